"""The class and the arguments of an optimizer, which ``Trainer`` takes apart when it makes one."""

from __future__ import annotations

from typing import Any

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
        if isinstance(groups, list):
            groups = [{**one, "params": _listed(one.get("params"))} if isinstance(one, dict) else one for one in groups]
        arguments["params"] = groups
    return kind, arguments


def _listed(parameters: Any) -> Any:
    return list(parameters) if isinstance(parameters, list) or hasattr(parameters, "__next__") else parameters
