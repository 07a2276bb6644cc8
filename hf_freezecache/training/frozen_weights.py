"""Notices that frozen blocks, or what stands before them, change while a stage trains from a cache of what they gave."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from ..data.seeding import preserved_random_state
from ..data.training_data import TrainingData
from ..errors import UnsupportedSetupError
from ..model.probe import first_row
from ..model.split import Split
from ..model.threads import one_thread_if_small
from .runtime import Runtime

__all__ = ["FrozenWeights"]

#: Whole numbers of each size in bytes.
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenWeights:
    """Compares the prefix's weights, by sums over their bits, and hidden states of the first row with those at a stage's start.

    The hidden states are those of training: a model may begin to augment its images after some steps.

    Args:
        split: The model, split where the cache was made.
        runtime: The trainer.
        data: The training data.
    """

    def __init__(self, split: Split, runtime: Runtime, data: TrainingData) -> None:
        self._split, self._runtime, self._data = split, runtime, data
        self._looked_at: int | None = None
        self._sums_before, self._states_before = self._sums(), self._states()

    def _sums(self) -> Tensor:
        split = self._split
        tensors = [*split.prefix_parameters().values(), *split.prefix_buffers().values()]
        with torch.no_grad(), one_thread_if_small(split.model):
            sums = [_sum_of_bits(tensor.detach()) for tensor in tensors]
        return torch.stack(sums) if sums else torch.zeros(0)

    def _states(self) -> Tensor:
        runtime, data, model = self._runtime, self._data, self._split.model
        names = ("pixel_values", *sorted(data.prefix_inputs))
        inputs = runtime.to_device(first_row({name: data.example_batch[name] for name in names}))
        training, buffers = model.training, [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        model.train()
        try:
            with ExitStack() as stack:
                contexts = (preserved_random_state(), one_thread_if_small(model), torch.no_grad())
                for context in (*contexts, runtime.autocast(), runtime.accelerator.autocast()):
                    stack.enter_context(context)
                return self._split.prefix(**inputs)
        finally:
            model.train(training)
            for buffer, value in buffers:
                buffer.data.copy_(value)

    def look(self, epoch: int) -> None:
        """Look once in an epoch.

        Args:
            epoch: The epoch that is being trained.

        Raises:
            UnsupportedSetupError: Something has changed.
        """
        split = self._split
        if epoch == self._looked_at:
            return
        self._looked_at = epoch
        states = self._states()  # first: it brings weights back that are in host memory
        if not torch.equal(self._sums(), self._sums_before):
            raise UnsupportedSetupError(
                f"The weights of the first {split.split_point} blocks have changed since the cache of this stage was opened, "
                f"before epoch {epoch}: a callback has written to them, perhaps (averaged weights, say). The cache holds what "
                f"the blocks gave before. Let the callback leave frozen blocks alone, or train such stages with "
                "CacheConfig(mode='never')."
            )
        before = self._states_before
        if not float((states - before).abs().max()) <= 1e-2 * float(before.abs().max()):
            raise UnsupportedSetupError(
                f"In epoch {epoch} the frozen blocks no longer see the images as they did when the cache of this stage was "
                "opened: the model changes its input, perhaps (an augmentation that begins later). Augment in the data set's "
                "transform, or train such stages with CacheConfig(mode='never')."
            )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's values, each read as a whole number: exact, whatever the order and the device.

    Classes of tensors of other libraries, quantized ones say, need not show their bits: there it is the bits of the sum.
    """
    if type(tensor) is not Tensor:
        return tensor.double().sum().view(torch.int64)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_WHOLE[tensor.element_size()]).sum(dtype=torch.int64)
