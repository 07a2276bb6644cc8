"""Takes one training step of each stage twice before anything is built: on images, and as from a cache.

Whatever the trainer, the model or the loss do with a batch is done here as in training: in train mode, with labels, through
the user's ``training_step`` and ``compute_loss``, through the wrapper for several processes, under the same random states.
Loss and gradients of both steps must agree. Then a cached stage trains on what the uncached one would.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.seeding import preserved_random_state
from ..errors import DataError, FreezeCacheError, UnsupportedModelError, UnsupportedSetupError
from ..model.freeze import freeze
from ..model.probe import first_row
from ..model.split import Split
from ..schedules import Stage
from .cached_step import train_on_states

__all__ = ["observed_call", "rehearse"]

logger = logging.getLogger(__name__)

#: Stands for the packed arrays of a cached batch. Its name is one of theirs.
_STATES = "packed.rehearsed"
#: Further random states to compare under, where random numbers are drawn before the split.
_TRIALS = 7
#: Largest difference of the loss, relative to it, and of the gradients, relative to all of them. On a CPU equal shapes give
#: equal bits, as a rule. Elsewhere kernels need not be deterministic, and 16 bits round to 3 digits.
_TOLERANCES = {"cpu": 1e-6, "16 bits": 2e-2, "other": 1e-3}


# ---- What the model is called with ----


class _Observed(Exception):
    """Ends a computation of the loss once the model is called."""


def observed_call(
    trainer: Any, model: nn.Module, batch: dict[str, Tensor], label_names: tuple[str, ...]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the arguments that a trainer's ``compute_loss`` calls its model with, for the first row of a batch.

    Args:
        trainer: A copy of the trainer, see ``rehearsal_copy.rehearsing``.
        model: The model, not wrapped.
        batch: A collated batch: name -> (rows, ...).
        label_names: Names under which the model takes labels.

    Returns:
        The arguments by name, without what is ``None``, and the names of those that come from the batch, beside
        ``pixel_values``. Where the model is not called as a whole, they are the entries of the batch that its forward names.
    """
    calls: list[dict[str, Any]] = []
    parameters = inspect.signature(model.forward).parameters

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**dict(zip(parameters, args, strict=False)), **kwargs})
        raise _Observed

    prepared = trainer._prepare_inputs(dict(batch))
    handle = model.register_forward_pre_hook(observe, with_kwargs=True)
    try:
        trainer.compute_loss(model, dict(prepared))
    except Exception as error:  # what is wrong with the loss, rehearsing the step will tell
        if not isinstance(error, _Observed):
            logger.debug("compute_loss ended with %r before the model was called.", error)
    finally:
        handle.remove()
    not_inputs = {"pixel_values", "labels", *label_names}
    # Other images than those of the batch tell nothing of it; rehearsing the step will find them.
    if calls and calls[0].get("pixel_values") is prepared["pixel_values"]:
        given = {name: value for name, value in calls[0].items() if value is not None}
    else:
        given = {name: value for name, value in prepared.items() if name in {"pixel_values", *parameters}}
    call = first_row(given)
    return call, frozenset(call.keys() & prepared.keys() - not_inputs)


# ---- One step ----


