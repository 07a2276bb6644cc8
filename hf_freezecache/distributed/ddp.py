"""Copies of the model on several processes: which ways of parallel training fit, and wrapping what still trains."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedSetupError

__all__ = ["check_parallelism", "is_replicated", "unused_parameters", "unwrapped", "wrap_again"]


def is_replicated(accelerator: Any) -> bool:
    """Whether accelerate wraps the model with DDP; under torchrun it does for a single process, too."""
    return str(accelerator.distributed_type.value).startswith("MULTI_")


def check_parallelism(accelerator: Any, args: Any, *, deepspeed: bool, fsdp: bool) -> None:
    """Refuse what splits parameters or batches over processes in another way than ``DistributedDataParallel``.

    Args:
        accelerator: accelerate's ``Accelerator``.
        args: ``TrainingArguments``.
        deepspeed: Whether DeepSpeed is on.
        fsdp: Whether FSDP, of either version, is on.

    Raises:
        UnsupportedSetupError: With the reason and what to use instead.
    """
    if deepspeed or fsdp:
        if deepspeed:
            name = "DeepSpeed"
            reason = (
                "it divides gradients and optimizer state once, at the start, for parameters that a later stage freezes"
            )
        elif getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            name = "FSDP (version 1)"
            reason = "it joins the parameters of a module into one, of which a stage could not freeze a part"
        else:
            name = "FSDP2"
            reason = (
                "it gathers the parameters of each block by all processes together, while each of them runs the frozen blocks "
                "on shards of the cache of its own, as many as there are"
            )
        raise UnsupportedSetupError(
            f"Cached training does not support {name}: {reason}. Use DistributedDataParallel (torchrun or accelerate launch "
            "without it): frozen blocks need neither gradients nor optimizer state, and in cached stages no activations, so that "
            "much of what sharding would save is not there. For a model that does not fit otherwise, train without freeze_config."
        )
    if args.world_size == 1:
        return
    if not is_replicated(accelerator) or getattr(args, "parallelism_config", None) is not None:
        raise UnsupportedSetupError(
            "Cached training runs on several processes by DistributedDataParallel, found "
            f"{accelerator.distributed_type}. Start it with torchrun or accelerate launch, without tensor, pipeline "
            "or sequence parallelism."
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise UnsupportedSetupError(
                f"accelerator_config sets {name}=True, by which processes would get samples of each other's chunks. "
                "Leave it out: each process reads batches of per_device_train_batch_size from chunks of its own."
            )


def unwrapped(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return a model without its wrapper for several processes and without its autocast, ready for new ones."""
    inner: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    inner.__dict__.pop("_is_accelerate_prepared", None)
    return inner


def wrap_again(accelerator: Any, inner: nn.Module) -> nn.Module:
    """Wrap an unwrapped model anew: a wrapper reduces the gradients of what required them when it was made.

    Nobody but accelerate's books may hold the wrapper of before: two of them would both answer autograd's hooks.
    """
    accelerator._models.clear()
    gc.collect()
    wrapped: nn.Module = accelerator.prepare_model(inner)
    return wrapped


def unused_parameters(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Return the names of trainable parameters that a loss does not reach; the model computes it in eval mode."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    try:
        gradients = torch.autograd.grad(loss(), [parameter for _, parameter in named], allow_unused=True)
    finally:
        model.train(training)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]
