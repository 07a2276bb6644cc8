"""The augmentations of cached hidden states, and their registry.

Images are not at hand while a model trains from a cache, so these change the hidden states themselves. Each augmentation is
a pure function of a batch and of a CPU generator. ``step_generator`` makes that generator from seed and step: every device
draws the same numbers, and so does a resumed run.

To add an augmentation, write one frozen dataclass with one number that derives from ``FeatureAugmentation``, and one line
that names it in ``FEATURE_AUGMENTATIONS``. ``CacheConfig(feature_augmentation="name:number")`` then finds it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, UnsupportedSetupError

__all__ = [
    "FEATURE_AUGMENTATIONS",
    "Brightness",
    "CutMix",
    "FeatureAugmentation",
    "FeatureBatch",
    "Mixup",
    "TokenDropout",
    "TokenFlip",
    "parse_feature_augmentation",
    "step_generator",
]


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Hidden states of a batch and their soft labels.

    Attributes:
        hidden_states: (batch, tokens, hidden), of any float dtype, on any device.
        targets: (batch, classes) float32 soft labels on the same device. A row sums to 1, or to less where a sample without
            a label (-100) was mixed in. ``None`` where no augmentation mixes samples.
        prefix_tokens: Number of leading tokens that are not patches (CLS, distillation and register tokens).
        grid: (height, width) of the grid of patches, which follow row by row.
    """

    hidden_states: Tensor
    targets: Tensor | None
    prefix_tokens: int
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            DataError: The tokens are not ``prefix_tokens`` and a grid of patches, or the targets are not one row per sample.
        """
        shape, (height, width) = tuple(self.hidden_states.shape), self.grid
        if len(shape) != 3 or shape[1] != self.prefix_tokens + height * width:
            raise DataError(
                f"Feature augmentation takes hidden states (batch, tokens, hidden) of {self.prefix_tokens} prefix tokens and "
                f"{height} x {width} patches, found shape {shape}. Leave feature_augmentation out for this model."
            )
        if self.targets is not None and (self.targets.dim() != 2 or len(self.targets) != shape[0]):
            raise DataError(
                f"Soft labels must be ({shape[0]}, classes), found {tuple(self.targets.shape)}. Let the augmentation return "
                "one row of targets per sample."
            )

    def with_patches(self, patches: Tensor) -> FeatureBatch:
        """Return the batch with other patch tokens (batch, height * width, hidden); the prefix tokens stay."""
        prefix, dtype = self.hidden_states[:, : self.prefix_tokens], self.hidden_states.dtype
        return replace(self, hidden_states=torch.cat([prefix, patches.to(dtype)], dim=1))

    @property
    def patches(self) -> Tensor:
        """Patch tokens (batch, height * width, hidden)."""
        return self.hidden_states[:, self.prefix_tokens :]


def _at_least_fp32(tensor: Tensor) -> Tensor:
    """Cast to fp32 unless the dtype is wider: intermediate sums must not be rounded to half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class FeatureAugmentation(ABC):
    """Changes the hidden states of a training batch, and its soft labels if it mixes samples.

    A subclass is a frozen dataclass of one number, which is checked at construction.

    Attributes:
        mixes: Whether it mixes samples. Such an augmentation needs ``targets``, and changes them.
        needs_grid: Whether it must know which tokens are patches and how they lie.
        largest: The number must be above 0 and at most this.
    """

    mixes: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    largest: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            UnsupportedSetupError: The number is out of range.
        """
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not 0 < value <= self.largest:
                raise UnsupportedSetupError(
                    f"{type(self).__name__}: {name} must be a number above 0 and at most {self.largest:g}, got {value!r}. "
                    "Change it, or leave this augmentation out."
                )

    @abstractmethod
    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Return the augmented batch. The batch that is passed in does not change.

        Args:
            batch: Hidden states and soft labels.
            generator: A CPU generator. All random numbers are drawn from it and then moved to the device of the batch.
        """


