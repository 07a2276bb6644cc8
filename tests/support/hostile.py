"""Caches as an attacker would write them: every hash, size and checksum fits what was tampered with.

``CASES`` maps a name to a function that turns a copy of a sound cache into a hostile one. Run as a script, it reads and
verifies all of them in one process and prints the peak of its memory above that of reading sound ones, case by case.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import zstandard
from torch.utils.data import default_collate

from hf_freezecache.cache.codec_state import (
    CodecState,
    save_state,
)
from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.index import (
    shard_name,
    table_name,
)
from hf_freezecache.cache.schema import TOKEN_POSITIONS
from hf_freezecache.cache.shard_file import file_sha256
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.codecs import (
    PRESETS,
    Codec,
)
from hf_freezecache.codecs.array_names import is_packed
from hf_freezecache.codecs.base import digest
from hf_freezecache.codecs.entropy import compress_frame
from hf_freezecache.compression.step_search import fit_codec
from hf_freezecache.data.collators import collate_cached, split_packed
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import (
    CacheCorruptError,
    UnsupportedSetupError,
)
from support import tiny_cache

GOLDEN = Path(__file__).parents[1] / "golden"
GIB = 2**30

CASES: dict[str, tuple[str, Callable[[Path], Any]]] = {}
#: What training never reads: only ``verify_cache`` can see it.
ONLY_VERIFIED: set[str] = set()


def case(
    base: str = "lossless", only_verified: bool = False
) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    def add(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES[function.__name__] = base, function
        if only_verified:
            ONLY_VERIFIED.add(function.__name__)
        return function

    return add


# ---- Sound caches ----


def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, 2) -> (batch, 5, 6): one prefix token, four patches."""
    row, draw = pixel_values[:, 0, 0, :].T
    tokens, hidden = torch.arange(5.0)[:, None], torch.arange(6.0)
    return torch.sin(row[:, None, None] * (tokens + 1) / 3 + draw[:, None, None] * (hidden + 1) / 40)


def fitted() -> Codec:
    images = torch.rand(32, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 2000.0])
    return fit_codec(PRESETS["transform"], prefix(images), 1, (2, 2))


def sound_caches(folder: Path) -> dict[str, Path]:
    """Sound caches by name: golden ones, and two lossy ones built into a folder."""
    (lossless,), (copies,) = ([p for p in (GOLDEN / name).iterdir() if p.is_dir()] for name in ("v2", "v2-copies"))
    caches = {"lossless": lossless, "copies": copies}
    for name, codec in (("int8", PRESETS["int8"]), ("transform", fitted())):
        plan = dataclasses.replace(tiny_cache.make_plan(codec=name), codec=codec, calibration={})
        caches[name] = tiny_cache.build(folder / name, plan, prefix=prefix).directory
    plan = dataclasses.replace(tiny_cache.make_plan(codec="few tokens"), num_tokens=7)
    caches["few_tokens"] = tiny_cache.build(folder / "few_tokens", plan, collate=collate_few_tokens).directory
    return caches


def collate_few_tokens(examples: list[Any]) -> dict[str, Any]:
    """Say that the two tokens of ``tiny_cache`` are the first and one more of seven."""
    batch = default_collate(examples)
    rows = batch["pixel_values"][:, 0, 0, 0].to(torch.int16)
    return {**batch, TOKEN_POSITIONS: torch.stack([torch.zeros_like(rows), 1 + rows % 6], 1)}


def make_hostile(name: str, sound: dict[str, Path], folder: Path) -> Path:
    base, tamper = CASES[name]
    cache = Path(shutil.copytree(sound[base], folder / "cache"))
    tamper(cache)
    return cache


def read_all(cache: Path) -> None:
    """Read every sample of every view into batches, decoded and as training does: packed, then restored."""
    for packed in (True, False):
        dataset = CachedDataset.from_pretrained(cache)
        dataset.packed = packed
        for view in range(dataset.reader.index.num_views):
            for row in range(len(dataset)):
                batch = collate_cached(dataset.__getitems__([(row, view)]))
                if packed:
                    arrays, _ = split_packed(batch)
                    assert any(is_packed(key) for key in batch)
                    batch["hidden_states"] = dataset.reader.views.dequantize(arrays, dataset.reader.dtype)
                assert bool(torch.isfinite(batch["hidden_states"]).all()), (
                    "hidden states that are not finite in a batch"
                )


# ---- Tools of the attacker ----


def document_of(cache: Path) -> dict[str, Any]:
    return json.loads((cache / "index.json").read_text())


