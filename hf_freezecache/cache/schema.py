"""What the JSON documents of a cache may say: checked before anything is made of them.

Whoever wrote a cache can write any number into it, and hashes that fit. So every number is checked for kind and range here,
before it sizes an array, a loop or a read.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..codecs.array_names import is_packed
from ..codecs.base import DTYPES

__all__ = [
    "CODEC_NAME",
    "COPIES_NAME",
    "EXTRA_DTYPES",
    "FILE_NAME",
    "MAX_CHUNK_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_INDEX_BYTES",
    "MAX_STATE_HEADER_BYTES",
    "RESERVED_EXTRAS",
    "check_document",
    "check_extra",
    "max_state_bytes",
    "max_table_bytes",
    "max_tensor_bytes",
    "parse_json",
    "shard_name",
    "table_name",
]

CODEC_NAME = "codec.safetensors"
COPIES_NAME = "copies.safetensors"
#: A larger index is refused unread. An entry of a file takes some 280 bytes: this is room for 60 thousand files, with the
#: default 1024 samples per shard 30 million views.
MAX_INDEX_BYTES = 16 * 2**20
#: A larger head of a shard is refused unread. It has 8 bytes per sample and per frame.
MAX_HEADER_BYTES = 64 * 2**20
#: Largest chunk, decoded. 32 samples of 1374 tokens of 1536 fp32 channels (DINOv2-giant at 518 pixels) take 258 MiB.
MAX_CHUNK_BYTES = 2**31
#: A longer header of a state is refused unread: it holds the codec's configuration and the report of its calibration.
MAX_STATE_HEADER_BYTES = 4 * 2**20
#: Frames of a sample: at most this many times its size, and the smallest size of all frames of a chunk. Packed integers of
#: the worst distribution take 5 times the size of fp16.
_MOST_TIMES, _FRAMES_BYTES = 16, 2**14
#: Lists, objects and commas of a document: what bounds the memory that parsing takes, 30 times the text at worst.
_MAX_OPENED, _MAX_COMMAS, _MAX_DEPTH, _MAX_DIGITS = 100_000, 500_000, 64, 40
#: Of an index, where each number has a line, and of the headers of other files, which are one line each.
_MAX_LINE = 4 * 2**20
#: Names that files of a cache have beside ``index.json``.
FILE_NAME = re.compile(
    r"((codec|copies)\.safetensors|view-\d{2,}/shard-\d{5,}\.safetensors|index/view-\d{2,}/part-\d{5,}\.parquet)"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Names of the dtypes that what is stored beside the hidden states may have, as torch spells them.
EXTRA_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}
#: Names in a cached batch that are not the collator's to use, beside those of ``codecs.array_names``.
RESERVED_EXTRAS = frozenset({"hidden_states", "pixel_values"})


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shard_name(view: int, shard: int) -> str:
    """Return the relative path of a shard."""
    return f"view-{view:02d}/shard-{shard:05d}.safetensors"


def table_name(view: int, shard: int) -> str:
    """Return the relative path of the index part that belongs to a shard."""
    return f"index/view-{view:02d}/part-{shard:05d}.parquet"


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN where a number is expected")
    return float(text)


def parse_json(raw: bytes) -> Any:
    """Parse a document in memory of a few times its size.

    Args:
        raw: ASCII, as ``json.dumps`` writes it.

    Raises:
        ValueError: No JSON, or more of it, nested deeper, or with longer numbers than a cache has; or NaN.
    """
    if not raw.isascii():
        raise ValueError("not valid JSON (bytes beyond ASCII)")
    # A text with one character beyond Latin takes four times its bytes, more than once while it is put together.
    for start in range(0, len(raw) - _MAX_LINE, _MAX_LINE):
        if raw.find(b"\n", start, start + _MAX_LINE) < 0:
            raise ValueError(f"a line longer than {_MAX_LINE} bytes")
    opened, commas = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
    if opened > _MAX_OPENED or commas > _MAX_COMMAS:
        raise ValueError(
            f"{opened} lists and objects and {commas} commas, expected at most {_MAX_OPENED} and {_MAX_COMMAS}"
        )
    try:
        document = json.loads(raw, parse_int=_integer, parse_constant=_constant)
    except RecursionError:
        raise ValueError("not valid JSON (nested too deep)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    level = [document]
    for _ in range(_MAX_DEPTH):
        nested: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                nested.extend(value.values())
            elif isinstance(value, list):
                nested.extend(value)
        if not nested:
            return document
        level = nested
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")


def _count(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {_short(value)}, expected a whole number from {least} to {most}")
    return value


def _short(value: Any) -> str:
    return _REPR.repr(value)


def _counts(value: Any, what: str, length: int | None, least: int, most: int) -> list[int]:
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        raise ValueError(f"{what} is {_short(value)}, expected a list of {length or 'whole'} numbers")
    return [_count(part, what, least, most) for part in value]


def check_extra(extra: Any) -> int:
    """Check ``{"name", "dtype", "shape"}`` of something stored beside the hidden states; return its bytes per sample.

    Raises:
        ValueError: Another kind of entry, an unknown dtype, a name that is taken, or a shape that is none.
    """
    if not isinstance(extra, Mapping) or extra.keys() != {"name", "dtype", "shape"}:
        raise ValueError(f"an extra is {_short(extra)}, expected name, dtype and shape")
    name, dtype = extra["name"], extra["dtype"]
    if not isinstance(name, str) or len(name) > 256:
        raise ValueError(f"an extra has the name {_short(name)}, expected a short string")
    if name in RESERVED_EXTRAS or is_packed(name):
        raise ValueError(f"an extra has the name {name!r}, which is taken in cached batches")
    if not isinstance(dtype, str) or dtype not in EXTRA_DTYPES:
        raise ValueError(f"extra {name!r} has the unknown dtype {_short(dtype)}")
    shape = _counts(extra["shape"], f"the shape of extra {name!r}", None, 0, 2**31)
    if len(shape) > 16:
        raise ValueError(f"extra {name!r} has {len(shape)} axes, expected at most 16")
    return math.prod(shape) * EXTRA_DTYPES[dtype].itemsize


def check_document(document: Mapping[str, Any]) -> None:
    """Check the content of ``index.json``, without its format, version and checksum.

    Afterwards every number may size an array or a loop: chunks are at most ``MAX_CHUNK_BYTES``, there are as many files as
    shards and index parts, and files of at least 8 bytes per sample and view. Codecs are left to ``codec_from_dict``.

    Raises:
        ValueError: What is wrong, what was found, and what was expected.
        KeyError: An entry is missing.
    """
    parts = document["fingerprint"]
    if not isinstance(parts, dict) or not all(isinstance(value, str) for value in parts.values()):
        raise ValueError(f"the fingerprint is {_short(parts)}, expected texts by name")
    _count(document["split_point"], "split_point", 0, 10**6)
    _count(document["layout_seed"], "layout_seed", -(2**127), 2**127)
    if math.prod(_counts(document["image_shape"], "image_shape", 3, 1, 2**16)) > 2**32:
        raise ValueError(f"image_shape is {document['image_shape']}, expected at most 2**32 values")
    num_samples = _count(document["num_samples"], "num_samples", 1, 2**40)
    num_views = _count(document["num_views"], "num_views", 1, 2**31)
    chunk_size = _count(document["chunk_size"], "chunk_size", 1, 2**31)
    shard_chunks = _count(document["shard_chunks"], "shard_chunks", 1, 2**31)
    tokens, hidden = _counts(document["hidden_shape"], "hidden_shape", 2, 1, 2**20)
    dtype = document["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {_short(dtype)}, expected one of {sorted(DTYPES)}")
    extras = document["extras"]
    if not isinstance(extras, (list, tuple)):
        raise ValueError(f"extras is {_short(extras)}, expected a list")
    sizes = [check_extra(extra) for extra in extras]
    names = [extra["name"] for extra in extras]
    if len(set(names)) != len(names):
        raise ValueError(f"extras {_short(names)} have names in common")
    largest = max([tokens * hidden * DTYPES[dtype].itemsize, *sizes]) * min(chunk_size, num_samples)
    if largest > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk takes {largest} bytes decoded, expected at most {MAX_CHUNK_BYTES}")
    for name in ("codec", "calibration", "copies", "copies_calibration"):
        if not isinstance(document.get(name), dict) and (name == "codec" or document.get(name) is not None):
            raise ValueError(f"{name} is {_short(document.get(name))}; calibration and codecs must be objects")
    _check_files(document, num_samples, num_views, chunk_size * shard_chunks)
    # Nor is a file hashed or read that is far larger than its content can be: sparse ones take no room on disk.
    if document.get("part") is not None:
        start, stop, total = _counts(document["part"], "part", 3, 0, 2**40)
        stored = sum(record["bytes"] for record in document["files"].values())
        # Rows of the whole data set are listed, whatever the part holds of them.
        if not start < stop <= total <= max(2**22, stored) or num_samples != stop - start:
            raise ValueError(
                f"part {[start, stop, total]}, of {num_samples} samples, is no run of rows of its data set"
            )
    row_bytes = tokens * hidden * DTYPES[dtype].itemsize + sum(sizes)
    rows = min(chunk_size * shard_chunks, num_samples)
    for name, record in document["files"].items():
        if name.startswith("view"):
            most = MAX_HEADER_BYTES + rows * (_MOST_TIMES * row_bytes + _FRAMES_BYTES)
        elif name.startswith("index"):
            most = max_table_bytes(rows, 5 + len(extras))
        else:
            most = max_state_bytes(tokens, hidden)
        if record["bytes"] > most:
            raise ValueError(f"{name} has {record['bytes']} bytes, expected at most {most}")


def max_table_bytes(rows: int, columns: int) -> int:
    """Return the largest size of an index part: its schema, and values of 8 bytes with pages and statistics."""
    return 2**20 + 64 * rows * columns


def max_tensor_bytes(tokens: int, hidden: int) -> int:
    """Return the largest size of what is fitted of a codec: a basis and a mean of four bytes each, and as much again."""
    return 8 * (hidden + 1) * (hidden + tokens + 1)


def max_state_bytes(tokens: int, hidden: int) -> int:
    """Return the largest size of the file of a codec's state."""
    return 2 * max_tensor_bytes(tokens, hidden) + MAX_STATE_HEADER_BYTES


