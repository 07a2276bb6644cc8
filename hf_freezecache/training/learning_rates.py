"""Learning rates of layers and of stages: changes an optimizer and its scheduler in place, whoever made them.

All rates of a group are multiplied alike: those of the optimizer, and the bounds and starting points that a scheduler keeps.
So a schedule keeps its form, and a group has the same share of the rate in every step.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..by_split_point import parse_lr_scale
from ..config import FreezeConfig
from ..errors import UnsupportedSetupError
from ..model.split import Splits
from . import lr_rule
from .freezer import Freezer

__all__ = ["LearningRates", "begin_after", "layers_of"]

logger = logging.getLogger(__name__)

#: Keys of a group that checkpoints keep. Other libraries have an ``lr_scale`` of their own there.
LAYER, DECAY, SCALE = "freezecache_layer", "freezecache_layer_decay", "freezecache_lr_scale"
#: Rates in a group: of every optimizer, of schedulers, of OneCycleLR (two), of SWALR.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
#: Lists of a scheduler with one rate for each group: of all, of plateaus and cycles, of GreedyLR.
_RATES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "_init_lrs")
#: Other lists with one item for each group: of LambdaLR and MultiplicativeLR, and of CyclicLR.
_ITEMS = ("lr_lambdas", "base_momentums", "max_momentums")
#: What helps if neither can be had.
_REMOVE_BOTH = "or remove layer_decay and lr_scale (schedule='auto' sets both: write the schedule out)."
#: Schedulers whose lists are all named above.
_KNOWN = ("torch.optim.lr_scheduler", "transformers.optimization")


def layers_of(splits: Splits) -> dict[nn.Parameter, int]:
    """Return the layer of each parameter that runs before the last block has ended.

    Layer 0 is what runs in front of block 0, and layer ``i + 1`` is block ``i``. What only later blocks reach belongs to the
    first of them. Parameters that are not here belong to layer ``num_blocks + 1``, the head.

    Raises:
        UnsupportedModelError: The model cannot be traced.
    """
    layers: dict[nn.Parameter, int] = {}
    for split_point in range(splits.num_blocks + 1):
        for parameter in splits.at(split_point).prefix_parameters().values():
            layers.setdefault(parameter, split_point)
    return layers


@dataclass(frozen=True)
class LearningRates:
    """What the user asks of learning rates.

    Attributes:
        layer_decay: See ``FreezeConfig``.
        lr_scale: See ``FreezeConfig``.
    """

    layer_decay: float | None = None
    lr_scale: str | None = None

    @staticmethod
    def of(config: FreezeConfig) -> LearningRates:
        """Return what a user's settings ask, or ``schedule="auto"`` chose."""
        return LearningRates(config.layer_decay, None if config.lr_scale is None else str(config.lr_scale))

    def scale_at(self, split_point: int, num_blocks: int) -> float:
        """Return what the learning rates of a stage are multiplied by.

        Args:
            split_point: Number of frozen blocks.
            num_blocks: Blocks of the model.

        Raises:
            UnsupportedSetupError: ``lr_scale`` cannot be read.
        """
        if self.lr_scale is None:
            return 1.0
        pairs = parse_lr_scale(self.lr_scale)
        if pairs is None:
            return lr_rule.lr_scale(split_point, num_blocks)
        return next((scale for start, scale in reversed(pairs) if start <= split_point), 1.0)

    def prepare(self, splits: Splits, optimizer: Any, scheduler: Any, freezer: Freezer) -> None:
        """Split each group of a new optimizer by layer, and lower the rates of early layers. Calling it again does nothing.

        The layers and rates are those of the fine-tuning recipes of BEiT (arXiv:2106.08254) and MAE (arXiv:2111.06377):
        embeddings are layer 0, block ``i`` of ``n`` is layer ``i + 1``, and what follows the blocks is layer ``n + 1``; the
        rate of a layer is that of the group times ``layer_decay ** (n + 1 - layer)``. Every group keeps its other options.

        Groups of later layers come first, so that ``Trainer`` logs the rate of the head. There is one for each layer and
        each former group, even without parameters: then a checkpoint fits whatever is frozen.

        Args:
            splits: The splits of the model.
            optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.
            scheduler: Its scheduler.
            freezer: Holds the groups of a user's own optimizer, which are split as well.

        Raises:
            UnsupportedSetupError: The optimizer has no rate of its own for each group, or its scheduler cannot be changed.
            UnsupportedModelError: The model cannot be traced.
        """
        if self.layer_decay is None and self.lr_scale is None:
            return
        optimizer, scheduler = _inner(optimizer, "optimizer"), _inner(scheduler, "scheduler")
        _check_optimizer(optimizer, splits.model)
        if self.layer_decay is not None and all(LAYER not in group for group in optimizer.param_groups):
            _split_groups(optimizer, scheduler, layers_of(splits), splits.num_blocks + 1, self.layer_decay, freezer)
            logger.info(
                "layer_decay=%g: the embeddings train with %.3g times the learning rate of the head.",
                self.layer_decay,
                self.layer_decay ** (splits.num_blocks + 1),
            )
        for each in _all_schedulers(scheduler):
            if type(each).__module__ not in _KNOWN:
                _check_scheduler(optimizer, each)

    @contextmanager
    def restoring(self, checkpoint: Any, optimizer: Any) -> Iterator[None]:
        """While active, the state of a checkpoint is loaded into an optimizer: say so if it was of another ``layer_decay``.

        Args:
            checkpoint: Its folder.
            optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.

        Raises:
            UnsupportedSetupError: The groups of the checkpoint are others.
        """
        try:
            yield
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise UnsupportedSetupError(
                f"The optimizer in {checkpoint} has other groups of parameters than that of this run, with layer_decay="
                f"{self.layer_decay!r}: {error}. Resume with the layer_decay and the optimizer of the interrupted run."
            ) from error
        saved = {group[DECAY] for group in _inner(optimizer, "optimizer").param_groups if DECAY in group}
        if saved and saved != {self.layer_decay}:
            logger.warning(
                "The rates of %s were made with layer_decay=%g: they go on, as the checkpoint has them, not with %r.",
                checkpoint,
                min(saved),
                self.layer_decay,
            )

    def enter(self, scale: float, optimizer: Any, scheduler: Any) -> None:
        """Multiply all rates by the scale of a stage, in place of that of the stage before. The groups keep the scale.

        Args:
            scale: As ``scale_at`` returned it.
            optimizer: A ``torch.optim.Optimizer``, or accelerate's wrapper around one.
            scheduler: Its scheduler.
        """
        optimizer, scheduler = _inner(optimizer, "optimizer"), _inner(scheduler, "scheduler")
        groups = optimizer.param_groups
        if self.lr_scale is None and all(SCALE not in group for group in groups):
            return
        factors = [scale / group.get(SCALE, 1.0) for group in groups]
        for group in groups:
            group[SCALE] = scale
        if any(factor != 1 for factor in factors):
            logger.info("Learning rates are those of the schedule, times %g.", scale)
            _multiply(groups, scheduler, factors)


