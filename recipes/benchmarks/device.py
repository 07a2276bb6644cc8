"""What a device makes of each way of training: images per second, host synchronisations in a step, and where the time goes.

    python recipes/benchmarks/device.py --model DIR --shapes deit-base vit-large --data DIR --json FILE
    python recipes/benchmarks/device.py --shapes deit-base --data DIR --splits 0.75 --codec lossless --seconds 60 --json FILE

The model of ``--model`` has its weights, those of ``--shapes`` random ones. Two parts for each of them and each split point:

* ``images_per_second``: the arms of ``epoch_cost.py`` in turns, several rounds, and ``lora_in_memory``: all blocks adapted, images in
  memory. ``limit`` is the suffix fed from memory, and ``cached`` reads each chunk from its file in each epoch.
* ``trainer``: ``Trainer`` and ``FreezeCacheTrainer``, live and cached, as users run them. ``synchronizations`` are the times in a step
  that the host waits for the device, as CUDA tells (``None`` elsewhere), and ``scalar_reads`` those in which it reads a number of any
  tensor, also of the optimizer's on the CPU;
  ``operations`` have the largest shares of the time of the device, or of the processor where there is no other. All steps lie in one epoch,
  if there are images enough, and each is counted from the end of the one before, so that fetching its batch is part of it.

The record is written after each split point: one that runs out of time holds what was reached. With ``--seconds`` nothing begins
after so many.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from accuracy_runs import with_lora
from epoch_cost import AUGMENT, SHAPES, Bench
from record import save, spread
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.model.probe import find_blocks

#: Steps of a trainer: to warm up, then to time, then to count in, then to profile.
WARM, TIMED, COUNTED, PROFILED = 3, 6, 2, 3
OPERATIONS = 12
#: An arm that is fast gets more steps, so that each sample takes a while.
MORE_STEPS = {"cached": 4, "limit": 4}


class LoraBench(Bench):
    """All blocks with adapters, which train with the head."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        super().__init__(args, 0, folder)
        self.model = with_lora(self.model).to(self.device)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)


