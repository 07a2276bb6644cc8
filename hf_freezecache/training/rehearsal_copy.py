"""A stand-in for the user's trainer, on which a step can be tried before a run without leaving anything behind."""

from __future__ import annotations

import copy
import functools
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.seeding import preserved_random_state

__all__ = [
    "duplicate",
    "keeping_generators",
    "keeping_parameters",
    "preserved_device_state",
    "rehearsing",
    "without_scaling",
]

#: Packages whose objects a trainer shares with its stand-in. Objects of other classes are the user's own.
_SHARED = frozenset({"torch", "transformers", "accelerate", "datasets", "numpy", "PIL", "hf_freezecache", "builtins"})
_DATA = ("train_dataset", "eval_dataset")
#: Numbers of a frozen parameter whose value is kept all the same: an averaged head, say.
_FEW = 10_000_000


def duplicate(trainer: Any) -> Any:
    """Return a shallow copy of a trainer with containers, tensors and arrays of its own; methods are bound to the copy."""
    stand_in = object.__new__(type(trainer))
    for name, value in vars(trainer).items():
        if isinstance(value, MethodType) and value.__self__ is trainer:
            value = MethodType(value.__func__, stand_in)
        vars(stand_in)[name] = value if name in _DATA else _copied(value)
    return stand_in


@contextmanager
def rehearsing(trainer: Any) -> Iterator[Any]:
    """Yield a copy of a trainer that has no callbacks and logs nothing, in the state in which its first step finds it.

    Methods that the user's class overrides run on the copy. What they may change is put back when the context ends:

    - attributes of the trainer, the content of its lists, dicts, sets and deques, and the states of its random generators;
    - attributes, buffers and ``training`` of all modules that it holds; gradients and ``requires_grad`` of parameters;
    - the configuration of the model, and attributes of objects of the user's own classes that it holds;
    - what the accelerator knows of loaders and models, and the random states of Python, NumPy, torch and the device.

    Values of parameters are not put back, see ``keeping_parameters``. A step of an optimizer must not be tried.

    Args:
        trainer: The user's trainer. It is in no stage.
    """
    stand_in = duplicate(trainer)
    if isinstance(stand_in.eval_dataset, dict):
        stand_in.eval_dataset = dict(stand_in.eval_dataset)
    stand_in.callback_handler = copy.copy(trainer.callback_handler)
    stand_in.callback_handler.callbacks = []
    stand_in.state, stand_in.control = copy.copy(trainer.state), copy.copy(trainer.control)
    vars(stand_in.state).update({name: _copied(value) for name, value in vars(trainer.state).items()})
    stand_in.log = lambda *args, **kwargs: None
    stand_in.is_in_train, stand_in.current_gradient_accumulation_steps = True, 1
    vars(stand_in).pop("_eval_dataloaders", None)  # kept workers of another loader
    if "_run" in vars(stand_in):
        stand_in._run = None
    # A method that was set on the trainer itself, as `trainer.compute_loss = ...`, may call the trainer's own.
    stand_in._original = trainer
    with preserved_random_state(), ExitStack() as stack:
        stack.enter_context(preserved_device_state(trainer.args.device))
        for attributes in _changeable(trainer):
            stack.callback(_remember(attributes))
        stack.enter_context(keeping_generators(trainer))
        stack.enter_context(_without_gradients(_modules(trainer)))
        _begin(stand_in)
        yield stand_in


def _copied(value: Any) -> Any:
    """Copy containers, and containers in them, tensors and arrays. Their other content is shared."""
    if type(value) is Tensor:
        return value.detach().clone() if value.is_leaf else value
    if isinstance(value, np.ndarray):
        return value.copy()
    if not isinstance(value, (list, dict, set, deque)):
        return value
    try:
        copied = copy.copy(value)
        if isinstance(copied, dict):
            for key in copied:
                copied[key] = _copied(copied[key])
        elif isinstance(copied, (list, deque)):
            for place, item in enumerate(copied):
                copied[place] = _copied(item)
    except Exception:  # a class of the user's own that takes no copies
        return value
    return copied


def _begin(stand_in: Any) -> None:
    """Fill in what ``Trainer`` sets before the first step, as far as code of users reads it."""
    args, state = stand_in.args, stand_in.state
    with suppress(TypeError, AttributeError):  # a data set without a length
        samples = stand_in._train_batch_size * args.world_size * args.gradient_accumulation_steps
        steps = max(1, math.ceil(len(stand_in.train_dataset) / samples))
        state.max_steps = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
        state.num_train_epochs = math.ceil(state.max_steps / steps)
        state.compute_steps(args, state.max_steps)
    state.epoch = state.epoch or 0.0
    state.train_batch_size = stand_in._train_batch_size
    # Optimizers of this kind step inside of backward.
    if stand_in.optimizer is None and not str(args.optim).endswith("layerwise"):
        # If it cannot be made, `Trainer` says so, before any stage is entered.
        with suppress(Exception):
            stand_in.create_optimizer_and_scheduler(max(1, state.max_steps))


