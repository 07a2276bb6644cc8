"""Augmentation of cached hidden states while training: what images are no longer there for.

Each is a pure function of a batch and a CPU generator. ``step_generator`` makes that generator from seed and step, so that
the same numbers are drawn on every device, and after a resume.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import (
    DataError,
    UnsupportedSetupError,
)

__all__ = [
    "FEATURE_AUGMENTATIONS",
    "Brightness",
    "CutMix",
    "FeatureAugmentation",
    "FeatureAugmenter",
    "FeatureBatch",
    "Mixup",
    "TokenDropout",
    "TokenFlip",
    "class_targets",
    "parse_feature_augmentation",
    "soft_cross_entropy",
    "step_generator",
]


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Hidden states of a batch, and what is to be predicted of them.

    Attributes:
        hidden_states: (batch, tokens, hidden), of any float dtype, on any device.
        targets: (batch, classes) float32 soft labels on the same device. Rows sum to 1, or to less where a sample without a
            label (-100) was mixed in. ``None`` where nothing mixes samples.
        prefix_tokens: Number of leading tokens that are no patches (CLS, distillation, registers).
        grid: (height, width) of the grid of patches, row by row.
    """

    hidden_states: Tensor
    targets: Tensor | None
    prefix_tokens: int
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            DataError: Tokens are not prefix tokens and a grid of patches, or targets are not one row per sample.
        """
        shape, (height, width) = tuple(self.hidden_states.shape), self.grid
        if len(shape) != 3 or shape[1] != self.prefix_tokens + height * width:
            raise DataError(
                f"Feature augmentation takes hidden states (batch, tokens, hidden) of {self.prefix_tokens} prefix tokens and "
                f"{height} x {width} patches, found shape {shape}. Leave feature_augmentation out for this model."
            )
        if self.targets is not None and (self.targets.dim() != 2 or len(self.targets) != shape[0]):
            raise DataError(f"Soft labels must be ({shape[0]}, classes), found {tuple(self.targets.shape)}.")

    def with_patches(self, patches: Tensor) -> FeatureBatch:
        """Return the batch with other patch tokens (batch, height * width, hidden); prefix tokens stay."""
        prefix, dtype = self.hidden_states[:, : self.prefix_tokens], self.hidden_states.dtype
        return replace(self, hidden_states=torch.cat([prefix, patches.to(dtype)], dim=1))

    @property
    def patches(self) -> Tensor:
        """Patch tokens (batch, height * width, hidden)."""
        return self.hidden_states[:, self.prefix_tokens :]


def _wide(tensor: Tensor) -> Tensor:
    """In fp32, or wider: what is added up must not be rounded between."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class FeatureAugmentation(ABC):
    """Changes hidden states of a training batch, and their labels where it mixes samples.

    A subclass is a frozen dataclass of one number, checked at construction, with an entry in ``FEATURE_AUGMENTATIONS``.

    Attributes:
        mixes: It mixes samples, and so needs and changes ``targets``.
        needs_grid: It must know which tokens are patches, and how they lie.
        largest: The number must lie above 0, and not above this.
    """

    mixes: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    largest: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            UnsupportedSetupError: It is out of range.
        """
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not 0 < value <= self.largest:
                raise UnsupportedSetupError(
                    f"{type(self).__name__}: {name} must be a number above 0 and at most {self.largest:g}, got {value!r}. "
                    "Change it, or leave this augmentation out."
                )

    @abstractmethod
    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Return the changed batch; the given one is left as it is.

        Args:
            batch: Hidden states and soft labels.
            generator: Of the CPU. All random numbers are drawn from it, and then moved to the device of the batch.
        """


@dataclass(frozen=True)
class TokenFlip(FeatureAugmentation):
    """Mirrors the grid of patches left-right; prefix tokens stay.

    Of use only where the suffix knows where a token lies: relative position biases or rotary embeddings in each block
    (BEiT, DINOv3), or a pooling that does. A ViT that adds its position embeddings before block 0 and reads CLS or the mean
    takes tokens in any order, so that this changes nothing but rounding.

    Attributes:
        probability: Of each sample to be mirrored, in (0, 1].
    """

    probability: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """See base class."""
        patches = batch.patches
        mirrored = patches.reshape(len(patches), *batch.grid, -1).flip(2).flatten(1, 2)
        chosen = torch.rand(len(patches), 1, 1, generator=generator) < self.probability
        return batch.with_patches(torch.where(chosen.to(patches.device), mirrored, patches))


