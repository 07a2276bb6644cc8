"""The names that a code object refers to."""

from __future__ import annotations

import dis
import functools
import importlib.util
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

__all__ = ["names_in", "variables_and_imports"]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of the functions and classes inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(4096)  # code is walked over several times
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """Return all names in a code object: of variables, attributes and modules."""
    return tuple(sorted({name for part in _codes(code) for name in part.co_names}))


@functools.lru_cache(4096)
def variables_and_imports(code: types.CodeType, package: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the global variables that code reads, and of the modules that it imports when it runs."""
    variables, imports = set(), set()
    for part in _codes(code):
        constants: list[Any] = []
        for step in dis.get_instructions(part):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                variables.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                level = next((each for each in constants[-2:] if isinstance(each, int)), 0)
                with suppress(ImportError):
                    imports.add(importlib.util.resolve_name("." * level + step.argval, package))
            elif step.opname.startswith("LOAD_"):
                constants.append(step.argval)
    return frozenset(variables), frozenset(imports)
