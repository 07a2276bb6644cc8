"""Where a trainer's processes and its model are."""

from __future__ import annotations

from typing import Any

from ..distributed.ddp import check_parallelism
from ..distributed.process_group import ProcessGroup, find_process_group
from .preflight import check_arguments

__all__ = ["find_process_groups", "place_model"]


def find_process_groups(trainer: Any) -> tuple[ProcessGroup, ProcessGroup]:
    """Return all processes of the run, and those that share this one's folder of caches. Collective.

    Raises:
        UnsupportedSetupError: Parameters or batches are divided in a way that does not fit; see ``check_parallelism``.
    """
    args, accelerator = trainer.args, trainer.accelerator
    fsdp = bool(trainer.is_fsdp_enabled)
    check_parallelism(accelerator, args, deepspeed=trainer.is_deepspeed_enabled, fsdp=fsdp)
    check_arguments(args)
    everyone = find_process_group(args.world_size, accelerator.local_process_index, per_node=False)
    if trainer.cache_config.cache_placement != "node":
        return everyone, everyone
    return everyone, find_process_group(args.world_size, accelerator.local_process_index, per_node=True)


def place_model(trainer: Any) -> None:
    """Move a model that is still on the CPU to the training device: it is tried before ``Trainer`` does so.

    ``Trainer`` leaves it there until it trains, with ``bf16_full_eval`` or ``fp16_full_eval``.

    Args:
        trainer: The user's trainer.
    """
    device = trainer.args.device
    on_cpu = all(parameter.device.type == "cpu" for parameter in trainer.model.parameters())
    if on_cpu and device.type != "cpu" and not trainer.is_model_parallel:
        trainer.model.to(device)
