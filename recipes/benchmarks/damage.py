"""Trials of damage: one flipped bit, or one truncated file, of small caches of every kind; what is found, and what is read.

    trials = DamageTrials(folder)
    trial = trials.flip_trial(seed)        # or trials.truncate_trial(seed)
    trial.detected                         # verify_cache names a problem
    trial.read                             # "refused", "identical", or "different": the one that must not be

A trial undoes its damage, so trials of one folder may follow each other in any order.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.cache.writer import build_cache
from hf_freezecache.codecs import (
    PRESETS,
    CopyCodec,
    Predictor,
    make_codec,
)
from hf_freezecache.compression.step_search import fit_codec
from hf_freezecache.data.collators import CheckedCollator, collate_cached, split_packed
from hf_freezecache.data.geometry import GEOMETRY_NAME
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import FreezeCacheError

SAMPLES, VIEWS, TOKENS, HIDDEN, GRID = 7, 2, 5, 6, (2, 2)


@dataclass(frozen=True)
class Trial:
    """What came of one damage.

    Attributes:
        cache: Kind of cache.
        file: Relative path of the file.
        place: Number of the bit, or length in bytes that is left.
        detected: Whether ``verify_cache`` found a problem.
        read: ``"refused"``: an error of ours; ``"identical"``: every value is that of the sound cache; ``"different"``.
    """

    cache: str
    file: str
    place: int
    detected: bool
    read: str


class _Rows(Dataset):  # type: ignore[type-arg]
    """Items by (row, view): an image whose pixels are the hidden states, labels, and the view's place."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row, view = key
        generator = torch.Generator().manual_seed(row)
        states = torch.randn(TOKENS, HIDDEN, generator=generator) + 0.1 * view
        return {
            "pixel_values": states,
            "labels": row % 3,
            "mask": torch.tensor([row % 2 == 0, True]),
            GEOMETRY_NAME: torch.tensor([0.0, 0.0, 1.0, 1.0, float(view)]),
        }


def _prefix(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values


def build_caches(folder: Path) -> dict[str, Path]:
    """Build one small cache of each kind; return them by kind."""
    sample = torch.stack([_Rows()[row, 0]["pixel_values"] for row in range(32)])
    geometry = torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]]]).expand(32, 2, 5)
    transform = fit_codec(PRESETS["transform"], sample, 1, GRID)
    predictor = Predictor(0.5, False, 1, GRID).fit(sample, geometry, sample + 0.1)
    plan = CachePlan(
        fingerprint=Fingerprint({}),
        split_point=2,
        image_shape=(1, TOKENS, HIDDEN),
        num_views=VIEWS,
        layout=ChunkLayout(SAMPLES, 3, seed=3),
        shard_chunks=2,
        codec=make_codec("lossless"),
    )
    changes: dict[str, dict[str, Any]] = {
        "lossless": {},
        "int8": {"codec": PRESETS["int8"], "calibration": {}},
        "transform": {"codec": transform, "calibration": {}},
        "copies": {
            "codec": transform,
            "calibration": {},
            "copies": CopyCodec(PRESETS["int8"], predictor),
            "copies_calibration": {},
        },
    }
    caches = {}
    for kind, change in changes.items():
        built = dataclasses.replace(plan, fingerprint=Fingerprint({"kind": kind}), **change)
        caches[kind] = build_cache(
            folder, built, _Rows(), CheckedCollator(default_collate), _prefix, batch_size=4
        ).directory
    return caches


def read_all(cache: Path) -> list[dict[str, torch.Tensor]]:
    """Read every sample of every view as training does: packed items, collated, restored.

    Raises:
        FreezeCacheError: The cache is damaged.
    """
    reader = CacheReader(cache)
    dataset = CachedDataset(reader, packed=True, geometry=True)
    batches = []
    for view in range(reader.index.num_views):
        for chunk in range(reader.layout.num_chunks):
            batch = collate_cached(dataset.__getitems__([(int(row), view) for row in reader.members(chunk)]))
            arrays, extras = split_packed(batch)
            batches.append({"hidden_states": reader.views.dequantize(arrays, reader.dtype), **extras})
    return batches


def same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> bool:
    """Say whether two readings agree in every bit."""
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(found, expected, strict=True)
    )


class DamageTrials:
    """Trials on copies of small caches in a folder, which is emptied and filled.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.caches = build_caches(folder)
        self.expected = {kind: read_all(cache) for kind, cache in self.caches.items()}
        for kind, cache in self.caches.items():
            if verify_cache(cache) or not same(read_all(cache), self.expected[kind]):
                raise AssertionError(f"the sound cache {cache} is not sound")
        #: (kind, relative path) of all files of all caches; the seed of a trial chooses one after the other.
        self.files = [
            (kind, path.relative_to(cache).as_posix())
            for kind, cache in self.caches.items()
            for path in sorted(cache.rglob("*"))
            if path.is_file()
        ]

    def flip_trial(self, seed: int) -> Trial:
        """Flip one bit of one file."""
        kind, name = self.files[seed % len(self.files)]
        raw = bytearray((self.caches[kind] / name).read_bytes())
        bit = random.Random(seed).randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        return self._trial(kind, name, bytes(raw), bit)

    def truncate_trial(self, seed: int) -> Trial:
        """Cut off the end of one file: everything, one byte, or anything between."""
        kind, name = self.files[seed % len(self.files)]
        raw = (self.caches[kind] / name).read_bytes()
        generator = random.Random(seed)
        length = generator.choice([0, len(raw) - 1, generator.randrange(len(raw)), generator.randrange(len(raw))])
        return self._trial(kind, name, raw[:length], length)

    def _trial(self, kind: str, name: str, content: bytes, place: int) -> Trial:
        cache = self.caches[kind]
        path = cache / name
        sound = path.read_bytes()
        path.write_bytes(content)
        try:
            detected = bool(verify_cache(cache))
            try:
                read = "identical" if same(read_all(cache), self.expected[kind]) else "different"
            except FreezeCacheError:
                read = "refused"
        finally:
            path.write_bytes(sound)
        return Trial(kind, name, place, detected, read)
