"""Takes one training step of each stage twice before anything is built: on images, and as from a cache.

Whatever the trainer, the model or the loss do with a batch is done here as in training: in train mode, with labels, through
the user's ``training_step`` and ``compute_loss``, through the wrapper for several processes, under the same random states.
Loss and gradients of both steps must agree. Then a cached stage trains on what the uncached one would.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.kept_tokens import KEPT_TOKENS, TokenSubset
from ..data.views import same_examples
from ..errors import DataError, FreezeCacheError, UnsupportedModelError
from ..model.freeze import freeze
from ..model.probe import first_row, other_images
from ..model.split import Split
from ..model.tokens import take_tokens
from ..stages import Stage
from .cached_step import train_on_states
from .draws import drawing, watching_draws
from .fewer_tokens import LiveStep, check_fewer_tokens, example_positions, refusal
from .freezer import check_something_trains
from .moved_weights import move_parameters, move_with_what_trains, noting_uses, trained_parameters
from .rehearsal_copy import duplicate, keeping_generators, keeping_parameters, without_scaling
from .step_outcome import TOLERANCES, StepOutcome, difference, sleeps

__all__ = ["rehearse"]

logger = logging.getLogger(__name__)

#: Stands for the packed arrays of a cached batch. Its name is one of theirs.
_STATES = "packed.rehearsed"
#: Further random states to compare under, where random numbers are drawn before the split.
_TRIALS = 7


# ---- One step ----


class _StatesStep:
    """Trains on a batch that holds hidden states, as ``CachedStep`` does once it has decoded them."""

    soft_loss = None

    def __init__(self, split: Split) -> None:
        self.split = split

    def __call__(self, training_step: Callable[..., Tensor], global_step: int, *args: Any, **kwargs: Any) -> Tensor:
        model, inputs, *rest = args
        batch = dict(inputs)
        return train_on_states(self.split, batch.pop(_STATES), batch, training_step, model, *rest, **kwargs)


class _Rehearsal:
    """Steps of one trainer on one batch.

    Args:
        trainer: A copy of the trainer.
        model: The model.
        wrapped: The model in its wrapper for several processes.
        batch: The first rows, collated.
        live_loader: Makes the loader that the trainer's ``get_train_dataloader`` gives.
        may_grow: Whether more rows are tried if these do not do.
    """

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        wrapped: nn.Module,
        batch: Mapping[str, Tensor],
        live_loader: Callable[[], Any],
        may_grow: bool,
    ) -> None:
        self.trainer, self.model, self.wrapped, self.batch = trainer, model, wrapped, batch
        self.live_loader = live_loader
        self.may_grow = may_grow
        #: What draws the tokens that are kept behind the split, and those of the first rows; ``None`` if all are.
        self.tokens: TokenSubset | None = None
        self.positions: Tensor | None = None
        self._repeatable: StepOutcome | None = None

    def _step(
        self, inputs: dict[str, Any], step: _StatesStep | LiveStep | None, seed: int, split: Split, progress: float
    ) -> StepOutcome:
        # What one step leaves behind in the trainer must not reach the next.
        trainer = duplicate(self.trainer)
        original = trainer._original
        kept = dict(vars(original))
        original.current_gradient_accumulation_steps = 1  # `Trainer` sets it with the first batch
        take = step or (lambda training_step, global_step, *args: training_step(*args))
        trainer._run = original._run = SimpleNamespace(step=step, training_step=take, live_loader=self.live_loader)
        trainer.state = original.state = copy.copy(trainer.state)
        trainer.state.global_step = int(progress * max(trainer.state.max_steps - 1, 0))
        trainer.state.epoch = progress * (trainer.state.num_train_epochs or 0)
        # Nor what it does to its batch in place.
        inputs = {name: value.clone() if type(value) is Tensor else value for name, value in inputs.items()}
        buffers = [(name, buffer, buffer.detach().clone()) for name, buffer in self.model.named_buffers()]
        # Each process by itself: not all parameters that the wrapper knows get a gradient here.
        alone = getattr(self.wrapped, "no_sync", nullcontext)()
        try:
            with ExitStack() as stack:
                contexts = (keeping_parameters(trainer), keeping_generators(original), drawing(seed), alone)
                for context in (*contexts, without_scaling(trainer.accelerator)):
                    stack.enter_context(context)
                drawn = stack.enter_context(watching_draws(split))
                loss = trainer.training_step(self.wrapped, inputs).detach()
                gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
            changed = {n: b.detach().clone() for n, b, before in buffers if not same_examples(b, before)}
            return StepOutcome(loss, gradients, changed, drawn[0], not drawn[-1] and not changed)
        finally:
            vars(original).clear()
            vars(original).update(kept)
            for parameter in self.model.parameters():
                parameter.grad = None
            for _, buffer, value in buffers:
                buffer.data.copy_(value)

    def live(self, split: Split, seed: int, progress: float = 0.0) -> StepOutcome:
        """Take the step on images. Split points must come in rising order.

        Raises:
            DataError: It fails, as it would in training.
        """
        if self.tokens is not None:
            return self._live_on_fewer_tokens(split, self.tokens, seed, progress)
        if self._repeatable is not None and progress == 0:
            return self._repeatable
        try:
            outcome = self._step(dict(self.batch), None, seed, split, progress)
            if progress == 0 and outcome.repeatable:
                self._repeatable = outcome
            return outcome
        except FreezeCacheError:
            raise
        except Exception as error:
            raise DataError(
                f"A training step on the first rows fails with {type(error).__name__}: {error}. They were collated to "
                f"{_described(self.batch)}. Do model, labels and loss fit each other? Plain Trainer fails on them alike."
            ) from error

    @contextmanager
    def with_moved_weights(self, parameters: Sequence[nn.Parameter], step: float) -> Iterator[None]:
        """Take steps with other weights than those at the start while the context is open."""
        kept, self._repeatable = self._repeatable, None
        try:
            with keeping_parameters(self.trainer):
                with drawing(1):
                    move_parameters(parameters, step)
                yield
        finally:
            self._repeatable = kept

    def keep(self, tokens: TokenSubset | None) -> None:
        """Let the steps that follow see some of the tokens behind the split, or all again."""
        self.tokens = tokens
        self.positions = None if tokens is None else example_positions(tokens, len(self.batch["pixel_values"]))

    def _live_on_fewer_tokens(self, split: Split, tokens: TokenSubset, seed: int, progress: float) -> StepOutcome:
        """Take the step on images, and on some of the tokens behind the split.

        Raises:
            UnsupportedModelError: It fails, or sees all tokens.
        """
        step = LiveStep(split, tokens)
        try:
            outcome = self._step({**self.batch, KEPT_TOKENS: self.positions}, step, seed, split, progress)
        except Exception as error:
            raise refusal(split, tokens.token_keep, f"a step fails with {type(error).__name__}: {error}") from error
        if step.steps == 0:
            name = type(self.trainer).__name__
            raise refusal(
                split, tokens.token_keep, f"{name}.training_step does not hand its batch to that of its base class"
            )
        return outcome

    def cached(self, split: Split, hidden_states: Tensor, seed: int, progress: float = 0.0) -> StepOutcome:
        """Take the step on hidden states."""
        inputs = {name: value for name, value in self.batch.items() if name != "pixel_values"}
        return self._step({**inputs, _STATES: hidden_states}, _StatesStep(split), seed, split, progress)

    @property
    def progress(self) -> tuple[float, ...]:
        """Parts of the run at which to compare: a loss of the user's own may change with it."""
        # Of the object, not of its class: a method may have been set on the trainer itself.
        methods = (self.trainer.compute_loss, self.trainer.training_step)
        ours = all(getattr(method, "__module__", "").partition(".")[0] == "hf_freezecache" for method in methods)
        return (0.0,) if ours and self.trainer.compute_loss_func is None else (0.0, 0.5, 1.0)