def begin_after(steps: int, scheduler: Any) -> None:
    """Let a new scheduler begin so many steps later; until then, rates are those of its optimizer.

    Args:
        steps: Number of steps.
        scheduler: A ``LambdaLR``, as almost all of ``TrainingArguments.lr_scheduler_type`` are. Others stay as they are.
    """
    if steps == 0 or type(scheduler) is not LambdaLR:
        return

    def later(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: 1.0 if step < steps else factor(step - steps)

    # Functions: of anything else, the scheduler would write the contents into checkpoints.
    scheduler.lr_lambdas = [later(factor) for factor in scheduler.lr_lambdas]
    rates = [base * factor(0) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def _inner(wrapped: Any, name: str) -> Any:
    """Return what accelerate's wrapper holds."""
    return getattr(wrapped, name, wrapped)


def _all_schedulers(scheduler: Any) -> list[Any]:
    """Return a scheduler and those that it is made of, which share one optimizer."""
    found = [] if scheduler is None else [scheduler]
    for part in getattr(scheduler, "_schedulers", ()):
        found += _all_schedulers(part)
    return found


def _times(rate: Any, factor: float) -> Any:
    """Return a rate times a factor; a tensor is a new one. What is no number stays."""
    return rate * factor if isinstance(rate, (int, float, Tensor)) and not isinstance(rate, bool) else rate


def _multiply(groups: Sequence[dict[str, Any]], scheduler: Any, factors: Sequence[float]) -> None:
    """Multiply the rates of each group by its factor: those in the group, and those that a scheduler keeps."""
    for group, factor in zip(groups, factors, strict=True):
        for name in _GROUP_RATES:
            if isinstance(group.get(name), Tensor):
                group[name].mul_(factor)  # a captured step reads this tensor
            elif name in group:
                group[name] = _times(group[name], factor)
    for each in _all_schedulers(scheduler):
        for name, values in _lists(each, _RATES).items():
            changed = [_times(value, factor) for value, factor in zip(values, factors, strict=False)]
            setattr(each, name, [*changed, *values[len(changed) :]])


def _lists(scheduler: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the lists of a scheduler that go by these names."""
    found = {name: vars(scheduler).get(name) for name in names}
    return {name: list(value) for name, value in found.items() if isinstance(value, (list, tuple))}


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer whose groups do not rule the rates of the model.

    Raises:
        UnsupportedSetupError: A group has no rate, or no group has a parameter of the model.
    """
    groups, name = optimizer.param_groups, type(optimizer).__name__
    if any(not isinstance(group.get("lr"), (int, float, Tensor)) for group in groups):
        raise UnsupportedSetupError(
            f"layer_decay and lr_scale multiply the learning rates of the optimizer, but a group of {name} has "
            f"lr={next(g.get('lr') for g in groups if not isinstance(g.get('lr'), (int, float, Tensor)))!r}. Give it a learning "
            f"rate (for Adafactor: relative_step=False and lr=...), {_REMOVE_BOTH}"
        )
    known = set(model.parameters())
    if not any(parameter in known for group in groups for parameter in group["params"]):
        raise UnsupportedSetupError(
            f"layer_decay and lr_scale multiply the learning rates of groups of parameters, but no group of {name} holds a "
            f"parameter of the model: it steps in a way of its own. Use another optimizer, {_REMOVE_BOTH}"
        )


def _split_groups(
    optimizer: Any, scheduler: Any, layers: dict[nn.Parameter, int], head: int, decay: float, freezer: Freezer
) -> None:
    """Put the parameters of each layer into groups of their own, with their rates.

    Args:
        optimizer: The optimizer, not wrapped.
        scheduler: Its scheduler, or ``None``.
        layers: As ``layers_of`` returned it.
        head: The layer of all other parameters.
        decay: Factor between one layer and the next.
        freezer: Holds the groups of a user's own optimizer.

    Raises:
        UnsupportedSetupError: The groups of the optimizer cannot be replaced.
    """
    former = list(optimizer.param_groups)
    order = [(layer, place) for layer in range(head, -1, -1) for place in range(len(former))]
    groups = []
    for layer, place in order:
        group = {name: value.clone() if isinstance(value, Tensor) else value for name, value in former[place].items()}
        kept = [number for number, p in enumerate(former[place]["params"]) if layers.get(p, head) == layer]
        group["params"] = [former[place]["params"][number] for number in kept]
        names = group.pop("param_names", None)
        if names is not None and len(names) == len(former[place]["params"]):
            group["param_names"] = [names[number] for number in kept]
        groups.append({**group, LAYER: layer, DECAY: decay})
    optimizer.param_groups[:] = groups  # in place: wrappers may share the list
    if len(optimizer.param_groups) != len(groups):
        raise UnsupportedSetupError(
            f"layer_decay cannot divide the groups of {type(optimizer).__name__} by layer: they are made anew when they are "
            "read, as if it were several optimizers. Use another optimizer, or remove layer_decay."
        )
    for each in _all_schedulers(scheduler):
        for name, values in _lists(each, (*_RATES, *_ITEMS)).items():
            if len(values) == len(former):
                setattr(each, name, [values[place] for _, place in order])
    freezer.regroup(order, lambda parameter: layers.get(parameter, head), optimizer)
    _multiply(groups, scheduler, [decay ** (head - layer) for layer, _ in order])


def _next_rates(optimizer: Any, scheduler: Any, change: Callable[[Any], None] = lambda scheduler: None) -> list[float]:
    """Return the rates that a scheduler would set next. Optimizer and scheduler stay as they are.

    Args:
        optimizer: The optimizer, not wrapped.
        scheduler: The scheduler.
        change: Called with a copy of the scheduler before it steps.
    """
    groups = optimizer.param_groups
    before = [{name: v.clone() if isinstance(v, Tensor) else v for name, v in group.items()} for group in groups]
    shared = {id(each.optimizer): each.optimizer for each in (scheduler,) if hasattr(each, "optimizer")}
    try:
        trial = copy.deepcopy(scheduler, {id(optimizer): optimizer, **shared})
        change(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.step()
        return [float(group["lr"]) for group in groups]
    finally:
        for group, content in zip(groups, before, strict=True):
            for name, value in content.items():
                if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                    with torch.no_grad():
                        group[name].copy_(value)
                else:
                    group[name] = value


def _check_scheduler(optimizer: Any, scheduler: Any) -> None:
    """Try whether a scheduler of the user's own takes the rates that it is given, by a step of a copy of it.

    Raises:
        UnsupportedSetupError: It does not, or it cannot be tried.
    """

    def halve(trial: Any) -> None:
        _multiply(optimizer.param_groups, trial, [0.5] * len(optimizer.param_groups))

    name = type(scheduler).__name__
    try:
        plain, halved = _next_rates(optimizer, scheduler), _next_rates(optimizer, scheduler, halve)
        kept = any(rate > 0 and not half < rate for rate, half in zip(plain, halved, strict=True))
        reason = "it sets rates of its own, whatever those of the groups are" if kept else None
        if not all(math.isfinite(rate) for rate in (*plain, *halved)):
            reason = "it gave a rate that is not finite"
    except Exception as error:
        reason = f"a step of it, tried with the divided groups, failed with {type(error).__name__}: {error}"
    if reason is not None:
        raise UnsupportedSetupError(
            f"layer_decay and lr_scale cannot be combined with the scheduler {name}: {reason}. Use a scheduler of "
            f"TrainingArguments (lr_scheduler_type) or of torch, {_REMOVE_BOTH}"
        )
