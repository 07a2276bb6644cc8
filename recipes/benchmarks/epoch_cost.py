"""What an image costs in training: full, frozen without cache, cached, and the limit of a cache.

    python recipes/benchmarks/epoch_cost.py --model DIR --data DIR --split-points 3,6,9,11 --json FILE
    python recipes/benchmarks/epoch_cost.py --shape deit-base --data DIR --split-points 6,9,11 --json FILE
    python recipes/benchmarks/epoch_cost.py --model DIR --data DIR --split-points 6,9 --token-keep 0.5 --json FILE
    python recipes/benchmarks/epoch_cost.py --model DIR --data DIR --codec auto --views 4 --json FILE

All arms run in one process, in turn, several rounds; figures are medians of images/s over rounds, and ratios are taken
round by round. ``limit`` feeds the same suffix with batches of hidden states that lie in memory, of the accelerator if there is one; ``decode`` only reads the
cache, through its sampler, and restores hidden states. ``cached`` and ``decode`` keep decoded chunks in memory, as training does by default up to
``memory_gb``, and have read all views once before; ``cached_read`` and ``decode_read`` read each chunk from its file in each epoch, as of caches
far larger than that, with files that the system keeps in memory. These arms take turns step by step, and their ratios are taken over windows
of chunks, since the machine's speed drifts within seconds; where threads read ahead, they take turns by several windows. ``full`` and ``frozen`` are measured
twice: with images rendered live, as in training, and (``..._in_memory``) with rendered images in memory, which leaves
the image pipeline out; it is the accelerator's memory, too. With ``--token-keep``, ``cached_kept`` is ``cached`` with that share of the patch tokens, and its ratio to
``cached`` is what fewer tokens gain. Peak memory of each arm is that of a process of its own. Building is compared with rendering
the same views and running the bare prefix on them, each measured before and after; calibrating is not part of it. Lossy codecs are
those that ``FreezeCacheTrainer`` chooses for these rows and views. The record is written after each split point.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from record import save, spread
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import CacheConfig, CachedDataset, FreezeCacheTrainer, FreezeConfig, split_model
from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.rendering import ViewRenderer
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import build_cache
from hf_freezecache.codecs import ViewCodec, make_codec
from hf_freezecache.codecs.array_names import KEPT, is_packed
from hf_freezecache.data.collators import CheckedCollator, collate_cached, split_packed
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.kept_tokens import EpochKeys, TokenSubset
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.data.views import ViewDataset
from hf_freezecache.model.freeze import freeze
from hf_freezecache.model.tokens import token_grid

SHAPES = {  # width, heads, blocks; patches of 16 pixels
    "deit-tiny": (192, 3, 12),
    "deit-small": (384, 6, 12),
    "deit-base": (768, 12, 12),
    "vit-large": (1024, 16, 24),
    "mini": (16, 2, 2),  # to try a script
}
SEED = 0
#: Arms that read a cache. They and ``limit`` are fast.
READING = ("cached", "cached_read", "cached_kept", "decode", "decode_read")
#: So many windows the fast arms train on in each round, of so many chunks of so many rows.
WINDOWS, WINDOW, CHUNK = 6, 8, 32
#: Random resized crop and flip to 224 pixels, and the whole image.
AUGMENT, PLAIN = (
    ImageTransform(size=224, train=train, scale=(0.35, 1.0), mean=[0.5] * 3, std=[0.5] * 3) for train in (True, False)
)


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


class Bench:
    """One split point: the model, the data and the arms."""

    def __init__(self, args: argparse.Namespace, split_point: int, folder: str) -> None:
        set_seed(SEED)
        self.args, self.split_point, self.folder = args, split_point, Path(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if args.model:
            model = AutoModelForImageClassification.from_pretrained(args.model)
        else:
            width, heads, blocks = SHAPES[args.shape]
            sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": blocks}
            model = DeiTForImageClassification(DeiTConfig(**sizes, intermediate_size=4 * width, num_labels=1000))
        self.model = model.to(self.device)
        files = {"train": str(Path(args.data) / "train*.parquet")}
        rows = datasets.load_dataset("parquet", data_files=files)["train"].shuffle(seed=SEED)
        rows = rows.select(np.arange(args.images) % len(rows))  # some come again where there are too few
        self.rows, self.views = rows, ViewDataset(rows, SEED, AUGMENT, PLAIN)
        self.layout = ChunkLayout(len(rows), CHUNK, SEED)
        self.split = split_model(self.model, split_point)
        if split_point:
            freeze(self.split)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not self.args.fp32)

    def prefix(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad(), self.autocast():
            return self.split.prefix(pixel_values.to(self.device))

    def plan(self) -> CachePlan:
        identity, codecs = Fingerprint({"benchmark": f"{self.split_point}"}), self.codecs
        shape, views = (3, 224, 224), self.args.views
        return CachePlan(identity, self.split_point, shape, views, self.layout, 32, codecs.base, copies=codecs.copies)

    @functools.cached_property
    def codecs(self) -> ViewCodec:
        """The codecs of all views; lossy ones are fitted and calibrated."""
        codec = make_codec("transform" if self.args.codec == "auto" else self.args.codec)
        if codec.lossless:
            return ViewCodec(codec)
        with tempfile.TemporaryDirectory() as folder:
            trainer = FreezeCacheTrainer(
                copy.deepcopy(self.model),
                TrainingArguments(
                    f"{folder}/out",
                    per_device_train_batch_size=self.args.batch_size,
                    bf16=not self.args.fp32,
                    use_cpu=self.device.type == "cpu",
                    remove_unused_columns=False,
                    report_to="none",
                    disable_tqdm=True,
                ),
                data_collator=collate,
                train_dataset=self.rows,
                train_transform=AUGMENT,
                eval_transform=PLAIN,
                freeze_config=FreezeConfig(schedule=f"0:{self.split_point}"),
                cache_config=CacheConfig(
                    cache_dir=f"{folder}/caches", codec=self.args.codec, num_views=self.args.views, chunk_size=CHUNK
                ),
            )
            return trainer.build_cache(self.split_point).reader.views

    def build(self, folder: Path) -> Any:
        views, collator = self.views, CheckedCollator(collate)
        if self.codecs.copies is not None:
            views, collator = views.with_geometry(), collator.with_geometry()
        settings = {"batch_size": self.args.batch_size, "num_workers": self.args.workers}
        return build_cache(folder, self.plan(), views, collator, self.prefix, **settings)

    def sampler(self) -> ChunkSampler:
        """Return the order of an arm: each is in an epoch of its own."""
        return ChunkSampler([self.layout], SEED, SEED, self.args.views, WINDOW)

    def endless(
        self,
        dataset: Any,
        collator: Callable[..., Any],
        sampler: ChunkSampler,
        with_epochs: bool = False,
        workers: int | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        loader = DataLoader(
            dataset,
            self.args.batch_size,
            sampler=EpochKeys(sampler) if with_epochs else sampler,
            collate_fn=collator,
            num_workers=self.args.workers if workers is None else workers,
            drop_last=True,
            pin_memory=self.device.type == "cuda",
        )
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from loader

    def batches(self, arm: str) -> Iterator[dict[str, torch.Tensor]]:
        """Return the arm's endless stream of batches."""
        if arm in ("full", "frozen"):
            return self.endless(self.views, collate, self.sampler())
        if arm in READING:
            reader = CacheReader(next(self.folder.glob(f"k{self.split_point:02d}-*")))
            self.stored = reader.views
            tokens = None
            if arm == "cached_kept":
                prefix, (height, width) = token_grid(reader.index.hidden_shape[0], (3, 224, 224), self.model.config)
                tokens = TokenSubset(SEED, prefix, height * width, self.args.token_keep)
            held = 0 if arm.endswith("_read") else int(CacheConfig.memory_gb * 1e9)
            dataset = CachedDataset(
                reader, WINDOW + min(self.args.batch_size, WINDOW), packed=True, tokens=tokens, held_bytes=held
            )
            # As in training: threads read ahead in place of workers, one beside an accelerator; or as many as steps have, within a window.
            threads, sampler = self.args.workers or int(self.device.type != "cpu"), self.sampler()
            at_once = torch.get_num_threads()
            dataset.read_ahead(sampler, threads=threads or at_once * (at_once > 1), within_window=not threads)
            return self.endless(dataset, collate_cached, sampler, tokens is not None, workers=0)
        kept = [self.moved(b) for b in itertools.islice(self.batches("cached" if arm == "limit" else "full"), 4)]
        if arm == "limit":
            kept = [{"hidden_states": self.dequantize(batch), "labels": batch["labels"]} for batch in kept]
        return itertools.cycle(kept)

    def dequantize(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        packed, _ = split_packed(batch)
        positions, compute_dtype = packed.pop(KEPT, None), None if self.args.fp32 else torch.bfloat16
        with torch.no_grad():
            return self.stored.dequantize(packed, torch.float32, compute_dtype, positions)

    def moved(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch on the device."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Train on one batch."""
        self.model.train()
        batch = self.moved(batch)
        labels, hidden_states = batch["labels"], batch.get("hidden_states")
        if any(is_packed(name) for name in batch):
            hidden_states = self.dequantize(batch)
        with self.autocast():
            if hidden_states is None:
                loss = self.model(pixel_values=batch["pixel_values"], labels=labels).loss
            else:
                loss = self.split.suffix(hidden_states, labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(self, batches: Iterator[dict[str, torch.Tensor]], steps: int, train: bool = True) -> float:
        """Train for some steps, or only read and restore their hidden states; return images/s."""
        self.finish()
        started = time.perf_counter()
        for batch in itertools.islice(batches, steps):
            if train:
                self.step(batch)
            else:
                self.dequantize(self.moved(batch))
        self.finish()
        return steps * self.args.batch_size / (time.perf_counter() - started)

    def render(self) -> float:
        """Render all views, of each row one after the other, as a build does; return seconds."""
        started = time.perf_counter()
        renderer = ViewRenderer(
            self.views, CheckedCollator(collate), self.plan(), self.args.batch_size, self.args.workers
        )
        units = list(itertools.product(range(self.args.views), range(self.plan().num_shards)))
        for _ in renderer.render(renderer.together(sorted(units, key=lambda unit: unit[::-1]))):
            pass
        return time.perf_counter() - started

    def run_prefix(self) -> float:
        """Run the bare prefix on as many images as a build does; return seconds."""
        batch = next(self.batches("full"))["pixel_values"]
        self.prefix(batch)
        self.finish()
        started = time.perf_counter()
        for _ in range(self.args.views * len(self.views) // self.args.batch_size):
            self.prefix(batch).to("cpu")
        return time.perf_counter() - started


def peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory.

    Linux hands ``ru_maxrss`` of the parent down to a spawned child, so there it is read from ``/proc``.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(args: argparse.Namespace, split_point: int, folder: str, arm: str, queue: Any) -> None:
    """Train a few steps in a process of its own; report its peak memory."""
    torch.set_num_threads(args.threads)
    bench = Bench(args, 0 if arm == "full" else split_point, folder)
    bench.rate(bench.batches(arm), min(24, args.images // args.batch_size))
    queue.put(torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else peak_resident_bytes())


def measure_memory(args: argparse.Namespace, split_point: int, folder: str, arm: str) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(args, split_point, folder, arm, queue))
    process.start()
    peak = queue.get()
    process.join()
    return int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or name of a pretrained ViT-like classifier")
    source.add_argument("--shape", choices=sorted(SHAPES), help="a DeiT of this size with random weights")
    parser.add_argument("--data", required=True, help="folder with train*.parquet of columns image and label")
    parser.add_argument("--split-points", default="3,6,9,11")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of a slow arm in a round")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--views", type=int, default=1, help="stored views of each image")
    parser.add_argument("--codec", default="lossless", help="name of a codec, or auto")
    parser.add_argument(
        "--token-keep", type=float, default=1.0, help="share of the patch tokens of the arm cached_kept"
    )
    parser.add_argument("--fp32", action="store_true", help="train without bf16 autocast")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    datasets.disable_progress_bars()
    results: dict[str, Any] = {}
    config = {name: str(value) for name, value in vars(args).items() if name != "json"} | {"seed": SEED}
    # Names, not where they lie on this machine.
    config |= {name: Path(value).name for name, value in (("model", args.model), ("data", args.data)) if value}
    for split_point in map(int, args.split_points.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            results[f"k={split_point}"] = measure(args, split_point, folder)
        save(args.json, "epoch_cost", config, results)


def _from(arms: list[str], first: int) -> list[str]:
    """Return the arms, beginning with another one."""
    return arms[first % len(arms) :] + arms[: first % len(arms)]


def measure(args: argparse.Namespace, split_point: int, folder: str) -> dict[str, Any]:
    frozen, full = Bench(args, split_point, folder), Bench(args, 0, folder)
    _ = frozen.codecs  # chosen before anything is timed
    builds: list[tuple[float, float, float]] = []
    # Rendering and prefix before and after each build: the machine's speed drifts.
    around = [(frozen.render(), frozen.run_prefix())]
    for turn in range(args.rounds):
        into = folder if turn == 0 else tempfile.mkdtemp(dir=folder)
        seconds = frozen.build(Path(into)).seconds
        around.append((frozen.render(), frozen.run_prefix()))
        (render, prefix), (render_after, prefix_after) = around[-2:]
        builds.append((seconds, (render + render_after) / 2, (prefix + prefix_after) / 2))
    benches = {
        "full": full,
        "full_in_memory": full,
        "frozen": frozen,
        "frozen_in_memory": frozen,
        "cached": frozen,
        "cached_read": frozen,
        "limit": frozen,
        "decode": frozen,
        "decode_read": frozen,
    }
    if args.token_keep < 1:
        benches["cached_kept"] = frozen
    streams = {arm: bench.batches(arm) for arm, bench in benches.items()}
    rates: dict[str, list[float]] = {arm: [] for arm in benches}
    # Whoever keeps chunks in memory has read all views of all of them once before.
    whole = args.views * len(frozen.views) // args.batch_size
    for arm, bench in benches.items():
        bench.rate(streams[arm], whole if arm in READING else 2, not arm.startswith("decode"))
    fast = [arm for arm in benches if arm in (*READING, "limit")]
    slow = [arm for arm in benches if arm not in fast]
    steps = max(min(WINDOW * CHUNK, len(frozen.views)) // args.batch_size, 1)
    # Threads that read ahead for one arm would do so beside the next.
    ahead = args.workers or frozen.device.type != "cpu"
    samples, turns, at_once = (1, 1, steps * WINDOWS) if ahead else (WINDOWS, steps, 1)
    windows: dict[str, list[float]] = {arm: [] for arm in fast}
    for turn in range(args.rounds):
        for arm in _from(slow, turn):
            rates[arm].append(benches[arm].rate(streams[arm], args.steps))
        for _ in range(samples):
            parts: dict[str, list[float]] = {arm: [] for arm in fast}
            for part in range(turns):
                for arm in _from(fast, turn + part):
                    parts[arm].append(benches[arm].rate(streams[arm], at_once, not arm.startswith("decode")))
            for arm, found in parts.items():
                windows[arm].append(statistics.harmonic_mean(found))  # equally many images in each part
    for arm, found in windows.items():
        rates[arm] = [statistics.median(found[start : start + samples]) for start in range(0, len(found), samples)]

    def ratio(a: str, b: str) -> dict[str, Any]:
        values = windows if a in windows and b in windows else rates
        return spread([x / y for x, y in zip(values[a], values[b], strict=True)])

    ratios = {
        f"{a}/{b}": ratio(a, b)
        for a, b in [
            ("cached", "limit"),
            ("cached_read", "limit"),
            ("decode", "limit"),
            ("decode_read", "limit"),
            ("cached", "frozen"),
            ("cached", "frozen_in_memory"),
            ("cached", "full"),
            ("cached", "full_in_memory"),
            ("cached_kept", "cached"),
        ]
        if a in rates
    }
    result: dict[str, Any] = {
        "images_per_second": {arm: spread(values) for arm, values in rates.items()},
        "ratios": ratios,
        "build_seconds": spread([build for build, _, _ in builds]),
        "render_seconds": spread([render for _, render, _ in builds]),
        "prefix_seconds": spread([prefix for _, _, prefix in builds]),
        "codec": frozen.codecs.base.to_dict(),
        "copies": None if frozen.codecs.copies is None else frozen.codecs.copies.to_dict(),
        "build_ratio": spread([build / (render + prefix) for build, render, prefix in builds]),
        "cache_bytes_per_image": sum(
            path.stat().st_size for path in (Path(folder) / frozen.plan().name).rglob("*") if path.is_file()
        )
        / (args.images * args.views),
    }
    label = f"k={split_point}:"
    print(label, "images/s", {arm: round(statistics.median(values), 1) for arm, values in rates.items()})
    for name, value in ratios.items():
        print(label, name, f"{value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})")
    value = result["build_ratio"]
    print(label, f"build/(render+prefix) {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})")
    print(label, f"cache {result['cache_bytes_per_image'] / 1024:.1f} KiB per image")
    if not args.no_memory:
        del frozen, full, streams, benches
        memory = partial(measure_memory, args, split_point, folder)
        result["peak_memory_bytes"] = {arm: memory(arm) for arm in ("full", "frozen", "cached")}
        print(label, "peak MiB", {arm: round(peak / 2**20) for arm, peak in result["peak_memory_bytes"].items()})
    return result


if __name__ == "__main__":
    main()