@dataclass(frozen=True)
class Brightness(FeatureAugmentation):
    """Shifts each channel of each sample by a random share of its range, in the manner of FroFA.

    After Bär et al., "Frozen Feature Augmentation for Few-Shot Image Classification", CVPR 2024. The values of a channel over
    the patches of a sample are mapped to [0, 1] by their minimum and maximum, an offset drawn uniformly from
    [-strength, strength] for each sample and channel is added, the sum is clipped to [0, 1] and mapped back. Computed
    without the detour, as ``clip(x + offset * (max - min), min, max)``: exact at the ends, and a constant channel stays.

    Prefix tokens stay, and take no part in minimum and maximum: CLS and registers lie far outside the range of the patches in
    some channels, so they would stretch it for all patches, and patches' limits would cut them off.

    Attributes:
        strength: Largest offset, as a share of a channel's range, in (0, 1].
    """

    strength: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """See base class."""
        patches = _wide(batch.patches)
        low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
        offset = torch.rand(len(patches), 1, patches.shape[2], generator=generator) * 2 - 1
        offset = (offset * self.strength).to(patches.device)
        return batch.with_patches(torch.minimum(torch.maximum(patches + offset * (high - low), low), high))


@dataclass(frozen=True)
class TokenDropout(FeatureAugmentation):
    """Replaces random patch tokens by the mean patch token of their sample; prefix tokens stay.

    Not by zeros: between blocks tokens share a large mean, so that no block has ever seen a zero token. The mean says only
    what all patches of the sample say together.

    Attributes:
        probability: Of each patch token to be replaced, in (0, 1].
    """

    probability: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """See base class."""
        patches = batch.patches
        mean = _wide(patches).mean(1, keepdim=True).to(patches.dtype)
        dropped = torch.rand(*patches.shape[:2], 1, generator=generator) < self.probability
        return batch.with_patches(torch.where(dropped.to(patches.device), mean, patches))


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha)."""
    # torch's own Beta takes no generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _mixed(own: Tensor, other: Tensor, share: float) -> Tensor:
    return (share * _wide(own) + (1 - share) * _wide(other)).to(own.dtype)


def _mixed_targets(batch: FeatureBatch, partner: Tensor, share: float) -> Tensor:
    if batch.targets is None:
        raise DataError("Mixing samples needs their classes, but the batch has no targets.")
    return _mixed(batch.targets, batch.targets[partner], share)


@dataclass(frozen=True)
class Mixup(FeatureAugmentation):
    """Mixes each sample with another one of the batch, token by token, and their labels likewise.

    Attributes:
        alpha: The share that a sample keeps is drawn from Beta(alpha, alpha), once per batch.
    """

    mixes: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False
    largest: ClassVar[float] = 1e6
    alpha: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """See base class."""
        share = _beta(self.alpha, generator)
        states = batch.hidden_states
        partner = torch.randperm(len(states), generator=generator).to(states.device)
        mixed = _mixed(states, states[partner], share)
        return replace(batch, hidden_states=mixed, targets=_mixed_targets(batch, partner, share))


@dataclass(frozen=True)
class CutMix(FeatureAugmentation):
    """Pastes a rectangle of patch tokens of another sample of the batch; labels are mixed by the exact share of tokens.

    One rectangle is drawn per batch, and lies inside the grid as a whole. Prefix tokens are mixed linearly by the same share:
    they summarise a whole image, and in late blocks are all that the head reads. Left alone, they would show nothing of what
    the mixed label asks for.

    Attributes:
        alpha: The share of tokens that a sample keeps is drawn from Beta(alpha, alpha), and then rounded to a rectangle.
    """

    mixes: ClassVar[bool] = True
    largest: ClassVar[float] = 1e6
    alpha: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """See base class."""
        side = math.sqrt(1 - _beta(self.alpha, generator))
        height, width = (round(size * side) for size in batch.grid)
        top, left = (
            int(torch.randint(size - cut + 1, (), generator=generator))
            for size, cut in zip(batch.grid, (height, width), strict=True)
        )
        inside = torch.zeros(batch.grid, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        share = 1 - height * width / inside.numel()
        states = batch.hidden_states
        partner = torch.randperm(len(states), generator=generator).to(states.device)
        other = states[partner]
        prefix = _mixed(states[:, : batch.prefix_tokens], other[:, : batch.prefix_tokens], share)
        patches = torch.where(inside.view(1, -1, 1).to(states.device), other[:, batch.prefix_tokens :], batch.patches)
        return replace(
            batch,
            hidden_states=torch.cat([prefix, patches], dim=1),
            targets=_mixed_targets(batch, partner, share),
        )


#: Name -> class of one number. An entry of one's own is a ``FeatureAugmentation`` too.
FEATURE_AUGMENTATIONS: dict[str, Callable[[float], FeatureAugmentation]] = {
    "token_flip": TokenFlip,
    "brightness": Brightness,
    "token_dropout": TokenDropout,
    "mixup": Mixup,
    "cutmix": CutMix,
}


def parse_feature_augmentation(text: str) -> tuple[FeatureAugmentation, ...]:
    """Read ``name:number`` pairs, e.g. ``"brightness:0.1,mixup:0.2"``; they act in this order.

    Raises:
        UnsupportedSetupError: A pair cannot be read, a name is unknown or given twice, a number is out of range, or more than
            one of them mixes samples.
    """
    found: dict[str, FeatureAugmentation] = {}
    for pair in text.split(","):
        name, _, number = (part.strip() for part in pair.partition(":"))
        if name and name not in FEATURE_AUGMENTATIONS:
            raise UnsupportedSetupError(
                f"feature_augmentation={text!r}: {name!r} is unknown; known are {sorted(FEATURE_AUGMENTATIONS)}."
            )
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise UnsupportedSetupError(
                f"feature_augmentation={text!r}: {pair.strip()!r} is no name:number pair. Expected e.g. "
                f"'brightness:0.1,mixup:0.2', with names from {sorted(FEATURE_AUGMENTATIONS)}; None turns it off."
            )
        if name in found:
            raise UnsupportedSetupError(f"feature_augmentation={text!r}: {name!r} is given twice. Give it once.")
        found[name] = FEATURE_AUGMENTATIONS[name](value)
    mixing = [name for name, augmentation in found.items() if augmentation.mixes]
    if len(mixing) > 1:
        raise UnsupportedSetupError(
            f"feature_augmentation={text!r}: {' and '.join(mixing)} both mix samples, and a label of up to four samples says "
            "little of any. Keep one of them."
        )
    return tuple(found.values())


def step_generator(seed: int, step: int, micro_step: int = 0, rank: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        micro_step: Position of the batch in the accumulation of gradients for this step.
        rank: Number of the process, each of which draws its own.
    """
    # 0xFA sets these numbers apart from those that other parts draw with the same seed.
    sequence = np.random.SeedSequence([seed & (2**64 - 1), 0xFA, step, micro_step, *([rank] if rank else [])])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def class_targets(labels: Any, num_classes: int) -> Tensor:
    """Return (batch, classes) float32: one-hot rows; a row of zeros for the label -100.

    Raises:
        DataError: ``labels`` are no classes, i.e. not a tensor (batch,) of integers.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        found = (
            f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise DataError(
            "feature_augmentation mixes samples, for which a batch must hold one integer class per sample as labels (batch,); "
            f"found {found}. Leave mixup and cutmix out, or let the data_collator return such labels."
        )
    labels = labels.long().unsqueeze(1)
    targets = torch.zeros(len(labels), num_classes, device=labels.device)
    return targets.scatter_(1, labels.clamp(min=0), (labels != -100).float())


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy with soft labels; of one-hot targets it is that of ``Trainer`` with hard labels.

    A row counts as much as its targets sum to: one without a label not at all.

    Args:
        logits: (batch, classes).
        targets: (batch, classes).
        label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        num_items: Labels in all batches of an optimizer step, by which the sum is divided. Default: those of this batch.

    Raises:
        DataError: The shapes differ.
    """
    if logits.shape != targets.shape:
        raise DataError(
            f"Mixing samples needs logits (batch, classes) = {tuple(targets.shape)}, but the model gave "
            f"{tuple(logits.shape)}. Leave mixup and cutmix out for this model."
        )
    weights = targets.sum(1, keepdim=True)
    smoothed = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1] * weights
    total = -(smoothed * torch.log_softmax(logits.float(), dim=1)).sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (weights.sum() if num_items is None else num_items)


