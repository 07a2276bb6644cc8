"""What do a million rows cost before the first batch? Memory and time of opening, sampling and resuming.

    python recipes/benchmarks/scale.py --rows 1000000 --json recipes/benchmarks/results/scale.json

Builds two caches of so many rows, with tiny hidden states of noise, the second with sixteen times the bytes of the first;
then, each in a fresh process, ``--repeats`` times: opens the cache, makes the sampler, draws the keys of an epoch, and reads the
first batch of a run that is resumed in the middle of an epoch, through accelerate's loader. Reports seconds, and the memory
that each step adds to the process after imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from made_up import SEED, build
from record import save, spread
from torch.utils.data import DataLoader

from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.codecs import make_codec
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.dataset import CachedDataset

BATCH, WINDOW, TOKENS = 256, 8, 2
WIDTHS = (4, 64)


def measure(directory: Path) -> dict[str, float]:
    """Open, sample and resume in this process."""
    from accelerate import Accelerator, skip_first_batches

    accelerator = Accelerator(cpu=True)
    process = psutil.Process()
    found: dict[str, float] = {}
    base = process.memory_info().rss

    def step(name: str, began: float) -> None:
        found[f"{name}_seconds"] = time.perf_counter() - began
        found[f"{name}_mib"] = (process.memory_info().rss - base) / 2**20

    began = time.perf_counter()
    dataset = CachedDataset(CacheReader(directory), max_chunks=2 * WINDOW)
    step("open", began)
    began = time.perf_counter()
    sampler = ChunkSampler([dataset.reader.layout], SEED, SEED, 1, WINDOW)
    assert len(sampler) == len(dataset)
    step("sampler", began)
    began = time.perf_counter()
    drawn = sum(1 for _ in sampler)
    assert drawn == len(dataset)
    step("epoch_of_keys", began)
    began = time.perf_counter()
    loader = accelerator.prepare(DataLoader(dataset, batch_size=BATCH, sampler=sampler, collate_fn=collate_cached))
    half = len(loader) // 2
    batch = next(iter(skip_first_batches(loader, half)))
    assert len(batch["labels"]) == BATCH
    step("resume", began)
    found["peak_mib"] = found["resume_mib"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for width in WIDTHS:
            began = time.perf_counter()
            noise = torch.randn(1 << 16, TOKENS, width, generator=torch.Generator().manual_seed(SEED))
            folders[width] = build(Path(name), arguments.rows, noise, make_codec("lossless"))
            seconds = time.perf_counter() - began
            total = load_index(folders[width]).total_bytes
            results[str(width)] = {"cache_bytes": total, "build_seconds": round(seconds, 1)}
        samples: dict[int, list[dict[str, float]]] = {width: [] for width in WIDTHS}
        for _ in range(arguments.repeats):
            for width in WIDTHS:
                command = [sys.executable, __file__, "--measure", str(folders[width])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                samples[width].append(json.loads(done.stdout.splitlines()[-1]))
    for width, found in samples.items():
        own = results[str(width)]
        own |= {key: spread([one[key] for one in found]) for key in found[0]}
        print(
            f"{arguments.rows:,} rows, {own['cache_bytes'] / 2**20:,.0f} MiB: open {own['open_seconds']['median']:.2f} s, sampler "
            f"{own['sampler_seconds']['median'] * 1e3:.2f} ms, keys of an epoch {own['epoch_of_keys_seconds']['median']:.2f} s, "
            f"resume in the middle {own['resume_seconds']['median']:.2f} s, {own['peak_mib']['median']:.0f} MiB of memory"
        )
    small, large = (results[str(width)] for width in WIDTHS)
    results["growth"] = {
        "bytes": round(large["cache_bytes"] / small["cache_bytes"], 2),
        "memory": round(large["peak_mib"]["median"] / small["peak_mib"]["median"], 2),
        "resume": round(large["resume_seconds"]["median"] / small["resume_seconds"]["median"], 2),
    }
    print(f"with {results['growth']['bytes']} times the bytes: {results['growth']}")
    if arguments.json is not None:
        config = {
            "rows": arguments.rows,
            "repeats": arguments.repeats,
            "batch": BATCH,
            "window": WINDOW,
            "widths": WIDTHS,
        }
        save(arguments.json, "scale", config, results)


if __name__ == "__main__":
    main()
