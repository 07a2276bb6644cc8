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


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and accelerator."""
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


def save(path: Path, benchmark: str, config: dict[str, Any], results: dict[str, Any], quiet: bool = False) -> None:
    """Write a record, whole or not at all."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
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
