"""Trains on some of the patch tokens behind the split: finds out whether a model can, and takes such steps on images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.kept_tokens import KEPT_TOKENS, TokenSubset
from ..errors import DataError, FreezeCacheError, UnsupportedModelError
from ..model.kept_tokens import keeping_tokens
from ..model.probe import evaluating
from ..model.split import Split
from ..model.tokens import token_grid
from .draws import drawing
from .rehearsal_copy import keeping_parameters
from .runtime import Runtime
from .step_outcome import StepOutcome, difference

__all__ = ["LiveStep", "check_fewer_tokens", "example_positions", "refusal", "why_not_fewer_tokens"]

#: Largest difference of loss and gradients, as in ``step_outcome.TOLERANCES``, that counts as rounding where tokens come in
#: another order: sums are in another order, too. What depends on the order of patches moves gradients by their own size.
_ROUNDING = {"32 bits": 5e-3, "16 bits": 5e-2}

#: Standard deviation of what is added to parameters; weights of transformers begin at 0.02.
_STIRRING = 0.01


@dataclass
class LiveStep:
    """Trains on batches of images that say which tokens each row keeps behind the split; others go to ``Trainer`` as they are.

    Attributes:
        split: The model, split behind the blocks that see all tokens.
        tokens: What drew the tokens.
        steps: Steps that were taken on some of the tokens.
    """

    split: Split
    tokens: TokenSubset
    steps: int = 0
    soft_loss = None

    def __call__(
        self,
        training_step: Callable[..., Tensor],
        global_step: int,
        model: nn.Module,
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Run ``training_step(model, inputs, ...)``, with its arguments as in ``CachedStep``.

        Raises:
            UnsupportedSetupError: The model runs on other rows than those of the batch.
        """
        if not isinstance(inputs, Mapping) or KEPT_TOKENS not in inputs:
            return training_step(model, inputs, *args, **kwargs)
        self.steps += 1
        with keeping_tokens(self.split, inputs[KEPT_TOKENS]):
            return training_step(model, self.as_images(inputs), *args, **kwargs)

    def as_images(self, inputs: Any) -> Any:
        """Return a batch without the positions of its tokens."""
        if not isinstance(inputs, Mapping):
            return inputs
        return {name: value for name, value in inputs.items() if name != KEPT_TOKENS}

    @functools.cached_property
    def _whole(self) -> set[nn.Parameter]:
        """Parameters that see all tokens; `Trainer` counts operations in every step."""
        return set(self.split.prefix_parameters().values())

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int | None:
        """Count 6 operations per trainable parameter and token that it sees, 2 per other parameter and token; ``None`` as ``CachedStep``."""
        if KEPT_TOKENS not in inputs:
            return None
        samples, kept = inputs[KEPT_TOKENS].shape
        count = 0
        for parameter in self.split.model.parameters():
            all_tokens = parameter in self._whole or not parameter.requires_grad
            tokens = self.tokens.num_tokens if all_tokens else kept
            count += (6 if parameter.requires_grad else 2) * tokens * parameter.numel()
        return int(samples * count)


def _find_tokens(split: Split, num_tokens: int, token_keep: float, seed: int) -> TokenSubset | None:
    """Return what draws the tokens of a stage; ``None`` if nothing tells which of its tokens are patches."""
    prefix_tokens, (height, width) = token_grid(num_tokens, split.image_shape, getattr(split.model, "config", None))
    if prefix_tokens == 0 and height == 1:  # how `token_grid` says that it found no grid
        return None
    return TokenSubset(seed, prefix_tokens, height * width, token_keep)


def example_positions(tokens: TokenSubset, rows: int) -> Tensor:
    """Return the positions of kept tokens of the first rows, in view 0 and epoch 0, (rows, kept) int64."""
    return torch.stack([tokens.positions(row, 0, 0) for row in range(rows)])


@contextmanager
def _in_full_precision(model: nn.Module) -> Iterator[None]:
    """Run a model without the autocast that accelerate has put around its forward: 16 bits would hide small differences."""
    wrapped, original = vars(model).get("forward"), vars(model).get("_original_forward")
    if original is None or wrapped is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def _outcome(trainer: Any, split: Split, batch: Mapping[str, Any], positions: Tensor | None) -> tuple[StepOutcome, Any]:
    """Compute loss and gradients in eval mode, under fixed random states; return them and the shape of the hidden states.

    All that trains is stirred a little, alike in each call: a new head or position bias of zeros would hide what training
    will make of it.
    """
    model = split.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    with (
        keeping_parameters(trainer),
        drawing(0),
        evaluating(model, parameter_gradients=None),
        _in_full_precision(model),
        keeping_tokens(split, positions) as seen,
    ):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=_STIRRING)
        loss = trainer.compute_loss(model, dict(batch))
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return StepOutcome(loss.detach(), dict(zip(parameters, gradients, strict=True)), {}), seen[-1] if seen else None


