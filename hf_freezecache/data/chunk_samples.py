"""Samples of decoded chunks, one by one or as a batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..codecs.array_names import KEPT

__all__ = ["Chunk", "ChunkSamples"]

#: Arrays of a decoded chunk by name, (samples, ...).
Chunk = Mapping[str, Tensor]

#: NumPy has no bfloat16. What is only moved may be taken for integers of that size.
_STAND_INS = {torch.bfloat16: torch.int16}


def _as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.view(_STAND_INS.get(tensor.dtype, tensor.dtype)).numpy()


class ChunkSamples(Sequence[dict[str, Tensor]]):
    """Samples that lie in chunks. Item ``i`` is a dict of the ``i``-th; ``batch`` has all of them, and makes no dicts.

    Args:
        places: Chunk and row in it, of each sample.
        token_axes: Axis of the tokens in the arrays of a chunk that have some.
        positions: Tokens that are kept of each sample, (kept,) int64 in rising order; ``None`` for all.
        packed: Whether the samples hold their positions, as ``packed.kept``.
    """

    def __init__(
        self,
        places: Sequence[tuple[Chunk, int]],
        token_axes: Mapping[str, int],
        positions: Sequence[Tensor] | None = None,
        packed: bool = False,
    ) -> None:
        self._places = places
        self._token_axes = {} if positions is None else token_axes
        self._positions = positions
        self._packed = packed and positions is not None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Tensor]]: ...

    def __getitem__(self, place: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return one sample, or several. Tensors share memory with the chunk, unless they hold some tokens only."""
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        chunk, row = self._places[place]
        item = {name: array[row] for name, array in chunk.items()}
        if self._positions is None:
            return item
        for name, axis in self._token_axes.items():
            if name in item:
                item[name] = item[name].index_select(axis - 1, self._positions[place])
        return {**item, KEPT: self._positions[place]} if self._packed else item

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the samples."""
        return (self[place] for place in range(len(self)))

    def batch(self) -> dict[str, Tensor]:
        """Return all samples as a batch, see ``collators.collate_cached``. Each array is copied once, token by token if some are left out.

        Raises:
            ValueError: Arrays of one name have different shapes in different chunks.
        """
        names = {name for chunk, _ in self._places for name in chunk}
        result = {name: self._stacked(name) for name in names}
        if self._packed and self._positions is not None:
            result[KEPT] = torch.stack(list(self._positions))
        return dict(sorted(result.items()))

    def _stacked(self, name: str) -> Tensor:
        arrays = {id(chunk): chunk[name] for chunk, _ in self._places if name in chunk}
        shapes = {array.shape[1:] for array in arrays.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"Samples of a batch have {name!r} of different shapes: {sorted(map(tuple, shapes))}; expected one. Check the "
                "cache with hf-freezecache verify, and pad what the collator gives."
            )
        shape, axis = list(shapes.pop()), self._token_axes.get(name)
        if axis is not None and self._positions is not None:
            shape[axis - 1] = len(self._positions[0])
        # A chunk whose numbers are small may have a narrower type than another.
        dtype = functools.reduce(torch.promote_types, {array.dtype for array in arrays.values()})
        everywhere = all(name in chunk for chunk, _ in self._places)
        stacked = (torch.empty if everywhere else torch.zeros)(len(self), *shape, dtype=dtype)
        sources = {key: _as_numpy(array) for key, array in arrays.items() if array.dtype == dtype}
        target = _as_numpy(stacked)
        for place, (chunk, row) in enumerate(self._places):
            if name not in chunk:
                continue
            # Of a chunk of another type only the rows of this batch are converted.
            source = sources[id(chunk)][row] if id(chunk) in sources else _as_numpy(chunk[name][row].to(dtype))
            if axis is None or self._positions is None:
                target[place] = source
            else:
                # NumPy takes along the last axis some five times faster than torch. Positions are in range: no need to look.
                np.take(source, self._positions[place].numpy(), axis=axis - 1, out=target[place, ...], mode="clip")
        return stacked