def _described(batch: Mapping[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for name, v in sorted(batch.items())
    )


# ---- Comparing ----


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
    if added := sorted(run.data.prefix_inputs - rehearsal.batch.keys()):
        return (
            f"frozen blocks take {', '.join(added)}, which _prepare_inputs adds to each batch; a cache is built of what the collator gives: "
            "let it give them"
        )
    inputs = {name: rehearsal.batch[name] for name in ("pixel_values", *sorted(run.data.prefix_inputs))}
    live = rehearsal.live(split, 0)
    if rehearsal.may_grow and bool(torch.isnan(live.loss)):
        raise DataError("The loss of the first rows is NaN.")
    try:
        trained = trained_parameters(rehearsal.model, live)
        with noting_uses(trained) as took_trained_weights:
            hidden_states = runtime.run_frozen(split.prefix, **inputs)
        rows = len(inputs["pixel_values"])
        if hidden_states.dim() != 3 or len(hidden_states) != rows:
            return (
                f"hidden states there are {tuple(hidden_states.shape)} for {rows} images; a cache stores (tokens, hidden) of "
                "each image"
            )
        if took_trained_weights() and move_with_what_trains(
            rehearsal.trainer, runtime.run_frozen, split, inputs, trained
        ):
            return (
                "hidden states there are others once the weights behind them have been trained, as where a trained head makes the "
                "masks of frozen blocks"
            )
        if rehearsal.positions is not None:
            hidden_states = take_tokens(hidden_states, rehearsal.positions)
        # A module or a hook may keep what it saw: then a step from the cache finds what the prefix saw last.
        other = first_row({**inputs, "pixel_values": other_images(inputs["pixel_values"])})
        runtime.run_frozen(split.prefix, **other)
        narrow = str(runtime.accelerator.mixed_precision) != "no" or hidden_states.dtype.itemsize < 4
        kind = "cpu" if hidden_states.device.type == "cpu" else "16 bits" if narrow else "other"
        # Tokens in random order, say, may change the loss by no more than rounding does.
        tolerance = 0.0 if kind == "cpu" and live.draws else TOLERANCES[kind]
        for seed in range(1 + (_TRIALS if live.draws else 0)):
            expected = live if seed == 0 else rehearsal.live(split, seed)
            if seed > 0:
                runtime.run_frozen(split.prefix, **other)
            differs = difference(expected, rehearsal.cached(split, hidden_states, seed), tolerance)
            if differs is not None:
                drawn = "; random numbers are drawn before the split, so hidden states are new in each step"
                return differs + (drawn if live.draws else "")
        # Large weights make much of rounding, which is none where equal shapes give equal bits.
        moves = (0.05, 0.5) if kind == "cpu" else (0.05,)
        for step in moves if sleeps(live) else ():
            with rehearsal.with_moved_weights(trained, step):
                expected = rehearsal.live(split, 0)
                runtime.run_frozen(split.prefix, **other)
                differs = difference(expected, rehearsal.cached(split, hidden_states, 0), tolerance)
            if differs is not None and bool(expected.loss.isfinite()):
                return f"{differs}, once weights have been trained"
        for progress in rehearsal.progress[1:]:
            expected = rehearsal.live(split, 0, progress)
            runtime.run_frozen(split.prefix, **other)
            differs = difference(expected, rehearsal.cached(split, hidden_states, 0, progress), tolerance)
            if differs is not None:
                return f"{differs}, {progress:.0%} into the run"
    except FreezeCacheError as error:
        return str(error).removesuffix(".")
    except Exception as error:
        return f"a step from the cache fails with {type(error).__name__}: {error}"
    return None


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
    with run.runtime.everyone.fail_together():
        few, many = len(run.data.example_batch["pixel_values"]), min(run.runtime.batch_size, len(run.data.views))
        try:
            refusals = _rehearse(run, wrapped, run.data.example_batch, many > few)
        except DataError:
            if many <= few:
                raise
            # A loss may need more rows: it takes the hardest of them, or pairs of a class.
            batch = run.data.collate([run.data.views[row, 0] for row in range(many)])
            refusals = _rehearse(run, wrapped, batch, False)
    for split_point, reason in refusals.items():
        if run.chosen is not None and split_point == run.splits.num_blocks:
            words = "schedule='auto' trains the head from images, since from a cache it would not be the same: %s."
            logger.warning(words, reason)
        elif run.config.mode == "always":
            raise UnsupportedModelError(
                f"{type(run.runtime.model).__name__} cannot be trained from a cache behind {split_point} frozen blocks: {reason}. "
                "Cached training must be the same as training on images. Freeze other blocks, train such stages on images "
                "with CacheConfig(mode='auto') or 'never', or use plain Trainer."
            )
    run.refusals = refusals


def _rehearse(run: Any, wrapped: nn.Module, batch: Mapping[str, Tensor], may_grow: bool) -> dict[int, str]:
    """Rehearse a step of each stage on one batch; return why some stages cannot be cached, by split point."""
    model, frozen = run.runtime.model, run.frozen or 0
    refusals: dict[int, str] = {}
    with run.runtime.rehearsing() as trainer:
        # As a loader gives it: each step prepares it, once.
        moved = run.runtime.to_device(dict(batch))
        rehearsal = _Rehearsal(trainer, model, wrapped, moved, run.live_loader, may_grow)
        for stage in sorted(run.foreseen, key=lambda stage: stage.split_point):
            if stage.split_point < frozen or stage.split_point in refusals:
                continue
            changes = freeze(run.splits.at(stage.split_point))
            try:
                check_something_trains(stage, model)
                rehearsal.keep(_tokens_of(run, rehearsal, stage))
                if run.config.mode != "never" and stage.split_point > 0:
                    reason = _why_not_cached(rehearsal, run, stage.split_point)
                    if reason is not None:
                        refusals[stage.split_point] = reason
                elif rehearsal.tokens is not None:
                    rehearsal.live(run.splits.at(stage.tokens_point), 0)
                elif stage == run.stages[0]:
                    rehearsal.live(run.splits.at(stage.split_point), 0)
            finally:
                rehearsal.keep(None)
                changes.thaw()
    return refusals


def _tokens_of(run: Any, rehearsal: _Rehearsal, stage: Stage) -> TokenSubset | None:
    """Return what draws the tokens of a stage, noted in ``run.tokens``; ``None`` if it sees all, as does a head that ``auto`` trains alone.

    Raises:
        UnsupportedModelError: The model cannot be trained on some of its tokens, and the user asks for it.
        DataError: A training step on all tokens fails.
    """
    split, token_keep = run.splits.at(stage.tokens_point), run.token_keep[stage.split_point == 0]
    if token_keep == 1 or (run.chosen is not None and stage.split_point == run.splits.num_blocks):
        return None
    rehearsal.live(split, 0)  # what is wrong with all tokens, this tells
    try:
        tokens = check_fewer_tokens(split, token_keep, run.sampler.seed, run.runtime, rehearsal.batch)
        if run.chosen is not None:
            rehearsal.keep(tokens)
            rehearsal.live(split, 0)
    except UnsupportedModelError as error:
        if run.chosen is None:
            raise
        logger.warning("schedule='auto' trains on all tokens, which takes more than it says. %s", error)
        return None
    run.tokens[stage.split_point] = tokens
    return tokens
