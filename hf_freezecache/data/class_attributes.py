"""The attributes of a class that count: not what follows from its source, and not what libraries keep there."""

from __future__ import annotations

import types
from typing import Any

from .code_values import is_drawn

__all__ = ["attributes_of"]

#: What the source of a class says already, or what Python keeps there for itself.
_NO_ATTRIBUTES = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__"),
    *("__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__abstractmethods__"),
    *("_abc_impl", "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__parameters__"),
    *("__orig_bases__", "__classdictcell__"),
    # What pydantic makes of fields and validators, or when the class is first used. The fields themselves count.
    *("__pydantic_core_schema__", "__pydantic_validator__", "__pydantic_serializer__", "__pydantic_complete__"),
    *("__pydantic_setattr_handlers__", "__pydantic_parent_namespace__", "__signature__"),
}
#: What the source of a class says, but none of its other attributes.
_IN_SOURCE = {"__pydantic_decorators__"}


def attributes_of(value: type, has_source: bool) -> dict[str, Any]:
    """Return the attributes of a class that count, by name.

    Args:
        value: The class.
        has_source: Whether the source of its module counts.
    """
    left_out = _NO_ATTRIBUTES | _IN_SOURCE if has_source else _NO_ATTRIBUTES
    attributes = {name: item for name, item in vars(value).items() if name not in left_out}
    if has_source:
        attributes = {name: item for name, item in attributes.items() if not is_drawn(item)}
    if _is_of_texts(attributes.get("__hash__")):
        del attributes["__hash__"]
    return attributes


def _is_of_texts(function: Any) -> bool:
    """Say whether a function is one that attrs writes, with a hash of texts inside: it differs from process to process."""
    return isinstance(function, types.FunctionType) and function.__code__.co_filename.startswith("<attrs generated")
