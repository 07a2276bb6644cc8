"""Where code comes from: the standard library and installed packages, the user's own project, or a script."""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
from pathlib import Path
from typing import Any

__all__ = ["INSTALLED", "PROJECT", "SCRIPT", "is_importable", "origin_of", "source_hash"]

#: Installed code changes with its version only. A project's module has a file. A script or notebook has no name to import.
INSTALLED, PROJECT, SCRIPT = "installed", "project", "script"
#: Transforms of this package carry a revision of their own.
_THIS_PACKAGE = __name__.partition(".")[0]


@functools.cache
def _library_folders() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({Path(sysconfig.get_path(name)).resolve() for name in names})


def _file_of(module: str) -> Path | None:
    path = getattr(sys.modules.get(module), "__file__", None)
    return None if path is None else Path(path)


def origin_of(module: str) -> str:
    """Return where the code of a module comes from.

    Args:
        module: Its name, as in ``__module__``.
    """
    top = module.partition(".")[0]
    if top in ("__main__", "__mp_main__", ""):
        return SCRIPT
    if top == _THIS_PACKAGE or top in sys.stdlib_module_names:
        return INSTALLED
    if module not in sys.modules:
        return SCRIPT
    path = _file_of(module)
    if path is None:
        return INSTALLED if getattr(sys.modules[module], "__spec__", None) is not None else SCRIPT
    return _origin_of_file(path)


@functools.cache
def _origin_of_file(path: Path) -> str:
    if {"site-packages", "dist-packages"} & set(path.parts):
        return INSTALLED
    path = path.resolve()
    return INSTALLED if any(folder in path.parents for folder in _library_folders()) else PROJECT


def source_hash(module: str) -> str:
    """Return the SHA-256 of the file of a module of the user's own project; empty for other modules.

    Args:
        module: Its name, as in ``__module__``.
    """
    path = _file_of(module)
    if origin_of(module) != PROJECT or path is None or not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_importable(value: Any) -> bool:
    """Say whether a function or class is what its module has under its name."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in value.__qualname__.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return found is value
