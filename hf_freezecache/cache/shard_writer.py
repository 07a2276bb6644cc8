"""What a cache is to hold, and writing one shard of it chunk by chunk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..codecs import (
    Codec,
    CopyCodec,
    ViewCodec,
    dtype_name,
)
from ..codecs.entropy import compress_frame
from ..data.geometry import GEOMETRY_NAME
from ..data.layout import ChunkLayout
from ..errors import DataError
from .fingerprint import Fingerprint
from .index import ExtraSpec, header_size, shard_metadata, write_shard_header
from .schema import (
    MAX_CHUNK_BYTES,
    check_extra,
)

__all__ = ["CachePlan", "ShardWriter", "cache_name"]

#: zstd level of labels and other extras; they are small and mostly compressible.
_EXTRA_LEVEL = 3


def cache_name(split_point: int, fingerprint: Fingerprint) -> str:
    """Return the name of a cache's directory below ``cache_dir``."""
    return f"k{split_point:02d}-{fingerprint.digest[:16]}"


@dataclass(frozen=True)
class CachePlan:
    """What a cache is to hold.

    Attributes:
        fingerprint: Identity of the cache.
        split_point: Number of blocks in the prefix.
        image_shape: (channels, height, width).
        num_views: Views to store, at least 1.
        layout: Which sample goes into which chunk.
        shard_chunks: Chunks per shard.
        codec: How chunks are encoded.
        calibration: How a lossy codec was chosen, for the index.
        copies: How chunks of views 1 and up are encoded, if not by ``codec``.
        copies_calibration: How that codec was chosen.
    """

    fingerprint: Fingerprint
    split_point: int
    image_shape: tuple[int, int, int]
    num_views: int
    layout: ChunkLayout
    shard_chunks: int
    codec: Codec
    calibration: dict[str, Any] | None = None
    copies: CopyCodec | None = None
    copies_calibration: dict[str, Any] | None = None

    @property
    def views(self) -> ViewCodec:
        """Codec of all views."""
        return ViewCodec(self.codec, self.copies)

    @property
    def name(self) -> str:
        """Name of the directory below ``cache_dir``."""
        return cache_name(self.split_point, self.fingerprint)

    @property
    def num_shards(self) -> int:
        """Shards per view."""
        return -(-self.layout.num_chunks // self.shard_chunks)

    def rows(self, shard: int) -> npt.NDArray[np.int64]:
        """Sample indices of a shard in stored order, int64."""
        per_shard = self.shard_chunks * self.layout.chunk_size
        return self.layout.order[shard * per_shard : (shard + 1) * per_shard]


def _specs(extras: dict[str, Tensor]) -> list[ExtraSpec]:
    return [
        ExtraSpec(name, str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))
        for name, value in sorted(extras.items())
    ]


