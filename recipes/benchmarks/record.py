"""What every benchmark record carries: configuration, versions, commit, machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hf-freezecache", "torch", "transformers", "accelerate", "datasets", "safetensors", "zstandard", "numpy")


def _processor_time() -> tuple[int, int]:
    """Return ticks in which processors were wanted, and those of them that the host gave to others; 0 where that is unknown."""
    stat = Path("/proc/stat")
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else [0] * 8
    _, _, _, idle, waiting, *_, stolen = ticks
    return sum(ticks) - idle - waiting, stolen


_BEGAN = _processor_time()


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and accelerator, and the share of wanted time that others took since the benchmark began."""
    wanted, stolen = (now - then for now, then in zip(_processor_time(), _BEGAN, strict=True))
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "stolen_share": round(stolen / wanted, 3) if wanted else 0.0,
    }


def commit() -> str:
    """Return the commit of the checkout, marked if there are uncommitted changes."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, smallest, largest and all values."""
    rounded = [round(value, 4) for value in values]
    return {
        "median": round(statistics.median(values), 4),
        "min": min(rounded),
        "max": max(rounded),
        "values": rounded,
    }


def _version(package: str) -> str | None:
    """Return the version of a package; ``None`` where it is not installed: a checkout can be run as it is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(path: Path, benchmark: str, config: dict[str, Any], results: dict[str, Any], quiet: bool = False) -> None:
    """Write a record, whole or not at all."""
    versions = {name: _version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    record = {
        "benchmark": benchmark,
        "config": config,
        "results": results,
        "versions": versions,
        "commit": commit(),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
    if not quiet:
        print(f"record: {path}")
