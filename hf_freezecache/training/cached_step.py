"""One training step on a batch of hidden states, around ``Trainer``'s own step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import ViewCodec
from ..codecs.array_names import KEPT
from ..data.collators import split_packed
from ..data.feature_augmenter import FeatureAugmenter
from ..data.seeding import preserved_random_state
from ..errors import UnsupportedSetupError
from ..model.split import Split
from ..model.tokens import take_tokens, token_grid
from ..model.withheld import Withheld
from .rehearsal_copy import keeping_generators, preserved_device_state

__all__ = ["CachedStep", "predict_on_states", "train_on_states"]

logger = logging.getLogger(__name__)

_NO_IMAGE = (
    "frozen blocks ran on the images before, once for each view. Augment in the data set's transform, or by "
    "CacheConfig(feature_augmentation=...), or train such stages on images with CacheConfig(mode='never')."
)


def train_on_states(
    split: Split,
    hidden_states: Tensor,
    batch: Mapping[str, Any],
    training_step: Callable[..., Tensor],
    model: nn.Module,
    *args: Any,
    looks: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Run ``training_step(model, batch, ...)`` with hidden states at the split and no images.

    Args:
        split: The model, split where the hidden states enter.
        hidden_states: (batch, tokens, hidden), on the training device.
        batch: The rest of the batch.
        training_step: ``Trainer.training_step``.
        model: The model, wrapped or not.
        args: As for ``training_step``.
        looks: Whether the loss is looked at, for which an accelerator must have computed it. If not, use of what does not
            exist gives NaN.
        kwargs: As for ``training_step``.

    Returns:
        The loss, a scalar.

    Raises:
        UnsupportedSetupError: Model or loss use images, or what frozen blocks gave, which do not exist.
    """

    def step(fill: float, model: nn.Module) -> Tensor:
        images = Withheld.of(split.placeholder(len(hidden_states)), "pixel_values", _NO_IMAGE)
        with split.injecting(hidden_states, fill):
            return training_step(model, {**batch, "pixel_values": images}, *args, **kwargs)

    loss = step(float("nan"), model)
    # A loss may be NaN for reasons of its own: then it stays NaN where 0 stands for what does not exist.
    if (
        looks
        and bool(torch.isnan(loss))
        and not _stays_nan(lambda: step(0.0, split.model), split.model, training_step, hidden_states.device)
    ):
        raise UnsupportedSetupError(
            f"The loss of {type(split.model).__name__} depends on the images or on outputs of the first {split.split_point} "
            f"blocks, which do not exist while training from a cache: {_NO_IMAGE}"
        )
    return loss


def _stays_nan(
    step: Callable[[], Tensor], model: nn.Module, training_step: Callable[..., Tensor], device: torch.device
) -> bool:
    """Say whether the loss of another step is NaN, too, or cannot be had: without a wrapper, since one process of several may ask."""
    try:
        with _leaving_no_trace(model), _drawing_nothing(training_step, device):
            return bool(torch.isnan(step()))
    except UnsupportedSetupError:
        raise
    except Exception as error:  # a loss that asks for the wrapper, say
        logger.debug("A second look at a loss of NaN failed with %r", error)
        return True


@contextmanager
def _drawing_nothing(training_step: Callable[..., Tensor], device: torch.device) -> Iterator[None]:
    """Put random states back: the global ones, those of the device, and of generators of the trainer's own."""
    trainer = getattr(training_step, "__self__", None)
    own = nullcontext() if trainer is None else keeping_generators(trainer)
    with preserved_random_state(), preserved_device_state(device), own:
        yield


@contextmanager
def _leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Leave gradients and buffers as they are, whatever a step does."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.data.copy_(value)