@dataclass(frozen=True)
class TokenFlip(FeatureAugmentation):
    """Mirrors the grid of patches left to right; the prefix tokens stay.

    It helps only where the suffix knows the position of a token: through relative position biases or rotary embeddings in
    each block (BEiT, DINOv3), or through its pooling. A ViT that adds its position embeddings before block 0 and reads CLS
    or the mean ignores the order of its tokens, so a flip changes nothing but rounding.

    Attributes:
        probability: Probability that a sample is mirrored, in (0, 1].
    """

    probability: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Mirror the patches of randomly chosen samples."""
        patches = batch.patches
        mirrored = patches.reshape(len(patches), *batch.grid, -1).flip(2).flatten(1, 2)
        chosen = torch.rand(len(patches), 1, 1, generator=generator) < self.probability
        return batch.with_patches(torch.where(chosen.to(patches.device), mirrored, patches))


@dataclass(frozen=True)
class Brightness(FeatureAugmentation):
    """Shifts each channel of each sample by a random fraction of its range, after FroFA.

    The values of a channel over the patches of a sample are mapped to [0, 1] by their minimum and maximum. An offset is drawn
    uniformly from [-strength, strength] for each sample and channel and added. The sum is clipped to [0, 1] and mapped back.
    The code computes the same as ``clip(x + offset * (max - min), min, max)``, which is exact at both ends and leaves a
    constant channel as it is.

    The prefix tokens stay, and do not count for minimum and maximum. CLS and registers lie far outside the range of the
    patches in some channels: they would stretch it for all patches.

    Source: Bär et al., "Frozen Feature Augmentation for Few-Shot Image Classification", CVPR 2024.

    Attributes:
        strength: Largest offset as a fraction of the range of a channel, in (0, 1].
    """

    strength: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Shift every channel of every sample by an offset of its own."""
        patches = _at_least_fp32(batch.patches)
        low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
        offset = torch.rand(len(patches), 1, patches.shape[2], generator=generator) * 2 - 1
        offset = (offset * self.strength).to(patches.device)
        return batch.with_patches(torch.minimum(torch.maximum(patches + offset * (high - low), low), high))


@dataclass(frozen=True)
class TokenDropout(FeatureAugmentation):
    """Replaces random patch tokens by the mean patch token of their sample; the prefix tokens stay.

    Zeros would not do: tokens between blocks share a large mean, so no block has ever been trained on a zero token. The mean
    holds only what all patches of the sample have in common.

    Attributes:
        probability: Probability that a patch token is replaced, in (0, 1].
    """

    probability: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Replace randomly chosen patch tokens by the mean of their sample."""
        patches = batch.patches
        mean = _at_least_fp32(patches).mean(1, keepdim=True).to(patches.dtype)
        dropped = torch.rand(*patches.shape[:2], 1, generator=generator) < self.probability
        return batch.with_patches(torch.where(dropped.to(patches.device), mean, patches))


def _draw_beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha)."""
    # torch's own Beta takes no generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _blend(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return ``weight * first + (1 - weight) * second``, computed in fp32, in the dtype of ``first``."""
    return (weight * _at_least_fp32(first) + (1 - weight) * _at_least_fp32(second)).to(first.dtype)


def _blend_targets(batch: FeatureBatch, partners: Tensor, weight: float) -> Tensor:
    if batch.targets is None:
        raise DataError(
            "Mixing samples needs their classes, but the batch has no targets. Give FeatureBatch the soft labels."
        )
    return _blend(batch.targets, batch.targets[partners], weight)


