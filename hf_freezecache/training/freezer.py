"""Freezes the prefixes of a run, and gives model and optimizer back as they came."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnsupportedSetupError
from ..model.freeze import Frozen, check_checkpointing, freeze, prune_optimizer, restore_groups
from ..model.split import Split
from ..schedules import Stage
from .cached_step import CachedStep
from .offload import OffloadedStep, why_not
from .runtime import Runtime

__all__ = ["Freezer", "check_something_trains"]

logger = logging.getLogger(__name__)


@dataclass
class Freezer:
    """What a trainer has frozen, over all its calls of ``train()``.

    Attributes:
        trained_from: The first block that the trainer may have trained; no block before it has changed.
        optimizer_is_ours: Whether ``Trainer`` made the optimizer, which then is made anew for each ``train()``.
        block_weights: Which weights of blocks that are not frozen train, as ``FreezeConfig`` calls it.
        trained_share: Their share of the blocks' weights.
    """

    trained_from: float = math.inf
    optimizer_is_ours: bool = False
    block_weights: str = "all"
    trained_share: float = 1.0
    _frozen: list[Frozen] = field(default_factory=list)
    #: What no stage trains, see ``block_weights``.
    _withheld: list[nn.Parameter] = field(default_factory=list)
    _prefix: tuple[nn.Parameter, ...] = ()
    _groups: list[list[nn.Parameter]] | None = None
    #: How many parameters are missing from the optimizer.
    _pruned: int = 0
    _offloaded: OffloadedStep | None = None
    _said: bool = False

    def begin(self, optimizer: Any, first_split_point: int) -> bool:
        """Prepare for a ``train()`` that starts at the first stage again: all parameters are trainable.

        Args:
            optimizer: The trainer's; ``None`` if there is none yet.
            first_split_point: Frozen blocks of the first stage.

        Returns:
            Whether the optimizer and its scheduler must be made anew. A user's own optimizer gets back what was pruned.
        """
        self.thaw()
        self.trained_from = min(first_split_point, self.trained_from)
        self._pruned = 0
        if self.optimizer_is_ours:
            self._groups = None
            return True
        if optimizer is not None:
            self._groups = restore_groups(optimizer, self._groups)
        return False

    def adopt(self, optimizer: Any) -> None:
        """Remember what the groups of a new optimizer hold, for stages that thaw blocks."""
        if self._groups is None and optimizer is not None:
            self._groups = restore_groups(optimizer, None)

    def freeze(self, split: Split, optimizer: Any = None) -> int:
        """Freeze a prefix, in place of the one before; the optimizer, if there is one, holds all other parameters.

        Returns:
            Bytes of optimizer state that were released.

        Raises:
            UnsupportedSetupError: The model uses reentrant activation checkpointing.
        """
        check_checkpointing(split.model)
        self.bring_back()
        prefix = _prefix_of(split)
        if len(prefix) < len(self._prefix):
            self._thaw_prefix()
        if prefix:
            if len(prefix) > len(self._prefix) and callable(show_averages := getattr(optimizer, "eval", None)):
                show_averages()  # schedule-free optimizers: blocks are frozen as evaluation sees them
            self._frozen.append(freeze(split))
            self._prefix = prefix
        return self.prune(optimizer, split)

    def prune(self, optimizer: Any, split: Split) -> int:
        """Drop what is frozen or withheld from an optimizer, and give it back what is not; return the bytes of state released."""
        if optimizer is None:
            return 0
        prefix = _prefix_of(split)
        if len(prefix) < self._pruned:
            restore_groups(optimizer, self._groups)
        self._pruned = len(prefix)
        return prune_optimizer(optimizer, [*prefix, *self._withheld])

    def regroup(
        self, parts: Sequence[tuple[int, int]], layer_of: Callable[[nn.Parameter], int], optimizer: Any
    ) -> None:
        """Divide the groups that are remembered, as those of the optimizer were just divided.

        Args:
            parts: For each new group, the layer of its parameters, and the place of the group that they were in.
            layer_of: Tells the layer of a parameter.
            optimizer: The optimizer, with the new groups. Those that the user has added are taken from it.
        """
        if (known := self._groups) is not None:
            self._groups = [
                [parameter for parameter in known[place] if layer_of(parameter) == layer]
                if place < len(known)
                else list(group["params"])
                for (layer, place), group in zip(parts, optimizer.param_groups, strict=True)
            ]

    def hold(self) -> None:
        """Freeze again what somebody else, such as a callback, has thawed of the prefix: it would get useless gradients."""
        withheld = {parameter for parameter in self._withheld if parameter.requires_grad}
        thawed = tuple(p for p in self._prefix if p.requires_grad and p not in withheld)
        _hold_back([*thawed, *withheld])
        if thawed or withheld:
            logger.warning(
                "%d parameters of frozen blocks%s required gradients again: they stay frozen until the run ends, as the "
                "schedule says. A callback that thaws a head must leave the frozen blocks alone.",
                len(thawed) + len(withheld),
                ", or withheld by block_weights," if withheld else "",
            )
        if thawed:
            self._frozen.append(Frozen(thawed, ()))

    def offloading(self, step: CachedStep, runtime: Runtime, wanted: bool) -> CachedStep | OffloadedStep:
        """Return what trains on batches of a stage with frozen weights in host memory; the step itself if that is not wanted.

        Args:
            step: What trains on batches of the stage.
            runtime: The trainer.
            wanted: ``CacheConfig.offload_prefix``.
        """
        reason = why_not(runtime) if wanted else None
        if reason is not None and not self._said:
            self._said = True
            logger.warning("offload_prefix=True has no effect: %s.", reason)
        if not wanted or reason is not None:
            return step
        self._offloaded = OffloadedStep(step)
        return self._offloaded

    def bring_back(self) -> None:
        """Bring weights that are in host memory back to the device."""
        if self._offloaded is not None:
            self._offloaded.end()
            self._offloaded = None

    def withhold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let no stage train these parameters, until ``thaw``; those that require no gradients stay as they are."""
        found = [parameter for parameter in parameters if parameter.requires_grad]
        self._withheld += found
        _hold_back(found)

    def thaw(self) -> None:
        """Let parameters that were frozen here require gradients again, bring them back, and remove all hooks."""
        self._thaw_prefix()
        for parameter in self._withheld:
            parameter.requires_grad_(True)
        self._withheld, self.block_weights, self.trained_share = [], "all", 1.0

    def _thaw_prefix(self) -> None:
        self.bring_back()
        self._prefix = ()
        while self._frozen:
            self._frozen.pop().thaw()


def _hold_back(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def _prefix_of(split: Split) -> tuple[nn.Parameter, ...]:
    """Return the parameters that are frozen; what runs in front of block 0 trains if no block is."""
    return tuple(split.prefix_parameters().values()) if split.split_point > 0 else ()


def check_something_trains(stage: Stage, model: nn.Module) -> None:
    """Refuse a stage that freezes all that is to be trained.

    Raises:
        UnsupportedSetupError: No parameter requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    raise UnsupportedSetupError(
        f"Nothing is left to train in the stage from epoch {stage.start_epoch}, which freezes {stage.split_point} blocks: no "
        "parameter behind them requires a gradient. Freeze fewer blocks, or let the head train (with PEFT: "
        "modules_to_save=['classifier'])."
    )
