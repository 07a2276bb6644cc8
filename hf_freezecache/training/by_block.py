"""``torch_compile``: stages compile the blocks that train, where accelerate would compile the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["compile_settings", "compiling_by_block"]


def compile_settings(accelerator: Any) -> dict[str, Any] | None:
    """Return the keyword arguments of ``torch.compile`` that a run asks for, or ``None`` if it is not to compile.

    They come from ``torch_compile``, ``torch_compile_backend`` and ``torch_compile_mode`` of ``TrainingArguments``, or from
    ``accelerate launch --dynamo_backend``.

    Args:
        accelerator: accelerate's ``Accelerator``.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == _none(plugin):
        return None
    settings: dict[str, Any] = plugin.to_kwargs()
    # accelerate's own, which says how it would wrap modules.
    settings.pop("use_regional_compilation", None)
    return settings


@contextmanager
def compiling_by_block(accelerator: Any) -> Iterator[None]:
    """While active, accelerate compiles no model that it prepares."""
    plugin = accelerator.state.dynamo_plugin
    backend, plugin.backend = plugin.backend, _none(plugin)
    try:
        yield
    finally:
        plugin.backend = backend


def _none(plugin: Any) -> Any:
    """Return accelerate's word for no compiler."""
    return type(plugin.backend)("NO")
