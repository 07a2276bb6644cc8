"""What a cache is to hold, and writing one shard of it chunk by chunk."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..codecs import (
    DTYPES,
    Codec,
    CopyCodec,
    ViewCodec,
    dtype_name,
)
from ..codecs.base import all_finite
from ..codecs.entropy import compress_frame
from ..data.geometry import GEOMETRY_NAME
from ..data.layout import ChunkLayout
from ..errors import CacheCorruptError, DataError
from .encoder import Encoder
from .fingerprint import Fingerprint
from .schema import (
    MAX_CHUNK_BYTES,
    TOKEN_POSITIONS,
    check_extra,
    check_stored_tokens,
    shard_name,
)
from .shard_file import (
    ExtraSpec,
    ShardHeader,
    check_token_positions,
    header_size,
    read_chunk_frames,
    read_extra,
    read_shard_header,
    shard_metadata,
    write_shard_header,
)

__all__ = ["BaseShard", "CachePlan", "FreshBase", "ShardWriter", "cache_name"]

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
        image_shape: (channels, height, width), or (patches, values).
        num_views: Views to store, at least 1.
        layout: Which sample goes into which chunk.
        shard_chunks: Chunks per shard.
        codec: How chunks are encoded.
        calibration: How a lossy codec was chosen, for the index.
        copies: How chunks of views 1 and up are encoded, if not by ``codec``.
        copies_calibration: How that codec was chosen.
        num_tokens: Tokens per sample in the model; ``None`` if all of them are stored. Where fewer are, each batch must hold
            ``token_positions`` (batch, stored tokens), int16 or int32, ascending per sample.
    """

    fingerprint: Fingerprint
    split_point: int
    image_shape: tuple[int, ...]
    num_views: int
    layout: ChunkLayout
    shard_chunks: int
    codec: Codec
    calibration: dict[str, Any] | None = None
    copies: CopyCodec | None = None
    copies_calibration: dict[str, Any] | None = None
    num_tokens: int | None = None

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
class FreshBase:
    """Gives the base view of chunks of a shard that is being written, as a reader will decode them.

    An encoder's threads add each chunk, and take it for each view that is written at once. The base view of a chunk is submitted before
    the others, so that they wait for what has begun. Nothing is read.

    Attributes:
        codec: Codec of the base view.
        uses: Views that take each chunk. After the last of them it is forgotten.
        chunks: (place in the shard) -> hidden states (samples, tokens, hidden), and geometry (samples, 5), once they are there.
        left: (place in the shard) -> views that have not taken it.
    """

    codec: Codec
    uses: int
    chunks: dict[int, Future[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, position: int) -> None:
        """Say that a chunk will come, before it is submitted."""
        self.chunks[position], self.left[position] = Future(), self.uses

    def add(self, position: int, frames: list[bytes], hidden_states: Tensor, geometry: Tensor) -> None:
        """Keep a chunk as its frames are decoded; ``hidden_states`` gives shape and dtype."""
        decoded = self.codec.decode(frames, tuple(hidden_states.shape), hidden_states.dtype)
        self.chunks[position].set_result((decoded, geometry))

    def fail(self, position: int, error: BaseException) -> None:
        """Let those who wait for a chunk that will not come fail as it did."""
        expected = self.chunks.get(position)
        if expected is not None and not expected.done():
            expected.set_exception(error)

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return hidden states and geometry of a chunk, by its place in the shard.

        Raises:
            DataError: The base view could not be encoded.
        """
        found = self.chunks[position].result()
        with self._lock:
            self.left[position] -= 1
            if not self.left[position]:
                del self.left[position], self.chunks[position]
        return found


@dataclass
class ShardWriter:
    """Writes one shard, chunk by chunk. Where that is faster, threads encode while the next batch is computed.

    It holds at most one incomplete chunk, as many chunks that are being encoded as the encoder takes at once, and one batch.

    Attributes:
        file: The shard, open for writing.
        plan: What the cache is to hold.
        view: The view.
        shard: The shard's number.
        encoder: Encodes chunks.
        base: (place of a chunk in the shard) -> hidden states and geometry of its base view; for views that are predicted.
        fresh: Takes the chunks of a base view, for views that are predicted and written at once.
    """

    file: BinaryIO
    plan: CachePlan
    view: int
    shard: int
    encoder: Encoder
    base: Callable[[int], tuple[Tensor, Tensor]] | None = None
    fresh: FreshBase | None = None
    hidden: list[Tensor] = field(default_factory=list)
    extras: list[dict[str, Tensor]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)
    pending: deque[Future[list[bytes]]] = field(default_factory=deque)
    metadata: dict[str, str] = field(default_factory=dict)
    position: int = 0
    chunks: int = 0
    samples: int = 0

    def append(self, hidden_states: Tensor, extras: dict[str, Tensor]) -> None:
        """Add samples, in stored order.

        Args:
            hidden_states: (batch, stored tokens, hidden), on the CPU.
            extras: Name -> (batch, ...).

        Raises:
            DataError: Hidden states are not finite; or shapes, dtypes, names or token positions are not those of the cache, or
                cannot be stored.
        """
        self._check_finite(hidden_states)
        if not self.metadata:
            self._start(hidden_states, extras)
        self._check(hidden_states, extras)
        self.hidden.append(hidden_states)
        self.extras.append(extras)
        self.samples += len(hidden_states)
        size = self.plan.layout.chunk_size
        while sum(map(len, self.hidden)) >= size:
            self._cut(size)

    def _check_finite(self, hidden_states: Tensor) -> None:
        if hidden_states.dtype not in DTYPES.values():
            raise DataError(f"Hidden states of dtype {hidden_states.dtype} cannot be stored; expected a float dtype.")
        if not all_finite(hidden_states):
            finite = torch.isfinite(hidden_states).flatten(1).all(dim=1)
            rows = self.plan.rows(self.shard)[self.samples :][: len(finite)][~finite.numpy()].tolist()
            raise DataError(
                f"The frozen prefix gave NaN or infinite hidden states for rows {rows[:5]} (view {self.view}). Check these "
                "images, the transform's normalisation and the model's weights; with fp16 try bf16 or fp32."
            )

    def _start(self, hidden_states: Tensor, extras: dict[str, Tensor]) -> None:
        specs = _specs(extras)
        num_tokens = self.plan.num_tokens or hidden_states.shape[1]
        self._check_readable(hidden_states, specs, num_tokens)
        self.metadata = shard_metadata(
            self.plan.fingerprint.digest,
            self.view,
            self.shard,
            self.plan.views.stored_dict(self.view),
            num_tokens,
            hidden_states.shape[1:],
            dtype_name(hidden_states.dtype),
            specs,
        )
        rows = len(self.plan.rows(self.shard))
        chunks = -(-rows // self.plan.layout.chunk_size)
        frames = self.plan.views.num_frames(self.view, hidden_states.shape, hidden_states.dtype) + len(specs)
        self.file.seek(header_size(chunks, frames, rows, self.metadata))

    def _check_readable(self, hidden_states: Tensor, specs: list[ExtraSpec], num_tokens: int) -> None:
        """Refuse at the start of a build what no reader would take at its end."""
        try:
            sizes = [check_extra(asdict(spec)) for spec in specs]
            check_stored_tokens(num_tokens, hidden_states.shape[1], [asdict(spec) for spec in specs])
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
        actual = (list(hidden_states.shape[1:]), dtype_name(hidden_states.dtype))
        if expected != actual:
            raise DataError(
                f"Hidden states of one cache must have one shape and dtype: expected {expected}, found {actual}. Let the "
                "transform give all images the same size."
            )
        expected_extras, specs = json.loads(self.metadata["extras"]), [asdict(spec) for spec in _specs(extras)]
        if expected_extras != json.loads(json.dumps(specs)):
            raise DataError(
                f"The collator gave {specs} per sample, expected {expected_extras} as in the first batch. Cached extras must "
                "have one name, dtype and shape in all batches; pad and convert them in the transform."
            )
        if TOKEN_POSITIONS in extras:
            try:
                check_token_positions(extras[TOKEN_POSITIONS], int(self.metadata["num_tokens"]))
            except ValueError as error:
                raise DataError(
                    f"A batch of shard {self.shard} (view {self.view}) cannot be stored: {error}. Sort the positions of "
                    "each sample, and its hidden states with them."
                ) from error

    def _cut(self, size: int) -> None:
        hidden = torch.cat(self.hidden)
        extras = {name: torch.cat([batch[name] for batch in self.extras]) for name in sorted(self.extras[0])}
        self.hidden, self.extras = [], []
        if len(hidden) > size:
            self.hidden = [hidden[size:]]
            self.extras = [{name: value[size:] for name, value in extras.items()}]
        self._flush(self.encoder.at_once - 1)
        chunk_extras = {name: value[:size] for name, value in extras.items()}
        if self.fresh is not None:
            self.fresh.expect(self.chunks)
        self.pending.append(self.encoder.submit(self._encoded, self.chunks, hidden[:size], chunk_extras))
        self.chunks += 1

    def _encoded(self, chunk: int, hidden_states: Tensor, extras: dict[str, Tensor]) -> list[bytes]:
        try:
            return self._encode(chunk, hidden_states, extras)
        except BaseException as error:
            if self.fresh is not None:
                self.fresh.fail(chunk, error)
            raise

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
        if self.fresh is not None:
            self.fresh.add(chunk, frames, hidden_states, extras[GEOMETRY_NAME])
        frames += [
            compress_frame(value.contiguous().flatten().view(torch.uint8).numpy().data, _EXTRA_LEVEL)
            for value in extras.values()
        ]
        return frames

    def _flush(self, left: int = 0) -> None:
        """Write the chunks that were submitted first, until so many are left."""
        while len(self.pending) > left:
            ends = [self.position]
            for frame in self.pending.popleft().result():
                self.file.write(frame)
                self.position += len(frame)
                ends.append(self.position)
            self.ends.append(ends)

    def finish(self) -> None:
        """Write what is left, then the header."""
        left = sum(map(len, self.hidden))
        if left:
            self._cut(left)
        self._flush()
        write_shard_header(self.file, np.array(self.ends, dtype=np.int64), self.plan.rows(self.shard), self.metadata)


@dataclass
class BaseShard:
    """Gives hidden states and geometry of the base view of a shard's chunks, as a reader will decode them.

    Calls come from an encoder's threads. The shard of the base view is complete before any of them.

    Attributes:
        directory: The cache.
        plan: What the cache is to hold.
        shard: The shard's number.
        header: Header of the shard of the base view; it is read when it is first needed.
    """

    directory: Path
    plan: CachePlan
    shard: int
    header: ShardHeader | None = None

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return hidden states (samples, tokens, hidden) and geometry (samples, 5) of a chunk, by its place in the shard.

        Raises:
            CacheCorruptError: The shard of the base view is missing or damaged.
        """
        path, plan = self.directory / shard_name(0, self.shard), self.plan
        if self.header is None:
            self.header = read_shard_header(path)
        metadata = self.header.metadata
        first = (self.shard * plan.shard_chunks + position) * plan.layout.chunk_size
        samples = min(plan.layout.chunk_size, plan.layout.num_samples - first)
        shape, dtype = (samples, *json.loads(metadata["hidden_shape"])), DTYPES[metadata["dtype"]]
        specs = [
            ExtraSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in json.loads(metadata["extras"])
        ]
        number = [spec.name for spec in specs].index(GEOMETRY_NAME)
        try:
            frames = read_chunk_frames(path, self.header, position)
            split = len(frames) - len(specs)
            geometry = read_extra(specs[number], frames[split + number], samples)
            return plan.codec.decode(frames[:split], shape, dtype), geometry
        except ValueError as error:
            raise CacheCorruptError(f"{path} is damaged in chunk {position}: {error}. Delete it to rebuild.") from error
