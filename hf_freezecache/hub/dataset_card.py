"""The card of a cached data set: what it holds, where it comes from, what it may reveal. States only what it was told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData, metadata_load
from yaml import YAMLError

from ..cache.fingerprint import Fingerprint
from ..cache.index import (
    CacheIndex,
    table_name,
)
from ..codecs import DTYPES, codec_from_dict
from ..report.text import (
    codec_words,
    distortion_words,
    size_words,
)
from .provenance import (
    Provenance,
    is_hub_id,
)

__all__ = ["FoundCard", "cache_card", "license_id", "read_card", "unfinished_card"]

_TAGS = ("hf-freezecache", "hidden-states", "vision-transformer")
#: What tells our cards from those of others that carry our tag: each names the fingerprint of its cache.
_FINGERPRINT = re.compile(r"fingerprint\W+`([0-9a-f]{64})`")
_METADATA = re.compile(r"\s*---\s*?\n.*?\n---[ \t]*(?:\n|$)", re.DOTALL)
#: What the Hub's metadata takes for the identifier of a licence.
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
#: What our cards say by themselves; of all other metadata, what is there stays.
_OURS = frozenset({"configs", "dataset_info", "size_categories", "source_datasets", "task_categories"})
#: What would stand in place of methods and arguments of the class that reads metadata, for whoever reads them next.
_UNUSABLE = frozenset({*dir(DatasetCardData), "self", "ignore_metadata_errors"})
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def _config_name(view: int) -> str:
    return f"view-{view:02d}"


def _features(directory: Path, index: CacheIndex, provenance: Provenance) -> datasets.Features:
    """Return the columns of the index, with the names of the classes where they fit."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(directory / table_name(0, 0)))
    names = provenance.label_names
    unique = names and len(set(names)) == len(names)
    if names and unique and isinstance(features.get("labels"), datasets.Value) and features["labels"].dtype == "int64":
        columns = [
            pq.read_table(directory / table_name(view, shard), columns=["labels"])["labels"].to_numpy()
            for view in range(index.num_views)
            for shard in range(index.num_shards)
        ]
        if all(column.min() >= 0 and column.max() < len(names) for column in columns):
            features["labels"] = datasets.ClassLabel(names=list(names))
    return features


@dataclass(frozen=True)
class FoundCard:
    """A card that lies in a repository.

    Attributes:
        fingerprint: That of the cache that it is of, 64 hexadecimal digits; ``None`` if it is none of ours.
        told: Metadata beside what our cards say themselves: licence, gates, languages, tags.
        text: What stands below the metadata; all of it, if those cannot be read.
    """

    fingerprint: str | None = None
    told: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def read_card(path: Path) -> FoundCard:
    """Read a card that anybody may have written."""
    content = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        metadata = metadata_load(path) or {}
    except (ValueError, YAMLError, RecursionError):
        return FoundCard(text=content.strip())
    text = _METADATA.sub("", content, count=1).strip() if metadata else content.strip()
    found = metadata.get("tags")
    tags = found if isinstance(found, list) else []
    named = _FINGERPRINT.search(text) if _TAGS[0] in tags else None
    told = {
        name: value
        for name, value in metadata.items()
        if value is not None and isinstance(name, str) and name not in _OURS and name not in _UNUSABLE
    }
    told["tags"] = [tag for tag in tags if tag not in _TAGS]
    return FoundCard(named and named[1], told, text)


def license_id(license: str | None) -> str | None:
    """Return what metadata say of a licence: its identifier, or that it is another."""
    return license if license is None or _LICENSE_ID.fullmatch(license) else "other"


def _metadata(
    directory: Path, index: CacheIndex, provenance: Provenance, told: Mapping[str, Any] | None
) -> DatasetCardData:
    told = told or {}
    size = next((name for bound, name in _SIZES if index.num_samples < bound), "n>1M")
    data = DatasetCardData(
        tags=[*_TAGS, *told.get("tags", ())],
        size_categories=[size],
        configs=[
            {
                "config_name": _config_name(view),
                "data_files": [{"split": "train", "path": f"index/{_config_name(view)}/*.parquet"}],
                **({"default": True} if view == 0 else {}),
            }
            for view in range(index.num_views)
        ],
    )
    if any(extra.name == "labels" for extra in index.extras):
        data["task_categories"] = ["image-classification"]
    if provenance.dataset_name and is_hub_id(provenance.dataset_name):
        data["source_datasets"] = [provenance.dataset_name]
    if provenance.license:
        data["license"] = license_id(provenance.license)
    stays = data.get("license") in (None, told.get("license"))
    for name, value in told.items():
        if data.get(name) is None and (stays or not name.startswith("license")):
            data[name] = value
    features = _features(directory, index, provenance)
    infos = {
        _config_name(view): datasets.DatasetInfo(features=features, config_name=_config_name(view))
        for view in range(index.num_views)
    }
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return data


