"""Evaluates a few rows from images and from hidden states, before a cache stands in for the images: both must give the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cache.reader import CacheReader
from ..data.collators import collate_cached
from ..data.seeding import preserved_random_state
from ..data.views import same_examples
from ..errors import UnsupportedSetupError
from ..model.hashing import hash_config
from ..model.probe import evaluating, first_row, other_images
from ..model.split import Split
from ..model.threads import one_thread_if_small
from ..model.withheld import Withheld
from .cache_check import content_name
from .cached_step import CachedStep, predict_on_states
from .remembered import Remembered
from .runtime import Runtime

__all__ = ["EvaluationStep", "compare_evaluations"]

#: Relative difference of outputs on devices whose kernels need not be deterministic; as ``Split.verify`` has it.
_TOLERANCE = 1e-3
#: Rows that are tried of a cache whose first batch was compared before.
_ROWS = 2
#: Stands for the packed arrays of a cached batch. Its name is one of theirs.
_STATES = "packed.compared"
#: Caches whose first batch gave the same as the images, by name and by all that decides about bits.
_COMPARED: Remembered[bool] = Remembered(64)


class EvaluationStep(Protocol):
    """Evaluates batches that hold hidden states."""

    def predict(
        self, prediction_step: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Run ``prediction_step(model, inputs, ...)`` on hidden states."""


@dataclass(frozen=True)
class _StatesStep:
    """Evaluates a batch of hidden states, as ``CachedStep`` does once it has decoded them."""

    split: Split

    def predict(
        self,
        prediction_step: Callable[..., Any],
        model: nn.Module,
        inputs: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        batch = dict(inputs)
        return predict_on_states(self.split, batch.pop(_STATES), batch, prediction_step, model, *args, **kwargs)


def compare_evaluations(
    trainer: Any,
    images: Any,
    cached: Any,
    step: CachedStep,
    prefix_inputs: frozenset[str],
    runtime: Runtime,
    use: Callable[[EvaluationStep], None],
) -> None:
    """Evaluate the first rows from images and from hidden states.

    A whole batch is read from the cache, and must give what the images do, to the bit on a CPU. Bits do not depend on weights:
    for another model of the same class over the same cache this need not be found out again in one process. What the model gives may
    depend on images in its own way, and is tried of every model: with two rows, whose hidden states are computed for it.

    Args:
        trainer: The user's trainer.
        images: Its loader of images.
        cached: The cache, whose item ``i`` is the ``i``-th row.
        step: Evaluates batches of the cache.
        prefix_inputs: Names of the parts of a batch, beside ``pixel_values``, that the frozen blocks take.
        runtime: The trainer, as its stages see it.
        use: Sets what the trainer's ``prediction_step`` evaluates hidden states with.

    Raises:
        UnsupportedSetupError: Hidden states give something else, or fail.
    """
    name = _name(trainer, cached.cached.reader, step, runtime)
    whole = not _COMPARED.get(name)
    model, rows = trainer.model, range(min(trainer.args.eval_batch_size if whole else _ROWS, len(cached)))
    with (
        nullcontext() if whole else one_thread_if_small(model),
        preserved_random_state(),
        evaluating(model, parameter_gradients=None),
        trainer.accelerator.autocast(),
    ):
        batch = images.collate_fn([images.dataset[row] for row in rows])
        expected = trainer.prediction_step(model, batch, False)
        try:
            if whole:
                use(step)
                batch = collate_cached(cached.__getitems__(list(rows)))
            else:
                use(_StatesStep(step.split))
                batch = _with_states(batch, step.split, prefix_inputs, runtime)
            found = trainer.prediction_step(model, batch, False)
        except Exception as error:
            raise UnsupportedSetupError(
                f"{type(model).__name__} cannot be evaluated without images: {type(error).__name__}: {error}"
            ) from error
    outputs = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    if len(outputs[0]) != len(outputs[1]) or not all(map(_same, *outputs)):
        raise UnsupportedSetupError(
            f"{type(model).__name__} gives another result when it is evaluated without images: its outputs depend on them, or "
            "show what frozen blocks gave."
        )
    use(step)
    _COMPARED.keep(name, True)


def _name(trainer: Any, reader: CacheReader, step: CachedStep, runtime: Runtime) -> tuple[Any, ...]:
    """Return a name of what decides about the bits of an evaluation, beside weights behind the split."""
    model, args = trainer.model, trainer.args
    return (
        content_name(reader),
        type(trainer),
        type(model),
        hash_config(getattr(model, "config", None)),
        step.split.split_point,
        *sorted({str(p.dtype) for p in model.parameters()}),
        args.eval_batch_size,
        str(args.device),
        str(runtime.accelerator.mixed_precision),
        torch.get_num_threads(),
        *_matmul_precision(),
    )


def _matmul_precision() -> tuple[str | None, ...]:
    """Return how products are rounded, as far as torch says: it has an old way to say so, which fails once the new one was used, as by ``tf32=True``."""
    backends = (torch.backends, torch.backends.cuda.matmul)
    said = [getattr(backend, "fp32_precision", None) for backend in backends]
    with suppress(RuntimeError):
        said.append(torch.get_float32_matmul_precision())
    return tuple(said)


def _with_states(
    batch: Mapping[str, Any], split: Split, prefix_inputs: frozenset[str], runtime: Runtime
) -> dict[str, Any]:
    """Return a batch of images as one of the hidden states that the model gives of them now."""
    inputs = {name: batch[name] for name in ("pixel_values", *sorted(prefix_inputs))}
    states = runtime.run_frozen(split.prefix, **inputs)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    # A module may keep what it saw last: that must not be these images.
    other = first_row({**inputs, "pixel_values": other_images(inputs["pixel_values"])})
    runtime.run_frozen(split.prefix, **other)
    return {**rest, _STATES: states}


def _same(exact: Any, found: Any) -> bool:
    if not isinstance(exact, Tensor):
        return bool(exact == found)
    if not isinstance(found, Tensor) or isinstance(found, Withheld) or exact.shape != found.shape:
        return False
    if exact.device.type == "cpu" or not exact.is_floating_point():
        return same_examples(exact, found)
    return _rounded_alike(exact, found)


def _rounded_alike(exact: Tensor, found: Tensor) -> bool:
    """Say whether two tensors differ by rounding; what is not finite must be equal, NaN in the same places."""
    finite = exact.isfinite()
    if not same_examples(exact.masked_fill(finite, 0), found.masked_fill(finite, 0)):
        return False
    errors = (exact - found)[finite].abs()
    return not len(errors) or bool(errors.max() <= _TOLERANCE * exact[finite].abs().max())
