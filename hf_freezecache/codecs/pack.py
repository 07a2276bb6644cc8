"""Packs small integers: several to a byte where they are small, and as a list of exceptions where they are rare.

An array (samples, components, positions) is cut into *cells*. A cell is one component at a range of positions, over all
samples. Its values have nearly one distribution, and neighbouring cells in the sorted streams have similar ones; an entropy
coder with one table per block needs that. Every cell has a *limit*. Values up to the limit go to a dense stream, several to a
byte. What larger values exceed it by goes to a sparse stream of gaps and remainders, so nothing is clipped.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from .base import (
    BYTES,
    INTEGERS,
    ArraySpec,
    Buffer,
    BytesStep,
    join_bytes,
)

__all__ = ["Pack"]

Ints = npt.NDArray[Any]

#: Kind of a cell -> largest absolute value in its dense stream. Kinds 1 to 3 are packed in base ``2 * limit + 1``.
LIMITS = (0, 1, 2, 7, 127, 32767)
#: Kind -> values in one byte: 3**5, 5**3 and 15**2 are at most 256.
PER_BYTE = {1: 5, 2: 3, 3: 2}
#: Kind -> entropy in bits per value from which on it is chosen over the kind before. Measured on DeiT-Tiny coefficients
#: at k = 3 and 11 with zstd's Huffman coder, which spends at least one bit on a byte: within 2 to 5% of the entropy.
ENTROPY = (0.6, 1.2, 1.75, 2.7)
#: Levels of magnitude by which the cells of a kind are sorted, in quarters of an octave; kind and level share a byte.
LEVELS = 32
#: Values that are brought into order at once: their copies should stay in a core's cache.
_BLOCK = 2**19
#: The second byte of larger integers is kept apart for so many of the lowest positions, or a quarter of all. Source: of DeiT-Tiny at
#: 224 pixels, k = 3 to 11 and a KL of 0.01, up to 83 of 1.2 million integers are larger than a byte, none beyond position 21.
_HIGH_POSITIONS = 32
#: And where no more than this share of all is that large.
_MOST_HIGH = 0.01
#: Kind -> binary logarithm of the mean magnitude at level 0.
FIRST_LEVEL = (-10, -4, -3, -2, -1, 4)


class _Scratch(threading.local):
    """Memory that a thread decodes in, again and again: the system would clear new pages for each chunk."""

    def __init__(self) -> None:
        self._buffers: dict[str, Ints] = {}

    def of(self, name: str, size: int, dtype: npt.DTypeLike) -> Ints:
        """Return an array (size,) with any content. It is good until the thread asks for that name again."""
        wanted = size * np.dtype(dtype).itemsize
        if name not in self._buffers or len(self._buffers[name]) < wanted:
            self._buffers[name] = np.empty(wanted, dtype=np.uint8)
        return self._buffers[name][:wanted].view(dtype)


_scratch = _Scratch()


@dataclass(frozen=True)
class Pack(BytesStep):
    """Packs small integers; the module's docstring says how.

    The buffers are: codes of the cells, the dense streams of kinds 1 to 5, then gaps and remainders of cells without a
    dense stream, and of the others.

    Attributes:
        zones: Ranges of positions per component, with edges at equal steps of the square root of the position, since
            positions are taken to be ordered by frequency on a square grid. There are fewer where a zone would have under 16
            positions. On DeiT-Tiny at k = 3, 6, 9, 11 and a KL of 0.01, 6, 10 and 14 zones differ by less than
            0.4%, 1 zone costs 3 to 8%.
    """

    name: ClassVar[str] = "pack"
    takes: ClassVar[frozenset[str]] = frozenset({INTEGERS})
    gives: ClassVar[str] = BYTES
    zones: int = 10

    def __post_init__(self) -> None:
        """Check the number of zones.

        Raises:
            ValueError: Not a whole number from 1 to 255.
        """
        if type(self.zones) is not int or not 1 <= self.zones <= 255:
            raise ValueError(f"zones must be a whole number from 1 to 255, got {self.zones!r}")

    def _edges(self, positions: int) -> list[int]:
        zones = max(1, min(self.zones, positions // 16))
        return [round((zone / zones) ** 2 * positions) for zone in range(zones + 1)]

    @override
    def max_bytes(self, spec: ArraySpec) -> list[int]:
        """Return the largest size of each buffer.

        Raises:
            ValueError: The array has not three axes, or is not int8 or int16.
        """
        if len(spec.shape) != 3 or spec.dtype not in (torch.int8, torch.int16):
            raise ValueError(f"pack takes three axes of int8 or int16, got {spec.shape} of {spec.dtype}")
        count = math.prod(spec.shape)
        cells = spec.shape[1] * (len(self._edges(spec.shape[2])) - 1)
        dense = [-(-count // PER_BYTE[kind]) for kind in (1, 2, 3)]
        sparse = [count + count // 255 + 1, 2 * count]
        return [cells, *dense, count, 2 * count, *sparse, *sparse]

    @override
    def encode(self, array: Tensor) -> list[bytes]:
        values = array.numpy().astype(np.int16, copy=False)
        samples, components, positions = values.shape
        edges = self._edges(positions)
        zones = list(itertools.pairwise(edges))
        codes = np.empty((len(zones), components), dtype=np.uint8)
        cells: list[Ints] = []
        for zone, (start, stop) in enumerate(zones):
            block = np.ascontiguousarray(values[:, :, start:stop].transpose(1, 0, 2))
            block = block.reshape(components, samples * (stop - start))
            codes[zone] = _codes(block)
            cells += list(block)
        order = np.argsort(codes.reshape(-1), kind="stable")
        kinds = codes.reshape(-1)[order] // LEVELS
        counts = np.array([cells[cell].size for cell in order], dtype=np.int64)
        flat = np.concatenate([cells[cell] for cell in order]) if cells else np.empty(0, np.int16)
        ends = np.cumsum(counts)
        starts = [int(ends[kinds < kind][-1]) if (kinds < kind).any() else 0 for kind in range(len(LIMITS) + 1)]
        buffers = [codes.tobytes()]
        remainders = flat.copy()
        for kind, limit in enumerate(LIMITS[1:], start=1):
            of_kind = slice(starts[kind], starts[kind + 1])
            dense = np.clip(flat[of_kind], -limit, limit)
            remainders[of_kind] -= dense
            buffers.append(_pack(dense, kind))
        return [*buffers, *_sparse(remainders[: starts[1]]), *_sparse(remainders[starts[1] :])]

    @override
    def decode(self, buffers: Sequence[Buffer], spec: ArraySpec) -> Tensor:
        """Return the array, of int8 if all values fit.

        Raises:
            ValueError: The buffers do not hold such an array.
        """
        values, high = self.decode_bytes(buffers, spec)
        return values if high is None else join_bytes(values, high)

    @override
    def decode_bytes(self, buffers: Sequence[Buffer], spec: ArraySpec) -> tuple[Tensor, Tensor | None]:
        """Return the array in bytes where it is mostly small: then half of it is brought into order, and moved to batches and to the device.

        Returns:
            Low bytes (samples, components, positions) int8, and high bytes of the first positions, (samples, components, first
            positions) int8, see ``join_bytes``. Without high bytes the array itself: int8 if all values fit, else int16.

        Raises:
            ValueError: The buffers do not hold such an array.
        """
        if len(buffers) != 10:
            raise ValueError(f"{len(buffers)} buffers, expected 10")
        samples, components, positions = spec.shape
        edges = self._edges(positions)
        widths = np.diff(edges)
        codes = np.frombuffer(buffers[0], dtype=np.uint8)
        if len(codes) != components * len(widths) or (codes // LEVELS >= len(LIMITS)).any():
            raise ValueError(f"{len(codes)} codes of cells, or unknown ones; expected {components * len(widths)}")
        order = np.argsort(codes, kind="stable")
        counts = np.repeat(widths * samples, components)[order]
        ends = np.cumsum(counts)
        of_kinds = np.bincount(codes[order] // LEVELS, counts, len(LIMITS)).astype(np.int64).tolist()
        flat, large = _scratch.of("cells", sum(of_kinds), np.int8), np.empty(of_kinds[5], dtype=np.int16)
        streams = np.split(flat, np.cumsum(of_kinds)[:-1])
        streams[0][:] = 0
        for kind in range(1, len(LIMITS)):
            _unpack(buffers[kind], kind, large if kind == 5 else streams[kind])
        first_dense, first_large, found = of_kinds[0], len(flat) - len(large), []
        for start, stop, place in ((0, first_dense, 6), (first_dense, len(flat), 8)):
            where, exceptions = _exceptions(buffers[place], buffers[place + 1], stop - start)
            where += start
            few = np.searchsorted(where, first_large)
            large[where[few:] - first_large] += exceptions[few:]
            found.append((where[:few], (flat[where[:few]] + exceptions[:few]).astype(np.int16)))
        streams[5][:] = large.astype(np.int8)
        where, values = map(np.concatenate, zip(*found, strict=True))
        flat[where] = values.astype(np.int8)
        is_large, is_wide, high = large != streams[5], values != flat[where], None
        count = np.count_nonzero(is_large) + np.count_nonzero(is_wide)
        if count and spec.dtype == torch.int8:
            raise ValueError(f"{count} values that do not fit in an array of int8")
        if 0 < count <= _MOST_HIGH * len(flat):
            wide = np.concatenate([where[is_wide], first_large + np.flatnonzero(is_large)])
            places = _places(wide, order, ends, widths, components)
            high = _high_bytes(np.concatenate([values[is_wide], large[is_large]]), places, spec)
        if count and high is None:
            flat = flat.astype(np.int16)
            flat[where], flat[first_large:] = values, large
        starts = np.empty(len(order), dtype=np.int64)
        starts[order] = ends - counts
        return _place(flat, starts.reshape(len(widths), components), edges, samples), high


def _places(where: Ints, order: Ints, ends: Ints, widths: Ints, components: int) -> tuple[Ints, Ints, Ints]:
    """Return sample, component and position of values that lie at ``where`` in the sorted cells.

    Args:
        where: Positions among the values of all cells, (values,) int64.
        order: Number of each sorted cell, counted zone by zone, component by component.
        ends: Where each sorted cell ends.
        widths: Positions in each zone.
        components: Components of the array.
    """
    cell = np.searchsorted(ends, where, side="right")
    zone, component = np.divmod(order[cell], components)
    begins = np.where(cell > 0, ends[cell - 1], 0)
    sample, position = np.divmod(where - begins, widths[zone])
    return sample, component, position + (np.cumsum(widths) - widths)[zone]


def _high_bytes(values: Ints, places: tuple[Ints, Ints, Ints], spec: ArraySpec) -> Tensor | None:
    """Return the high bytes of the first positions, int8, from the values that need them; ``None`` if one lies elsewhere, or needs more."""
    first = min(_HIGH_POSITIONS, spec.shape[2] // 4)
    bytes_ = (values.astype(np.int32) - values.astype(np.int8)) // 256
    if places[2].max() >= first or bytes_.max() > 127:
        return None
    high = np.zeros((*spec.shape[:2], first), dtype=np.int8)
    high[places] = bytes_
    return torch.from_numpy(high)


def _place(flat: Ints, starts: Ints, edges: Sequence[int], samples: int) -> Tensor:
    """Bring cells into order.

    Args:
        flat: Cells one after the other, int8 or int16.
        starts: Where each begins, (zones, components).
        edges: First position of each zone, and the number of positions.
        samples: Samples in each cell.

    Returns:
        (samples, components, positions), of the dtype of ``flat``.
    """
    components, positions = starts.shape[1], edges[-1]
    values = np.empty((samples, components, positions), dtype=flat.dtype)
    at_once = max(1, _BLOCK // max(1, samples * positions))
    zones = [(zone, *pair) for zone, pair in enumerate(itertools.pairwise(edges))]
    for first, (zone, start, stop) in itertools.product(range(0, components, at_once), zones):
        some, size = slice(first, first + at_once), samples * (stop - start)
        if size:
            # Cells of a zone have one length, so those that begin anywhere are rows of one overlapping view, and NumPy copies rows fast.
            rows = np.lib.stride_tricks.as_strided(
                flat, (flat.size - size + 1, size), 2 * flat.strides, writeable=False
            )
            cells = rows[starts[zone, some]].reshape(-1, samples, stop - start)
            values[:, some, start:stop] = cells.transpose(1, 0, 2)
    return torch.from_numpy(values)


def _codes(block: Ints) -> Ints:
    """Return the codes (kind and level) of cells, (cells,) uint8, from their values, (cells, values)."""
    if block.size == 0:
        return np.zeros(len(block), dtype=np.uint8)
    magnitude = np.abs(block).view(np.uint16)  # that of the smallest int16, too; as a symbol it counts as 0
    cells, size = block.shape
    # NumPy's `minimum` of small integers takes ten times as long.
    symbols = torch.from_numpy(magnitude.view(np.int16)).clamp(0, 8)
    offsets = torch.arange(0, 9 * cells, 9, dtype=torch.int32)[:, None]
    counts = np.bincount((symbols + offsets).view(-1).numpy(), minlength=9 * cells).reshape(cells, 9)
    # Counts of 0 to 7 with their mirror images; what is larger counts as one more symbol with the bits of its length.
    mirrored = np.array([1, *[2] * 7])[:, None]
    share = counts[:, :8].T / size / mirrored
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(share > 0, -share * np.log2(share), 0.0) * mirrored
    entropy = np.zeros(cells)
    for of_value in bits:  # in this order: the sum decides
        entropy += of_value
    large = counts[:, 8] / size
    mean = magnitude.sum(axis=1, dtype=np.int64) / size
    entropy += large * np.log2(2 + mean) * 2
    kinds = np.searchsorted(ENTROPY, entropy, side="right")
    # Two bytes only where exceptions at some 24 bits each would cost more than a second plane of mostly zeros.
    if magnitude.max() > 127:
        kinds[np.count_nonzero(magnitude > 127, axis=1) > 0.05 * size] = 5
    octaves = np.log2(np.maximum(mean, 2.0**-10)) - np.take(FIRST_LEVEL, kinds)
    levels = np.clip(np.round(4 * octaves), 0, LEVELS - 1).astype(np.int64)
    return (kinds * LEVELS + levels).astype(np.uint8)


def _pack(values: Ints, kind: int) -> bytes:
    if kind == 4:
        return values.astype(np.int8).tobytes()
    if kind == 5:
        return _planes(values.astype(np.uint16))
    count, base = PER_BYTE[kind], 2 * LIMITS[kind] + 1
    digits = np.zeros(-(-len(values) // count) * count, dtype=np.uint8)
    digits[: len(values)] = values + LIMITS[kind]
    packed = digits[0::count].copy()
    for place in range(1, count):
        packed += digits[place::count] * np.uint8(base**place)
    return packed.tobytes()


def _unpack(buffer: Buffer, kind: int, out: Ints) -> None:
    """Unpack a dense stream into ``out``, int8 or int16."""
    raw = np.frombuffer(buffer, dtype=np.uint8)
    count, base = PER_BYTE.get(kind, 1), 2 * LIMITS[kind] + 1
    expected = {4: len(out), 5: 2 * len(out)}.get(kind, -(-len(out) // count))
    if len(raw) != expected:
        raise ValueError(f"dense stream {kind} has {len(raw)} bytes, expected {expected}")
    if kind == 4:
        out[:] = raw.view(np.int8)
    elif kind == 5:
        out[:] = _join(raw).view(np.int16)
    else:
        if raw.size and raw.max() >= base**count:
            raise ValueError(f"dense stream {kind} has a byte of {raw.max()}, expected less than {base**count}")
        # Two bytes at a look-up: a quarter to a half of the time that divisions take, and in one call, without the interpreter's lock.
        digits, pairs = _digits(kind), _digits_of_pairs(kind)
        whole = len(out) // (2 * count)
        done = 2 * count * whole
        np.take(pairs, raw[: 2 * whole].view("<u2"), out=out[:done].view(pairs.dtype), mode="clip")
        out[done:] = digits[raw[2 * whole :]].reshape(-1)[: len(out) - done]


@functools.cache
def _digits(kind: int) -> Ints:
    """Return the values in each byte of a dense stream, (256, values) int8; bytes that cannot be are among them."""
    base = 2 * LIMITS[kind] + 1
    places = base ** np.arange(PER_BYTE[kind])
    return (np.arange(256)[:, None] // places % base - LIMITS[kind]).astype(np.int8)


@functools.cache
def _digits_of_pairs(kind: int) -> Ints:
    """Return the values in each two bytes, first byte lowest, (65536,) of as many bytes as there are values."""
    digits = _digits(kind)
    first, second = np.tile(digits, (256, 1)), np.repeat(digits, 256, 0)
    return np.concatenate([first, second], 1).view(f"V{2 * PER_BYTE[kind]}")[:, 0]


def _planes(values: Ints) -> bytes:
    return values.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()


def _join(raw: Ints) -> Ints:
    return np.ascontiguousarray(raw.reshape(2, -1).T).view("<u2").reshape(-1).astype(np.uint16)


def _sparse(remainders: Ints) -> list[bytes]:
    """Return gaps and remainders. A gap byte of 255 means 255 more zeros and that the gap goes on."""
    where = np.flatnonzero(remainders != 0)
    gaps = np.diff(where, prepend=-1) - 1
    more, rest = np.divmod(gaps, 255)
    coded = np.full(len(gaps) + int(more.sum()), 255, dtype=np.uint8)
    coded[np.cumsum(more + 1) - 1] = rest
    exceptions = remainders[where].astype(np.int32)
    return [coded.tobytes(), _planes((2 * np.abs(exceptions) - (exceptions > 0) - 1).astype(np.uint16))]


def _exceptions(gaps: Buffer, remainders: Buffer, size: int) -> tuple[Ints, Ints]:
    """Return where a sparse stream adds to ``size`` values, int64, and what, int16."""
    coded, raw = np.frombuffer(gaps, dtype=np.uint8), np.frombuffer(remainders, dtype=np.uint8)
    last = np.flatnonzero(coded != 255)
    if len(raw) != 2 * len(last):
        raise ValueError(f"{len(last)} exceptions, but {len(raw)} bytes of remainders")
    if len(coded) and coded[-1] == 255:
        raise ValueError("the last gap does not end")
    where = np.cumsum(coded, dtype=np.int64)[last] + np.arange(len(last))
    if len(where) and where[-1] >= size:
        raise ValueError(f"an exception at {where[-1]} of {size} values")
    exceptions = _join(raw).astype(np.int32) + 1
    return where, np.where(exceptions % 2 == 1, (exceptions + 1) // 2, -(exceptions // 2)).astype(np.int16)