def _logits(outputs: Any, position: int = 0) -> Tensor:
    """Logits of a model's output: by name, or by position in a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[position]


class FeatureAugmenter:
    """Augments the cached batches of one run, and keeps the soft labels of the batch at hand for its loss.

    Args:
        augmentations: They act in this order.
        num_classes: Classes of the model, or ``None`` if its labels are not classes.
        seed: Seed of the run.
        label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.

    Attributes:
        mixes: Samples are mixed.
        targets: Soft labels of the batch at hand; ``None`` between batches and where nothing mixes.

    Raises:
        UnsupportedSetupError: Samples are to be mixed whose labels are not classes.
    """

    def __init__(
        self,
        augmentations: tuple[FeatureAugmentation, ...],
        num_classes: int | None,
        seed: int = 0,
        label_smoothing: float = 0.0,
        rank: int = 0,
    ) -> None:
        self.augmentations = augmentations
        self.mixes = any(augmentation.mixes for augmentation in augmentations)
        self.targets: Tensor | None = None
        self._num_classes = num_classes
        self._seed = seed
        self._label_smoothing = label_smoothing
        self._rank = rank
        self._last = (-1, -1)
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
            labels: Classes (batch,); not looked at where nothing mixes.
            token_grid: Number of prefix tokens, and (height, width) of the patches.
            global_step: Optimizer steps done. Batches of the same one are told apart by their order, which a resume keeps,
                since checkpoints lie between steps.
        """
        last_step, last_micro_step = self._last
        self._last = (global_step, last_micro_step + 1 if global_step == last_step else 0)
        batch = self.augment(hidden_states, labels, token_grid, step_generator(self._seed, *self._last, self._rank))
        self.targets = batch.targets
        return batch.hidden_states

    def augment(
        self,
        hidden_states: Tensor,
        labels: Any,
        token_grid: tuple[int, tuple[int, int]],
        generator: torch.Generator,
    ) -> FeatureBatch:
        """Apply one augmentation after the other.

        Raises:
            UnsupportedSetupError: One must know the grid of patches, which was not found.
            DataError: Labels or shapes are not what mixing needs.
        """
        prefix_tokens, grid = token_grid
        needing = [type(a).__name__ for a in self.augmentations if a.needs_grid]
        if needing and prefix_tokens == 0 and grid[0] == 1:  # as `splitting.token_grid` says that it found none
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
        """Return the loss with ``targets`` in place of hard labels; fits ``Trainer.compute_loss_func``."""
        assert self.targets is not None
        return soft_cross_entropy(_logits(outputs), self.targets, self._label_smoothing, num_items_in_batch)

    def without_effect(
        self, suffix: Callable[[Tensor], Tensor], hidden_states: Tensor, token_grid: tuple[int, tuple[int, int]]
    ) -> list[str]:
        """Return names of those that, at their strongest, leave the output as it is: to 3e-5 of its largest value.

        Args:
            suffix: Hidden states in, output out, in fp32; where it computes in less, rounding hides what has no effect.
            hidden_states: (batch, tokens, hidden).
            token_grid: As for ``step``.
        """
        batch = FeatureBatch(hidden_states, None, *token_grid)
        before, found = suffix(hidden_states).float(), []
        for augmentation in self.augmentations:
            if augmentation.mixes:
                continue
            strongest = type(augmentation)(augmentation.largest)  # type: ignore[call-arg]
            after = suffix(strongest(batch, step_generator(0, 0)).hidden_states).float()
            if bool((after - before).abs().max() <= 3e-5 * before.abs().max()):
                found.append(type(augmentation).__name__)
        return found

    def check_loss(self, loss: Tensor, outputs: Any, labels: Any) -> None:
        """Refuse to mix for a model whose own loss is not cross-entropy, which would silently take its place.

        Args:
            loss: The model's own, in eval mode.
            outputs: The model's, with loss.
            labels: Classes (batch,).

        Raises:
            UnsupportedSetupError: It differs from cross-entropy by more than 1e-3 relative.
            DataError: Logits or labels are not what mixing needs.
        """
        assert self._num_classes is not None
        logits = _logits(outputs, position=1)
        expected = float(soft_cross_entropy(logits, class_targets(labels, self._num_classes).to(logits.device)))
        # Not so of NaN, which is the loss of rows without labels.
        if abs(expected - float(loss)) > 1e-3 * max(1.0, abs(expected)):
            raise UnsupportedSetupError(
                "feature_augmentation mixes labels, for which the loss must be cross-entropy, but the model's own is another: "
                f"{float(loss):.6g} on the first rows, where cross-entropy is {expected:.6g}. Leave mixup and cutmix out."
            )