def predict_on_states(
    split: Split,
    hidden_states: Tensor,
    batch: Mapping[str, Any],
    prediction_step: Callable[..., Any],
    model: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run ``prediction_step(model, batch, ...)`` with hidden states at the split and no images.

    Args:
        split: The model, split where the hidden states enter.
        hidden_states: (batch, tokens, hidden), on the training device.
        batch: The rest of the batch.
        prediction_step: ``Trainer.prediction_step``.
        model: The model, wrapped or not.
        args: As for ``prediction_step``.
        kwargs: As for ``prediction_step``.

    Returns:
        What ``prediction_step`` returns.

    Raises:
        UnsupportedSetupError: Model or loss use the images.
    """
    images = Withheld.of(split.placeholder(len(hidden_states)), "pixel_values", _NO_IMAGE)
    with split.injecting(hidden_states):
        return prediction_step(model, {**batch, "pixel_values": images}, *args, **kwargs)


@dataclass(frozen=True)
class CachedStep:
    """Trains on batches of a cache through the suffix; batches of images go to ``Trainer`` as they are.

    Attributes:
        split: The model, split where the cached hidden states enter.
        decoder: Decodes packed batches on the training device.
        dtype: Dtype of the hidden states.
        compute_dtype: Dtype of the decoder's arithmetic; ``None`` for fp32.
        augmenter: Augments hidden states, if the user asks for it.
        to_device: Moves packed tensors to the training device. What else a user's trainer does with a batch, ``training_step`` does.
        num_tokens: Tokens per sample that a step trains on.
        looks: Whether each loss is looked at, see ``train_on_states``.
        prepare_inputs: Does with a batch what ``training_step`` does, for the labels that the augmenter mixes.
    """

    split: Split
    decoder: ViewCodec
    dtype: torch.dtype
    compute_dtype: torch.dtype | None
    augmenter: FeatureAugmenter | None
    to_device: Callable[[dict[str, Any]], dict[str, Any]]
    num_tokens: int
    looks: bool = True
    prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __call__(
        self,
        training_step: Callable[..., Tensor],
        global_step: int,
        model: nn.Module,
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Run ``training_step(model, inputs, ...)``, which finds the hidden states at the split.

        Args:
            training_step: ``Trainer.training_step``.
            global_step: Optimizer steps done, for the random numbers of the augmenter.
            model: The model, wrapped or not.
            inputs: A packed batch, or one of images.
            args: As for ``training_step``.
            kwargs: As for ``training_step``.

        Returns:
            The loss, a scalar.

        Raises:
            UnsupportedSetupError: See ``train_on_states``.
        """
        packed, rest = split_packed(inputs) if isinstance(inputs, Mapping) else ({}, {})
        if not packed:
            return training_step(model, inputs, *args, **kwargs)
        packed = self.to_device(packed)
        positions = packed.pop(KEPT, None)
        # An augmentation sees all tokens: it may need their grid.
        early = positions if self.augmenter is None else None
        with torch.no_grad():
            hidden_states = self.decoder.dequantize(packed, self.dtype, self.compute_dtype, early)
        if self.augmenter is not None:
            grid = token_grid(hidden_states.shape[1], self.split.image_shape, getattr(self.split.model, "config", None))
            labels = self._labels(rest, training_step, hidden_states)
            hidden_states = self.augmenter.step(hidden_states, labels, grid, global_step)
            if positions is not None:
                hidden_states = take_tokens(hidden_states, positions)
        try:
            return train_on_states(
                self.split, hidden_states, rest, training_step, model, *args, looks=self.looks, **kwargs
            )
        finally:
            if self.augmenter is not None:
                self.augmenter.targets = None

    def _labels(
        self, rest: Mapping[str, Any], training_step: Callable[..., Tensor], hidden_states: Tensor
    ) -> Tensor | None:
        """Return the labels that are mixed: as ``training_step`` will have them, which prepares the batch once more."""
        if self.prepare_inputs is None or not (self.augmenter and self.augmenter.mixes):
            return self.to_device(dict(rest)).get("labels")
        images = Withheld.of(self.split.placeholder(len(hidden_states)), "pixel_values", _NO_IMAGE)
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in rest.items()}
        with _drawing_nothing(training_step, hidden_states.device):
            return self.prepare_inputs({**copied, "pixel_values": images}).get("labels")

    def predict(
        self,
        prediction_step: Callable[..., Any],
        model: nn.Module,
        inputs: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run ``prediction_step(model, inputs, ...)``, which finds the hidden states of a batch at the split.

        Args:
            prediction_step: ``Trainer.prediction_step``.
            model: The model, wrapped or not.
            inputs: A packed batch.
            args: As for ``prediction_step``.
            kwargs: As for ``prediction_step``.

        Returns:
            What ``prediction_step`` returns.

        Raises:
            UnsupportedSetupError: Model or loss use the images.
        """
        packed, rest = split_packed(inputs)
        with torch.no_grad():
            hidden_states = self.decoder.dequantize(self.to_device(packed), self.dtype, self.compute_dtype)
        return predict_on_states(self.split, hidden_states, rest, prediction_step, model, *args, **kwargs)

    @property
    def soft_loss(self) -> Callable[..., Tensor] | None:
        """The loss on soft labels while a batch of mixed samples is trained on, else ``None``."""
        if self.augmenter is None or self.augmenter.targets is None:
            return None
        return self.augmenter.loss

    def as_images(self, inputs: Any) -> Any:
        """Return a packed batch as one of blank images, which take no memory; others as they are.

        ``Trainer`` counts the inputs that were seen by the shape of the images.
        """
        packed, rest = split_packed(inputs) if isinstance(inputs, Mapping) else ({}, {})
        if not packed:
            return inputs
        return {**rest, "pixel_values": self.split.placeholder(len(next(iter(packed.values()))))}

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int | None:
        """Count 6 operations per trainable parameter and token of a packed batch; ``None`` for one of images.

        Source: the estimate of ``PreTrainedModel.floating_point_ops``, with tokens for inputs and without what does not
        run.
        """
        packed, _ = split_packed(inputs)
        if not packed:
            return None
        samples = len(next(iter(packed.values())))
        return 6 * samples * self.num_tokens * sum(p.numel() for p in self.split.model.parameters() if p.requires_grad)