@dataclass(frozen=True)
class _Outcome:
    """What one training step gave.

    Attributes:
        loss: The loss, a scalar.
        gradients: Name of each trainable parameter -> its gradient, or ``None``.
        draws: Whether random numbers were drawn before the hidden states at the split were there.
        repeatable: Whether no random number was drawn at all, and no buffer changed. Then the step gives the same behind more
            frozen blocks, which are in eval mode.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    draws: bool = False
    repeatable: bool = False


class _StatesStep:
    """Trains on a batch that holds hidden states, as ``CachedStep`` does once it has decoded them."""

    soft_loss = None

    def __init__(self, split: Split) -> None:
        self.split = split

    def __call__(
        self,
        training_step: Callable[..., Tensor],
        global_step: int,
        model: nn.Module,
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        batch = dict(inputs)
        return train_on_states(self.split, batch.pop(_STATES), batch, training_step, model, *args, **kwargs)


def _random_states() -> tuple[Any, ...]:
    cuda = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes(), cuda  # type: ignore[union-attr,index]


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Seed all generators, and put them back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with preserved_random_state(), torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def _watching_draws(split: Split) -> Iterator[list[bool]]:
    """Note whether random numbers were drawn: each time that the hidden states at a split are there, and at the end."""
    before = _random_states()
    drawn: list[bool] = []

    def look(*_: Any) -> None:
        drawn.append(_random_states() != before)

    blocks = list(split.blocks)
    if split.split_point < len(blocks):
        handle = blocks[split.split_point].register_forward_pre_hook(look)
    else:
        handle = blocks[-1].register_forward_hook(look)
    try:
        yield drawn
        drawn.append(_random_states() != before)
    finally:
        handle.remove()


class _Rehearsal:
    """Steps of one trainer on one batch.

    Args:
        trainer: A copy of the trainer.
        model: The model.
        wrapped: The model in its wrapper for several processes.
        batch: The first rows, collated, on the CPU.
    """

    def __init__(self, trainer: Any, model: nn.Module, wrapped: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.trainer, self.model, self.wrapped, self.batch = trainer, model, wrapped, batch
        self._repeatable: _Outcome | None = None

    def _step(self, inputs: dict[str, Any], step: _StatesStep | None, seed: int, split: Split) -> _Outcome:
        self.trainer._run = SimpleNamespace(step=step, watch_transform=lambda: None)
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        # Each process by itself: not all parameters that the wrapper knows get a gradient here.
        alone = self.trainer.accelerator.no_sync(self.wrapped)
        try:
            with _drawing(seed), alone, _watching_draws(split) as drawn:
                loss = self.trainer.training_step(self.wrapped, inputs).detach()
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
            unchanged = all(torch.equal(buffer, value) for buffer, value in buffers)
            return _Outcome(loss, gradients, drawn[0], not drawn[-1] and unchanged)
        finally:
            for parameter in self.model.parameters():
                parameter.grad = None
            for buffer, value in buffers:
                buffer.data.copy_(value)

    def live(self, split: Split, seed: int) -> _Outcome:
        """Take the step on images. Split points must come in rising order.

        Raises:
            DataError: It fails, as it would in training.
        """
        if self._repeatable is not None:
            return self._repeatable
        try:
            outcome = self._step(dict(self.batch), None, seed, split)
            self._repeatable = outcome if outcome.repeatable else None
            return outcome
        except FreezeCacheError:
            raise
        except Exception as error:
            raise DataError(
                f"A training step on the first rows fails with {type(error).__name__}: {error}. They were collated to "
                f"{_described(self.batch)}. Do model, labels and loss fit each other? Plain Trainer fails on them alike."
            ) from error

    def cached(self, split: Split, hidden_states: Tensor, seed: int) -> _Outcome:
        """Take the step on hidden states."""
        inputs = {name: value for name, value in self.batch.items() if name != "pixel_values"}
        return self._step({**inputs, _STATES: hidden_states}, _StatesStep(split), seed, split)


def _described(batch: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for name, v in sorted(batch.items())
    )


# ---- Comparing ----


def _difference(live: _Outcome, cached: _Outcome, tolerance: float) -> str | None:
    """Say how two steps differ; ``None`` if they agree."""
    expected, found = float(live.loss), float(cached.loss)
    # The conditions say what is right, so that NaN is a difference.
    if not abs(found - expected) <= tolerance * max(abs(expected), 1e-12) and found != expected:
        return f"the loss is {found:.6g} from the cache and {expected:.6g} on images"
    # The step on images may have been taken with fewer frozen blocks.
    gradients = {name: live.gradients[name] for name in cached.gradients}
    for name, gradient in gradients.items():
        other = cached.gradients[name]
        if (gradient is None) != (other is None):
            has, lacks = ("images", "the cache") if other is None else ("the cache", "images")
            return f"the parameter {name} gets a gradient from {has} and none from {lacks}"
    pairs = [(name, g.float(), cached.gradients[name].float()) for name, g in gradients.items() if g is not None]  # type: ignore[union-attr]
    total = sum(float(g.square().sum()) for _, g, _ in pairs) ** 0.5
    for name, gradient, other in pairs:
        if torch.equal(gradient, other):
            continue
        # A parameter whose gradient is all rounding (the bias of keys) is measured by those of the others.
        scale = max(float(gradient.norm()), total * (gradient.numel() / sum(g.numel() for _, g, _ in pairs)) ** 0.5)
        if not float((gradient - other).norm()) <= tolerance * scale:
            return (
                f"the gradient of {name} differs by {float((gradient - other).norm()) / max(scale, 1e-30):.3g} of its size "
                "between cache and images"
            )
    return None


def _why_not_cached(rehearsal: _Rehearsal, run: Any, split_point: int) -> str | None:
    """Return why a stage cannot be trained from a cache; ``None`` if it can.

    Args:
        rehearsal: Takes the steps.
        run: The ``StageRunner``.
        split_point: Number of frozen blocks; they are frozen.

    Raises:
        DataError: The step on images fails.
    """
    split, runtime = run.splits.at(split_point), run.runtime
    inputs = {name: rehearsal.batch[name] for name in ("pixel_values", *sorted(run.data.prefix_inputs))}
    live = rehearsal.live(split, 0)
    try:
        hidden_states = runtime.run_frozen(split.prefix, **inputs)
        rows = len(inputs["pixel_values"])
        if hidden_states.dim() != 3 or len(hidden_states) != rows:
            return (
                f"hidden states there are {tuple(hidden_states.shape)} for {rows} images; a cache stores (tokens, hidden) of "
                "each image"
            )
        narrow = str(runtime.accelerator.mixed_precision) != "no" or hidden_states.dtype.itemsize < 4
        kind = "16 bits" if narrow else "cpu" if hidden_states.device.type == "cpu" else "other"
        # Tokens in random order, say, may change the loss by no more than rounding does.
        tolerance = 0.0 if kind == "cpu" and live.draws else _TOLERANCES[kind]
        for seed in range(1 + (_TRIALS if live.draws else 0)):
            expected = live if seed == 0 else rehearsal.live(split, seed)
            difference = _difference(expected, rehearsal.cached(split, hidden_states, seed), tolerance)
            if difference is not None:
                drawn = "; random numbers are drawn before the split, so hidden states are new in each step"
                return difference + (drawn if live.draws else "")
    except FreezeCacheError as error:
        return str(error).removesuffix(".")
    except Exception as error:
        return f"a step from the cache fails with {type(error).__name__}: {error}"
    return None


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


def rehearse(run: Any, wrapped: nn.Module) -> None:
    """Rehearse a step of each stage of a run, and note in ``run.refusals`` which are not to be cached. Collective.

    Args:
        run: The ``StageRunner``, its model frozen as at the start of the run.
        wrapped: The model in its wrapper for several processes.

    Raises:
        UnsupportedModelError: Under ``mode="always"``: a stage cannot be trained from a cache.
        UnsupportedSetupError: A stage would train nothing.
        DataError: A training step on the first rows fails.
    """
    model, frozen = run.runtime.model, run.frozen or 0
    refusals: dict[int, str] = {}
    with run.runtime.rehearsing() as trainer:
        batch = run.runtime.prepare_inputs(dict(run.data.example_batch))
        rehearsal = _Rehearsal(trainer, model, wrapped, batch)
        for stage in sorted(run.stages, key=lambda stage: stage.split_point):
            if stage.split_point < frozen or stage.split_point in refusals:
                continue
            changes = freeze(run.splits.at(stage.split_point))
            try:
                check_something_trains(stage, model)
                if run.config.mode != "never" and stage.split_point > 0:
                    reason = _why_not_cached(rehearsal, run, stage.split_point)
                    if reason is not None:
                        refusals[stage.split_point] = reason
                elif stage is run.stages[0]:
                    rehearsal.live(run.splits.at(stage.split_point), 0)
            finally:
                changes.thaw()
    for split_point, reason in refusals.items():
        if run.config.mode == "always":
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be trained from a cache behind {split_point} frozen blocks: {reason}. "
                "Cached training must be the same as training on images. Freeze other blocks, train such stages on images "
                "with CacheConfig(mode='auto') or 'never', or use plain Trainer."
            )
    run.refusals = refusals
