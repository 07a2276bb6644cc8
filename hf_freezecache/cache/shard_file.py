"""Shards: valid safetensors files, whose header can be checked without reading the frames. See ``docs/format.md``.

The *header* of a shard is all that comes before its frames: eight bytes of length, the JSON header of safetensors, the frame
offsets and the sample indices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from ..codecs.base import Buffer
from ..codecs.entropy import decompress_frame
from ..errors import CacheCorruptError
from .schema import (
    EXTRA_DTYPES,
    MAX_HEADER_BYTES,
    TOKEN_POSITIONS,
    parse_json,
)
from .storage import (
    StoredFile,
    as_file,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "ExtraSpec",
    "ShardHeader",
    "check_token_positions",
    "file_sha256",
    "header_size",
    "read_chunk_frames",
    "read_extra",
    "read_shard_header",
    "shard_metadata",
    "write_shard_header",
]

FORMAT = "hf_freezecache"
FORMAT_VERSION = 2
#: A longer JSON header of a shard is refused unread. It holds the configuration of a codec and the names of extras.
MAX_JSON_BYTES = 2**20


@dataclass(frozen=True)
class ExtraSpec:
    """Something that the collator yields beside the images, e.g. labels.

    Attributes:
        name: Key in the batch.
        dtype: Name of a torch dtype, e.g. ``"int64"``.
        shape: Shape per sample, ``()`` for plain labels.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CacheCorruptError: There is no dtype of this name.
        """
        dtype = EXTRA_DTYPES.get(self.dtype)
        if dtype is None:
            raise CacheCorruptError(f"Extra {self.name!r} has the unknown dtype {self.dtype!r}.")
        return dtype


def file_sha256(path: Path | StoredFile, limit: int | None = None) -> str:
    """SHA-256 of a file, or of its first ``limit`` bytes.

    Raises:
        CacheCorruptError: It is missing, or cannot be read.
    """
    file, digest, position = as_file(path), hashlib.sha256(), 0
    while limit is None or position < limit:
        step = file.block_bytes if limit is None else min(file.block_bytes, limit - position)
        block = file.read(position, step)
        digest.update(block)
        position += len(block)
        if len(block) < step:
            break
    return digest.hexdigest()


def shard_metadata(
    digest: str,
    view: int,
    shard: int,
    codec: dict[str, Any],
    num_tokens: int,
    hidden_shape: Sequence[int],
    dtype: str,
    extras: Sequence[ExtraSpec],
) -> dict[str, str]:
    """Return the metadata of a shard, from which alone a reader can tell what the shard holds.

    Args:
        digest: Digest of the cache's fingerprint.
        view: Number of the view.
        shard: Number of the shard.
        codec: ``{"name", "configuration"}`` of the codec of this view.
        num_tokens: Tokens per sample in the model.
        hidden_shape: (stored tokens, hidden).
        dtype: Safetensors name of the dtype of the hidden states.
        extras: What is stored beside the hidden states.

    Returns:
        Name -> text: safetensors allows nothing but texts.
    """
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint": digest,
        "view": str(view),
        "shard": str(shard),
        "codec": json.dumps(codec, sort_keys=True),
        "num_tokens": str(num_tokens),
        "hidden_shape": json.dumps(list(hidden_shape)),
        "dtype": dtype,
        "extras": json.dumps([dataclasses.asdict(spec) for spec in extras], sort_keys=True),
    }


@dataclass(frozen=True)
class ShardHeader:
    """What a shard holds before its frames.

    Attributes:
        metadata: Name -> text, see ``shard_metadata``.
        frame_offsets: (chunks, frames + 1), int64, ends of frames in ``frames``.
        sample_indices: (rows,), int64.
        header_bytes: Where ``frames`` starts in the file.
    """

    metadata: dict[str, str]
    frame_offsets: npt.NDArray[np.int64]
    sample_indices: npt.NDArray[np.int64]
    header_bytes: int


def _header_layout(num_chunks: int, num_frames: int, num_rows: int, metadata: dict[str, str]) -> tuple[int, int]:
    """Return the bytes reserved for the JSON header, and the size of the whole header."""
    # The number of frame bytes is not known yet: there is room for 20 digits.
    header = _header_json(num_chunks, num_frames, num_rows, 10**19, metadata)
    reserved = (len(header) + 7) // 8 * 8
    return reserved, 8 + reserved + 8 * (num_chunks * (num_frames + 1) + num_rows)


def _header_json(num_chunks: int, num_frames: int, num_rows: int, frame_bytes: int, metadata: dict[str, str]) -> bytes:
    end_offsets = 8 * num_chunks * (num_frames + 1)
    end_indices = end_offsets + 8 * num_rows
    header: dict[str, Any] = {
        "__metadata__": metadata,
        "frame_offsets": {
            "dtype": "I64",
            "shape": [num_chunks, num_frames + 1],
            "data_offsets": [0, end_offsets],
        },
        "sample_indices": {"dtype": "I64", "shape": [num_rows], "data_offsets": [end_offsets, end_indices]},
        "frames": {
            "dtype": "U8",
            "shape": [frame_bytes],
            "data_offsets": [end_indices, end_indices + frame_bytes],
        },
    }
    return json.dumps(header, sort_keys=True).encode()


def header_size(num_chunks: int, num_frames: int, num_rows: int, metadata: dict[str, str]) -> int:
    """Return the size of a shard's header in bytes. It is known before any frame is."""
    return _header_layout(num_chunks, num_frames, num_rows, metadata)[1]


