"""When to freeze how many blocks. A schedule is text; it becomes stages. This module knows no model and no disk.

A policy turns the number of epochs and of blocks into stages. To add one, write a frozen dataclass and name it in `POLICIES`:

    @dataclass(frozen=True)
    class Halves:
        share: float = 0.5  # a parameter, with its default

        def __post_init__(self) -> None:
            if not 0 <= self.share <= 1:
                raise ScheduleError(f"share is a fraction of the blocks in [0, 1], got {self.share}.")

        def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
            return number_stages([(num_epochs // 2, math.floor(self.share * num_blocks))])

    POLICIES = {..., "halves": Halves}

``FreezeConfig(schedule="halves(share=0.25)")`` then uses it. A script of a user adds it by ``POLICIES["halves"] = Halves``. Policies
that look at the run before they decide are in ``adaptive_policies``.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .adaptive_policies import AdaptivePolicy, AutoFreeze
from .auto_schedule import choose
from .errors import ScheduleError
from .stages import Stage, number_stages, stage_at, thawed_to

__all__ = [
    "POLICIES",
    "Auto",
    "Linear",
    "Pairs",
    "Policy",
    "Stage",
    "adaptive_policy",
    "foreseen_stages",
    "number_stages",
    "parse_schedule",
    "plan_stages",
    "stage_at",
    "thawed_to",
]

logger = logging.getLogger(__name__)


class Policy(Protocol):
    """Decides when to freeze how many blocks. Its parameters are its fields."""

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        """Return the stages in order.

        Start epochs rise, and split points are whole numbers from 0 to ``num_blocks``. Where one is lower than the one before,
        blocks thaw. Epochs before the first stage train all blocks. Stages from ``num_epochs`` on are never reached.

        Args:
            num_epochs: Epochs of the whole run, rounded up.
            num_blocks: Blocks of the model.

        Raises:
            ScheduleError: The policy cannot be applied to such a run.
        """


@dataclass(frozen=True)
class Pairs:
    """Follow a schedule that is written out.

    Attributes:
        schedule: ``start:split_point`` pairs, e.g. ``"0:6,3:9"`` or ``"0.0:6,0.5:9"``.
    """

    schedule: str

    def __post_init__(self) -> None:
        """Check what can be checked without a run.

        Raises:
            ScheduleError: A pair cannot be read.
        """
        for pair in self.schedule.split(","):
            start, colon, split_point = pair.partition(":")
            if not colon or not re.fullmatch(r"\s*[0-9]+\s*", split_point):
                raise ScheduleError(
                    f"Schedule {self.schedule!r}: {pair.strip()!r} is not a start:split_point pair. Expected e.g. "
                    "'0:6,3:9' (from epoch 0 freeze 6 blocks, from epoch 3 freeze 9)."
                )
            self._start_epoch(start, 1)

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        """Return a stage for each pair.

        Raises:
            ScheduleError: The start epochs do not increase.
        """
        pairs = [pair.partition(":") for pair in self.schedule.split(",")]
        stages = number_stages((self._start_epoch(start, num_epochs), int(point)) for start, _, point in pairs)
        for before, after in itertools.pairwise(stages):
            if after.start_epoch <= before.start_epoch:
                raise ScheduleError(
                    f"Schedule {self.schedule!r}: starts must increase, but epoch {before.start_epoch} is followed by epoch "
                    f"{after.start_epoch} (with {num_epochs} epochs in all)."
                )
        return stages

    def _start_epoch(self, text: str, num_epochs: int) -> int:
        text = text.strip()
        if re.fullmatch(r"-?[0-9]+", text):
            if int(text) < 0:
                raise ScheduleError(f"Schedule {self.schedule!r}: epoch {text} is negative.")
            return int(text)
        if not re.fullmatch(r"-?([0-9]+\.[0-9]*|\.[0-9]+)", text):
            raise ScheduleError(
                f"Schedule {self.schedule!r}: {text!r} is not a start. Expected an epoch such as '3', or a fraction of "
                "training such as '0.5'."
            )
        fraction = float(text)
        if not 0 <= fraction < 1:
            raise ScheduleError(
                f"Schedule {self.schedule!r}: {text!r} is written as a fraction of training, which lies in [0, 1). "
                "Write epochs as whole numbers; stages change at epoch boundaries only."
            )
        # The tolerance keeps 0.7 of 10 epochs at 7: in binary the product lies just above it.
        return math.ceil(fraction * num_epochs - 1e-9)


@dataclass(frozen=True)
class Linear:
    """Freeze at a constant pace.

    In epoch ``e`` (of ``num_epochs``) the split point is ``floor(num_blocks * level * p)`` with
    ``p = clip((e / num_epochs - start) / (end - start), 0, 1)``.

    Source: the linear schedule of Composer's layer freezing, with ``end`` in place of the end of training.

    Attributes:
        start: Fraction of training at which freezing starts, in [0, 1).
        end: Fraction of training at which ``level`` is reached, in (0, 1].
        level: Fraction of the blocks that end up frozen, in [0, 1].
    """

    start: float = 0.0
    end: float = 0.5
    level: float = 0.75

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ScheduleError: A parameter is out of its range.
        """
        if not 0 <= self.start < self.end <= 1:
            raise ScheduleError(
                f"start and end are fractions of training with 0 <= start < end <= 1, got start={self.start} and "
                f"end={self.end}."
            )
        if not 0 <= self.level <= 1:
            raise ScheduleError(f"level is a fraction of the blocks in [0, 1], got {self.level}.")

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        """Return a stage for each split point that is reached."""
        first_epochs: dict[int, int] = {}
        for epoch in range(num_epochs):
            progress = (epoch / num_epochs - self.start) / (self.end - self.start)
            split_point = math.floor(num_blocks * self.level * min(max(progress, 0.0), 1.0) + 1e-9)
            first_epochs.setdefault(split_point, epoch)
        return number_stages((epoch, split_point) for split_point, epoch in first_epochs.items())