def seal(cache: Path, document: dict[str, Any] | None = None, records: bool = True, **changes: Any) -> None:
    """Write ``index.json`` with hashes of the files as they are, and with its own."""
    document = {**(document or document_of(cache)), **changes}
    for name, record in document["files"].items() if records and isinstance(document["files"], dict) else ():
        path = cache / name
        if not path.is_file():
            continue
        raw = path.read_bytes()
        record.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        if name.startswith("view"):
            size = header_bytes_of(raw)
            record.update(header_bytes=size, header_sha256=hashlib.sha256(raw[:size]).hexdigest())
    document.pop("checksum", None)
    document["checksum"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (cache / "index.json").write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")


def header_bytes_of(raw: bytes) -> int:
    (length,) = struct.unpack_from("<Q", raw)
    return int(8 + length + json.loads(raw[8 : 8 + length])["frames"]["data_offsets"][0])


class Shard:
    """A shard, taken apart."""

    def __init__(self, cache: Path, view: int = 0, shard: int = 0) -> None:
        self.cache, self.path = cache, cache / shard_name(view, shard)
        raw = self.path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        self.header = json.loads(raw[8 : 8 + length])
        (chunks, width), (rows,) = self.header["frame_offsets"]["shape"], self.header["sample_indices"]["shape"]
        numbers = np.frombuffer(raw[8 + length : header_bytes_of(raw)], "<i8")
        offsets, self.indices = numbers[: chunks * width].reshape(chunks, width), numbers[chunks * width :].copy()
        body = raw[header_bytes_of(raw) :]
        self.chunks = [[body[a:b] for a, b in itertools.pairwise(ends)] for ends in offsets.tolist()]
        assert len(self.indices) == rows

    def offsets(self) -> list[list[int]]:
        ends, position = [], 0
        for frames in self.chunks:
            ends.append([position, *(position := position + len(frame) for frame in frames)])
        return ends

    def write(
        self, offsets: list[list[int]] | None = None, frame_bytes: int | None = None, sealed: bool = True
    ) -> None:
        """Write it back, consistent but for what is given, and seal the cache."""
        ends = np.array(offsets or self.offsets(), dtype="<i8")
        body = b"".join(frame for frames in self.chunks for frame in frames)
        middle, stop = ends.size * 8, 8 * (ends.size + len(self.indices))
        size = len(body) if frame_bytes is None else frame_bytes
        self.header["frame_offsets"].update(shape=list(ends.shape), data_offsets=[0, middle])
        self.header["sample_indices"].update(shape=[len(self.indices)], data_offsets=[middle, stop])
        self.header["frames"].update(shape=[size], data_offsets=[stop, stop + size])
        header = json.dumps(self.header, sort_keys=True).encode()
        header = header.ljust(-(-len(header) // 8) * 8)
        numbers = ends.tobytes() + np.asarray(self.indices, dtype="<i8").tobytes()
        self.path.write_bytes(struct.pack("<Q", len(header)) + header + numbers + body)
        if sealed:
            seal(self.cache)


def set_frame(cache: Path, frame: bytes, number: int = 0, view: int = 0) -> None:
    shard = Shard(cache, view)
    shard.chunks[0][number] = frame
    shard.write()


def zstd_frame(content_size: int | None, blocks: bytes, window: int = 0x58, descriptor: int = 0) -> bytes:
    """A frame by hand, with the flag of a checksum and four bytes in place of one. Source: RFC 8878."""
    if content_size is None:
        return b"\x28\xb5\x2f\xfd" + bytes([0x04 | descriptor, window]) + blocks + b"\0\0\0\0"
    return b"\x28\xb5\x2f\xfd" + bytes([0xE4 | descriptor]) + struct.pack("<Q", content_size) + blocks + b"\0\0\0\0"


def zeros(num_bytes: int) -> bytes:
    """Blocks that repeat one zero, 128 KiB in four bytes."""
    count = num_bytes // 2**17
    block = lambda last: struct.pack("<I", (2**17 << 3) | (1 << 1) | last)[:3] + b"\0"  # noqa: E731
    return block(0) * (count - 1) + block(1)


def set_states(cache: Path, value: float, view: int = 0) -> None:
    """Put one value into the first chunk of a lossless view."""
    shard = Shard(cache, view)
    shape = (3, *json.loads(shard.header["__metadata__"]["hidden_shape"]))
    if json.loads(shard.header["__metadata__"]["codec"])["name"] == "copy":
        shape = (2, *shape[1:])
    states = torch.zeros(shape)
    states[1, 1, 2] = value
    shard.chunks[0][:4] = PRESETS["lossless"].encode(states)
    shard.write()


def set_codec(cache: Path, codec: Any, tensors_of: Any = None, **document: Any) -> None:
    """Let index, state and shards name a codec."""
    index = document_of(cache)
    described = codec if isinstance(codec, dict) else codec.to_dict()
    index["codec"] = described
    if not isinstance(codec, dict):
        save_state(cache / "codec.safetensors", Fingerprint(index["fingerprint"]).digest, CodecState(codec, {}))
    elif (cache / "codec.safetensors").exists():
        edit_state(cache, codec=described, **document)
    for view in range(index["num_views"]):
        for path in sorted((cache / f"view-{view:02d}").iterdir()):
            shard = Shard(cache, view, int(path.stem.removeprefix("shard-")))
            shard.header["__metadata__"]["codec"] = json.dumps(described, sort_keys=True)
            shard.write(sealed=False)
    seal(cache, index)


def edit_state(cache: Path, name: str = "codec.safetensors", frames: Any = None, **changes: Any) -> None:
    """Change the document of a state, or its frames, and its checksum; leave the index to the caller."""
    raw = (cache / name).read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    document = {**json.loads(metadata["hf_freezecache"]), **changes}
    del document["checksum"]
    document["checksum"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    tensors = {**safetensors.torch.load(raw), **(frames or {})}
    (cache / name).write_bytes(safetensors.torch.save(tensors, {"hf_freezecache": json.dumps(document)}))


def set_transform(cache: Path, **changes: Any) -> None:
    """Change what is fitted of the transform, with the hash that names it."""
    codec = fitted()
    step = codec.steps[0]
    changed = {**step.tensors(), **{k: v for k, v in changes.items() if isinstance(v, torch.Tensor)}}
    step = dataclasses.replace(step, **{**changes, **changed}, state=digest(changed))
    set_codec(cache, Codec((step, *codec.steps[1:])))


def set_predictor(cache: Path, **changes: torch.Tensor) -> None:
    """Change what is fitted of the prediction of copies."""
    from support import tiny_copies

    copies = tiny_copies.make_copies()
    tensors = {**copies.predictor.tensors(), **changes}
    copies = dataclasses.replace(
        copies, predictor=dataclasses.replace(copies.predictor, **tensors, state=digest(tensors))
    )
    index = document_of(cache)
    index["copies"] = copies.to_dict()
    save_state(cache / "copies.safetensors", Fingerprint(index["fingerprint"]).digest, CodecState(copies, {}))
    for view in range(1, index["num_views"]):
        shard = Shard(cache, view)
        shard.header["__metadata__"]["codec"] = json.dumps(copies.to_dict(), sort_keys=True)
        shard.write(sealed=False)
    seal(cache, index)


def raw_index(cache: Path, **texts: str) -> None:
    """Replace values of the index by texts that ``json.dumps`` would not write, and seal it."""
    seal(cache, **dict.fromkeys(texts, 0))
    text = (cache / "index.json").read_text()
    for name, value in texts.items():
        text = text.replace(f' "{name}": 0', f' "{name}": {value}', 1)
    (cache / "index.json").write_text(text)


def set_extras(cache: Path, **changes: Any) -> None:
    """Change the description of labels, in the index and in all shards."""
    document = document_of(cache)
    document["extras"][0].update(changes)
    for view, shard in itertools.product(range(2), range(2)):
        opened = Shard(cache, view, shard)
        opened.header["__metadata__"]["extras"] = json.dumps(document["extras"], sort_keys=True)
        opened.write(sealed=False)
    seal(cache, document)


def replace_by(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def edit_table(cache: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    path = cache / table_name(0, 0)
    table = pq.read_table(path)
    place = table.schema.names.index(column)
    values = pa.array(change(table[column].to_pylist()))
    pq.write_table(table.set_column(place, column, values), path)
    seal(cache)


# ---- index.json ----


def _index_case(name: str, base: str = "lossless", **changes: Any) -> None:
    def tamper(cache: Path) -> None:
        seal(cache, **changes)

    tamper.__name__ = name
    case(base)(tamper)


_index_case("index_claims_a_billion_samples", num_samples=10**9)
_index_case("index_claims_a_billion_samples_in_one_chunk", num_samples=10**9, chunk_size=10**9)
_index_case("index_claims_a_million_views", num_views=10**6)
_index_case("index_with_a_huge_number", num_samples=10**30)
_index_case("index_with_a_huge_chunk", chunk_size=10**12)
_index_case("index_with_a_float_for_a_count", chunk_size=3.0)
_index_case("index_with_a_boolean_for_a_count", shard_chunks=True)
_index_case("index_with_a_text_for_a_count", num_views="2")
_index_case("index_with_a_negative_count", shard_chunks=-2)
_index_case("index_with_a_list_for_a_count", split_point=[2])
_index_case("index_with_a_text_for_a_seed", layout_seed="3")
_index_case("index_with_an_absurd_number_of_tokens", num_tokens=10**9)
_index_case("index_with_a_text_for_the_number_of_tokens", num_tokens="2")
_index_case(
    "index_with_a_file_record_that_says_more", files={"index.json": {"bytes": 1, "sha256": "0" * 64, "mode": 7}}
)
_index_case("index_with_an_absurd_hidden_shape", hidden_shape=[10**6, 10**6])
_index_case("index_with_hidden_states_of_no_axes", hidden_shape=[])
_index_case("index_with_an_absurd_image_shape", image_shape=[3, 10**9, 10**9])
_index_case("index_with_a_text_for_an_image_shape", image_shape="abc")
_index_case("index_with_a_number_for_an_image_shape", image_shape=224)
_index_case("index_without_an_image_shape", image_shape=None)
_index_case("index_with_an_unknown_dtype", dtype="F8_E4M3")
_index_case("index_with_a_list_for_a_dtype", dtype=["F32"])
_index_case("index_with_fingerprint_components_that_are_no_texts", fingerprint={"data": 7})
_index_case("index_with_a_list_for_a_fingerprint", fingerprint=["data"])
_index_case("index_with_an_entry_that_no_cache_has", command="rm")
_index_case("index_with_a_text_for_a_codec", codec="lossless")
_index_case("index_with_an_unknown_codec", codec={"name": "zip", "configuration": {}})
_index_case("index_of_another_format_version", format_version=3)
_index_case("index_of_a_boolean_format_version", format_version=True)
_index_case("index_with_a_text_for_files", files="all")
_index_case("index_with_nan_in_its_calibration", base="int8", calibration={"distortion": float("nan")})
for _name, _extra in {
    "of_an_unknown_dtype": {"name": "labels", "dtype": "nn", "shape": []},
    "of_a_quantized_dtype": {"name": "labels", "dtype": "qint32", "shape": []},
    "of_a_huge_shape": {"name": "labels", "dtype": "int64", "shape": [2**20, 2**20]},
    "of_many_axes": {"name": "labels", "dtype": "int64", "shape": [1] * 10_000},
    "of_a_negative_shape": {"name": "labels", "dtype": "int64", "shape": [-1]},
    "of_a_boolean_shape": {"name": "labels", "dtype": "int64", "shape": [True]},
    "named_as_the_hidden_states": {"name": "hidden_states", "dtype": "int64", "shape": []},
    "named_as_a_packed_array": {"name": "packed.values", "dtype": "int64", "shape": []},
    "named_as_another": {"name": "mask", "dtype": "int64", "shape": []},
    "named_by_a_number": {"name": 7, "dtype": "int64", "shape": []},
    "with_an_entry_too_many": {"name": "labels", "dtype": "int64", "shape": [], "hook": "x"},
}.items():

    def _tamper(cache: Path, extra: dict[str, Any] = _extra) -> None:
        set_extras(cache, **extra)

    _tamper.__name__ = f"extra_{_name}"
    case()(_tamper)

for _name, _path in {
    "the_folder_above": "../x",
    "an_absolute_path": "/etc/passwd",
    "a_detour": "view-00/../../x",
    "a_shard_by_a_detour": "view-00/../view-00/shard-00000.safetensors",
    "a_zero_byte": "view-00/shard-00000.safetensors\0",
}.items():

    def _rename(cache: Path, path: str = _path) -> None:
        document = document_of(cache)
        document["files"][path] = document["files"].pop(shard_name(0, 0))
        seal(cache, document, records=False)

    _rename.__name__ = f"index_names_{_name}"
    case()(_rename)


@case()
def rows_of_a_data_set_of_absurd_size(cache: Path) -> None:
    count = document_of(cache)["num_samples"]
    seal(cache, rows=[0, count, 2**40])


@case()
def rows_that_are_not_as_many_as_samples(cache: Path) -> None:
    seal(cache, rows=[0, document_of(cache)["num_samples"] - 1, 100])


@case()
def rows_beyond_the_last(cache: Path) -> None:
    count = document_of(cache)["num_samples"]
    seal(cache, rows=[count, 2 * count, 2 * count - 1])


@case()
def rows_that_are_texts(cache: Path) -> None:
    seal(cache, rows=["0", "8", "16"])


@case()
def rows_that_are_not_those_of_the_shards(cache: Path) -> None:
    count = document_of(cache)["num_samples"]
    seal(cache, rows=[count, 2 * count, 2 * count])


@case()
def index_nested_deeply(cache: Path) -> None:
    raw_index(cache, copies="[" * 100_000 + "]" * 100_000)


@case()
def index_nested_by_a_hundred(cache: Path) -> None:
    """Deep enough for Python's own recursion further on."""
    nested: Any = {}
    for _ in range(100):
        nested = {"a": nested}
    seal(cache, calibration=nested)


@case()
def index_of_a_million_lists(cache: Path) -> None:
    raw_index(cache, copies="[" + "[]," * 5_000_000 + "[]]")


@case()
def index_of_millions_of_texts(cache: Path) -> None:
    raw_index(cache, copies="[" + '"ab",' * 3_000_000 + '"ab"]')


@case()
def index_of_one_long_text(cache: Path) -> None:
    seal(cache, split_point="\U0001f600" + "a" * 15_000_000)


@case()
def index_of_60_megabytes(cache: Path) -> None:
    (cache / "index.json").write_bytes(b"[" + b"{}," * (20 * 2**20) + b"{}]")


@case()
def index_with_a_number_of_a_million_digits(cache: Path) -> None:
    raw_index(cache, num_samples="1" * 1_000_000)


@case()
def index_with_nan_and_infinity(cache: Path) -> None:
    raw_index(cache, num_samples="Infinity", chunk_size="NaN")


@case()
def index_with_an_infinite_size(cache: Path) -> None:
    seal(cache, split_point=float("inf"))


@case()
def index_with_a_key_twice(cache: Path) -> None:
    text = (cache / "index.json").read_text()
    (cache / "index.json").write_text(text.replace('\n "num_views": 2,', '\n "num_views": 2,\n "num_views": 2,'))


@case()
def index_with_files_of_exabytes(cache: Path) -> None:
    """So that a billion samples seem to be there."""
    document = document_of(cache)
    for record in document["files"].values():
        record["bytes"] = 2**60
    seal(cache, document, records=False, num_samples=10**9, chunk_size=10**9)


@case()
def index_with_a_header_larger_than_its_shard(cache: Path) -> None:
    document = document_of(cache)
    document["files"][shard_name(0, 0)]["header_bytes"] = 2**40
    seal(cache, document, records=False)


@case()
def index_with_a_text_for_a_size(cache: Path) -> None:
    document = document_of(cache)
    document["files"][shard_name(0, 0)]["bytes"] = "4096"
    seal(cache, document, records=False)


@case()
def index_with_a_hash_that_is_none(cache: Path) -> None:
    document = document_of(cache)
    document["files"][shard_name(0, 0)]["header_sha256"] = None
    seal(cache, document, records=False)


# ---- What is no file of the cache ----


@case()
def shard_that_links_out_of_the_cache(cache: Path) -> None:
    path = cache / shard_name(0, 0)
    target = cache.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


@case()
def table_that_links_out_of_the_cache(cache: Path) -> None:
    path = cache / table_name(0, 0)
    path.rename(cache.parent / "elsewhere")
    path.symlink_to("../../../elsewhere")


@case("int8")
def state_that_links_out_of_the_cache(cache: Path) -> None:
    (cache / "codec.safetensors").rename(cache.parent / "elsewhere")
    (cache / "codec.safetensors").symlink_to(cache.parent / "elsewhere")


@case()
def view_that_links_out_of_the_cache(cache: Path) -> None:
    (cache / "view-01").rename(cache.parent / "elsewhere")
    (cache / "view-01").symlink_to(cache.parent / "elsewhere", target_is_directory=True)


@case()
def index_that_links_out_of_the_cache(cache: Path) -> None:
    (cache / "index.json").rename(cache.parent / "elsewhere")
    (cache / "index.json").symlink_to(cache.parent / "elsewhere")


@case()
def links_in_a_loop(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), lambda path: path.symlink_to(path.name))


@case()
def index_that_links_to_itself(cache: Path) -> None:
    replace_by(cache / "index.json", lambda path: path.symlink_to("index.json"))


@case()
def shard_that_is_a_pipe(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), os.mkfifo)


@case()
def index_that_is_a_pipe(cache: Path) -> None:
    replace_by(cache / "index.json", os.mkfifo)


@case()
def shard_that_is_a_device(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), lambda path: path.symlink_to("/dev/zero"))


@case()
def index_that_is_a_device(cache: Path) -> None:
    replace_by(cache / "index.json", lambda path: path.symlink_to("/dev/zero"))


@case()
def shard_that_is_a_folder(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), Path.mkdir)


@case()
def index_that_is_a_folder(cache: Path) -> None:
    replace_by(cache / "index.json", Path.mkdir)


@case()
def folder_that_is_a_file(cache: Path) -> None:
    shutil.rmtree(cache / "view-01")
    (cache / "view-01").write_text("x")


# ---- Headers ----


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


# ---- Frames ----


@case()
def frame_that_claims_a_terabyte(cache: Path) -> None:
    set_frame(cache, zstd_frame(2**40, zeros(2**17)))


@case()
def frame_of_four_gigabytes_of_zeros(cache: Path) -> None:
    set_frame(cache, zstd_frame(4 * GIB, zeros(4 * GIB)))


@case()
def frame_of_gigabytes_that_states_no_size(cache: Path) -> None:
    set_frame(cache, zstd_frame(None, zeros(4 * GIB)))


@case()
def frame_of_gigabytes_that_states_the_expected_size(cache: Path) -> None:
    set_frame(cache, zstd_frame(18, zeros(4 * GIB)))


@case()
def small_frame_that_states_the_expected_size_and_holds_more(cache: Path) -> None:
    set_frame(cache, zstd_frame(18, zeros(2**17)))


@case()
def labels_of_gigabytes(cache: Path) -> None:
    set_frame(cache, zstd_frame(24, zeros(4 * GIB)), number=4)


@case()
def frame_with_a_huge_window(cache: Path) -> None:
    set_frame(cache, zstd_frame(None, zeros(2**17), window=0xFF))


@case()
def frame_with_something_behind(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes(18), 1) + b"more")


@case()
def frame_behind_a_skippable_one(cache: Path) -> None:
    set_frame(cache, b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip" + compress_frame(bytes(18), 1))


@case()
def two_frames_in_one(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes(9), 1) * 2)


@case()
def frame_without_a_checksum(cache: Path) -> None:
    set_frame(cache, zstandard.ZstdCompressor(write_checksum=False, write_content_size=True).compress(bytes(18)))


@case()
def frame_with_a_dictionary(cache: Path) -> None:
    set_frame(cache, b"\x28\xb5\x2f\xfd" + bytes([0x27, 1, 0, 0, 0, 18]) + zeros(2**17) + b"\0\0\0\0")


@case()
def frame_of_nothing(cache: Path) -> None:
    set_frame(cache, b"")


@case()
def frame_of_no_content(cache: Path) -> None:
    set_frame(cache, compress_frame(b"", 1))


@case()
def frame_of_a_byte_too_few(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes(17), 1))