def write_shard_header(
    file: BinaryIO,
    frame_offsets: npt.NDArray[np.int64],
    sample_indices: npt.NDArray[np.int64],
    metadata: dict[str, str],
) -> None:
    """Write the header of a shard whose frames already follow at ``header_size``."""
    num_chunks, width = frame_offsets.shape
    num_rows = len(sample_indices)
    reserved, _ = _header_layout(num_chunks, width - 1, num_rows, metadata)
    header = _header_json(num_chunks, width - 1, num_rows, int(frame_offsets[-1, -1]), metadata)
    file.seek(0)
    file.write(struct.pack("<Q", reserved))
    file.write(header.ljust(reserved))  # safetensors allows trailing spaces
    file.write(frame_offsets.astype("<i8").tobytes())
    file.write(sample_indices.astype("<i8").tobytes())


def read_shard_header(path: Path | StoredFile, start: bytes | None = None) -> ShardHeader:
    """Read and check the header of a shard.

    Args:
        path: The shard.
        start: The first bytes of the file, if the caller has read them: at least its header.

    Raises:
        CacheCorruptError: Missing, not a shard, truncated, or offsets that do not tile its frames.
    """
    file = as_file(path)
    try:
        size = file.size()
        if size is None:
            raise CacheCorruptError(f"{file} is missing. Delete the cache folder to rebuild it.")

        def take(position: int, length: int) -> bytes:
            return file.read(position, length) if start is None else start[position : position + length]

        # The parser of safetensors takes no header alone: it wants the whole file in memory or on a local disk.
        (reserved,) = struct.unpack("<Q", take(0, 8))
        if not 2 <= reserved <= min(MAX_JSON_BYTES, size):
            raise ValueError(
                f"a header of {reserved} bytes in a file of {size}, expected at most {min(MAX_JSON_BYTES, size)}"
            )
        header = parse_json(take(8, reserved))
        metadata = header["__metadata__"]
        num_chunks, width = header["frame_offsets"]["shape"]
        (num_rows,) = header["sample_indices"]["shape"]
        (frame_bytes,) = header["frames"]["shape"]
        counts: Sequence[int] = (num_chunks, width, num_rows, frame_bytes)
        if not all(type(count) is int and count >= 0 for count in counts) or width < 2:
            raise ValueError(f"shapes {list(counts)}")
        header_bytes = 8 + reserved + 8 * (num_chunks * width + num_rows)
        if header_bytes > MAX_HEADER_BYTES or header_bytes + frame_bytes != size:
            raise ValueError(f"{size} bytes, expected {header_bytes + frame_bytes}")
        expected = json.loads(_header_json(num_chunks, width - 1, num_rows, frame_bytes, metadata))
        if header != expected or metadata.get("format") != FORMAT:
            raise ValueError("foreign tensors, offsets or metadata in its header")
        numbers = np.frombuffer(take(8 + reserved, header_bytes - 8 - reserved), dtype="<i8")
        if len(numbers) != num_chunks * width + num_rows:
            raise ValueError(f"{len(numbers)} offsets and indices, expected {num_chunks * width + num_rows}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CacheCorruptError(f"{file} is damaged: {error}. Delete it, or the cache folder, to rebuild.") from error
    offsets = numbers[: num_chunks * width].reshape(num_chunks, width)
    ends = offsets.reshape(-1)
    tiled = num_chunks > 0 and offsets[0, 0] == 0 and offsets[-1, -1] == frame_bytes
    # Compared, not subtracted: differences of far numbers wrap around.
    if not tiled or bool((ends[1:] < ends[:-1]).any()) or not np.array_equal(offsets[1:, 0], offsets[:-1, -1]):
        raise CacheCorruptError(f"{file} is damaged: its frame offsets do not tile its {frame_bytes} bytes of frames.")
    return ShardHeader(metadata, offsets, numbers[num_chunks * width :], header_bytes)


def read_chunk_frames(
    path: Path | StoredFile, header: ShardHeader, position: int, largest: Sequence[int] | None = None
) -> list[Buffer]:
    """Read the frames of one chunk of a shard.

    Args:
        path: The shard.
        header: Its header.
        position: The chunk's place in the shard.
        largest: Largest size of each frame in bytes. A larger one is refused unread.

    Raises:
        ValueError: A frame is too large, or the file is shorter than its header promises.
        CacheCorruptError: The file is missing, or cannot be read.
    """
    offsets = header.frame_offsets[position]
    sizes = np.diff(offsets).tolist()
    for number, most in enumerate(largest or ()):
        if sizes[number] > most:
            raise ValueError(f"frame {number} takes {sizes[number]} bytes, expected at most {most}")
    length = sum(sizes)
    data = as_file(path).read(header.header_bytes + int(offsets[0]), length)
    if len(data) != length:
        raise ValueError(f"{len(data)} bytes left of {length}")
    bounds = (offsets - offsets[0]).tolist()
    return [memoryview(data)[start:end] for start, end in itertools.pairwise(bounds)]


def read_extra(spec: ExtraSpec, frame: Buffer, samples: int) -> torch.Tensor:
    """Decode the frame of an extra, (samples, ...).

    Raises:
        ValueError: Damaged, or of another size.
    """
    shape = (samples, *spec.shape)
    content = bytearray(decompress_frame(frame, math.prod(shape) * spec.torch_dtype.itemsize))
    if not content:
        return torch.empty(shape, dtype=spec.torch_dtype)
    if spec.torch_dtype is torch.bool and not set(content) <= {0, 1}:
        raise ValueError(f"extra {spec.name!r} holds bytes that are neither true nor false")
    return torch.frombuffer(content, dtype=spec.torch_dtype).reshape(shape)


def check_token_positions(positions: torch.Tensor, num_tokens: int) -> None:
    """Check which tokens of the model are stored.

    Args:
        positions: (samples, stored tokens), int16 or int32: the position of each stored token among those of the model.
        num_tokens: Tokens per sample in the model.

    Raises:
        ValueError: A position is out of range, or those of a sample do not ascend.
    """
    # The first and the last of an ascending row bound all others.
    in_range = (positions[:, :1] >= 0) & (positions[:, -1:].int() < num_tokens)  # int16 would wrap the number around
    ascending = (positions[:, 1:] > positions[:, :-1]).all(1, keepdim=True)
    wrong = (~(in_range & ascending)).flatten().nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{TOKEN_POSITIONS} of its sample {wrong[0]} begin with {positions[wrong[0], :8].tolist()}, expected ascending "
            f"numbers from 0 to {num_tokens - 1}"
        )
