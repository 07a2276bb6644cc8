"""What the JSON documents of a cache may say, checked before anything is made of them.

Whoever wrote a cache can write any number into it, and hashes that fit. So this module checks the kind and range of every
number before it sizes an array, a loop or a read.

The checks are written by hand. What libraries for schemas do here takes ``true`` for a count, or prints a value of 16 MB into
its message; and nearly all checks relate several entries to one another. A module of its own keeps them beside the limits that
index, shards and states share.
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
    "TOKEN_POSITIONS",
    "check_document",
    "check_extra",
    "check_stored_tokens",
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
#: A larger header of a shard is refused unread. It has 8 bytes per sample and per frame.
MAX_HEADER_BYTES = 64 * 2**20
#: Largest chunk, decoded. 32 samples of 1374 tokens of 1536 fp32 channels (DINOv2-giant at 518 pixels) take 258 MiB.
MAX_CHUNK_BYTES = 2**31
#: A longer JSON header of a state is refused unread. It holds the codec's configuration and the report of its calibration.
MAX_STATE_HEADER_BYTES = 4 * 2**20
#: Frames of a sample: at most this many times its size, and the smallest size of all frames of a chunk. Packed integers of
#: the worst distribution take 5 times the size of fp16.
_MOST_TIMES, _FRAMES_BYTES = 16, 2**14
#: Limits on lists, objects and commas of a document. They bound the memory that parsing takes, 30 times the text at worst.
_MAX_OPENED, _MAX_COMMAS, _MAX_DEPTH, _MAX_DIGITS = 100_000, 500_000, 64, 40
#: Longest line of an index, where each number has a line, and of the JSON headers of other files, which are one line each.
_MAX_LINE = 4 * 2**20
#: Names that files of a cache have beside ``index.json``.
FILE_NAME = re.compile(
    r"((codec|copies)\.safetensors|view-\d{2,}/shard-\d{5,}\.safetensors|index/view-\d{2,}/part-\d{5,}\.parquet)"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORD_KEYS = {"bytes", "sha256", "header_bytes", "header_sha256"}
#: Entry of ``index.json`` -> its smallest and largest value.
_COUNTS = {
    "split_point": (0, 10**6),
    "layout_seed": (-(2**127), 2**127),
    "num_samples": (1, 2**40),
    "num_views": (1, 2**31),
    "num_tokens": (1, 2**20),
    "chunk_size": (1, 2**31),
    "shard_chunks": (1, 2**31),
}
#: Dtypes of extras, under the names that torch gives them.
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
#: Extra (samples, stored tokens) with the positions of the stored tokens. It exists exactly where not all are stored.
TOKEN_POSITIONS = "token_positions"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shard_name(view: int, shard: int) -> str:
    """Return the relative path of a shard."""
    return f"view-{view:02d}/shard-{shard:05d}.safetensors"


def table_name(view: int, shard: int) -> str:
    """Return the relative path of the index table that belongs to a shard."""
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
    return [_count(number, what, least, most) for number in value]


def check_extra(extra: Any) -> int:
    """Check ``{"name", "dtype", "shape"}`` of something stored beside the hidden states.

    Returns:
        Its bytes per sample.

    Raises:
        ValueError: It has another form, an unknown dtype, a reserved name, or an impossible shape.
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


def check_stored_tokens(num_tokens: int, stored_tokens: int, extras: Sequence[Mapping[str, Any]]) -> None:
    """Check that the extras say which tokens are stored, exactly where not all of them are.

    Args:
        num_tokens: Tokens per sample in the model.
        stored_tokens: Tokens per sample in the cache.
        extras: ``{"name", "dtype", "shape"}`` of all that is stored beside the hidden states.

    Raises:
        ValueError: More tokens are stored than there are; or ``token_positions`` is missing, superfluous, or of another
            dtype or shape.
    """
    if stored_tokens > num_tokens:
        raise ValueError(f"{stored_tokens} tokens are stored per sample, but the model has {num_tokens}")
    specs = [(extra["dtype"], list(extra["shape"])) for extra in extras if extra["name"] == TOKEN_POSITIONS]
    if stored_tokens == num_tokens and specs:
        raise ValueError(f"the extra {TOKEN_POSITIONS!r} is reserved for samples with fewer tokens than the model")
    expected = [(dtype, [stored_tokens]) for dtype in ("int16", "int32")]
    if stored_tokens < num_tokens and not (specs and specs[0] in expected):
        raise ValueError(
            f"{stored_tokens} of {num_tokens} tokens are stored per sample, and {TOKEN_POSITIONS} is {_short(specs)}, "
            f"expected int16 or int32 of shape [{stored_tokens}]"
        )