def why_not_fewer_tokens(split: Split, token_keep: float, runtime: Runtime, batch: Mapping[str, Tensor]) -> str | None:
    """Say why a model cannot be trained on some of its patch tokens behind a split. It is found by trying, not by name.

    What comes behind the split must not know where a patch lies: the patch tokens in another order must give the same loss
    and gradients, up to rounding. And fewer tokens must run. Position biases, windows, rotary codes in each block and heads on
    a grid fail one or the other.

    Args:
        split: The model, split behind at least one block, frozen or not.
        token_keep: Share of the patch tokens that is to be kept.
        runtime: The trainer.
        batch: The first rows, collated: name -> (rows, ...).

    Returns:
        The reason, or ``None`` if the model can.

    Raises:
        DataError: The loss of the first rows fails on all tokens, or is not finite.
    """
    return _try_fewer_tokens(split, token_keep, 0, runtime, batch)[0]


def check_fewer_tokens(
    split: Split, token_keep: float, seed: int, runtime: Runtime, batch: Mapping[str, Any]
) -> TokenSubset:
    """Return what draws the tokens of a stage.

    Args:
        split: The model, split behind the blocks that see all tokens.
        token_keep: Share of the patch tokens that is kept.
        seed: Seed of the draws.
        runtime: The trainer.
        batch: The first rows, collated.

    Raises:
        UnsupportedModelError: The model cannot be trained on some of its patch tokens.
        DataError: The loss of the first rows fails on all tokens, or is not finite.
    """
    reason, tokens = _try_fewer_tokens(split, token_keep, seed, runtime, batch)
    if tokens is None:
        raise refusal(split, token_keep, str(reason))
    return tokens


def _try_fewer_tokens(
    split: Split, token_keep: float, seed: int, runtime: Runtime, batch: Mapping[str, Any]
) -> tuple[str | None, TokenSubset | None]:
    """Return why a model cannot be trained on some of its tokens, or what draws them."""
    rows = len(batch["pixel_values"])
    with runtime.rehearsing() as trainer:
        inputs = runtime.prepare_inputs(dict(batch))
        try:
            expected, shape = _outcome(trainer, split, inputs, None)
        except FreezeCacheError:
            raise
        except Exception as error:
            raise DataError(
                f"The loss of the first rows fails with {type(error).__name__}: {error}. Do model, labels and loss fit each "
                "other? Plain Trainer fails on them alike."
            ) from error
        if not bool(torch.isfinite(expected.loss)):
            raise DataError(f"The loss of the first rows is {float(expected.loss)}; expected a finite number.")
        if shape is None or len(shape) != 3 or shape[0] != rows:
            found = "are not computed" if shape is None else f"are {tuple(shape)} for {rows} images"
            return f"hidden states there {found}, not (images, tokens, hidden)", None
        tokens = _find_tokens(split, shape[1], token_keep, seed)
        if tokens is None:
            return (
                f"its {shape[1]} tokens form no grid in the proportions of the image, so which are patches is unknown",
                None,
            )
        try:
            generator = torch.Generator().manual_seed(0)
            orders = [torch.randperm(tokens.num_patches, generator=generator) for _ in range(rows)]
            prefix = torch.arange(tokens.prefix_tokens).expand(rows, -1)
            moved, _ = _outcome(
                trainer, split, inputs, torch.cat([prefix, torch.stack(orders) + tokens.prefix_tokens], 1)
            )
            narrow = any(p.dtype.itemsize < 4 for p in split.model.parameters() if p.is_floating_point())
            if difference(expected, moved, _ROUNDING["16 bits" if narrow else "32 bits"]) is not None:
                return (
                    "what comes behind them depends on where each patch lies (a position code, windows, a grid)",
                    None,
                )
            fewer, _ = _outcome(trainer, split, inputs, example_positions(tokens, rows))
        except FreezeCacheError as error:
            return str(error).removesuffix("."), None
        except Exception as error:
            return f"{tokens.num_kept} of {tokens.num_tokens} tokens do not run: {type(error).__name__}: {error}", None
    gradients = [gradient for gradient in fewer.gradients.values() if gradient is not None]
    if not all(bool(torch.isfinite(values).all()) for values in (fewer.loss, *gradients)):
        return f"{tokens.num_kept} of {tokens.num_tokens} tokens give a loss or a gradient that is not finite", None
    return None, tokens


def refusal(split: Split, token_keep: float, reason: str) -> UnsupportedModelError:
    """Return the error that says why a model cannot be trained on some of its patch tokens."""
    name, where = "token_keep", f"{split.split_point} frozen blocks"
    if any(parameter.requires_grad for parameter in split.prefix_parameters().values()):
        name, where = "unfrozen_token_keep", "its first block"
    return UnsupportedModelError(
        f"{type(split.model).__name__} cannot be trained with {name}={token_keep:g} behind {where}: "
        f"{reason}. Set FreezeConfig({name}=1), or use a model whose blocks ignore the order of patches, as ViT, DeiT, "
        "DINOv2 and CLIP do."
    )