def _modules(trainer: Any) -> list[nn.Module]:
    """Return all modules that a trainer holds, and the modules in them, each once."""
    held = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    return list({id(module): module for each in held for module in each.modules()}.values())


def _changeable(trainer: Any) -> list[dict[str, Any]]:
    """Return the attributes of all objects that code of users may change through a trainer."""
    modules = _modules(trainer)
    objects = [trainer.accelerator, trainer.accelerator.gradient_state, *modules]
    objects += [module.config for module in modules if hasattr(getattr(module, "config", None), "__dict__")]
    for name, value in vars(trainer).items():
        package = type(value).__module__.partition(".")[0]
        if name not in _DATA and package not in _SHARED and package not in sys.stdlib_module_names:
            objects.append(value)
    return list({id(each): vars(each) for each in objects if hasattr(each, "__dict__")}.values())


def _remember(attributes: dict[str, Any]) -> Callable[[], None]:
    """Return what puts the attributes of an object back, with the content of containers and tensors among them."""
    kept = dict(attributes)
    held = [value for value in kept.values() if isinstance(value, (list, dict, set, deque))]
    # Most are the empty dicts of hooks that every module has.
    containers = [(value, copy.copy(value) if value else None) for value in held]
    # Buffers lie in a dict of the module; parameters and gradients are not looked at.
    tensors = [*kept.values(), *kept.get("_buffers", {}).values()]
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors if type(tensor) is Tensor]

    def restore() -> None:
        # What did not change is not touched: threads of a logger may be reading it.
        for name in attributes.keys() - kept.keys():
            del attributes[name]
        attributes.update(kept)
        for container, content in containers:
            _refill(container, content)
        with torch.no_grad():
            for tensor, before in contents:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)

    return restore


def _state_of(generator: Any) -> Callable[[], None] | None:
    """Return what puts the state of a random generator back; ``None`` for other objects."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(bits, "state", state)
    for kind, get, put in (
        (torch.Generator, "get_state", "set_state"),
        (np.random.RandomState, "get_state", "set_state"),
        (random.Random, "getstate", "setstate"),
    ):
        if isinstance(generator, kind):
            with suppress(NotImplementedError):  # of the operating system: it has no state
                return functools.partial(getattr(generator, put), getattr(generator, get)())
    return None


def _refill(container: Any, content: Any) -> None:
    """Give a list, dict, set or deque the content of a copy of it again; ``None`` is that of one that was empty."""
    if content is None:
        if container:
            container.clear()
        return
    if isinstance(container, dict):
        if container.keys() != content.keys() or any(container[key] is not content[key] for key in content):
            container.clear()
            for key, item in content.items():  # `update` of a Counter would add
                container[key] = item
        return
    if isinstance(container, set):
        container.intersection_update(content)
        container.update(content)
    elif len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)


@contextmanager
def _without_gradients(modules: list[nn.Module]) -> Iterator[None]:
    """Put gradients aside; restore them and ``requires_grad`` when the context ends."""
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient, required in kept:
            parameter.grad = gradient
            parameter.requires_grad_(required)


@contextmanager
def keeping_parameters(trainer: Any) -> Iterator[None]:
    """Put values of parameters back: a step may move weights and back again (SAM), or average some (EMA)."""
    parameters = [parameter for module in _modules(trainer) for parameter in module.parameters(recurse=False)]
    values = [(p, p._version, p.detach().clone()) for p in parameters if p.requires_grad or p.numel() <= _FEW]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, version, value in values:
                if parameter._version != version or not torch.equal(parameter, value):
                    parameter.data.copy_(value)


@contextmanager
def keeping_generators(trainer: Any) -> Iterator[None]:
    """Put the states of random generators back that a trainer holds, or an object of the user's own in it: each step shall draw the same."""
    held = [vars(trainer), *_changeable(trainer)]
    states = [state for attributes in held for value in attributes.values() if (state := _state_of(value)) is not None]
    try:
        yield
    finally:
        for put_back in states:
            put_back()


@contextmanager
def without_scaling(accelerator: Any) -> Iterator[None]:
    """Leave the loss unscaled while the context is active: the scale at which fp16 begins is too large for most models, by design."""
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None:
        accelerator.scaler = torch.amp.GradScaler(enabled=False)
    try:
        yield
    finally:
        if scaler is not None:
            accelerator.scaler = scaler


@contextmanager
def preserved_device_state(device: torch.device) -> Iterator[None]:
    """Restore the generator of an accelerator when the context ends. That of the CPU is left alone."""
    if device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device.type)
    at = () if device.type == "mps" else (device,)  # there is one of these
    state = module.get_rng_state(*at)
    try:
        yield
    finally:
        module.set_rng_state(state, *at)
