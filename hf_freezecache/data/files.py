"""Files that data or code name: what can be told of them without reading them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["is_data_file", "looks_like_a_file", "stamp"]

#: Names of files that hold images, arrays and tables. Logs, scripts and archives are none of them.
_DATA_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"),
    *(".jp2", ".avif", ".heic", ".dcm", ".nii", ".mha", ".icc", ".icm", ".cube", ".npy", ".npz", ".pt", ".pth", ".bin"),
    *(".safetensors", ".h5", ".hdf5", ".mat", ".pkl", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".toml"),
    ".parquet",
}
#: A path is not longer, and no file name of any system holds these.
_LONGEST, _NEVER = 4096, ("\n", "\0")


def _local(text: str) -> str:
    """Return the local part of a path: without ``file://``, and of ``zip://member::archive`` the archive."""
    return text.rpartition("::")[2].removeprefix("file://")


def stamp(text: str) -> str | None:
    """Return the size in bytes and the time of the last change of a file, or of each file of a folder; ``None`` without one.

    Args:
        text: A path, absolute or relative to the working directory.
    """
    try:
        path = Path(_local(text))
        if not path.is_dir():
            status = path.stat()
            return f"{status.st_size} {status.st_mtime_ns};"
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        return "".join(f"{entry.name} {entry.stat().st_size} {entry.stat().st_mtime_ns};" for entry in entries)
    except (OSError, ValueError):
        return None


def looks_like_a_file(text: str) -> bool:
    """Say whether a text may be meant as the name of a file of data, whether or not there is one."""
    if not 0 < len(text) <= _LONGEST or any(sign in text for sign in _NEVER):
        return False
    return "://" in text or Path(text).suffix.lower() in _DATA_SUFFIXES


def is_data_file(text: str) -> bool:
    """Say whether a text names an existing file of images, arrays or a table."""
    return looks_like_a_file(text) and Path(_local(text)).is_file()
