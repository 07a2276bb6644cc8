"""A cache as a map-style data set."""

from __future__ import annotations

import functools
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache.fingerprint import Fingerprint
from .cache.index import Selection
from .cache.reader import CacheReader
from .cache.transfer import copy_cache
from .data.chunk_samples import Chunk, ChunkSamples
from .data.geometry import GEOMETRY_NAME
from .data.kept_tokens import EpochKey, TokenSubset
from .data.read_ahead import ReadAhead, ReadingOrder
from .data.sampler import ChunkKey, ChunkSampler, OpenedSampler
from .data.task import IMAGE_CLASSIFICATION, task_of
from .data.views import ViewKey
from .errors import DataError, UnsupportedSetupError

__all__ = [
    "CachedDataset",
]


def _read_chunk(reader: CacheReader, packed: bool, geometry: bool, key: ChunkKey) -> Chunk:
    """Read and decode a chunk; see ``CachedDataset`` for the arguments."""
    if packed:
        undone = reader.entropy_decode_chunk(*key)
        parts = undone.arrays | undone.extras
    else:
        decoded = reader.read_chunk(*key)
        parts = {"hidden_states": decoded.hidden_states, **decoded.extras}
    if not geometry:
        parts.pop(GEOMETRY_NAME, None)
    return parts


