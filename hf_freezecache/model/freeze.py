"""Freezes the prefix: it has no gradients and no optimizer state, and stays in eval mode under ``model.train()``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedSetupError
from .split import Split

__all__ = ["Frozen", "check_checkpointing", "freeze", "prune_optimizer", "restore_groups"]


def _stay_in_eval(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Put a frozen module back into eval mode before its forward: ``Trainer`` calls ``model.train()`` in every step."""
    if module.training:
        module.eval()


@dataclass(frozen=True)
class Frozen:
    """The changes that one call of ``freeze`` made.

    Attributes:
        parameters: Parameters that required gradients before.
        handles: Handles of the hooks that were added.
    """

    parameters: tuple[nn.Parameter, ...]
    handles: tuple[RemovableHandle, ...]

    def thaw(self) -> None:
        """Undo the changes. The modules stay in eval mode until the next ``model.train()``."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for handle in self.handles:
            handle.remove()


def freeze(split: Split) -> Frozen:
    """Freeze the prefix of a split model. It may be called again, for the same prefix or a deeper one.

    The parameters stop requiring gradients, and their gradients are dropped. The modules get a hook that puts them into eval
    mode before each forward: dropout, drop-path and the jitter of position embeddings stay off.

    Returns:
        The changes of this call, which ``Frozen.thaw`` can undo.
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


def prune_optimizer(optimizer: Any, parameters: Iterable[nn.Parameter]) -> int:
    """Remove parameters from an optimizer, in place, and free their state.

    The groups keep their order and options, so that a learning-rate scheduler of the optimizer stays valid. Whether a
    parameter requires gradients does not matter: one that the user has frozen stays, since the user may thaw it again.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.
        parameters: What to remove: the parameters of the frozen prefix.

    Returns:
        Number of bytes of optimizer state that were freed.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    removed, freed_bytes = set(parameters), 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in removed:
                for value in optimizer.state.pop(parameter, {}).values():
                    if isinstance(value, torch.Tensor):
                        freed_bytes += value.numel() * value.element_size()
        group["params"] = [parameter for parameter in group["params"] if parameter not in removed]
    return freed_bytes


def restore_groups(optimizer: Any, groups: list[list[nn.Parameter]] | None) -> list[list[nn.Parameter]]:
    """Put the parameters that ``prune_optimizer`` removed back into a user's optimizer.

    Groups and parameters that the user has added since stay, behind those of the first call.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.
        groups: The result of the first call; ``None`` for the first call, which changes nothing.

    Returns:
        The parameters of each group, as they were at the first call.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if groups is None:
        return [list(group["params"]) for group in optimizer.param_groups]
    for group, parameters in zip(optimizer.param_groups, groups, strict=False):
        known = set(parameters)
        group["params"] = [*parameters, *(parameter for parameter in group["params"] if parameter not in known)]
    return groups


def check_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant activation checkpointing: behind a frozen prefix it computes no gradients at all.

    Raises:
        UnsupportedSetupError: A module uses activation checkpointing with ``use_reentrant=True``.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise UnsupportedSetupError(
                f"Module '{name}' uses activation checkpointing with use_reentrant=True: with a frozen prefix it gives "
                "no gradients at all, without an error. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
