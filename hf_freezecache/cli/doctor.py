"""What ``hf-freezecache doctor`` looks at: whether this machine and a folder of caches are fit for use."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FreezeCacheError
from ..report.text import size_words

__all__ = ["Finding", "examine"]

PACKAGE = "hf-freezecache"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        ok: Whether it is as it should be.
        words: What was found, and what to do if it is not as it should be.
    """

    name: str
    ok: bool
    words: str


def examine(folder: Path) -> Iterator[Finding]:
    """Look at versions, device, hooks of the installed transformers, and a folder of caches, which need not exist.

    Args:
        folder: Folder of caches, or where one would be made.

    Yields:
        What was found.
    """
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _versions()
    yield _device()
    yield _hooks()
    yield from _folder(folder)


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        needed = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(PACKAGE, False, f"is not installed, only found on the path. Install it: pip install {PACKAGE}.")
        return
    for line in needed:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, False, f"is missing. Install it: pip install '{requirement}'.")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(
            requirement.name,
            fits,
            version if fits else f"{version}, expected {requirement.specifier}. pip install '{requirement}'.",
        )


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        count, bf16 = torch.cuda.device_count(), torch.cuda.is_bf16_supported()
        return Finding("device", True, f"{count} x {torch.cuda.get_device_name()}, bf16: {'yes' if bf16 else 'no'}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("device", True, f"no CUDA; CPU, {cores} cores, {torch.get_num_threads()} threads")


def overridden(cls: type) -> list[str]:
    """Return the names of methods of a class that call the method of the same name further up."""
    functions = {name: inspect.unwrap(member) for name, member in vars(cls).items() if inspect.isfunction(member)}
    return sorted(name for name, function in functions.items() if {"super", name} <= set(function.__code__.co_names))


def _hooks() -> Finding:
    from ..trainer import FreezeCacheTrainer

    names, bases = overridden(FreezeCacheTrainer), FreezeCacheTrainer.__mro__[1:]
    missing = [name for name in names if not any(name in vars(base) for base in bases)]
    if missing:
        version = importlib.metadata.version("transformers")
        words = f"Trainer of transformers {version} has no {', '.join(missing)}: install a version that was tested."
        return Finding("hooks of Trainer", False, words)
    return Finding("hooks of Trainer", True, f"all {len(names)} that are relied on are there")


def _folder(folder: Path) -> Iterator[Finding]:
    from ..cache.lock import check_lockable

    name = str(folder)
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        yield Finding(name, False, f"{existing} is a file; a folder of caches is expected.")
        return
    free = size_words(shutil.disk_usage(existing).free)
    yield Finding(name, True, f"{free} free" + ("" if existing == folder else "; it does not exist yet"))
    yield _tried("writing and locks", existing, check_lockable, "work")
    if existing == folder:
        yield from _caches(folder)


def _tried(name: str, folder: Path, function: Callable[[Path], object], words: str) -> Finding:
    try:
        function(folder)
    except (OSError, FreezeCacheError) as error:
        return Finding(name, False, str(error))
    return Finding(name, True, words)


def _caches(folder: Path) -> Iterator[Finding]:
    from .prune import caches_of, others_in

    caches = caches_of(folder)
    others = others_in(folder, caches)
    whole = sum(cache.bytes for cache in caches)
    yield Finding("caches", True, f"{len(caches)}, {size_words(whole)}")
    for cache in caches:
        yield Finding(cache.path.name, cache.problem is None, cache.words)
    left = sum(cache.bytes for cache in caches if not cache.finished)
    if left:
        words = f"{size_words(left)} of unfinished builds: the runs that began them go on with them, or "
        yield Finding("could be deleted", True, f"{words}hf-freezecache prune {folder} --unfinished --yes")
    damaged = sum(cache.bytes for cache in caches if cache.problem is not None)
    if damaged:
        words = f"{size_words(damaged)} of caches that cannot be opened, see above: delete their folders"
        yield Finding("could be deleted", True, words)
    if others:
        files = (file for path in others for file in ([path] if path.is_file() else path.rglob("*")))
        size = sum(file.stat().st_size for file in files if file.is_file())
        names = ", ".join(path.name for path in others[:3]) + (", ..." if len(others) > 3 else "")
        yield Finding("no caches", True, f"{size_words(size)} of other files, which prune leaves alone: {names}")