class Watching(TrainerCallback):
    """Times some steps of a run, counts in others, and profiles others: fetching, forward, backward, clipping and the optimizer's step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.synchronizations: int | None = None
        self.profiler: Any = None
        self.seconds = self.profiled_seconds = 0.0
        self._stack = ExitStack()
        self._warned: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps, cuda = state.global_step, self.device.type == "cuda"
        if steps not in (WARM, WARM + TIMED, WARM + TIMED + COUNTED, WARM + TIMED + COUNTED + PROFILED):
            return
        if steps == WARM + TIMED + COUNTED and cuda:
            torch.cuda.set_sync_debug_mode("default")
            self.synchronizations = sum("synchronizing" in str(each.message) for each in self._warned)
            self._stack.close()
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if steps == WARM:
            self.seconds -= now
        elif steps == WARM + TIMED:
            self.seconds += now
            if cuda:
                self._warned = self._stack.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
        elif steps == WARM + TIMED + COUNTED:
            on_device = [ProfilerActivity.CUDA] if cuda else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *on_device])
            self.profiler.__enter__()
            self.profiled_seconds -= time.perf_counter()
        else:
            self.profiled_seconds += now
            self.profiler.__exit__(None, None, None)

    def found(self) -> dict[str, Any]:
        """Return what was counted and profiled, per step."""
        events = self.profiler.key_averages()
        by_host = [event for event in events if event.device_type == DeviceType.CPU]
        if self.device.type == "cuda":
            # Kernels are listed by themselves, and once more under the operations that started them.
            times = {event.key: event.self_device_time_total / 1e6 for event in by_host}
            kernels = [
                e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
            ]
            busy = sum(event.self_device_time_total for event in kernels) / 1e6
        else:
            times = {event.key: event.self_cpu_time_total / 1e6 for event in by_host}
            busy = sum(times.values())
        largest = sorted(times, key=lambda key: -times[key])[:OPERATIONS]
        reads = sum(event.count for event in events if event.key == "aten::_local_scalar_dense")
        return {
            "synchronizations": None if self.synchronizations is None else self.synchronizations / COUNTED,
            "scalar_reads": reads / PROFILED,
            "step_seconds": round(self.seconds / TIMED, 6),
            "busy_share": round(busy / self.profiled_seconds, 3),
            "operations": {key: round(times[key] / busy, 3) for key in largest if times[key] > 0},
        }


def train(args: argparse.Namespace, bench: Bench, arm: str, folder: str) -> dict[str, Any]:
    """Run a trainer for a few steps; return what was seen of them."""
    watching, cuda = Watching(bench.device), bench.device.type == "cuda"
    settings = TrainingArguments(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=args.batch_size,
        max_steps=WARM + TIMED + COUNTED + PROFILED,
        bf16=not args.fp32,
        use_cpu=not cuda,
        dataloader_num_workers=args.workers,
        learning_rate=1e-5,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    rows = bench.rows.with_transform(AUGMENT)
    common = {"model": bench.model, "args": settings, "train_dataset": rows, "callbacks": [watching]}
    trainer: Trainer
    if arm == "full":
        trainer = Trainer(**common)
    else:
        cache = CacheConfig(
            cache_dir=f"{folder}/caches",
            mode="always" if arm == "cached" else "never",
            codec=args.codec,
            transform_id="bench",
        )
        trainer = FreezeCacheTrainer(
            **common, freeze_config=FreezeConfig(schedule=f"0:{bench.split_point}"), cache_config=cache
        )
    trainer.train()
    return watching.found()


def measure(args: argparse.Namespace, split_point: int, folder: str, deadline: float) -> dict[str, Any]:
    """Measure one model at one split point."""
    frozen, full = Bench(args, split_point, folder), Bench(args, 0, folder)
    frozen.build(Path(folder))
    benches = {"full_in_memory": full, "frozen": frozen, "frozen_in_memory": frozen, "cached": frozen, "limit": frozen}
    try:
        benches["lora_in_memory"] = LoraBench(args, folder)
    except ImportError:
        print("lora_in_memory is left out: PEFT is not installed")
    fed = {"lora_in_memory": "full_in_memory", "cached": "cached_read"}
    streams = {arm: bench.batches(fed.get(arm, arm)) for arm, bench in benches.items()}
    rates: dict[str, list[float]] = {arm: [] for arm in benches}
    for arm, bench in benches.items():
        bench.rate(streams[arm], 2)  # warm up
    for turn in range(args.rounds):
        if rates["cached"] and time.monotonic() > deadline:
            break
        order = list(benches)
        for arm in order[turn % len(order) :] + order[: turn % len(order)]:
            rates[arm].append(benches[arm].rate(streams[arm], args.steps * MORE_STEPS.get(arm, 1)))
    pairs = zip(rates["cached"], rates["limit"], strict=True)
    result: dict[str, Any] = {
        "images_per_second": {arm: spread(values) for arm, values in rates.items()},
        "cached/limit": spread([cached / limit for cached, limit in pairs]),
        "codec": frozen.codecs.base.to_dict(),
        "trainer": {},
    }
    del streams, benches
    for arm in ("full", "frozen", "cached"):
        if time.monotonic() < deadline:
            result["trainer"][arm] = train(args, full if arm == "full" else frozen, arm, folder)
    if "cached" in result["trainer"]:
        rate = args.batch_size / result["trainer"]["cached"]["step_seconds"]
        result["trainer_cached/limit"] = round(rate / result["images_per_second"]["limit"]["median"], 4)
    return result


def shown(name: str, found: dict[str, Any]) -> str:
    rates = {arm: round(values["median"], 1) for arm, values in found["images_per_second"].items()}
    lines = [f"{name}: images/s {rates}, cached/limit {found['cached/limit']['median']:.3f}"]
    if "trainer_cached/limit" in found:
        lines.append(f"{name}: the trainer's cached images/s are {found['trainer_cached/limit']:.3f} of the limit")
    for arm, one in found["trainer"].items():
        largest = ", ".join(f"{key} {share:.0%}" for key, share in list(one["operations"].items())[:3])
        lines.append(
            f"{name} {arm}: {one['synchronizations']} synchronizations and {one['scalar_reads']:g} scalar reads a step, "
            f"{one['step_seconds'] * 1e3:.1f} ms, busy {one['busy_share']:.0%}: {largest}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a pretrained ViT-like classifier")
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=[], help="DeiTs with random weights")
    parser.add_argument("--data", required=True, help="folder with train*.parquet of columns image and label")
    parser.add_argument("--splits", type=float, nargs="+", default=[0.75, 0.92, 0.5], help="shares of frozen blocks")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="steps per arm and round")
    parser.add_argument("--workers", type=int, default=0, help="processes that render, threads that read caches")
    parser.add_argument("--codec", default="auto", help="name of a codec, or auto")
    parser.add_argument("--fp32", action="store_true", help="train without bf16 autocast")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    datasets.disable_progress_bars()
    subjects = [(Path(args.model).name, args.model, None)] if args.model else []
    subjects += [(shape, None, shape) for shape in args.shapes]
    config = {name: str(value) for name, value in vars(args).items() if name not in ("json", "model", "data")}
    config |= {"model": Path(args.model).name if args.model else None, "data": Path(args.data).name}
    args.token_keep, args.views = 1.0, 1
    results: dict[str, Any] = {}
    # All models first at the first split point: what is reached says something of each.
    for share, (name, model, shape) in itertools.product(args.splits, subjects):
        args.model, args.shape = model, shape
        if time.monotonic() > deadline:
            break
        with tempfile.TemporaryDirectory() as folder:
            blocks = len(find_blocks(Bench(args, 0, folder).model)[1])
            key = f"{name} k={min(max(round(share * blocks), 1), blocks - 1)}"
            if key in results:
                continue
            results[key] = measure(args, int(key.partition("k=")[2]), folder, deadline)
        print(shown(key, results[key]), flush=True)
        save(args.json, "device", config, results, quiet=True)


if __name__ == "__main__":
    main()
