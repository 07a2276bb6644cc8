"""The files that hold a fitted codec and the report of its calibration, once per cache. See ``docs/format.md``."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..codecs import (
    Codec,
    CopyCodec,
    Planes,
    codec_from_dict,
)
from ..codecs.base import ArraySpec
from ..codecs.entropy import (
    compress_frame,
    decompress_frame,
)
from ..errors import (
    CacheCorruptError,
    UnsupportedSetupError,
)
from .index import atomic_write
from .schema import (
    EXTRA_DTYPES,
    MAX_STATE_HEADER_BYTES,
    parse_json,
)
from .shard_file import FORMAT, FORMAT_VERSION
from .storage import (
    StoredFile,
    as_file,
)

__all__ = ["CodecState", "load_copies", "load_state", "read_state", "save_state"]

_LEVEL = 19
_PLANES = Planes()
#: Name of the one tensor of a file of a codec without tensors.
_NOTHING = "nothing"
#: A larger state is refused unread: a basis of 1536 channels in 8 bits takes 2.3 MB, a mean of 1024 tokens 6 MB.
_MAX_BYTES = 2**30
_KEYS = {"format_version", "fingerprint", "codec", "calibration", "tensors", "checksum"}


_C = TypeVar("_C", Codec, CopyCodec)


@dataclass(frozen=True)
class CodecState(Generic[_C]):
    """A codec with its tensors, and the report of its calibration.

    Attributes:
        codec: The codec, ready to encode.
        calibration: The report of its calibration, as JSON holds it. It is empty if nothing was measured.
    """

    codec: _C
    calibration: dict[str, Any]


def save_state(path: Path, fingerprint: str, state: CodecState[Any]) -> None:
    """Write the state of a codec, atomically.

    Each tensor becomes one zstd frame of its byte planes, which the file holds as a U8 tensor. The metadata of the file hold a
    JSON document of codec, calibration, dtypes and shapes, with a checksum: a build that is resumed has no index to trust.

    Args:
        path: The file.
        fingerprint: Digest of the cache's fingerprint.
        state: What to write.
    """
    tensors = state.codec.tensors()
    frames = {
        name: torch.frombuffer(bytearray(compress_frame(b"".join(_PLANES.encode(tensor)), _LEVEL)), dtype=torch.uint8)
        for name, tensor in tensors.items()
    }
    document = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "codec": state.codec.to_dict(),
        "calibration": state.calibration,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()},
    }
    document["checksum"] = _checksum(document)
    # One entry: safetensors writes several in random order, and the same cache should give the same file.
    metadata = {FORMAT: json.dumps(document, sort_keys=True)}
    with atomic_write(path) as file:
        # Old versions of safetensors cannot read a file of no tensors.
        file.write(safetensors.torch.save(frames or {_NOTHING: torch.zeros(1, dtype=torch.uint8)}, metadata))


def _checksum(document: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in document.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _tensors(frames: Mapping[str, bytes], specs: Any, max_bytes: int) -> dict[str, Tensor]:
    """Decode the tensors whose dtypes and shapes ``specs`` names."""
    if not isinstance(specs, dict) or specs.keys() != frames.keys() - {_NOTHING}:
        raise ValueError(f"tensors {sorted(frames)}, expected {specs if isinstance(specs, list) else sorted(specs)}")
    checked = {}
    for name, (dtype, shape) in specs.items():
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a tensor of shape {shape}")
        checked[name] = ArraySpec(tuple(shape), EXTRA_DTYPES[dtype])
    total = sum(spec.num_bytes for spec in checked.values())
    if total > max_bytes or any(size > max_bytes for spec in checked.values() for size in spec.shape):
        raise ValueError(f"tensors of {total} bytes, expected at most {max_bytes}")
    tensors = {}
    for name, spec in checked.items():
        content = decompress_frame(frames[name], spec.num_bytes)
        size = len(content) // spec.dtype.itemsize
        tensors[name] = _PLANES.decode([content[p * size : (p + 1) * size] for p in range(spec.dtype.itemsize)], spec)
    return tensors


def load_state(
    path: Path | StoredFile, fingerprint: str | None = None, max_bytes: int = _MAX_BYTES, data: bytes | None = None
) -> CodecState[Codec]:
    """Read and check the state of a codec.

    Args:
        path: The file.
        fingerprint: Digest that it must name; ``None`` takes any.
        max_bytes: Largest size of its tensors together.
        data: Content of the file, if the caller has read it.

    Raises:
        CacheCorruptError: The file is missing or damaged, or belongs to another cache.
    """
    return _load(path, fingerprint, max_bytes, data, codec_from_dict)


def load_copies(
    path: Path | StoredFile, fingerprint: str | None = None, max_bytes: int = _MAX_BYTES, data: bytes | None = None
) -> CodecState[CopyCodec]:
    """Read and check the state of the codec of copies; otherwise as ``load_state``."""
    return _load(path, fingerprint, max_bytes, data, CopyCodec.from_dict)


def read_state(file: StoredFile, max_bytes: int = _MAX_BYTES) -> bytes:
    """Return the content of a state whose tensors take at most ``max_bytes``.

    Raises:
        CacheCorruptError: The file is missing, or larger than such a state can be.
    """
    size, most = file.size(), min(_MAX_BYTES, 2 * max_bytes + MAX_STATE_HEADER_BYTES)
    if size is None:
        raise CacheCorruptError(f"{file} is missing. Delete the cache folder to rebuild it.")
    if size > most:
        raise CacheCorruptError(f"{file} is damaged: {size} bytes, expected at most {most}.")
    return file.read(0, size)


def _parse(data: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the metadata of a safetensors file, and its tensors, which must be bytes.

    The parser of safetensors checks offsets and sizes. It takes a header of up to 100 MB, so a smaller limit comes before it;
    and it gives no metadata of what is no file, so those are read here.
    """
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_STATE_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, expected at most {MAX_STATE_HEADER_BYTES}")
    header = parse_json(data[8 : 8 + length])
    tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    if any(tensor["dtype"] != "U8" for tensor in tensors.values()):
        raise ValueError("tensors of other dtypes than U8")
    return header["__metadata__"], {name: bytes(tensor["data"]) for name, tensor in tensors.items()}


