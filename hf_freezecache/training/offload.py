"""Keeps weights of frozen blocks in host memory while a stage trains from a cache: no step reads them.

A parameter stays the same object, and its values are right wherever they are read: only ``data`` moves. Weights are sent away before
a step, and come back by themselves when a module that holds some is about to run: for an evaluation, a look at the frozen blocks, a
callback that runs the model. They are saved from where they are. The end of a stage, or of ``train()``, brings them back for good.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.split import Split
from .cached_step import CachedStep
from .fewer_tokens import LiveStep
from .moved_weights import noting_uses
from .runtime import Runtime

__all__ = ["OffloadedStep", "Step", "why_not"]

logger = logging.getLogger(__name__)


def why_not(runtime: Runtime) -> str | None:
    """Return why weights of frozen blocks stay on the device; ``None`` if they can leave it.

    Args:
        runtime: The trainer.
    """
    if not _is_apart(runtime.accelerator.device):
        return f"the device, {runtime.accelerator.device.type}, has no memory but the host's"
    if runtime.args.n_gpu > 1:
        return "torch.nn.DataParallel copies all weights in each step"
    if runtime.compile_settings is not None:
        return "which weights a compiled step reads cannot be seen"
    return None


class OffloadedStep:
    """Trains as ``CachedStep`` does, with the weights in host memory that no step reads.

    The first step is taken with all weights in place, and is watched: what it reads stays.

    Args:
        step: What trains on batches of the stage. Its other attributes are those of this object.
    """

    def __init__(self, step: CachedStep) -> None:
        self._step = step
        self._modules = {module: _own_forward(module) for module in step.split.prefix_modules()}
        self._movable = _movable(step.split)
        #: Where parameters belong; ``None`` before the first step.
        self._places: dict[nn.Parameter, torch.device] | None = None
        self._handles: list[RemovableHandle] = []
        self._away = False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the step."""
        return getattr(self._step, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch, see ``CachedStep``."""
        if self._places is None:
            return self._watched(args, kwargs)
        self._send_away(self._places)
        return self._step(*args, **kwargs)

    def _watched(self, args: Any, kwargs: Any) -> Tensor:
        """Take the first step, and note what it reads."""
        running: set[nn.Module] = set()

        def note(module: nn.Module, inputs: Any) -> None:
            if self._runs(module):
                running.add(module)

        handles = [module.register_forward_pre_hook(note) for module in self._modules]
        try:
            with noting_uses(self._movable) as used:
                loss = self._step(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        stay = {id(parameter) for module in running for parameter in module.parameters()} | used()
        self._places = {p: p.device for p in self._movable if id(p) not in stay}
        self._modules = {
            module: own for module, own in self._modules.items() if any(p in self._places for p in module.parameters())
        }
        # The model as well: it may move its input to where the weights are.
        for module in (self._step.split.model, *self._modules):
            self._handles.append(module.register_forward_pre_hook(self._about_to_run))
        size = sum(parameter.numel() * parameter.element_size() for parameter in self._places)
        logger.info("%.1f MiB of frozen weights leave the device while this stage trains.", size / 2**20)
        return loss

    def _runs(self, module: nn.Module) -> bool:
        """Whether a module that is called does what it does by itself: a cached step calls it, and lets it do nothing."""
        return _own_forward(module) is self._modules[module]

    def _about_to_run(self, module: nn.Module, inputs: Any) -> None:
        # States of an earlier split may be injected: blocks behind it run then.
        if all(map(self._runs, [module] if module in self._modules else self._modules)):
            self.bring_back()

    def _send_away(self, places: dict[nn.Parameter, torch.device]) -> None:
        if not self._away:
            self._away = True
            for parameter in places:
                parameter.data = _to_host(parameter.data)

    def bring_back(self) -> None:
        """Bring all weights back to the device, until the next step."""
        if self._away:
            for parameter, device in (self._places or {}).items():
                parameter.data = _to_device(parameter.data, device)
            self._away = False

    def end(self) -> None:
        """Bring all weights back to the device for good."""
        self.bring_back()
        while self._handles:
            self._handles.pop().remove()
        self._places = {}


#: What trains on the batches of a stage.
Step = CachedStep | OffloadedStep | LiveStep


def _own_forward(module: nn.Module) -> Any:
    """Return what an instance has in place of the forward of its class."""
    return vars(module).get("forward")


def _movable(split: Split) -> list[nn.Parameter]:
    """Return the parameters that modules of the prefix alone hold, each with memory of its own, in the model's order."""
    model, members = split.model, {sub for module in split.prefix_modules() for sub in module.modules()}
    elsewhere = {id(p) for sub in model.modules() if sub not in members for p in sub.parameters(recurse=False)}
    tensors = [*model.parameters(), *model.buffers()]
    # Tensors of classes of other libraries, quantized ones say, may lie anywhere.
    plain = [tensor for tensor in tensors if type(tensor.data) is Tensor]
    holders = Counter(tensor.untyped_storage().data_ptr() for tensor in plain)
    return [
        parameter
        for parameter in split.prefix_parameters().values()
        if type(parameter.data) is Tensor
        and id(parameter) not in elsewhere
        and holders[parameter.untyped_storage().data_ptr()] == 1
        and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    ]


def _is_apart(device: torch.device) -> bool:
    """Whether a device has memory of its own."""
    return device.type not in ("cpu", "mps")


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu")


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)
