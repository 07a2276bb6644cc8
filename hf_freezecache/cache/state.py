"""The file that holds a fitted codec and how it was calibrated, once per cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..codecs import Codec, CopyCodec, Planes, codec_from_dict
from ..codecs.base import ArraySpec
from ..codecs.entropy import compress_frame, decompress_frame
from ..errors import CacheCorruptError, UnsupportedSetupError
from .format import FORMAT, FORMAT_VERSION, atomic_write

__all__ = ["CodecState", "load_copies", "load_state", "save_state"]

_LEVEL = 19
_PLANES = Planes()
#: Stands in a file for no tensors.
_NOTHING = "nothing"
#: A larger state is refused unread: a basis of 1536 channels in 8 bits takes 2.3 MB, a mean of 1024 tokens 6 MB.
_MAX_BYTES = 2**30


_C = TypeVar("_C", Codec, CopyCodec)


@dataclass(frozen=True)
class CodecState(Generic[_C]):
    """A codec with its tensors, and the report of its calibration.

    Attributes:
        codec: Ready to encode.
        calibration: What ``calibration.Calibration.to_dict`` gave; empty if nothing was measured.
    """

    codec: _C
    calibration: dict[str, Any]


def save_state(path: Path, fingerprint: str, state: CodecState[Any]) -> None:
    """Write the state, atomically.

    Each tensor becomes one zstd frame of its byte planes, as a U8 tensor of a safetensors file, whose metadata hold a JSON
    document of codec, calibration, dtypes and shapes, with a hash of all that: what goes on with an unfinished cache has no index to trust.

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
    known = {name: value for name, value in document.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _tensor(frame: Tensor, dtype: str, shape: list[int]) -> Tensor:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a tensor of shape {shape}")
    spec = ArraySpec(tuple(shape), getattr(torch, dtype))
    if spec.num_bytes > _MAX_BYTES:
        raise ValueError(f"a tensor of {spec.num_bytes} bytes")
    content = decompress_frame(frame.numpy().tobytes(), spec.num_bytes)
    size = len(content) // spec.dtype.itemsize
    return _PLANES.decode([content[p * size : (p + 1) * size] for p in range(spec.dtype.itemsize)], spec)


def load_state(path: Path, fingerprint: str | None = None) -> CodecState[Codec]:
    """Read and check the state of a codec.

    Args:
        path: The file.
        fingerprint: Digest that it must name; ``None`` takes any.

    Raises:
        CacheCorruptError: Missing, damaged, or of another cache.
    """
    return _load(path, fingerprint, codec_from_dict)


def load_copies(path: Path, fingerprint: str | None = None) -> CodecState[CopyCodec]:
    """Read and check the state of the codec of copies; otherwise as ``load_state``."""
    return _load(path, fingerprint, lambda data, tensors: CopyCodec.from_dict(data, tensors, codec_from_dict))


def _load(path: Path, fingerprint: str | None, read: Callable[[Any, dict[str, Tensor]], _C]) -> CodecState[_C]:
    """Read and check a state, whose codec ``read`` makes."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, expected at most {_MAX_BYTES}")
        with safetensors.safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {})[FORMAT])
            if document["checksum"] != _checksum(document):
                raise ValueError("its checksum does not match")
            if document["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {document['format_version']}, expected {FORMAT_VERSION}")
            specs = document["tensors"]
            if specs.keys() != set(file.keys()) - {_NOTHING}:
                raise ValueError(f"tensors {sorted(file.keys())}, expected {sorted(specs)}")
            tensors = {name: _tensor(file.get_tensor(name), *spec) for name, spec in specs.items()}
        codec = read(document["codec"], tensors)
        calibration, owner = document["calibration"], document["fingerprint"]
        if not isinstance(calibration, dict):
            raise ValueError(f"its calibration is {calibration!r}")
    except FileNotFoundError:
        raise CacheCorruptError(f"{path} is missing. Delete the cache folder to rebuild it.") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        safetensors.SafetensorError,
        UnsupportedSetupError,
    ) as error:
        raise CacheCorruptError(f"{path} is damaged: {error}. Delete the cache folder to rebuild.") from error
    if fingerprint is not None and owner != fingerprint:
        raise CacheCorruptError(f"{path} belongs to another cache. Delete the cache folder to rebuild.")
    return CodecState(codec, calibration)