# ---- Values ----


@case()
def hidden_states_of_nan(cache: Path) -> None:
    set_states(cache, float("nan"))


@case()
def hidden_states_of_infinity(cache: Path) -> None:
    set_states(cache, float("inf"), view=1)


@case("copies")
def copies_of_nan(cache: Path) -> None:
    set_states(cache, float("nan"), view=1)


@case("copies")
def base_of_copies_of_infinity(cache: Path) -> None:
    set_states(cache, -float("inf"), view=0)


@case("copies")
def copies_that_overflow_with_their_prediction(cache: Path) -> None:
    """Each finite, their sum not."""
    set_states(cache, 3e38, view=0)


def _geometry_case(name: str, values: list[float], view: int) -> None:
    def tamper(cache: Path) -> None:
        set_frame(cache, compress_frame(torch.tensor([values] * 2).numpy().tobytes(), 3), number=5, view=view)

    tamper.__name__ = name
    case("copies")(tamper)


_geometry_case("geometry_of_nan", [0.0, float("nan"), 1.0, 1.0, 0.0], 1)
_geometry_case("geometry_without_extent", [0.5, 0.0, 0.5, 1.0, 0.0], 0)
_geometry_case("geometry_of_infinity", [0.0, 0.0, float("inf"), 1.0, 0.0], 2)


