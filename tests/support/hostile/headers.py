"""Hostile headers of shards."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_freezecache.cache.index import shard_name
from hf_freezecache.cache.shard_file import file_sha256
from hf_freezecache.codecs.entropy import compress_frame

from .cases import GIB, case
from .tools import Shard, document_of, header_bytes_of, seal, set_extras, set_frame


@case()
def header_that_claims_2_to_the_63(cache: Path) -> None:
    path = cache / shard_name(0, 0)
    raw = path.read_bytes()
    size = document_of(cache)["files"][shard_name(0, 0)]["header_bytes"]
    path.write_bytes(struct.pack("<Q", 2**63) + raw[8:])
    document = document_of(cache)
    for limit, name in ((None, "sha256"), (size, "header_sha256")):
        document["files"][shard_name(0, 0)][name] = hashlib.sha256(path.read_bytes()[:limit]).hexdigest()
    seal(cache, document, records=False)


def _long_header(cache: Path, junk: bytes) -> None:
    path = cache / shard_name(0, 0)
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = raw[8 : 8 + length].rstrip()[:-1] + b', "x": [' + junk + b"]}"
    raw = struct.pack("<Q", len(header)) + header + raw[8 + length :]
    path.write_bytes(raw)
    document = document_of(cache)
    size = 8 + len(header)
    record = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "header_bytes": size}
    document["files"][shard_name(0, 0)] = {**record, "header_sha256": hashlib.sha256(raw[:size]).hexdigest()}
    seal(cache, document, records=False)


@case()
def header_of_60_megabytes(cache: Path) -> None:
    _long_header(cache, b"{}," * (20 * 2**20) + b"{}")


@case()
def header_nested_deeply(cache: Path) -> None:
    _long_header(cache, b"[" * 100_000 + b"]" * 100_000)


@case()
def header_full_of_lists(cache: Path) -> None:
    _long_header(cache, b"[]," * 300_000 + b"[]")


def _offsets_case(name: str, change: Callable[[list[list[int]]], Any]) -> None:
    def tamper(cache: Path) -> None:
        shard = Shard(cache)
        offsets = shard.offsets()
        change(offsets)
        shard.write(offsets)

    tamper.__name__ = name
    case()(tamper)


_offsets_case("offsets_that_overlap", lambda ends: ends[0].__setitem__(1, ends[0][3]))
_offsets_case("offsets_that_fall", lambda ends: ends[0].__setitem__(2, ends[0][1] - 1))
_offsets_case("offsets_that_are_negative", lambda ends: ends[0].__setitem__(1, -8))
_offsets_case(
    "offsets_that_wrap_around", lambda ends: (ends[0].__setitem__(1, 2**63 - 1), ends[0].__setitem__(2, -(2**63)))
)
_offsets_case("offsets_out_of_the_file", lambda ends: ends[-1].__setitem__(-1, 2**62))
_offsets_case("offsets_of_overlapping_chunks", lambda ends: ends[1].__setitem__(0, 0))
_offsets_case("offsets_with_a_hole", lambda ends: ends[1].__setitem__(0, ends[1][1]))


@case()
def header_whose_frames_end_beyond_the_file(cache: Path) -> None:
    shard = Shard(cache)
    offsets = shard.offsets()
    offsets[-1][-1] += 2**40
    shard.write(offsets, frame_bytes=offsets[-1][-1])


@case()
def frame_of_a_gigabyte_of_nothing(cache: Path) -> None:
    """Sparse: it takes no room on disk, only in who reads it."""
    shard = Shard(cache)
    offsets = shard.offsets()
    offsets[-1][-1] += GIB
    shard.write(offsets, frame_bytes=offsets[-1][-1], sealed=False)
    size = header_bytes_of(shard.path.read_bytes())
    os.truncate(shard.path, size + offsets[-1][-1])
    document = document_of(cache)
    document["files"][shard_name(0, 0)].update(
        bytes=size + offsets[-1][-1], header_sha256=file_sha256(shard.path, size)
    )
    seal(cache, document, records=False)


@case()
def sample_index_twice(cache: Path) -> None:
    shard = Shard(cache)
    shard.indices[1] = shard.indices[0]
    shard.write()


@case()
def sample_index_out_of_range(cache: Path) -> None:
    shard = Shard(cache)
    shard.indices[1] = 10**12
    shard.write()


@case()
def sample_index_negative(cache: Path) -> None:
    shard = Shard(cache)
    shard.indices[1] = -1
    shard.write()


@case()
def sample_index_missing(cache: Path) -> None:
    shard = Shard(cache)
    shard.indices = shard.indices[:-1]
    shard.write()


@case()
def sample_indices_exchanged(cache: Path) -> None:
    """Labels would go to other samples."""
    shard = Shard(cache)
    shard.indices = shard.indices[::-1].copy()
    shard.write()


@case()
def shards_exchanged_between_views(cache: Path) -> None:
    first, second = cache / shard_name(0, 0), cache / shard_name(1, 0)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    seal(cache)


@case()
def shard_of_another_cache(cache: Path) -> None:
    shard = Shard(cache)
    shard.header["__metadata__"]["fingerprint"] = "0" * 64
    shard.write()


@case()
def shard_of_another_dtype(cache: Path) -> None:
    shard = Shard(cache)
    shard.header["__metadata__"]["dtype"] = "F64"
    shard.write()


@case()
def shard_with_metadata_that_are_no_texts(cache: Path) -> None:
    shard = Shard(cache)
    shard.header["__metadata__"]["codec"] = [1]
    shard.write()


@case()
def shard_with_another_tensor(cache: Path) -> None:
    shard = Shard(cache)
    shard.header["frames"]["dtype"] = "I8"
    shard.write()


@case()
def labels_of_another_dtype_in_the_index_only(cache: Path) -> None:
    document = document_of(cache)
    document["extras"][0]["dtype"] = "float64"
    seal(cache, document)


@case()
def labels_of_another_size(cache: Path) -> None:
    set_extras(cache, dtype="int32")


@case()
def labels_of_another_shape(cache: Path) -> None:
    set_extras(cache, shape=[2])


@case()
def booleans_that_are_neither(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes([7] * 6), 3), number=5)