@dataclass
class ShardWriter:
    """Writes one shard, chunk by chunk; a thread encodes while the next batch is computed.

    Holds at most one incomplete chunk, one chunk being encoded, and one batch.

    Attributes:
        file: The shard, open for writing.
        plan: What the cache is to hold.
        view: The view.
        shard: The shard's number.
        executor: Runs the encoder.
        base: Gives hidden states and geometry of the base view of a chunk, by its place in the shard; for views that are
            predicted.
    """

    file: BinaryIO
    plan: CachePlan
    view: int
    shard: int
    executor: ThreadPoolExecutor
    base: Callable[[int], tuple[Tensor, Tensor]] | None = None
    hidden: list[Tensor] = field(default_factory=list)
    extras: list[dict[str, Tensor]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)
    pending: Future[list[bytes]] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    position: int = 0
    chunks: int = 0

    def append(self, hidden_states: Tensor, extras: dict[str, Tensor]) -> None:
        """Add samples, in stored order."""
        if not self.metadata:
            self._start(hidden_states, extras)
        self._check(hidden_states, extras)
        self.hidden.append(hidden_states)
        self.extras.append(extras)
        size = self.plan.layout.chunk_size
        while sum(len(part) for part in self.hidden) >= size:
            self._cut(size)

    def _start(self, hidden_states: Tensor, extras: dict[str, Tensor]) -> None:
        specs = _specs(extras)
        self._check_readable(hidden_states, specs)
        self.metadata = shard_metadata(
            self.plan.fingerprint.digest,
            self.view,
            self.shard,
            self.plan.views.stored_dict(self.view),
            hidden_states.shape[1:],
            dtype_name(hidden_states.dtype),
            specs,
        )
        rows = len(self.plan.rows(self.shard))
        chunks = -(-rows // self.plan.layout.chunk_size)
        frames = self.plan.views.num_frames(self.view, hidden_states.shape, hidden_states.dtype) + len(specs)
        self.file.seek(header_size(chunks, frames, rows, self.metadata))

    def _check_readable(self, hidden_states: Tensor, specs: list[ExtraSpec]) -> None:
        """Refuse at the start of a build what no reader would take at its end."""
        try:
            sizes = [check_extra(asdict(spec)) for spec in specs]
        except ValueError as error:
            raise DataError(
                f"What the collator gave beside the images cannot be stored: {error}. Rename or convert it."
            ) from error
        sizes.append(math.prod(hidden_states.shape[1:]) * hidden_states.dtype.itemsize)
        most = MAX_CHUNK_BYTES // max(sizes) if max(sizes) else self.plan.layout.chunk_size
        if min(self.plan.layout.chunk_size, self.plan.layout.num_samples) > most:
            raise DataError(
                f"A chunk of {self.plan.layout.chunk_size} samples of {max(sizes)} bytes is larger than {MAX_CHUNK_BYTES} "
                f"bytes. Set CacheConfig(chunk_size=...) to at most {most}."
            )

    def _check(self, hidden_states: Tensor, extras: dict[str, Tensor]) -> None:
        expected = (json.loads(self.metadata["hidden_shape"]), self.metadata["dtype"])
        found = (list(hidden_states.shape[1:]), dtype_name(hidden_states.dtype))
        if expected != found:
            raise DataError(
                f"Hidden states of one cache must have one shape and dtype: expected {expected}, found {found}. Let the "
                "transform give all images the same size."
            )
        stored, given = json.loads(self.metadata["extras"]), [asdict(spec) for spec in _specs(extras)]
        if stored != json.loads(json.dumps(given)):
            raise DataError(
                f"The collator gave {given} per sample, expected {stored} as in the first batch. Cached extras must have "
                "one name, dtype and shape in all batches; pad and convert them in the transform."
            )

    def _cut(self, size: int) -> None:
        hidden = torch.cat(self.hidden)
        names = self.extras[0].keys()
        extras = {name: torch.cat([part[name] for part in self.extras]) for name in names}
        self.hidden, self.extras = [], []
        if len(hidden) > size:
            self.hidden = [hidden[size:]]
            self.extras = [{name: value[size:] for name, value in extras.items()}]
        self._flush()
        chunk = hidden[:size]
        parts = {name: extras[name][:size] for name in sorted(names)}
        self.pending = self.executor.submit(self._encode, self.chunks, chunk, parts)
        self.chunks += 1

    def _encode(self, chunk: int, hidden_states: Tensor, extras: dict[str, Tensor]) -> list[bytes]:
        base, geometry = None, None
        if self.base is not None:
            base, base_geometry = self.base(chunk)
            geometry = torch.stack([base_geometry, extras[GEOMETRY_NAME]], 1)
        try:
            frames = self.plan.views.encode(self.view, hidden_states, base, geometry)
        except ValueError as error:
            raise DataError(
                f"Hidden states of shard {self.shard} (view {self.view}) could not be encoded: {error}. Finished shards are kept."
            ) from error
        frames += [
            compress_frame(value.contiguous().flatten().view(torch.uint8).numpy().data, _EXTRA_LEVEL)
            for value in extras.values()
        ]
        return frames

    def _flush(self) -> None:
        if self.pending is not None:
            frames, self.pending = self.pending.result(), None
            ends = [self.position]
            for frame in frames:
                self.file.write(frame)
                self.position += len(frame)
                ends.append(self.position)
            self.ends.append(ends)

    def finish(self) -> None:
        """Write what is left, then the head."""
        left = sum(len(part) for part in self.hidden)
        if left:
            self._cut(left)
        self._flush()
        write_shard_header(self.file, np.array(self.ends, dtype=np.int64), self.plan.rows(self.shard), self.metadata)