def _check_files(document: Mapping[str, Any], num_samples: int, num_views: int, shard_rows: int) -> None:
    files = document["files"]
    if not isinstance(files, dict):
        raise ValueError(f"files is {_short(files)}, expected records by name")
    # Before anything is listed or permuted: every shard has a file, and every row takes 8 bytes of its shard's head.
    num_shards = -(-num_samples // shard_rows)
    num_files = 2 * num_views * num_shards
    stored = 0
    for name, record in files.items():
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
            raise ValueError(f"the record of {_short(name)} is {_short(record)}, expected size and hashes")
        size = _count(record["bytes"], f"the size of {_short(name)}", 0, 2**62)
        head = _count(record.get("header_bytes", 0), f"the size of the head of {_short(name)}", 0, MAX_HEADER_BYTES)
        hashes: Sequence[Any] = [record["sha256"]] + [record.get("head_sha256")] * bool(head)
        if head > size or not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in hashes):
            raise ValueError(f"the record of {_short(name)} has sizes {size} and {head} and hashes {_short(hashes)}")
        stored += size
    if len(files) < num_files or stored < 8 * num_samples * num_views:
        raise ValueError(
            f"{num_samples} samples in {num_views} views do not fit its {len(files)} files of {stored} bytes, expected "
            f"{num_files} files"
        )
    expected = {
        name(view, shard)
        for name in (shard_name, table_name)
        for view in range(num_views)
        for shard in range(num_shards)
    }
    if document.get("calibration") is not None:
        expected.add(CODEC_NAME)
    if (document.get("copies") is None) != (document.get("copies_calibration") is None):
        raise ValueError("it names a codec of copies without its calibration, or the reverse")
    if document.get("copies") is not None:
        expected.add(COPIES_NAME)
    if files.keys() != expected or not all(FILE_NAME.fullmatch(name) for name in files):
        odd = sorted(files.keys() ^ expected)[:3]
        raise ValueError(f"files missing from it, or foreign to a cache: {_short(odd)}")
    for shard in range(num_shards):
        rows = min(shard_rows, num_samples - shard * shard_rows)
        for view in range(num_views):
            found = files[shard_name(view, shard)].get("header_bytes", 0)
            if found < 8 * rows:
                raise ValueError(
                    f"the head of {shard_name(view, shard)} has {found} bytes, expected 8 for each of {rows} samples"
                )
