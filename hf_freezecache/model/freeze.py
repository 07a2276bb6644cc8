"""Freezes the prefix: no gradients, eval mode whatever ``model.train()`` says, no optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedSetupError
from .split import Split

__all__ = ["Frozen", "check_checkpointing", "freeze", "prune_optimizer", "restore_groups"]


def _stay_in_eval(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook. ``Trainer`` calls ``model.train()`` in every step; a frozen module must not follow."""
    if module.training:
        module.eval()


@dataclass(frozen=True)
class Frozen:
    """What one call of ``freeze`` changed.

    Attributes:
        parameters: Parameters that required gradients before.
        handles: Hooks that were added.
    """

    parameters: tuple[nn.Parameter, ...]
    handles: tuple[RemovableHandle, ...]

    def thaw(self) -> None:
        """Undo it. Modules stay in eval mode until the next ``model.train()``."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for handle in self.handles:
            handle.remove()


def freeze(split: Split) -> Frozen:
    """Freeze the prefix of a split model. Repeating it, or freezing a deeper prefix later, is fine.

    Parameters stop requiring gradients and lose the ones they have. Modules get a hook that puts them back into eval
    mode before each forward, so that dropout, drop-path and jittered position codes stay off.

    Returns:
        What was changed by this call, and can be undone.
    """
    parameters = tuple(p for p in split.prefix_parameters().values() if p.requires_grad)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    handles = []
    for module in split.prefix_modules():
        if _stay_in_eval not in module._forward_pre_hooks.values():
            handles.append(module.register_forward_pre_hook(_stay_in_eval))
        module.eval()
    return Frozen(parameters, tuple(handles))


def prune_optimizer(optimizer: Any) -> int:
    """Drop frozen parameters from an optimizer, in place, and release their state.

    Groups keep their order and options, so a learning-rate scheduler built on the optimizer stays valid.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.

    Returns:
        Bytes of optimizer state that were released.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    released = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                for value in optimizer.state.pop(parameter, {}).values():
                    if isinstance(value, torch.Tensor):
                        released += value.numel() * value.element_size()
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return released


def restore_groups(optimizer: Any, groups: list[list[nn.Parameter]] | None) -> list[list[nn.Parameter]]:
    """Give a user's optimizer back the parameters that pruning took; the first time, note which these are.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.
        groups: What this returned before; ``None`` the first time.

    Returns:
        The parameters of each group.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if groups is None:
        return [list(group["params"]) for group in optimizer.param_groups]
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = list(parameters)
    return groups


def check_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant activation checkpointing, which loses all gradients behind a frozen prefix.

    Raises:
        UnsupportedSetupError: A module checkpoints with ``use_reentrant=True``.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise UnsupportedSetupError(
                f"Module '{name}' uses activation checkpointing with use_reentrant=True: with a frozen prefix it gives "
                "no gradients at all, without an error. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
