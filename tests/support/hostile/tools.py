"""Tools of the attacker: they change a cache and make every hash, size and checksum fit."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from hf_freezecache.cache.codec_state import CodecState, save_state
from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.index import shard_name, table_name
from hf_freezecache.codecs import PRESETS, Codec
from hf_freezecache.codecs.base import digest

from .cases import fitted


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