def check_document(document: Mapping[str, Any]) -> None:
    """Check the content of ``index.json``, without its format, version and checksum.

    Afterwards every number may size an array or a loop: chunks take at most ``MAX_CHUNK_BYTES``, there are as many files
    as shards and index tables, and files of at least 8 bytes per sample and view. ``codec_from_dict`` checks codecs.

    Raises:
        ValueError: What is wrong, which value it has, and what was expected.
        KeyError: An entry is missing.
    """
    components = document["fingerprint"]
    if not isinstance(components, dict) or not all(isinstance(value, str) for value in components.values()):
        raise ValueError(f"the fingerprint is {_short(components)}, expected texts by name")
    counts = {name: _count(document[name], name, least, most) for name, (least, most) in _COUNTS.items()}
    shape = document["image_shape"]
    length = 2 if isinstance(shape, (list, tuple)) and len(shape) == 2 else 3  # images may come as patches
    if math.prod(_counts(shape, "image_shape", length, 1, 2**16)) > 2**32:
        raise ValueError(f"image_shape is {document['image_shape']}, expected at most 2**32 values")
    stored_tokens, hidden = _counts(document["hidden_shape"], "hidden_shape", 2, 1, 2**20)
    dtype, extras = document["dtype"], document["extras"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {_short(dtype)}, expected one of {sorted(DTYPES)}")
    if not isinstance(extras, (list, tuple)):
        raise ValueError(f"extras is {_short(extras)}, expected a list")
    sizes = [check_extra(extra) for extra in extras]
    names = [extra["name"] for extra in extras]
    if len(set(names)) != len(names):
        raise ValueError(f"extras {_short(names)} have names in common")
    check_stored_tokens(counts["num_tokens"], stored_tokens, extras)
    num_samples, chunk_size = counts["num_samples"], counts["chunk_size"]
    state_bytes = stored_tokens * hidden * DTYPES[dtype].itemsize
    largest = max([state_bytes, *sizes]) * min(chunk_size, num_samples)
    if largest > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk takes {largest} bytes decoded, expected at most {MAX_CHUNK_BYTES}")
    for name in ("codec", "calibration", "copies", "copies_calibration"):
        if not isinstance(document.get(name), dict) and (name == "codec" or document.get(name) is not None):
            raise ValueError(f"{name} is {_short(document.get(name))}; calibration and codecs must be objects")
    shard_rows = chunk_size * counts["shard_chunks"]
    _check_files(document, num_samples, counts["num_views"], shard_rows)
    _check_rows(document, num_samples)
    # No file is hashed or read that is far larger than its content can be. Sparse files take no room on disk.
    rows = min(shard_rows, num_samples)
    for name, record in document["files"].items():
        if name.startswith("view"):
            most = MAX_HEADER_BYTES + rows * (_MOST_TIMES * (state_bytes + sum(sizes)) + _FRAMES_BYTES)
        elif name.startswith("index"):
            most = max_table_bytes(rows, 5 + len(extras))
        else:
            most = max_state_bytes(stored_tokens, hidden)
        if record["bytes"] > most:
            raise ValueError(f"{name} has {record['bytes']} bytes, expected at most {most}")


def _check_rows(document: Mapping[str, Any], num_samples: int) -> None:
    """Check which run of the permuted rows of its data set the cache holds."""
    if document.get("rows") is None:
        return
    start, stop, total = _counts(document["rows"], "rows", 3, 0, 2**40)
    stored_bytes = sum(record["bytes"] for record in document["files"].values())
    # A reader permutes all rows of the data set, however few of them the cache holds.
    if not start < stop <= total <= max(2**22, stored_bytes) or num_samples != stop - start:
        raise ValueError(f"rows {[start, stop, total]}, of {num_samples} samples, is no run of rows of its data set")


def max_table_bytes(rows: int, columns: int) -> int:
    """Return the largest size of an index table: its schema, and values of 8 bytes with pages and statistics."""
    return 2**20 + 64 * rows * columns


def max_tensor_bytes(tokens: int, hidden: int) -> int:
    """Return the largest size of the fitted tensors of a codec: a basis and a mean of four bytes each, and as much again."""
    return 8 * (hidden + 1) * (hidden + tokens + 1)


def max_state_bytes(tokens: int, hidden: int) -> int:
    """Return the largest size of the file of a codec's state."""
    return 2 * max_tensor_bytes(tokens, hidden) + MAX_STATE_HEADER_BYTES


def _check_files(document: Mapping[str, Any], num_samples: int, num_views: int, shard_rows: int) -> None:
    """Check names, sizes and hashes of all files."""
    files = document["files"]
    if not isinstance(files, dict):
        raise ValueError(f"files is {_short(files)}, expected records by name")
    # Before anything is listed or permuted: every shard has a file, and every row takes 8 bytes of a shard's header.
    num_shards = -(-num_samples // shard_rows)
    num_files = 2 * num_views * num_shards
    stored_bytes = 0
    for name, record in files.items():
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys() <= _RECORD_KEYS:
            entries = sorted(record.keys() ^ _RECORD_KEYS) if isinstance(record, dict) else record
            raise ValueError(f"the record of {_short(name)} lacks or adds {_short(entries)}, expected sizes and hashes")
        size = _count(record["bytes"], f"the size of {_short(name)}", 0, 2**62)
        header = _count(record.get("header_bytes", 0), f"the header size of {_short(name)}", 0, MAX_HEADER_BYTES)
        hashes: Sequence[Any] = [record["sha256"]] + [record.get("header_sha256")] * bool(header)
        if header > size or not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in hashes):
            raise ValueError(f"the record of {_short(name)} has sizes {size} and {header} and hashes {_short(hashes)}")
        stored_bytes += size
    if len(files) < num_files or stored_bytes < 8 * num_samples * num_views:
        raise ValueError(
            f"{num_samples} samples in {num_views} views do not fit its {len(files)} files of {stored_bytes} bytes, "
            f"expected {num_files} files"
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
        raise ValueError(f"files missing from it, or foreign to a cache: {_short(sorted(files.keys() ^ expected)[:3])}")
    for shard in range(num_shards):
        rows = min(shard_rows, num_samples - shard * shard_rows)
        for view in range(num_views):
            header = files[shard_name(view, shard)].get("header_bytes", 0)
            if header < 8 * rows:
                raise ValueError(
                    f"the header of {shard_name(view, shard)} has {header} bytes, expected 8 for each of {rows} samples"
                )