class CachedDataset(Dataset):  # type: ignore[type-arg]
    """The samples of a cache.

    Item ``(i, v)`` is ``{"hidden_states": (tokens, hidden), "labels": ...}`` of sample ``i`` of the original data set in
    view ``v``; item ``i`` is view 0. The sample index alone says where a sample lies. Where fewer tokens are stored than the
    model has, ``token_positions`` (tokens,) says which.

    Args:
        reader: The opened cache.
        max_chunks: Decoded chunks kept in memory. ``ChunkSampler`` needs its window and, where a batch spans two
            windows, what the batch touches of the next.
        packed: Items hold the codec's integers, under the names of ``codecs.array_names``, in place of ``hidden_states``.
            They are a quarter to half the size; ``ViewCodec.dequantize`` turns a batch of them into hidden states on the training
            device.
        geometry: Items hold ``view_geometry`` (5,), where the view lies in its image, if the cache has it.
        keep_read: A chunk stays in memory after all of its samples were read, until others need the room. ``ChunkSampler``
            wants this for several processes, where some samples come twice.
        tokens: Draws the tokens that items hold; ``None`` for all. Keys are then ``(i, v, epoch)``. Packed items hold the
            positions as ``packed.kept``, for ``ViewCodec.dequantize``, and of the arrays what it needs for these tokens.
        whole: Packed items hold all tokens all the same: something else is to see all before others are dropped.
        held_bytes: Beyond these, decoded chunks stay in memory, up to so many bytes, and are read no more. They are those that
            are read first: where all are read in turn, throwing out the oldest would keep none.
    """

    def __init__(
        self,
        reader: CacheReader,
        max_chunks: int = 16,
        packed: bool = False,
        geometry: bool = False,
        keep_read: bool = False,
        tokens: TokenSubset | None = None,
        whole: bool = False,
        held_bytes: int = 0,
    ) -> None:
        self.reader = reader
        self.max_chunks = max_chunks
        self.packed = packed
        self.geometry = geometry
        self.keep_read = keep_read
        self.tokens = tokens
        #: Axis of the tokens in those entries of a chunk that items hold only a part of.
        self._token_axes = {} if whole else reader.views.token_axes() if packed else {"hidden_states": 1}
        #: Chunks decoded so far by this process.
        self.decoded_chunks = 0
        self._chunks: OrderedDict[ChunkKey, Chunk] = OrderedDict()
        self._unread: dict[ChunkKey, int] = {}
        self._ahead: ReadAhead[Chunk] | None = None
        self._held: dict[ChunkKey, Chunk] = {}
        self._room_to_hold = self.held_bytes = held_bytes

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        expected: Fingerprint | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        views: Sequence[int] | None = None,
        shards: Sequence[int] | None = None,
        **settings: Any,
    ) -> CachedDataset:
        """Open a cache: a local one, one on the Hub, which is fetched once and checked bit by bit, or one in a store.

        Nothing in it is trusted, since it may come from anyone.

        Args:
            path: The folder with ``index.json``; or ``user/name`` of a data set on the Hub, if there is no such folder; or an
                address that fsspec knows, e.g. ``hf://datasets/user/name`` or ``s3://bucket/cache``. From a store only the
                needed bytes are fetched: the index now, the header of a shard once, those of a chunk when it is read.
            expected: Fingerprint that the cache must have; ``None`` takes any.
            revision: Branch, tag or commit on the Hub; default ``main``.
            token: Token for the Hub; default the one of ``hf auth login``.
            views: Only these views are fetched, and only they need exist; default all.
            shards: The same for shards. ``sample_indices`` says which samples they hold.
            settings: The keyword arguments of ``CachedDataset``.

        Raises:
            CacheCorruptError: It is no finished cache, a file is missing, damaged or altered, or the store is out of reach.
            CacheMismatchError: The fingerprint differs; the message names the components.
            HubError: The Hub has no such repository or revision, refused, or could not be reached.
            IndexError: The cache has no such view or shard.
            UnsupportedSetupError: It has another version of the format, an unknown codec, or an address of an unknown protocol.
        """
        selection = Selection.of(views, shards)
        location: Any = path
        if isinstance(path, str) and "://" not in path and not Path(path).exists():
            from .hub.client import is_repo_id
            from .hub.pull import fetch_cache

            if is_repo_id(path):
                location = fetch_cache(path, revision=revision, token=token, selection=selection)
        elif revision is not None:
            raise UnsupportedSetupError(
                f"revision={revision!r} was given, but {path} is local; only the Hub has revisions."
            )
        if isinstance(location, str) and "://" not in location:
            location = Path(location)
        return cls(CacheReader(location, expected, selection), **settings)

    def save_pretrained(self, path: str | Path) -> Path:
        """Copy the cache, or what was opened of it, to a new or empty folder. Each file is checked against its hash.

        Raises:
            CacheCorruptError: A file is missing or damaged.
            CacheWriteError: The folder is not empty, or cannot be written.
            UnsupportedSetupError: The cache is read from a URL.
        """
        if "://" in str(self.reader.directory):
            raise UnsupportedSetupError(
                f"{self.reader.directory} is no folder; fetch it with hf-freezecache pull instead."
            )
        copy_cache(Path(self.reader.directory), Path(path), self.reader.selection)
        return Path(path)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = True,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        dataset_name: str | None = None,
        dataset_revision: str | None = None,
        license: str | None = None,
        model_id: str | None = None,
        model_revision: str | None = None,
        label_names: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> Any:
        """Push the cache to a data set on the Hub, or the rest of it after an interruption; see ``hub.push.push_cache``.

        Hidden states can reveal the images they were computed from. The card says only what these arguments say.

        Args:
            repo_id: ``user/name``.
            private: A repository that is made is private, and a public one is refused; ``False`` makes a public one.
            token: Token for the Hub; default the one of ``hf auth login``.
            revision: Branch; default ``main``.
            dataset_name: Source of the images: a data set on the Hub, or words.
            dataset_revision: Its commit.
            license: Licence of the source: an identifier of the Hub, or words.
            model_id: Model whose blocks were run.
            model_revision: Its commit.
            label_names: Names of the classes, by number.
            overwrite: Replace another cache that is in the repository.

        Returns:
            ``hub.push.PushReport``: ``url``, ``revision``, and what was uploaded.

        Raises:
            CacheCorruptError: The cache is damaged, or only some of its views or shards were opened.
            CacheMismatchError: The repository holds another cache.
            HubError: The Hub refused or could not be reached.
        """
        from .hub.provenance import Provenance
        from .hub.push import push_cache

        provenance = Provenance(
            dataset_name=dataset_name,
            dataset_revision=dataset_revision,
            license=license,
            model_id=model_id,
            model_revision=model_revision,
            label_names=None if label_names is None else tuple(label_names),
        )
        return push_cache(
            self.reader.directory,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            provenance=provenance,
            overwrite=overwrite,
        )

    @property
    def sample_indices(self) -> np.ndarray[Any, Any]:
        """Sample indices that can be read, in stored order, int64; all of them unless only some shards were opened."""
        layout = self.reader.layout
        return np.concatenate([layout.members(chunk) for chunk in self._chunks_opened()])

    def _chunks_opened(self) -> list[int]:
        index, num_chunks = self.reader.index, self.reader.layout.num_chunks
        shards = self.reader.selection.chosen_shards(index)
        return [
            chunk
            for shard in shards
            for chunk in range(shard * index.shard_chunks, min((shard + 1) * index.shard_chunks, num_chunks))
        ]

    def sampler(self, seed: int, window: int = 8) -> ChunkSampler:
        """Return a sampler that shuffles what was opened, chunk by chunk, and shows each chunk each view in turn.

        Args:
            seed: Of the order, and of the turns of the views.
            window: Chunks whose samples are mixed; ``max_chunks`` must hold them and those of a batch.
        """
        return OpenedSampler(
            self.reader.layout,
            tuple(self._chunks_opened()),
            self.reader.selection.chosen_views(self.reader.index),
            seed,
            window,
        )

    def check_labels(self, model: Any) -> None:
        """Check that the stored labels are classes of a model, as far as labels are classes and lie on this machine.

        Args:
            model: The model that is to be trained on them.

        Raises:
            DataError: A label lies outside ``[0, classes)`` and is not -100.
            CacheCorruptError: A shard is damaged.
        """
        reader = self.reader
        num_labels = (task_of(model) or IMAGE_CLASSIFICATION).num_classes(getattr(model, "config", None))
        specs = [spec for spec in reader.index.extras if spec.name == "labels" and spec.shape == ()]
        if (
            num_labels is None
            or not specs
            or specs[0].torch_dtype.is_floating_point
            or isinstance(reader.directory, str)
        ):
            return
        view = reader.selection.chosen_views(reader.index)[0]
        for chunk in self._chunks_opened():
            labels = reader.read_extra("labels", view, chunk)
            wrong = torch.nonzero(((labels < 0) | (labels >= num_labels)) & (labels != -100))
            if len(wrong):
                row = int(wrong[0])
                raise DataError(
                    f"Labels out of range: sample {reader.members(chunk)[row]} of the cache {reader.directory} has label "
                    f"{labels[row]}, but this {type(model).__name__} has {num_labels} classes, so labels must lie in "
                    f"[0, {num_labels}). Give the model num_labels=..., e.g. in from_pretrained(..., num_labels=..., "
                    "ignore_mismatched_sizes=True). If a collator gives other labels, say so: for_cache(..., relabelled=True)."
                )

    def __len__(self) -> int:
        """Return the number of samples; of the stored rows, if the cache holds only some of the data set."""
        return self.reader.index.num_samples

    def __getstate__(self) -> dict[str, Any]:
        """Leave decoded chunks behind when copied into a worker process."""
        empty: dict[str, Any] = {"_chunks": OrderedDict(), "_unread": {}, "_ahead": None, "_held": {}}
        return {**self.__dict__, **empty, "_room_to_hold": self.held_bytes}

    def read_ahead(self, sampler: ReadingOrder, rank: int = 0, threads: int = 1, within_window: bool = False) -> None:
        """Read chunks in threads before they are needed, as far as ``max_chunks`` leaves room. In worker processes it has no effect.

        Args:
            sampler: Gives the order, of the data set's own cache.
            rank: Process whose samples are read here.
            threads: Threads that read; 0 reads chunks when they are needed.
            within_window: Threads read the chunks of a window when its first sample is needed, and rest while steps compute.
        """
        self._ahead = ReadAhead(self._read, sampler, rank, threads, within_window) if threads else None

    @property
    def _read(self) -> Callable[[ChunkKey], Chunk]:
        """Reads and decodes a chunk. It holds no reference to the data set: threads that still read would keep all chunks alive."""
        return functools.partial(_read_chunk, self.reader, self.packed, self.geometry)

    def forget_chunks(self) -> None:
        """Let go of all decoded chunks, and of threads that read ahead; samples that are asked for later are read anew."""
        self._ahead = None
        self._chunks.clear()
        self._unread.clear()
        self._held.clear()
        self._room_to_hold = self.held_bytes

    def _chunk(self, view: int, chunk: int) -> Chunk:
        key = (view, chunk)
        if key in self._held:
            return self._held[key]
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return self._chunks[key]
        if self._ahead is None:
            parts = self._read(key)
        else:
            self._ahead.turn_to(key)
            self._read_on()
            parts = self._ahead.take(key)
        self.decoded_chunks += 1
        size = sum(part.nbytes for part in parts.values())
        if size <= self._room_to_hold:
            self._room_to_hold -= size
            self._held[key] = parts
            return parts
        self._chunks[key] = parts
        self._unread[key] = len(next(iter(parts.values())))
        while len(self._chunks) > self.max_chunks:
            old, _ = self._chunks.popitem(last=False)
            del self._unread[old]
        self._read_on()
        return parts

    def _read_on(self) -> None:
        """Use the room for chunks that are needed next; those that were read to their end give way to them."""
        if self._ahead is None:
            return
        unread = sum(count > 0 for count in self._unread.values())
        self._ahead.read_on(ChainMap(self._chunks, self._held), self.max_chunks - unread)
        for key in list(self._chunks):
            if len(self._chunks) + len(self._ahead) > self.max_chunks and self._unread[key] <= 0:
                del self._chunks[key], self._unread[key]

    def __getitem__(self, key: int | ViewKey | EpochKey) -> dict[str, Tensor]:
        """Return one sample.

        Raises:
            IndexError: No such sample or view.
            CacheCorruptError: Its chunk is damaged.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | ViewKey | EpochKey]) -> ChunkSamples:
        """Return several samples, from which ``collators.collate_cached`` makes a batch without making them one by one."""
        layout, num_views = self.reader.layout, self.reader.index.num_views
        if self._ahead is not None and self._ahead.follow():
            for known, parts in self._chunks.items():
                self._unread[known] = len(next(iter(parts.values()))) if known in self._ahead else 0
        places: list[tuple[Chunk, int]] = []
        kept: list[Tensor] = []
        for key in keys:
            sample_index, view, *epoch = (key, 0) if isinstance(key, (int, np.integer)) else key
            in_range = 0 <= sample_index < layout.total_samples and 0 <= view < num_views
            position = int(layout.position[sample_index]) if in_range else -1
            if position < 0:
                raise IndexError(
                    f"Sample {sample_index}, view {view} is not in the cache {self.reader.directory}, which holds "
                    f"{len(self)} samples in {num_views} views."
                )
            chunk, row = divmod(position, layout.chunk_size)
            places.append((self._chunk(view, chunk), row))
            if self.tokens is not None:
                kept.append(self.tokens.positions(sample_index, view, *epoch))
            if (view, chunk) in self._held:
                continue
            # In an epoch each sample is read once: a chunk read to its end makes room at once.
            self._unread[view, chunk] -= 1
            if self._unread[view, chunk] == 0:
                if not self.keep_read:
                    del self._chunks[view, chunk], self._unread[view, chunk]
                self._read_on()
        return ChunkSamples(places, self._token_axes, None if self.tokens is None else kept, self.packed)
