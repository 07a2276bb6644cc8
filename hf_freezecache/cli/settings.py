"""Says in groups what can be set, which the help of ``HfArgumentParser`` cannot."""

from __future__ import annotations

import textwrap
from dataclasses import Field, fields
from typing import Any

from ..config import ADVANCED, CacheConfig, FreezeConfig

__all__ = ["settings_lines"]

_WIDTH = 100


def settings_lines() -> list[str]:
    """Return what ``hf-freezecache settings`` prints: each field with its default and its help, in three groups."""
    caching = fields(CacheConfig)
    groups = {
        "When to freeze: FreezeConfig": list(fields(FreezeConfig)),
        "Where and how to cache: CacheConfig": [field for field in caching if not _is_advanced(field)],
        "Advanced: CacheConfig": [field for field in caching if _is_advanced(field)],
    }
    lines = []
    for title, members in groups.items():
        lines += [title, *(line for field in members for line in _field_lines(field)), ""]
    return lines[:-1]


def _is_advanced(field: Field[Any]) -> bool:
    return str(field.metadata["help"]).startswith(ADVANCED)


def _field_lines(field: Field[Any]) -> list[str]:
    words = str(field.metadata["help"]).removeprefix(ADVANCED)
    return [
        f"  --{field.name}  (default: {field.default})",
        *textwrap.wrap(
            words[0].upper() + words[1:],
            _WIDTH,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
            break_on_hyphens=False,
        ),
    ]