def _positions_case(name: str, values: list[list[int]]) -> None:
    def tamper(cache: Path) -> None:
        number = 4 + [extra["name"] for extra in document_of(cache)["extras"]].index(TOKEN_POSITIONS)
        set_frame(cache, compress_frame(torch.tensor(values, dtype=torch.int16).numpy().tobytes(), 3), number=number)

    tamper.__name__ = name
    case("few_tokens")(tamper)


_positions_case("token_position_out_of_range", [[0, 1], [0, 7], [0, 1]])
_positions_case("token_position_negative", [[0, 1], [0, 1], [-1, 1]])
_positions_case("token_position_twice", [[0, 1], [3, 3], [0, 1]])
_positions_case("token_positions_that_descend", [[2, 1], [0, 1], [0, 1]])
_positions_case("token_positions_of_another_size", [[0, 1], [0, 1]])


def set_tokens(cache: Path, num_tokens: int, rename: str = TOKEN_POSITIONS) -> None:
    """Change the number of tokens of the model, and the name of the extra, in the index and in all shards."""
    document = document_of(cache)
    document["num_tokens"] = num_tokens
    for extra in document["extras"]:
        extra["name"] = rename if extra["name"] == TOKEN_POSITIONS else extra["name"]
    for view, shard in itertools.product(range(2), range(2)):
        opened = Shard(cache, view, shard)
        opened.header["__metadata__"]["extras"] = json.dumps(document["extras"], sort_keys=True)
        opened.header["__metadata__"]["num_tokens"] = str(num_tokens)
        opened.write(sealed=False)
    seal(cache, document)


