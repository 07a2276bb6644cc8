"""What the stages of a run need of their trainer, in one object."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Sampler

from ..distributed.ddp import is_replicated, unused_parameters, unwrapped
from ..distributed.process_group import ProcessGroup

__all__ = ["Runtime", "args_without_workers"]

logger = logging.getLogger(__name__)


def args_without_workers(args: Any) -> Any:
    """Return a copy of ``TrainingArguments`` whose loaders start no processes."""
    args = copy.copy(args)
    args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
    args.dataloader_persistent_workers = False
    if hasattr(args, "dataloader_multiprocessing_context"):  # absent from early 5.x
        args.dataloader_multiprocessing_context = None
    return args


def _as_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


@dataclass(frozen=True)
class Runtime:
    """The trainer as its stages see it.

    Attributes:
        model: The model, not wrapped.
        args: ``TrainingArguments``.
        accelerator: accelerate's ``Accelerator``.
        everyone: All processes of the run.
        cache_group: Processes that share this one's folder of caches.
        batch_size: Samples per training batch of one process.
        label_names: Names under which the model takes labels.
        num_classes: Classes of the model; ``None`` if its labels are not classes.
        raw_collator: The user's collator, as it was passed.
        collate: The same, with unused columns removed as ``Trainer`` does.
        prepare_inputs: Prepares a batch of images as ``training_step`` does: moves it to the training device, and what a user's trainer adds.
        to_device: Moves tensors to the training device.
        rehearsing: Enters a copy of the trainer, on which a step leaves nothing behind; see ``rehearsal_copy``.
        autocast: Enters the run's autocast.
        compile_settings: Keyword arguments of ``torch.compile``; ``None`` if nothing is to be compiled.
        known_loss: Whether the loss is the model's own, as ``Trainer`` computes it.
    """

    model: nn.Module
    args: Any
    accelerator: Any
    everyone: ProcessGroup
    cache_group: ProcessGroup
    batch_size: int
    label_names: tuple[str, ...]
    num_classes: int | None
    raw_collator: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]]
    to_device: Callable[[dict[str, Any]], dict[str, Any]]
    rehearsing: Callable[[], AbstractContextManager[Any]]
    autocast: Callable[[], AbstractContextManager[Any]]
    compile_settings: Mapping[str, Any] | None
    known_loss: bool = True

    def run_frozen(self, function: Callable[..., Any], **inputs: Any) -> Any:
        """Call a function of tensors on the training device, in eval mode, without gradients.

        The run's own autocast is on: hidden states computed in fp32 are not those of a bf16 run. Where a user's trainer does something to
        images in ``_prepare_inputs``, rehearsing a step fails: there are none in a cached one.

        Args:
            function: Called with ``inputs`` on the training device.
            inputs: Tensors, or dicts of tensors.
        """
        inputs, training = self.to_device(inputs), self.model.training
        try:
            self.model.eval()
            with torch.no_grad(), self.autocast(), self.accelerator.autocast():
                return function(**inputs)
        finally:
            self.model.train(training)

    @contextmanager
    def in_its_precision(self) -> Iterator[None]:
        """Let the model's forward compute as training will have it, before ``Trainer`` has prepared the model for it.

        ``Accelerator.prepare_model`` wraps the forward for good, under these names: in the run's autocast, with outputs of fp32.
        """
        model = self.model
        if str(self.accelerator.mixed_precision) == "no" or "forward" in vars(model):
            yield
            return
        forward = model.forward

        @functools.wraps(forward)
        def in_autocast(*args: Any, **kwargs: Any) -> Any:
            with self.autocast(), self.accelerator.autocast():
                return pytree.tree_map(_as_fp32, forward(*args, **kwargs))

        model.forward, model._original_forward = in_autocast, forward  # type: ignore[assignment]
        try:
            yield
        finally:
            del model.forward, model._original_forward

    def parameters_without_gradient(self, batch: dict[str, Tensor]) -> list[str] | None:
        """Return the names of trainable parameters on which the loss of a batch does not depend.

        Args:
            batch: A collated batch: name -> (rows, ...).

        Returns:
            The names; ``None`` if the loss fails. Two rows may not do for it; what is wrong, rehearsing a step will tell.
        """

        try:
            with self.rehearsing() as trainer, self.accelerator.autocast():
                inputs = self.prepare_inputs(dict(batch))
                return unused_parameters(self.model, lambda: trainer.compute_loss(self.model, inputs))
        except Exception as error:
            logger.debug("Which parameters the loss depends on is not known: %r", error)
            return None

    def unwrap(self, wrapped: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
        """Return the model without its wrapper for several processes, or a compiler's, for a new one around what trains now.

        DDP is told to look for unused parameters in every step, ``Trainer``'s default, where the model has some, or where its forward or
        its loss are the user's own: other batches may use other parameters.

        Args:
            wrapped: The model in its wrapper.
            batch: See ``parameters_without_gradient``.
        """
        if not is_replicated(self.accelerator):
            return getattr(wrapped, "_orig_mod", wrapped)  # what a compiler has wrapped
        inner = unwrapped(self.accelerator, wrapped)
        handler = getattr(self.accelerator, "ddp_handler", None)
        if handler is None or self.args.ddp_find_unused_parameters is not None:
            return inner

        unused = self.parameters_without_gradient(batch)
        forward = getattr(self.model, "get_base_model", lambda: self.model)()  # behind adapters
        known = self.known_loss and type(forward).__module__.startswith("transformers.")
        handler.find_unused_parameters = unused is None or bool(unused) or not known
        if unused:
            logger.warning(
                "The loss does not depend on %d parameters that are to be trained (%s, ...): DDP looks for them in every "
                "step. Set requires_grad=False for what your model does not use.",
                len(unused),
                unused[0],
            )
        return inner

    def without_workers(self) -> Runtime:
        """Return the trainer with loaders that start no processes."""
        return replace(self, args=args_without_workers(self.args))

    def make_loader(
        self,
        dataset: Any,
        sampler: Sampler[Any],
        collate: Callable[[list[Any]], Any],
        draws: bool = False,
    ) -> Any:
        """Return a prepared ``DataLoader`` with the settings of ``TrainingArguments``.

        Args:
            dataset: A map-style data set.
            sampler: Gives the keys of its items.
            collate: Turns a list of items into a batch.
            draws: Whether each iteration begins with a draw from the global generator, as with ``Trainer``'s own loaders.
        """
        args = self.args
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=self.batch_size,
                sampler=sampler,
                collate_fn=collate,
                num_workers=args.dataloader_num_workers,
                # Starting workers draws a seed: from here, so that the global state is the same with kept workers or
                # after a resume. Views are seeded by themselves.
                generator=None if draws else torch.Generator(),
                # Absent from early 5.x.
                multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
                pin_memory=args.dataloader_pin_memory,
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                drop_last=args.dataloader_drop_last,
            )
        )