@dataclass(frozen=True)
class Auto:
    """Train the head first, then freeze what the rule of ``auto_schedule`` chooses for so many epochs.

    ``FreezeConfig(schedule="auto")`` chooses views, tokens and learning rates as well.
    """

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        """Return the stage of the head and that behind the split point.

        Raises:
            ScheduleError: The model has one block only.
        """
        return number_stages(choose(num_blocks, num_epochs).stages(num_blocks))


#: Extension point: name in a schedule -> policy. The module's docstring shows how to add one.
POLICIES: dict[str, type[Policy]] = {"auto": Auto, "autofreeze": AutoFreeze, "linear": Linear}


def parse_schedule(schedule: str) -> Policy:
    """Read a schedule: start:split_point pairs, or a policy's name with or without arguments.

    Raises:
        ScheduleError: The schedule cannot be read; the message says why.
    """
    if not isinstance(schedule, str):
        raise ScheduleError(f"A schedule is text such as '0:6,3:9', got {schedule!r}.")
    if not re.match(r"\s*[^\W\d]\w*\s*(\(|$)", schedule):
        return Pairs(schedule)
    try:
        node = ast.parse(schedule.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name):
            raise ValueError("it does not begin with a name")
        arguments = [_literal(argument) for argument in call.args]
        keywords = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        if len(keywords) < len(call.keywords):
            raise ValueError("an argument is given twice")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ScheduleError(
            f"Schedule {schedule!r} cannot be read: {error}. Expected start:split_point pairs such as '0:6,3:9', or a "
            f"policy with literal arguments, e.g. 'linear(0.0, 0.5, 0.75)'; known are {sorted(POLICIES)}."
        ) from error
    if call.func.id not in POLICIES:
        raise ScheduleError(
            f"Schedule {schedule!r}: unknown policy {call.func.id!r}; known are {sorted(POLICIES)}. Or give "
            "start:split_point pairs such as '0:6,3:9'."
        )
    return _make_policy(call.func.id, arguments, keywords, schedule)


