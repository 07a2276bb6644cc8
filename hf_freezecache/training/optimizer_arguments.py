"""The class and the arguments of an optimizer, which ``Trainer`` takes apart when it makes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["copied_arguments"]


def copied_arguments(asked: tuple[Any, dict[str, Any]] | None) -> tuple[Any, dict[str, Any]] | None:
    """Return ``optimizer_cls_and_kwargs`` for one optimizer to use up: it adds its defaults to groups, and takes frozen parameters out.

    Args:
        asked: What ``Trainer`` was given, or a copy of it. Iterators of parameters are at their end afterwards; the copy has lists.
    """
    if asked is None:
        return None
    kind, arguments = asked[0], dict(asked[1])
    if "params" in arguments:
        groups = _listed(arguments["params"])
        arguments["params"] = [_copied(one) for one in groups] if isinstance(groups, list) else groups
    return kind, arguments


def _copied(group: Any) -> Any:
    if not isinstance(group, dict):
        return group
    return {name: _listed(value) if name == "params" else value for name, value in group.items()}


def _listed(parameters: Any) -> Any:
    """Return what an optimizer takes for several parameters as a list; a tensor, and what it does not take, as it is."""
    if isinstance(parameters, (Tensor, Mapping, str, set, frozenset)) or not isinstance(parameters, Iterable):
        return parameters
    return list(parameters)
