"""``DistributedDataParallel``: refuses other ways of parallel training, and wraps the model again after a freeze."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedSetupError

__all__ = ["check_parallelism", "is_replicated", "unused_parameters", "unwrapped", "wrap_again"]


def is_replicated(accelerator: Any) -> bool:
    """Say whether accelerate wraps the model with DDP. Under torchrun it does so for a single process too."""
    return str(accelerator.distributed_type.value).startswith("MULTI_")


def check_parallelism(accelerator: Any, args: Any, *, deepspeed: bool, fsdp: bool) -> None:
    """Refuse every way of parallel training other than ``DistributedDataParallel``.

    Args:
        accelerator: accelerate's ``Accelerator``.
        args: ``TrainingArguments``.
        deepspeed: Whether DeepSpeed is on.
        fsdp: Whether FSDP, of either version, is on.

    Raises:
        UnsupportedSetupError: Parameters, optimizer state or batches are split over processes. The message says why that does
            not work, and what to use instead.
    """
    if deepspeed or fsdp:
        if deepspeed:
            name = "DeepSpeed"
            reason = "it shards gradients and optimizer state once, at the start, also for parameters that a later stage freezes"
        elif getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            name = "FSDP (version 1)"
            reason = "it flattens the parameters of a module into one, so that a stage could not freeze some of them"
        else:
            name = "FSDP2"
            reason = (
                "it gathers the parameters of each block on all processes at once, while each process builds shards of the cache "
                "of its own, and their numbers differ"
            )
        raise UnsupportedSetupError(
            f"Cached training does not support {name}: {reason}. Use DistributedDataParallel (torchrun or accelerate launch "
            "without it): frozen blocks need neither gradients nor optimizer state, and no activations in cached stages, so "
            "sharding would save little. For a model that does not fit otherwise, train without freeze_config."
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
                f"accelerator_config sets {name}=True, so that processes would get samples of each other's chunks. "
                "Leave it out: each process reads batches of per_device_train_batch_size from chunks of its own."
            )


def unwrapped(accelerator: Any, model: nn.Module) -> nn.Module:
    """Return the model inside DDP, without accelerate's autocast, so that it can be prepared again."""
    inner: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    inner.__dict__.pop("_is_accelerate_prepared", None)
    return inner


def wrap_again(accelerator: Any, inner: nn.Module) -> nn.Module:
    """Wrap an unwrapped model in a new DDP: DDP reduces the gradients of parameters that required them when it was made.

    The caller must hold no reference to the old wrapper: autograd would run the hooks of both.
    """
    accelerator._models.clear()
    gc.collect()
    wrapped: nn.Module = accelerator.prepare_model(inner)
    return wrapped


def unused_parameters(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Return the names of trainable parameters that get no gradient from a loss.

    Args:
        model: The model. It is in eval mode while the loss is computed.
        loss: Computes the loss from the model.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    try:
        gradients = torch.autograd.grad(loss(), [parameter for _, parameter in named], allow_unused=True)
    finally:
        model.train(training)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]
