"""What ``schedule="auto"`` multiplies learning rates by, and how long a head trains at its rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..auto_schedule import Choice
from ..by_split_point import MOST_LR_SCALE
from .lr_rule import budget_scale, lr_scale

__all__ = ["DECAY_SCALE", "QKV_SCALE", "chosen_rates", "head_steps"]

#: With the ``layer_decay`` that is chosen, or one like it, the best learning rate is so many times that without: 6e-4 against 2e-4 for 8 epochs of full fine-tuning. Source:
#: as ``lr_rule.budget_scale``.
DECAY_SCALE = 3.0
#: How many times higher the rates of queries, keys and values are where they train alone. Source: runs of DeiT-Tiny scored on
#: training rows (record of explorations). At a cost of one epoch, 6e-4 has 85.3% on CIFAR-10 and 8.5e-4 has 83.3; 1.2e-3 has 84.2 on Caltech-101
#: and 2.4e-3 has 80.5; at two epochs' cost 6e-4 has 85.4 there and 1.2e-3 87.6. The best rates of full fine-tuning of one epoch are 1.5e-4 and
#: 6e-4. A decay gains nothing: 77.9% with 0.85 on CIFAR-10, 84.4 without.
QKV_SCALE = 4.0
#: Behind a head that has been trained, blocks want lower rates: 6e-4 to 1.2e-3, where full fine-tuning of the same cost wants 1.2e-3
#: to 2.4e-3. Source: tuning runs, one seed, of cifar10 (in its record of recipes/benchmarks/time_to_accuracy.py) and Caltech-101, both
#: at 112 pixels.
AFTER_HEAD_SCALE = 0.5
#: Where all blocks follow a new head, low rates are best, and say little of what a head alone wants, or blocks behind a trained one. With
#: AdamW these have at least such rates: that of the head, and that of blocks, for states of up to so many channels. For wider ones they
#: fall with the width, since each step moves every weight by the rate, and sums of weights by the sum. Source: full fine-tuning of one
#: epoch has its best rate at 3.75e-5 on digits and 1.5e-4 on CIFAR-10 (records of recipes/benchmarks/time_to_accuracy.py); what the rule
#: alone makes of them leaves runs with 50 and 75%, head and blocks at these rates with 80 and 79% (DeiT-Tiny, means of three seeds, record of
#: explorations). With twice the rate of the head it is 81 and 78%. That of queries, keys and values
#: is ``QKV_SCALE`` times that of blocks.
LEAST_HEAD_RATE, LEAST_BLOCK_RATE, WIDTH = 1.2e-3, 1.5e-4, 192
#: Queries, keys and values that train for fewer epochs than these have the least rate, and for half as many less in proportion: higher rates lose
#: more than so few steps mend. Source: as there. For 0.2 epochs 3e-4 has 77.8% on Caltech-101 and 1.5e-3 has 75.2, 5e-5 has 79.2 on digits
#: and 1e-4 has 77.3, 1.5e-4 has 71.2 on CIFAR-10 and 6e-4 has 74.2; for half an epoch, 3e-4 has 77.5 there and 6e-4 has 80.2.
BRIEF = 0.8
#: But for a head, and for queries, keys and values, no more than so many times the user's rate, and for blocks so many times what the rule
#: gives: the user may mean it.
MOST_HEAD_SCALE, MOST_RAISE = 32.0, 4.0
#: So many steps at the least rate, fewer at a higher one in proportion, suit the head of a short run, which sees few rows: it should go some way,
#: and not learn its rows by heart. Source: at half an epoch's cost, with 1.2e-3, 46, 69 and 92 steps have 71.0, 75.2 and 75.4% on Caltech-101,
#: 56, 112, 140, 168 and 224 have 78.9, 82.4, 83.5, 81.3 and 78.3 on digits, and 94, 141 and 188 have 82.0, 79.0 and 79.7 on CIFAR-10 (two or three seeds,
#: record of explorations).
HEAD_STEPS = 100


def _width(trainer: Any, blocks: Iterable[nn.Module]) -> int | None:
    """Return the channels of the hidden states; ``None`` where they are not known, or the optimizer may not be AdamW."""
    makers = ("create_optimizer", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs")
    own = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    packages = {getattr(trainer, name).__module__.partition(".")[0] for name in makers}
    own = own or not packages <= {"transformers", "hf_freezecache"}
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if own or not optimizer.startswith(("adamw", "paged_adamw")):
        return None
    # The layers of a block that come first take hidden states.
    linear = (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear))
    return next((module.in_features for module in linear), None)


def _unit(trainer: Any, blocks: Iterable[nn.Module]) -> float | None:
    """Return what makes the least rates multiples of the user's, for states of this width; ``None`` where they say nothing."""
    rate, width = trainer.args.learning_rate, _width(trainer, blocks)
    return None if width is None or rate <= 0 else min(1.0, WIDTH / width) / rate


def _head_scale(trainer: Any, num_blocks: int, unit: float | None) -> float:
    scale = budget_scale(trainer.freeze_config.budget) * lr_scale(num_blocks, num_blocks)
    scale = scale if unit is None else max(scale, min(LEAST_HEAD_RATE * unit, MOST_HEAD_SCALE))
    return min(scale, MOST_LR_SCALE)


def head_steps(trainer: Any, blocks: Sequence[nn.Module]) -> float | None:
    """Return for how many optimizer steps a head of a short run should train before the blocks do; ``None`` if that is not known.

    Args:
        trainer: The user's trainer.
        blocks: The model's blocks.
    """
    unit = _unit(trainer, blocks)
    if unit is None or trainer.freeze_config.lr_scale is not None:
        return None
    return HEAD_STEPS * LEAST_HEAD_RATE * unit / _head_scale(trainer, len(blocks), unit)


def chosen_rates(trainer: Any, blocks: Sequence[nn.Module], choice: Choice, higher: float) -> str:
    """Return what the user's learning rate is multiplied by in each stage, as ``lr_scale`` has it.

    Args:
        trainer: The user's trainer.
        blocks: The model's blocks.
        choice: What they are to be trained for.
        higher: How many times higher rates the blocks bear than where all of their weights train.
    """
    # The user's rate suits the epochs and the decay that the user trains with.
    num_blocks, unit = len(blocks), _unit(trainer, blocks)
    stages = choice.stages(num_blocks)
    least = budget_scale(trainer.freeze_config.budget)
    scales = {point: least * lr_scale(point, num_blocks) * (higher if point < num_blocks else 1) for _, point in stages}
    if len(stages) > 1:
        point = stages[-1][1]
        scales[point] *= AFTER_HEAD_SCALE
        scales[num_blocks] = _head_scale(trainer, num_blocks, unit)
        if unit is not None:
            most = MOST_RAISE * scales[point] if higher == 1 else MOST_HEAD_SCALE
            least, epochs = min(LEAST_BLOCK_RATE * higher * unit, most), choice.num_epochs - choice.head_epochs
            brief = choice.qkv_only and epochs < BRIEF
            scales[point] = least * min(epochs / (BRIEF / 2), 1.0) if brief else max(scales[point], least)
    return ",".join(f"{point}:{min(scale, MOST_LR_SCALE):.3g}" for point, scale in sorted(scales.items()))