@dataclass(frozen=True)
class Mixup(FeatureAugmentation):
    """Mixes each sample, token by token, with another sample of the batch, and mixes their labels likewise.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Attributes:
        alpha: The weight that a sample keeps is drawn from Beta(alpha, alpha), once per batch.
    """

    mixes: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False
    largest: ClassVar[float] = 1e6
    alpha: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Mix each sample with its partner in a random permutation of the batch.

        Raises:
            DataError: The batch has no targets.
        """
        weight = _draw_beta(self.alpha, generator)
        states = batch.hidden_states
        partners = torch.randperm(len(states), generator=generator).to(states.device)
        mixed = _blend(states, states[partners], weight)
        return replace(batch, hidden_states=mixed, targets=_blend_targets(batch, partners, weight))


@dataclass(frozen=True)
class CutMix(FeatureAugmentation):
    """Pastes a rectangle of patch tokens of another sample of the batch; labels are mixed by the exact fraction of tokens.

    One rectangle is drawn per batch, and it lies wholly inside the grid. The prefix tokens are mixed linearly by the same
    fraction. They summarise a whole image, and in late blocks they are all that the head reads: unmixed, they would not
    match the mixed label.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.

    Attributes:
        alpha: The fraction of tokens that a sample keeps is drawn from Beta(alpha, alpha), then rounded to a rectangle.
    """

    mixes: ClassVar[bool] = True
    largest: ClassVar[float] = 1e6
    alpha: float

    def __call__(self, batch: FeatureBatch, generator: torch.Generator) -> FeatureBatch:
        """Paste one rectangle, from each sample's partner in a random permutation of the batch.

        Raises:
            DataError: The batch has no targets.
        """
        side = math.sqrt(1 - _draw_beta(self.alpha, generator))
        height, width = (round(size * side) for size in batch.grid)
        top, left = (
            int(torch.randint(size - cut + 1, (), generator=generator))
            for size, cut in zip(batch.grid, (height, width), strict=True)
        )
        inside = torch.zeros(batch.grid, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        weight = 1 - height * width / inside.numel()
        states = batch.hidden_states
        partners = torch.randperm(len(states), generator=generator).to(states.device)
        pasted = states[partners]
        prefix = _blend(states[:, : batch.prefix_tokens], pasted[:, : batch.prefix_tokens], weight)
        patches = torch.where(inside.view(1, -1, 1).to(states.device), pasted[:, batch.prefix_tokens :], batch.patches)
        return replace(
            batch,
            hidden_states=torch.cat([prefix, patches], dim=1),
            targets=_blend_targets(batch, partners, weight),
        )


#: Name -> class of one number: the names that ``CacheConfig.feature_augmentation`` knows.
FEATURE_AUGMENTATIONS: dict[str, Callable[[float], FeatureAugmentation]] = {
    "token_flip": TokenFlip,
    "brightness": Brightness,
    "token_dropout": TokenDropout,
    "mixup": Mixup,
    "cutmix": CutMix,
}


def parse_feature_augmentation(text: str) -> tuple[FeatureAugmentation, ...]:
    """Read ``name:number`` pairs such as ``"brightness:0.1,mixup:0.2"``; the augmentations act in this order.

    Raises:
        UnsupportedSetupError: A pair cannot be read, a name is unknown or given twice, a number is out of range, or more than
            one augmentation mixes samples.
    """
    augmentations: dict[str, FeatureAugmentation] = {}
    for pair in text.split(","):
        name, _, number = (side.strip() for side in pair.partition(":"))
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
        if name in augmentations:
            raise UnsupportedSetupError(f"feature_augmentation={text!r}: {name!r} is given twice. Give it once.")
        augmentations[name] = FEATURE_AUGMENTATIONS[name](value)
    mixing = [name for name, augmentation in augmentations.items() if augmentation.mixes]
    if len(mixing) > 1:
        raise UnsupportedSetupError(
            f"feature_augmentation={text!r}: {' and '.join(mixing)} both mix samples, and a label of up to four samples says "
            "little of any. Keep one of them."
        )
    return tuple(augmentations.values())


def step_generator(seed: int, step: int, micro_step: int = 0, rank: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        micro_step: Position of the batch in the accumulation of gradients for this step.
        rank: Rank of the process. Each process draws numbers of its own.
    """
    # 0xFA keeps these numbers apart from those that other modules draw with the same seed.
    sequence = np.random.SeedSequence([seed & (2**64 - 1), 0xFA, step, micro_step, *([rank] if rank else [])])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
