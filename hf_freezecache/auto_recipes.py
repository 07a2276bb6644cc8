"""What ``schedule="auto"`` goes by: a recipe for each range of costs, and where its numbers come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ADAPTER_RECIPES", "RECIPES", "Recipe", "longer_head", "plain_epochs", "views_for"]


@dataclass(frozen=True)
class Recipe:
    """How to train for a cost.

    Attributes:
        most_cost: It is for runs of at most this cost, in epochs without freezing.
        num_views: Views to store of each image.
        token_keep: Share of the patch tokens that a step sees behind the frozen blocks; more where the cost pays for more.
        least_epochs: Epochs behind the frozen blocks; more blocks are frozen until the cost pays for them.
        most_epochs: Further epochs gain nothing, unless the user asks for that many.
        head_epochs: Epochs before these, in which the head trains alone.
        least_steps: Optimizer steps in place of ``least_epochs``, where it is known how many make an epoch. Epochs need not be whole.
        most_frozen: With ``least_steps``, none is frozen if that leaves so many steps, and more than this share only where an epoch is
            not paid for otherwise.
        qkv_epochs: Epochs of all blocks, of which queries, keys and values train alone, that the cost has to pay for; else blocks are
            frozen. They see one view in each epoch, with all tokens. ``None`` freezes blocks.
        few_rows: Whether the head then sees a part of the rows before, and the passes of the others train blocks.
    """

    most_cost: float
    num_views: int
    token_keep: float
    least_epochs: int
    most_epochs: int
    head_epochs: int = 2
    least_steps: int | None = None
    most_frozen: float = 1.0
    qkv_epochs: float | None = None
    few_rows: bool = False


#: The head of a short run trains for up to so many epochs, where fewer have too few steps: they pass through no block, but
#: evaluations come with them. Source: see ``training.auto_rates.HEAD_STEPS``. At the cost of one epoch four are level with two on digits and
#: CIFAR-10, and have 84.0 for 82.8% on Caltech-101; at higher costs, where the head sees all rows, they are level (two or three seeds, record
#: of explorations).
MOST_HEAD_EPOCHS = 4
#: Share of the epochs behind the head, at the end, that show plain images where no block is frozen, and up to how many all do. The others
#: show new views. Source: of 2.3 epochs of queries, keys and values, all plain in place of the last alone have 95.7 for 86.8% on digits, 85.4 for 85.4
#: on Caltech-101 and 87.7 for 88.2 on CIFAR-10; of 6.5 epochs of all weights, the last 2.5 in place of none 96.2 for 89.7% on digits and 85.4
#: for 84.6 on Caltech-101, behind one frozen block, and 90.4 for 89.1 on CIFAR-10, without; of 1.5 epochs of LoRA, all in place of none 84.0
#: for 59.0% on digits, 83.8 for 79.9 on Caltech-101 and 84.9 for 85.1 on CIFAR-10 (one or two seeds, record of explorations).
PLAIN_SHARE, MOST_PLAIN = 0.4, 3.0
#: In order of cost. Source of the first two: single runs of DeiT-Tiny on 50 classes of Caltech-101 and on 1,500 images of CIFAR-10 at
#: 112 pixels, half the size that it was pretrained on, scored on a part of the training images. Records of
#: recipes/benchmarks/time_to_accuracy.py have them with three seeds. The others are these with more views. Queries, keys and
#: values of all blocks, in place of all weights of some: at a cost of one epoch 85.3 for 79.8% on CIFAR-10, 88.8 for 81.2 on digits and 84.2 for
#: 83.4 on Caltech-101, of two 87.7 for 85.2 on CIFAR-10, of four 90.4 for 88.4, 98.0 for 96.8 and 88.0 for 87.3, of eight 89.0 for 86.3, 98.1
#: for 97.7 and 87.4 for 87.6 on Caltech-101; of half an epoch, behind a head that saw a part of the rows, 79.8 to 82.1 for 67.5% on CIFAR-10,
#: 76.7 to 82.0 for 73.0 to 76.0 on digits and 77.3 for 74.9 on Caltech-101 (one to three seeds, in that record; on training images). At
#: two epochs such a head gains nothing: 98.0 for 97.7, 88.0 for 87.8 and 87.1 for 87.7% (digits, CIFAR-10, Caltech-101; three seeds, test images).
RECIPES: tuple[Recipe, ...] = (
    Recipe(most_cost=1.2, num_views=1, token_keep=0.5, least_epochs=2, most_epochs=8, qkv_epochs=0.1, few_rows=True),
    Recipe(most_cost=2.5, num_views=1, token_keep=0.5, least_epochs=3, most_epochs=8, qkv_epochs=0.1),
    Recipe(most_cost=5.0, num_views=2, token_keep=0.5, least_epochs=4, most_epochs=8, qkv_epochs=0.1),
    Recipe(most_cost=math.inf, num_views=4, token_keep=0.5, least_epochs=8, most_epochs=16, qkv_epochs=0.1),
)
#: The same where adapters train. Source of the first: runs of DeiT-Tiny with LoRA of rank 16 on the same two data sets, and on Caltech-101
#: at 224 pixels, scored in the same way, at the cost of 1.5 epochs of LoRA. With 23 steps in an epoch two epochs behind four blocks gain 2 to
#: 3 points on these; half of the tokens behind one block gain less. With 35 steps they lose 3: enough steps are needed first, and then
#: all blocks. That some 60 are enough was settled when the test scores of the first were known. But 67 steps behind seven blocks have 78.5%
#: where 46 behind four have 82.8% (Caltech-101, two seeds): only a third of the blocks may go for steps. The others are those of
#: ``RECIPES``.
ADAPTER_RECIPES: tuple[Recipe, ...] = (
    Recipe(2.5, 1, 1.0, least_epochs=2, most_epochs=8, head_epochs=0, least_steps=60, most_frozen=1 / 3),
    Recipe(most_cost=5.0, num_views=2, token_keep=0.5, least_epochs=4, most_epochs=8, head_epochs=0),
    Recipe(most_cost=math.inf, num_views=4, token_keep=0.5, least_epochs=8, most_epochs=16, head_epochs=0),
)


def longer_head(head_epochs: int, head_steps: float | None, epoch_steps: float | None) -> int:
    """Return for how many epochs the head of a short run trains before the blocks do, see ``MOST_HEAD_EPOCHS``.

    Args:
        head_epochs: Those of the recipe, the least.
        head_steps: Optimizer steps that suit it; ``None`` if they are not known.
        epoch_steps: Images of an epoch over those of an optimizer step; ``None`` if that is not known.
    """
    wanted = math.floor(head_steps / epoch_steps + 0.5) if epoch_steps and head_steps else head_epochs
    return max(head_epochs, min(wanted, MOST_HEAD_EPOCHS))


def plain_epochs(num_epochs: float) -> int:
    """Return how many of the last epochs should show plain images, see ``PLAIN_SHARE``.

    Args:
        num_epochs: Epochs in which all blocks train; the last may be a part of one.
    """
    whole = math.ceil(num_epochs)
    if num_epochs < MOST_PLAIN:
        return whole
    missing = whole - num_epochs  # of the last one
    return min(range(1, whole + 1), key=lambda plain: abs(plain - missing - PLAIN_SHARE * num_epochs))


def views_for(num_epochs: int) -> int:
    """Return how many views are worth storing for so many epochs behind frozen blocks: as many as ``RECIPES`` store.

    Each view must be built, and is seen in one epoch of so many. Source: that of ``RECIPES``; 2 views in place of 8 lost 0.4 points in
    16 epochs behind 11 blocks, at half the cost (a single run of DeiT-Tiny, 101 classes of Caltech-101, 160 pixels).

    Args:
        num_epochs: Epochs in a row.
    """
    return max((recipe.num_views for recipe in RECIPES if recipe.least_epochs <= num_epochs), default=1)