def _load(
    path: Path | StoredFile,
    fingerprint: str | None,
    max_bytes: int,
    data: bytes | None,
    read: Callable[[Any, dict[str, Tensor]], _C],
) -> CodecState[_C]:
    """Read and check a state. ``read`` makes its codec of a description and tensors."""
    file = as_file(path)
    if data is None:
        data = read_state(file, max_bytes)
    try:
        metadata, frames = _parse(data)
        document = parse_json(metadata[FORMAT].encode())
        if document["checksum"] != _checksum(document):
            raise ValueError("its checksum does not match")
        if document.keys() != _KEYS:
            raise ValueError(f"its entries are {sorted(document)[:20]}, expected {sorted(_KEYS)}")
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {document['format_version']}, expected {FORMAT_VERSION}")
        codec = read(document["codec"], _tensors(frames, document["tensors"], max_bytes))
        calibration, owner = document["calibration"], document["fingerprint"]
        if not isinstance(calibration, dict):
            raise ValueError(f"its calibration is {calibration!r}")
    except (
        *(ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError, IndexError, struct.error),
        safetensors.SafetensorError,
        UnsupportedSetupError,
    ) as error:
        raise CacheCorruptError(f"{file} is damaged: {error}. Delete the cache folder to rebuild.") from error
    if fingerprint is not None and owner != fingerprint:
        raise CacheCorruptError(f"{file} belongs to another cache. Delete the cache folder to rebuild.")
    return CodecState(codec, calibration)
