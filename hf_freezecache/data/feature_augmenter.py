"""Augments the cached batches of one training run, and computes the loss of those whose samples it mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedSetupError
from .feature_augmentation import FeatureAugmentation, FeatureBatch, step_generator
from .soft_labels import class_targets, soft_cross_entropy
from .task import IMAGE_CLASSIFICATION, Task

__all__ = ["FeatureAugmenter"]


def _logits(outputs: Any, position: int = 0) -> Tensor:
    """Return the logits of a model's output: by name, or by position in a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[position]


class FeatureAugmenter:
    """Augments the cached batches of one run, and keeps the soft labels of the current batch for its loss.

    Args:
        augmentations: They act in this order.
        num_classes: Classes of the model, or ``None`` if its labels are not classes.
        seed: Seed of the run.
        label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        rank: Rank of this process among all processes of the run.
        task: The model's task, for its loss on soft labels.

    Attributes:
        mixes: Whether an augmentation mixes samples.
        targets: Soft labels (batch, classes) float32 of the current batch. ``None`` between batches and where nothing mixes.

    Raises:
        UnsupportedSetupError: An augmentation mixes samples, and their labels are not classes.
    """

    def __init__(
        self,
        augmentations: tuple[FeatureAugmentation, ...],
        num_classes: int | None,
        seed: int = 0,
        label_smoothing: float = 0.0,
        rank: int = 0,
        task: Task = IMAGE_CLASSIFICATION,
    ) -> None:
        self.augmentations = augmentations
        self.mixes = any(augmentation.mixes for augmentation in augmentations)
        self.targets: Tensor | None = None
        self._num_classes = num_classes
        self._soft_loss = task.soft_loss
        self._seed = seed
        self._label_smoothing = label_smoothing
        self._rank = rank
        #: Optimizer step and micro-step of the last batch.
        self._last_step = (-1, -1)
        if self.mixes and num_classes is None:
            raise UnsupportedSetupError(
                "feature_augmentation mixes samples, which takes one class per sample, but the model's labels are no classes "
                "(see num_labels and problem_type of its configuration). Leave mixup and cutmix out."
            )

    def step(
        self, hidden_states: Tensor, labels: Any, token_grid: tuple[int, tuple[int, int]], global_step: int
    ) -> Tensor:
        """Return the augmented hidden states of the next batch, and set ``targets``.

        Args:
            hidden_states: (batch, tokens, hidden).
            labels: Classes (batch,). They are not read where nothing mixes.
            token_grid: Number of prefix tokens, and (height, width) of the patches.
            global_step: Number of optimizer steps done. Batches of one step differ by their order. A resumed run has the
                same order, since checkpoints are saved between steps.

        Raises:
            UnsupportedSetupError: As ``augment``.
            DataError: As ``augment``.
        """
        last_global_step, last_micro_step = self._last_step
        self._last_step = (global_step, last_micro_step + 1 if global_step == last_global_step else 0)
        generator = step_generator(self._seed, *self._last_step, self._rank)
        batch = self.augment(hidden_states, labels, token_grid, generator)
        self.targets = batch.targets
        return batch.hidden_states

    def augment(
        self,
        hidden_states: Tensor,
        labels: Any,
        token_grid: tuple[int, tuple[int, int]],
        generator: torch.Generator,
    ) -> FeatureBatch:
        """Apply all augmentations in order.

        Args:
            hidden_states: (batch, tokens, hidden).
            labels: Classes (batch,). They are not read where nothing mixes.
            token_grid: Number of prefix tokens, and (height, width) of the patches.
            generator: A CPU generator, from which all random numbers are drawn.

        Raises:
            UnsupportedSetupError: An augmentation needs the grid of patches, and the tokens form none.
            DataError: The labels are not one integer class per sample, or the shapes do not fit together.
        """
        prefix_tokens, grid = token_grid
        needing = [type(a).__name__ for a in self.augmentations if a.needs_grid]
        if needing and prefix_tokens == 0 and grid[0] == 1:  # how `token_grid` says that it found no grid
            raise UnsupportedSetupError(
                f"feature_augmentation: {', '.join(needing)} must know which tokens are patches, but the model's "
                f"{grid[1]} tokens form no grid in the proportions of the image. Leave all but mixup out."
            )
        targets = None
        if self.mixes and self._num_classes is not None:
            targets = class_targets(labels, self._num_classes).to(hidden_states.device)
        batch = FeatureBatch(hidden_states, targets, prefix_tokens, grid)
        for augmentation in self.augmentations:
            batch = augmentation(batch, generator)
        return batch

    def loss(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss with ``targets`` in place of the hard labels; its signature is that of ``Trainer.compute_loss_func``.

        Raises:
            DataError: The logits of the model are not (batch, classes).
        """
        assert self.targets is not None
        return self._soft_loss(_logits(outputs), self.targets, self._label_smoothing, num_items_in_batch)

    def without_effect(
        self, suffix: Callable[[Tensor], Tensor], hidden_states: Tensor, token_grid: tuple[int, tuple[int, int]]
    ) -> list[str]:
        """Return the class names of augmentations that change no output, even at their strongest.

        An output counts as unchanged if it moves by at most 3e-5 of its largest absolute value.

        Args:
            suffix: Maps hidden states to the output, in fp32: coarser rounding would look like an effect.
            hidden_states: (batch, tokens, hidden).
            token_grid: Number of prefix tokens, and (height, width) of the patches.
        """
        batch = FeatureBatch(hidden_states, None, *token_grid)
        before = suffix(hidden_states).float()
        names = []
        for augmentation in self.augmentations:
            if augmentation.mixes:
                continue
            strongest = type(augmentation)(augmentation.largest)  # type: ignore[call-arg]
            after = suffix(strongest(batch, step_generator(0, 0)).hidden_states).float()
            if bool((after - before).abs().max() <= 3e-5 * before.abs().max()):
                names.append(type(augmentation).__name__)
        return names

    def check_loss(self, loss: Tensor, outputs: Any, labels: Any) -> None:
        """Refuse to mix samples for a model whose own loss is not cross-entropy: soft labels would silently replace it.

        Args:
            loss: The model's own loss, in eval mode.
            outputs: The model's output, with its loss.
            labels: Classes (batch,).

        Raises:
            UnsupportedSetupError: The loss differs from cross-entropy by more than 1e-3, relative.
            DataError: The logits are not (batch, classes), or the labels are not classes (batch,).
        """
        assert self._num_classes is not None
        logits = _logits(outputs, position=1)
        expected = float(soft_cross_entropy(logits, class_targets(labels, self._num_classes).to(logits.device)))
        # The comparison is false for NaN, which is the loss of rows without labels.
        if abs(expected - float(loss)) > 1e-3 * max(1.0, abs(expected)):
            raise UnsupportedSetupError(
                "feature_augmentation mixes labels, for which the loss must be cross-entropy, but the model's own is another: "
                f"{float(loss):.6g} on the first rows, where cross-entropy is {expected:.6g}. Leave mixup and cutmix out."
            )