def _escaped(text: str) -> str:
    """Return text of others so that Markdown shows it as it is."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", text)


def _named(name: str, revision: str | None) -> str:
    return _escaped(name) + (f" at revision `{revision.replace('`', '')}`" if revision else "")


def _table(rows: dict[str, str]) -> str:
    # A bar would begin a new cell.
    lines = [f"| {name} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _facts(index: CacheIndex, provenance: Provenance) -> dict[str, str]:
    rows: dict[str, str] = {}
    if provenance.dataset_name:
        rows["source data set"] = _named(provenance.dataset_name, provenance.dataset_revision)
    if provenance.license:
        rows["licence of the source"] = _escaped(provenance.license)
    if provenance.model_id:
        rows["model"] = _named(provenance.model_id, provenance.model_revision)
    tokens, hidden = index.hidden_shape
    rows |= {
        "split point": f"{index.split_point} blocks have run",
        "samples": f"{index.num_samples:,}",
        "views": f"{index.num_views} renderings of each image, view 0 the base view"
        if index.num_views > 1
        else "1 rendering of each image",
        "images": " x ".join(map(str, index.image_shape)) + " (channels x height x width)",
        "hidden states": f"{tokens} tokens x {hidden}, {str(DTYPES[index.dtype]).removeprefix('torch.')}",
        "beside them": ", ".join(f"`{extra.name}` ({extra.dtype})" for extra in index.extras) or "nothing",
        "codec": codec_words(index.codec),
        "distortion": distortion_words(index.calibration) if index.calibration else "exact",
    }
    if not codec_from_dict(index.codec).lossless and not index.calibration:
        rows["distortion"] = "not measured"
    if index.copies is not None and index.copies_calibration is not None:
        rows["codec of further views"] = codec_words(index.copies["configuration"].get("codec", index.copies))
        if "distortion" in index.copies_calibration:
            rows["distortion of further views"] = distortion_words(index.copies_calibration)
    total = index.total_bytes
    rows["size"] = (
        f"{size_words(total)} ({total:,} bytes) in {index.num_shards * index.num_views} shards; "
        f"{size_words(total / index.num_samples / index.num_views)} per image and view, "
        f"{index.bits_per_element:.2f} bits per element"
    )
    return rows


def unfinished_card(
    directory: Path, index: CacheIndex, provenance: Provenance | None = None, told: Mapping[str, Any] | None = None
) -> str:
    """Render what stands in place of the card while a cache is pushed: that it is unfinished, and of which cache.

    It names no data files.

    Args:
        directory: As for ``cache_card``.
        index: As for ``cache_card``.
        provenance: As for ``cache_card``: what the Hub refuses of it, it refuses before anything large is sent.
        told: As for ``cache_card``.
    """
    data = _metadata(directory, index, provenance or Provenance(), told)
    data.pop("dataset_info", None)
    # Nothing is there: without this line, all parts of all views that are there would be taken for rows.
    data["configs"] = [
        {"config_name": "unfinished", "data_files": [{"split": "train", "path": "unfinished/*.parquet"}]}
    ]
    return f"""---
{data.to_yaml()}
---

# Unfinished

A cache of hidden states is being pushed here by `hf-freezecache`, or its push was interrupted. The same push finishes it.

Its fingerprint: `{Fingerprint(index.fingerprint).digest}`.
"""


def cache_card(
    directory: Path,
    index: CacheIndex,
    repo_id: str,
    provenance: Provenance | None = None,
    told: Mapping[str, Any] | None = None,
) -> str:
    """Render the card of a cache: metadata that the Hub reads, and text.

    Args:
        directory: The cache, for the columns of its index.
        index: Its index.
        repo_id: Where it is pushed to.
        provenance: What it was made of, as far as that is known.
        told: Further metadata, as ``read_card`` returns them; what the card says itself stands in their place.
    """
    provenance = provenance or Provenance()
    imports, load = (
        "TrainingArguments",
        f"# model: the one whose first {index.split_point} blocks were cached, with a head of yours",
    )
    if provenance.model_id and is_hub_id(provenance.model_id):
        safe = re.fullmatch(r"[\w./-]+", provenance.model_revision or "") is not None
        revision = f', revision="{provenance.model_revision}"' if safe else ""
        imports = "AutoModelForImageClassification, TrainingArguments"
        load = f'model = AutoModelForImageClassification.from_pretrained("{provenance.model_id}"{revision})'
    parts = {f"`{name}`": f"`{value}`" for name, value in sorted(index.fingerprint.items())}
    terms = (
        " The terms of the source data set go on to apply to what is computed from it."
        if provenance.dataset_name
        else ""
    )
    return f"""---
{_metadata(directory, index, provenance, told).to_yaml()}
---

# Hidden states after {index.split_point} blocks, {index.num_samples:,} images

The output of the first {index.split_point} frozen blocks of a vision transformer for each image of a data set, cached by
`hf-freezecache`. Whoever trains the blocks behind them needs neither the images nor the time that the frozen blocks take.

> [!WARNING]
> **Hidden states can reveal the images they were computed from**: much of an image can be reconstructed from the output of
> early blocks, and its content recognised from later ones. Treat this repository as you would treat the images.{terms}

{_table(_facts(index, provenance))}

## Use

```python
from transformers import {imports}
from hf_freezecache import CachedDataset, FreezeCacheTrainer, SuffixModel

cached = CachedDataset.from_pretrained("{repo_id}")  # every file is checked against its hash
{load}
trainer = FreezeCacheTrainer(
    model=SuffixModel.for_cache(model, cached),  # refuses a model with other frozen weights
    args=TrainingArguments("out", num_train_epochs=5),
    train_dataset=cached,
)
trainer.train()
model.save_pretrained("out")  # a whole, ordinary model
```

`views=[0]` or `shards=[0, 1]` fetches only a part. Without hf-freezecache, `datasets.load_dataset("{repo_id}")` shows one
row per stored sample: its row in the source, where it lies, and its labels.

## Identity

The cache depends on all of these; a cache of other inputs has another fingerprint, `{Fingerprint(index.fingerprint).digest}`.

{_table(parts)}
"""