def _literal(argument: ast.expr) -> Any:
    try:
        return ast.literal_eval(argument)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{ast.unparse(argument)} is not a number or a text") from error


def _make_policy(name: str, arguments: list[Any], keywords: dict[str, Any], schedule: str) -> Policy:
    policy = POLICIES[name]
    signature = inspect.signature(policy)
    expected = f"{name}({', '.join(map(_describe_parameter, signature.parameters.values()))})"
    try:
        bound = signature.bind(*arguments, **keywords)
        types = typing.get_type_hints(policy)
        for parameter, value in bound.arguments.items():
            wanted = types.get(parameter)
            if wanted is float and type(value) is int:
                bound.arguments[parameter] = float(value)
            elif wanted in (bool, int, float, str) and type(value) is not wanted:
                raise TypeError(f"{parameter} must be of type {wanted.__name__}, got {value!r}")
        return policy(*bound.args, **bound.kwargs)
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error).rstrip(".")
        raise ScheduleError(f"Schedule {schedule!r}: {reason}. Expected {expected}.") from error


def _describe_parameter(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def plan_stages(schedule: str | None, num_epochs: int, num_blocks: int) -> list[Stage]:
    """Return the stages of a run, numbered from 0. The first one starts at epoch 0.

    Args:
        schedule: The user's schedule; ``None`` freezes nothing.
        num_epochs: Epochs of the whole run, rounded up.
        num_blocks: Blocks of the model.

    Raises:
        ScheduleError: The schedule cannot be read, starts do not increase, or a split point is negative or exceeds
            ``num_blocks``.
    """
    stages = [] if schedule is None else parse_schedule(schedule).stages(num_epochs, num_blocks)
    pairs = [(stage.start_epoch, stage.split_point) for stage in stages]
    if not pairs or pairs[0][0] > 0:
        pairs = [(0, 0), *pairs]
    stages = number_stages(pairs)
    for stage in stages:
        if type(stage.split_point) is not int or not 0 <= stage.split_point <= num_blocks:
            raise ScheduleError(
                f"The schedule freezes {stage.split_point} blocks from epoch {stage.start_epoch}, but the model has "
                f"{num_blocks}: use whole split points from 0 to {num_blocks}."
            )
    for before, after in itertools.pairwise(stages):
        if after.start_epoch <= before.start_epoch:
            raise ScheduleError(
                f"The schedule {schedule!r} starts a stage at epoch {after.start_epoch} behind one at epoch "
                f"{before.start_epoch}: starts must increase."
            )
    unreached = [stage for stage in stages if stage.start_epoch >= num_epochs]
    if unreached:
        logger.warning(
            "The run has %d epochs, so these stages of the schedule are never reached: %s",
            num_epochs,
            ", ".join(f"{stage.start_epoch}:{stage.split_point}" for stage in unreached),
        )
    return stages


def adaptive_policy(schedule: str | None) -> AdaptivePolicy | None:
    """Return the policy of a schedule that decides while training; ``None`` if all stages are known before.

    Raises:
        ScheduleError: The schedule cannot be read.
    """
    policy = None if schedule is None else parse_schedule(schedule)
    return policy if isinstance(policy, AdaptivePolicy) else None


def foreseen_stages(schedule: str | None, stages: Sequence[Stage], num_blocks: int) -> list[Stage]:
    """Return the stages that a run must be prepared for: those that are known, and one for each split point that may be decided.

    Args:
        schedule: The user's schedule.
        stages: The stages that are known, in order.
        num_blocks: Blocks of the model.

    Raises:
        ScheduleError: The schedule cannot be read.
    """
    policy, known = adaptive_policy(schedule), list(stages)
    if policy is None:
        return known
    points = policy.split_points(num_blocks)
    return known + [Stage(len(known) + place, policy.first_epoch, point) for place, point in enumerate(points)]