@case("few_tokens")
def more_tokens_stored_than_the_model_has(cache: Path) -> None:
    set_tokens(cache, 1)


@case("few_tokens")
def token_positions_where_all_tokens_are_stored(cache: Path) -> None:
    set_tokens(cache, 2)


@case("few_tokens")
def fewer_tokens_than_some_positions_need(cache: Path) -> None:
    set_tokens(cache, 3)


@case("few_tokens")
def tokens_without_positions(cache: Path) -> None:
    set_tokens(cache, 7, rename="other_positions")


@case()
def fewer_tokens_without_positions(cache: Path) -> None:
    set_tokens(cache, 5)


@case("few_tokens")
def token_positions_of_another_dtype(cache: Path) -> None:
    document = document_of(cache)
    (extra,) = [extra for extra in document["extras"] if extra["name"] == TOKEN_POSITIONS]
    extra.update(dtype="uint16")
    seal(cache, document)


@case()
def tokens_of_the_model_in_the_index_only(cache: Path) -> None:
    seal(cache, num_tokens=2**20)


@case("int8")
def steps_of_nan(cache: Path) -> None:
    step = np.full(6, np.nan, np.float32).view(np.uint8).reshape(-1, 4).T
    shard = Shard(cache)
    shard.chunks[0][10:14] = [compress_frame(plane.tobytes(), 1) for plane in step]
    shard.write()


