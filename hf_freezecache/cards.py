"""The card of a cached data set: what it holds, where it comes from, what it may reveal. States only what it was told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData, try_to_load_from_cache

from .cache.fingerprint import Fingerprint
from .cache.format import CacheIndex, part_name
from .codecs import DTYPES
from .wording import codec_words, fidelity_words, size_words

__all__ = ["Origin", "cache_card", "origin_of_dataset", "origin_of_model"]

#: What the Hub's metadata takes for the id of a repository, and for the identifier of a licence.
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Where ``datasets`` keeps what it made of files of the Hub: owner, name, configuration, version and commit.
_DOWNLOADED = re.compile(r"/([\w.-]+?)___([\w.-]+)/[^/]+/[\d.]+/([0-9a-f]{40})/[^/]+$")
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Origin:
    """What a cache was made of, as far as it is known. What is not known is not written.

    Attributes:
        dataset_name: Source data set: its id on the Hub, or words.
        dataset_revision: Its commit.
        license: Its licence, an identifier as the Hub knows them or words.
        model_id: The model whose prefix was run: its id on the Hub, or words.
        model_revision: Its commit.
        label_names: Names of the classes, by number.
    """

    dataset_name: str | None = None
    dataset_revision: str | None = None
    license: str | None = None
    model_id: str | None = None
    model_revision: str | None = None
    label_names: tuple[str, ...] | None = None


def origin_of_dataset(dataset: Any) -> dict[str, Any]:
    """Return what a ``datasets.Dataset`` says of itself: Hub id and commit, licence, names of its classes.

    A name is taken only where the data came from the Hub: a local folder is nobody else's business.
    """
    found: dict[str, Any] = {}
    if not isinstance(dataset, datasets.Dataset):
        return found
    for url in dataset.info.download_checksums or {}:
        match = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", str(url))
        if match is not None:
            found |= {"dataset_name": match[1], "dataset_revision": match[2]}
            break
    for file in dataset.cache_files if not found else []:  # by default no checksums are kept, but the folder tells
        match = _DOWNLOADED.search(Path(file["filename"]).as_posix())
        if match is not None:
            found |= {"dataset_name": f"{match[1]}/{match[2]}", "dataset_revision": match[3]}
            break
    if isinstance(dataset.info.license, str) and dataset.info.license.strip():
        found["license"] = dataset.info.license.strip()
    for name in ("labels", "label"):
        feature = dataset.features.get(name)
        if isinstance(feature, datasets.ClassLabel):
            found["label_names"] = tuple(feature.names)
            break
    return found


def origin_of_model(model: Any) -> dict[str, Any]:
    """Return Hub id and commit of a model, as far as this machine's cache of the Hub tells them.

    Nothing of a model that was loaded from a folder; no commit where several have been fetched.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name or Path(name).exists() or not _REPO_ID.fullmatch(name):
        return {}
    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        return {}
    # Configurations of transformers 5 do not hold the commit that they came from.
    commits = [path.name for path in Path(found).parents[1].iterdir()]
    return {"model_id": name, **({"model_revision": commits[0]} if len(commits) == 1 else {})}


def _config_name(view: int) -> str:
    return f"view-{view:02d}"


def _features(directory: Path, index: CacheIndex, origin: Origin) -> datasets.Features:
    """Return the columns of the index, with the names of the classes where they fit."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(directory / part_name(0, 0)))
    names = origin.label_names
    if names and isinstance(features.get("labels"), datasets.Value) and features["labels"].dtype == "int64":
        columns = [
            pq.read_table(directory / part_name(view, shard), columns=["labels"])["labels"].to_numpy()
            for view in range(index.num_views)
            for shard in range(index.num_shards)
        ]
        if all(column.min() >= 0 and column.max() < len(names) for column in columns):
            features["labels"] = datasets.ClassLabel(names=list(names))
    return features


def _metadata(directory: Path, index: CacheIndex, origin: Origin) -> DatasetCardData:
    size = next((name for bound, name in _SIZES if index.num_samples < bound), "n>1M")
    data = DatasetCardData(
        tags=["hf-freezecache", "hidden-states", "vision-transformer"],
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
    if origin.dataset_name and _REPO_ID.fullmatch(origin.dataset_name):
        data["source_datasets"] = [origin.dataset_name]
    if origin.license:
        data["license"] = origin.license if _LICENSE_ID.fullmatch(origin.license) else "other"
    features = _features(directory, index, origin)
    infos = {
        _config_name(view): datasets.DatasetInfo(features=features, config_name=_config_name(view))
        for view in range(index.num_views)
    }
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return data


def _named(name: str, revision: str | None) -> str:
    return f"{name} at revision `{revision}`" if revision else name


def _table(rows: dict[str, str]) -> str:
    # A bar would begin a new cell.
    lines = [f"| {name} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _facts(index: CacheIndex, origin: Origin) -> dict[str, str]:
    rows: dict[str, str] = {}
    if origin.dataset_name:
        rows["source data set"] = _named(origin.dataset_name, origin.dataset_revision)
    if origin.license:
        rows["licence of the source"] = origin.license
    if origin.model_id:
        rows["model"] = _named(origin.model_id, origin.model_revision)
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
        "fidelity": fidelity_words(index.calibration) if index.calibration else "exact",
    }
    if index.codec["name"] != "lossless" and not index.calibration:
        rows["fidelity"] = "not measured"
    if index.copies is not None and index.copies_calibration is not None:
        rows["codec of further views"] = codec_words(index.copies["configuration"].get("codec", index.copies))
        if "fidelity" in index.copies_calibration:
            rows["fidelity of further views"] = fidelity_words(index.copies_calibration)
    total = index.total_bytes
    rows["size"] = (
        f"{size_words(total)} ({total:,} bytes) in {index.num_shards * index.num_views} shards; "
        f"{size_words(total / index.num_samples / index.num_views)} per image and view, "
        f"{index.bits_per_element:.2f} bits per element"
    )
    return rows


def cache_card(directory: Path, index: CacheIndex, repo_id: str, origin: Origin | None = None) -> str:
    """Render the card of a cache: metadata that the Hub reads, and text.

    Args:
        directory: The cache, for the columns of its index.
        index: Its index.
        repo_id: Where it is pushed to.
        origin: What it was made of, as far as that is known.
    """
    origin = origin or Origin()
    imports, load = (
        "TrainingArguments",
        f"# model: the one whose first {index.split_point} blocks were cached, with a head of yours",
    )
    if origin.model_id and _REPO_ID.fullmatch(origin.model_id):
        revision = f', revision="{origin.model_revision}"' if origin.model_revision else ""
        imports = "AutoModelForImageClassification, TrainingArguments"
        load = f'model = AutoModelForImageClassification.from_pretrained("{origin.model_id}"{revision})'
    parts = {f"`{name}`": f"`{value}`" for name, value in sorted(index.fingerprint.items())}
    terms = (
        "The terms of the source data set go on to apply to what is computed from it. " if origin.dataset_name else ""
    )
    return f"""---
{_metadata(directory, index, origin).to_yaml()}
---

# Hidden states after {index.split_point} blocks, {index.num_samples:,} images

The output of the first {index.split_point} frozen blocks of a vision transformer for each image of a data set, cached by
`hf-freezecache`. Whoever trains the blocks behind them needs neither the images nor the time that the frozen blocks take.

> [!WARNING]
> **Hidden states can reveal the images they were computed from**: much of an image can be reconstructed from the output of
> early blocks, and its content recognised from later ones. Treat this repository as you would treat the images.{terms}

{_table(_facts(index, origin))}

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
