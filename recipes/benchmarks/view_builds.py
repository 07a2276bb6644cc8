"""What it gains to read and decode each image once for all its views, when a cache is built.

    python recipes/benchmarks/view_builds.py --model DIR --data DIR --split-points 6,9 --sizes 336x224,500x375,2000x1500 --json FILE

Images are those of the data set, resized, with a camera's noise, as JPEG of quality 92. Each cache is built twice in each
round, in turn: ``together`` as builds are, and ``one_by_one``, where each view is read and decoded anew. Both must write the same
bytes. ``ready`` builds with hidden states that lie ready in place of the prefix: what is left when the device is far faster than
rendering. Seconds are of the processor, children included, so that other work on the machine counts little; ``wall`` is beside
them. With several workers, wall-clock is what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from record import save, spread
from torch.utils.data import default_collate
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_freezecache import split_model
from hf_freezecache.cache import rendering
from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import build_cache
from hf_freezecache.codecs import make_codec
from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.views import ViewDataset

SEED = 0


def resized(rows: datasets.Dataset, size: tuple[int, int]) -> datasets.Dataset:
    """Return the images as JPEG files of another size, in memory."""
    generator, files = np.random.default_rng(SEED), []
    for row in rows:
        pixels = np.asarray(row["image"].convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = pixels + generator.normal(0, 6, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        files.append({"image": {"bytes": file.getvalue(), "path": None}, "label": row["label"]})
    return datasets.Dataset.from_list(files, features=datasets.Features({**rows.features, "image": datasets.Image()}))


def processor_seconds() -> float:
    """Return the seconds that this process and the children that have ended have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(build: Callable[[Path], Any]) -> tuple[float, float, str]:
    """Build into a new folder; return seconds of the processor, of the wall clock, and a hash of all files."""
    folder = Path(tempfile.mkdtemp())
    try:
        before, started = processor_seconds(), time.perf_counter()
        directory = build(folder).directory
        seconds = processor_seconds() - before, time.perf_counter() - started
        found = hashlib.sha256()
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                found.update(path.read_bytes())
        return *seconds, found.hexdigest()
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def one_by_one(active: bool) -> Any:
    """Build views in turns of one."""
    usual = rendering.MOST_RENDERED_BYTES
    rendering.MOST_RENDERED_BYTES = 0 if active else usual
    try:
        yield
    finally:
        rendering.MOST_RENDERED_BYTES = usual


def compare(
    args: argparse.Namespace, views: ViewDataset, split_point: int, prefix: Callable[..., Any]
) -> dict[str, Any]:
    """Return seconds of both ways of building, and what the first saves of the second, round by round."""
    layout = ChunkLayout(len(views), 32, SEED)
    plan = CachePlan(
        Fingerprint({"benchmark": str(split_point)}),
        split_point,
        (3, 224, 224),
        args.views,
        layout,
        32,
        make_codec("lossless"),
    )

    def build(folder: Path) -> Any:
        settings = {"batch_size": args.batch_size, "num_workers": args.workers}
        return build_cache(folder, plan, views, CheckedCollator(default_collate), prefix, **settings)

    found: dict[str, list[tuple[float, float, str]]] = {"together": [], "one_by_one": []}
    for turn in range(args.rounds + 1):  # the first one warms up
        for arm in sorted(found, reverse=bool(turn % 2)):
            with one_by_one(arm == "one_by_one"):
                found[arm].append(measure(build))
    if len({digest for rounds in found.values() for _, _, digest in rounds}) != 1:
        raise AssertionError("the two ways of building write different bytes")
    result: dict[str, Any] = {}
    for place, clock in enumerate(("processor", "wall")):
        together, single = ([float(values[place]) for values in found[arm][1:]] for arm in ("together", "one_by_one"))
        result[clock] = {
            "together_seconds": spread(together),
            "one_by_one_seconds": spread(single),
            "saved": spread([1 - a / b for a, b in zip(together, single, strict=True)]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a pretrained ViT with an image processor")
    parser.add_argument("--data", required=True, help="folder with train*.parquet of columns image and label")
    parser.add_argument("--split-points", default="6", help="'ready' is added to them")
    parser.add_argument("--sizes", default="336x224,500x375,2000x1500")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="run the prefix under bf16 autocast")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageClassification.from_pretrained(args.model).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(args.model)
    files = {"train": str(Path(args.data) / "train*.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files)["train"].shuffle(seed=SEED).select(range(args.images))
    training = ImageTransform.from_processor(processor, train=True, scale=(0.35, 1.0))
    evaluation = ImageTransform.from_processor(processor, train=False)
    results: dict[str, Any] = {}
    for size in args.sizes.split(","):
        width, height = map(int, size.split("x"))
        views = ViewDataset(resized(rows, (width, height)), SEED, training, evaluation)
        for split_point in (*args.split_points.split(","), "ready"):
            split = split_model(model, 1 if split_point == "ready" else int(split_point))

            def prefix(pixel_values: torch.Tensor, split: Any = split) -> torch.Tensor:
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    return split.prefix(pixel_values.to(device))

            if split_point == "ready":
                states = prefix(torch.zeros(args.batch_size, 3, 224, 224)).cpu()

                def prefix(pixel_values: torch.Tensor, states: torch.Tensor = states) -> torch.Tensor:
                    return states[: len(pixel_values)]

            result = compare(args, views, 1 if split_point == "ready" else int(split_point), prefix)
            results[f"{size}, {split_point if split_point == 'ready' else f'k={split_point}'}"] = result
            saved = {clock: f"{part['saved']['median']:.1%}" for clock, part in result.items()}
            seconds = [result["processor"][arm]["median"] for arm in ("one_by_one_seconds", "together_seconds")]
            print(size, split_point, "processor seconds", seconds, "saved", saved, flush=True)
    config = {name: str(value) for name, value in vars(args).items() if name != "json"} | {"seed": SEED}
    # Names, not where they lie on this machine.
    config |= {"model": Path(args.model).name, "data": Path(args.data).name, "threads": str(torch.get_num_threads())}
    save(args.json, "view_builds", config, results)


if __name__ == "__main__":
    main()