@case("int8")
def steps_that_overflow(cache: Path) -> None:
    step = np.full(6, 3e38, np.float32).view(np.uint8).reshape(-1, 4).T
    shard = Shard(cache)
    shard.chunks[0][10:14] = [compress_frame(plane.tobytes(), 1) for plane in step]
    shard.write()


@case("transform")
def prefix_tokens_of_nan(cache: Path) -> None:
    tokens = np.full(18, np.nan, np.float16).view(np.uint8).reshape(-1, 2).T
    shard = Shard(cache)
    shard.chunks[0][10:12] = [compress_frame(plane.tobytes(), 1) for plane in tokens]
    shard.write()


@case("transform")
def state_of_nan(cache: Path) -> None:
    set_transform(cache, scale=torch.full((6,), torch.nan))


@case("transform")
def state_of_infinity(cache: Path) -> None:
    set_transform(cache, scale=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, torch.inf]))


@case("transform")
def state_that_overflows(cache: Path) -> None:
    set_transform(cache, scale=torch.full((6,), 3e38))


@case("transform")
def state_with_a_huge_step(cache: Path) -> None:
    set_transform(cache, step=1e300)


@case("transform")
def state_with_a_mean_of_another_shape(cache: Path) -> None:
    set_transform(cache, mean=torch.zeros(1, 6, dtype=torch.int32))


