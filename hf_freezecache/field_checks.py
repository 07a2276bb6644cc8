"""Checks the fields of a dataclass by their types, and by functions beside these in ``Annotated``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias, TypedDict, TypeVar, get_args, get_type_hints

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from .errors import UnsupportedSetupError

__all__ = ["Schema", "Schemas", "above", "at_least", "between", "check_values", "documented", "schema_of"]

#: Type of each field by its name, and the same as a ``TypedDict``.
Schema: TypeAlias = tuple[dict[str, Any], Any]
Schemas: TypeAlias = Mapping[Any, Schema]

_Config = TypeVar("_Config", bound=type)


def documented(config: _Config) -> _Config:
    """Append the help of each field to the docstring, so that ``help()`` and the command line say the same."""
    lines = [f"    {setting.name}: {setting.metadata['help']}" for setting in fields(config)]
    config.__doc__ = "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Attributes:", *lines])
    return config


def between(least: float, most: float, *, above: bool = False) -> Callable[[Any], None]:
    """Return a check of a number that may be ``None``. With ``above``, ``least`` itself is refused."""
    interval = f"{'above' if above else 'of at least'} {least}{'' if most == float('inf') else f' and at most {most}'}"

    def check(value: Any) -> None:
        if value is not None and (not least <= value <= most or value == float("inf") or (above and value == least)):
            raise ValueError(f"expected a number {interval}, got {value!r}")

    return check


at_least = functools.partial(between, most=float("inf"))
above = functools.partial(between, most=float("inf"), above=True)


def check_values(config: Any, schemas: Schemas) -> None:
    """Check every field of a config by its type and by the check beside it. Whole numbers become floats where floats are meant.

    Args:
        config: An instance of one of the classes.
        schemas: What ``schema_of`` returned of each class.

    Raises:
        UnsupportedSetupError: The message names the field, what was found and what was expected.
    """
    types, schema = next(found for kind, found in schemas.items() if isinstance(config, kind))
    for name, hint in types.items():
        value = getattr(config, name)
        known = _types_in(hint)
        if type(value) is int and float in known and int not in known:
            setattr(config, name, float(value))
        if type(value) is bool and int in known and bool not in known:  # not every version of the library refuses it
            raise UnsupportedSetupError(
                f"{type(config).__name__}: field '{name}' expected int, got bool (value: {value})."
            )
    try:
        validate_typed_dict(schema, vars(config))
    except StrictDataclassFieldValidationError as error:
        raise UnsupportedSetupError(f"{type(config).__name__}: {' '.join(str(error).split())}.") from error


def _types_in(hint: Any) -> list[Any]:
    """Return the types that a hint names."""
    return [hint, *get_args(hint), *(part for each in get_args(hint) for part in get_args(each))]


def schema_of(config: type) -> Schema:
    """Return what the fields of a dataclass are checked by. Names that are arguments only, as ``InitVar``, are left out.

    Args:
        config: The class. A field's type is its hint, or has one: ``hint``, for a type that is there to parse a command line.
    """
    hints = get_type_hints(config, include_extras=True)
    types = {one.name: getattr(hints[one.name], "hint", hints[one.name]) for one in fields(config)}
    return types, TypedDict(f"_{config.__name__}", types)  # type: ignore[operator]