@case("transform")
def state_with_a_scale_of_one(cache: Path) -> None:
    """It would be broadcast."""
    set_transform(cache, scale=torch.ones(1))


@case("transform")
def state_with_a_basis_that_is_not_square(cache: Path) -> None:
    set_transform(cache, basis=torch.ones(6, 1, dtype=torch.int8))


@case("transform")
def state_with_an_absurd_grid(cache: Path) -> None:
    set_transform(cache, grid=(10**6, 10**6))


@case("transform")
def state_with_an_absurd_number_of_prefix_tokens(cache: Path) -> None:
    set_transform(cache, prefix_tokens=10**12)


@case("transform")
def state_of_another_cache(cache: Path) -> None:
    save_state(cache / "codec.safetensors", "0" * 64, CodecState(fitted(), {}))
    seal(cache)


@case("transform")
def state_with_an_entry_that_no_state_has(cache: Path) -> None:
    edit_state(cache, hook="x")
    seal(cache)


@case("transform")
def state_without_its_tensors(cache: Path) -> None:
    (cache / "codec.safetensors").write_bytes(safetensors.torch.save({}, {"hf_freezecache": "{}"}))
    seal(cache)


@case("transform")
def state_of_gigabytes(cache: Path) -> None:
    """A basis of 32768 channels: frames that hold what they claim."""
    frame = torch.frombuffer(bytearray(zstd_frame(GIB, zeros(GIB))), dtype=torch.uint8)
    tensors = {"0.basis": ["int8", [2**15, 2**15]], "0.mean": ["int32", [4, 6]], "0.scale": ["float32", [6]]}
    edit_state(cache, frames={"0.basis": frame}, tensors=tensors)
    seal(cache)


@case("transform")
def state_that_claims_exabytes(cache: Path) -> None:
    edit_state(
        cache, tensors={"0.basis": ["int8", [6, 6]], "0.mean": ["int32", [2**31, 2**31]], "0.scale": ["float32", [6]]}
    )
    seal(cache)


@case("transform")
def state_with_a_header_of_60_megabytes(cache: Path) -> None:
    path = cache / "codec.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = b'{"x":[' + b"{}," * (20 * 2**20) + b"{}]," + raw[9 : 8 + length]
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    seal(cache)


@case("transform")
def state_nested_deeply(cache: Path) -> None:
    path = cache / "codec.safetensors"
    header = b'{"__metadata__":{"hf_freezecache":"' + b"[" * 100_000 + b"]" * 100_000 + b'"}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    seal(cache)


@case("transform")
def state_of_a_sparse_terabyte(cache: Path) -> None:
    os.truncate(cache / "codec.safetensors", 2**40)
    document = document_of(cache)
    document["files"]["codec.safetensors"]["bytes"] = 2**40
    seal(cache, document, records=False)


@case("copies")
def prediction_of_nan(cache: Path) -> None:
    set_predictor(cache, scale=torch.tensor([1.0, torch.nan, 1.0]))


@case("copies")
def prediction_with_a_mean_of_infinity(cache: Path) -> None:
    set_predictor(cache, mean=torch.full((4, 3), torch.inf, dtype=torch.float16))


@case("copies")
def prediction_that_overflows(cache: Path) -> None:
    """All of it finite."""
    set_predictor(cache, scale=torch.full((3,), 3e38))


def _codec_case(name: str, steps: Any, base: str = "int8") -> None:
    def tamper(cache: Path) -> None:
        set_codec(cache, {"name": "pipeline", "configuration": {"steps": steps}})

    tamper.__name__ = name
    case(base)(tamper)


_PACKED = [{"name": "pack", "configuration": {"zones": 10}}, {"name": "zstd", "configuration": {"level": 1}}]
_codec_case("codec_of_a_million_bits", [{"name": "quantize", "configuration": {"bits": 10**6}}, *_PACKED])
_codec_case("codec_of_an_unknown_step", [{"name": "exec", "configuration": {"code": "1"}}, *_PACKED])
_codec_case("codec_of_steps_that_are_none", 7)
_codec_case("codec_of_a_list_for_settings", [{"name": "quantize", "configuration": [8]}, *_PACKED])
_codec_case("codec_of_a_step_by_no_name", [{"name": ["quantize"], "configuration": {}}, *_PACKED])
_codec_case("codec_of_a_thousand_compressions", ["planes", *["zstd"] * 1000])
_codec_case("codec_of_a_step_of_400_digits", [{"name": "transform", "configuration": {"step": 10**38}}, *_PACKED])
_codec_case("codec_with_a_text_for_a_tensor", [{"name": "transform", "configuration": {"basis": "x"}}, *_PACKED])


@case("int8")
def codec_nested_deeply(cache: Path) -> None:
    nested: Any = 8
    for _ in range(60):
        nested = [nested]
    set_codec(
        cache,
        {"name": "pipeline", "configuration": {"steps": [{"name": "quantize", "configuration": {"bits": nested}}]}},
    )


@case("int8")
def frames_of_another_codec(cache: Path) -> None:
    """All say fp16: as many bytes, other meaning."""
    set_codec(cache, PRESETS["fp16"])


# ---- Index tables: training does not read them ----


@case(only_verified=True)
def table_with_another_label(cache: Path) -> None:
    edit_table(cache, "labels", lambda values: [values[0] + 1, *values[1:]])


@case(only_verified=True)
def table_with_labels_of_another_dtype(cache: Path) -> None:
    edit_table(cache, "labels", lambda values: [float(value) for value in values])


@case(only_verified=True)
def table_with_texts_for_labels(cache: Path) -> None:
    edit_table(cache, "labels", lambda values: [str(value) for value in values])


@case(only_verified=True)
def table_with_other_sample_indices(cache: Path) -> None:
    edit_table(cache, "sample_index", lambda values: values[::-1])


@case(only_verified=True)
def table_with_another_chunk(cache: Path) -> None:
    edit_table(cache, "chunk", lambda values: [value + 1 for value in values])


@case(only_verified=True)
def table_with_nothing(cache: Path) -> None:
    edit_table(cache, "row", lambda values: [None, *values[1:]])


@case(only_verified=True)
def table_with_a_column_too_many(cache: Path) -> None:
    path = cache / table_name(0, 0)
    table = pq.read_table(path)
    pq.write_table(table.append_column("notes", pa.array(["x"] * len(table))), path)
    seal(cache)


@case(only_verified=True)
def table_of_fifty_million_rows(cache: Path) -> None:
    """A few kilobytes of repetitions."""
    path = cache / table_name(0, 0)
    schema = pq.read_schema(path)
    table = pa.table({name: np.zeros(50_000 * 100, np.int64) for name in schema.names})
    pq.write_table(table, path, compression="zstd")
    seal(cache)


@case(only_verified=True)
def table_that_is_no_parquet(cache: Path) -> None:
    (cache / table_name(0, 0)).write_bytes(b"PAR1" + bytes(64) + b"\xff\xff\xff\x7fPAR1")
    seal(cache)


@case(only_verified=True)
def table_of_another_view(cache: Path) -> None:
    (cache / table_name(0, 0)).write_bytes((cache / table_name(1, 0)).read_bytes())
    seal(cache)


# ---- Memory ----


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def main() -> None:
    """Print for each case the peak of memory above what reading and verifying sound caches takes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sound = sound_caches(Path(folder) / "sound")
        for cache in sound.values():
            read_all(cache)
            assert verify_cache(cache) == []
        made = {}
        for number, name in enumerate(CASES):
            place = Path(folder) / f"{number}"
            place.mkdir()
            made[name] = make_hostile(name, sound, place)
        # What crafting freed would hide what reading takes.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        peaks = {}
        for name, cache in made.items():
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is there
            before = _status("VmRSS")
            try:
                read_all(cache)
                assert name in ONLY_VERIFIED, name
            except (CacheCorruptError, UnsupportedSetupError):
                pass
            assert verify_cache(cache), name
            peaks[name] = _status("VmHWM") - before
        print(json.dumps(peaks))


if __name__ == "__main__":
    sys.exit(main())
