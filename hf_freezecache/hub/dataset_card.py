"""The card of a cached data set: what it holds, where it comes from, what it may reveal. It states only what is known."""

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
from ..data.task import IMAGE_CLASSIFICATION
from ..errors import UnsupportedSetupError
from ..report.page import fill_template
from ..report.text import (
    codec_words,
    distortion_words,
)
from .provenance import (
    Provenance,
    is_hub_id,
)

__all__ = ["ExistingCard", "cache_card", "license_id", "read_card", "unfinished_card"]

_TEMPLATES = Path(__file__).parent / "templates"
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
class ExistingCard:
    """A card that is in a repository already.

    Attributes:
        fingerprint: That of the cache that it is of, 64 hexadecimal digits; ``None`` if it is none of ours.
        extra_metadata: Metadata beside those that our cards state themselves: licence, gates, languages, tags.
        text: What stands below the metadata; all of it, if those cannot be read.
    """

    fingerprint: str | None = None
    extra_metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def read_card(path: Path) -> ExistingCard:
    """Read a card that anybody may have written."""
    content = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        metadata = metadata_load(path) or {}
    except (ValueError, YAMLError, RecursionError):
        return ExistingCard(text=content.strip())
    text = _METADATA.sub("", content, count=1).strip() if metadata else content.strip()
    tags = metadata.get("tags")
    tags = tags if isinstance(tags, list) else []
    named = _FINGERPRINT.search(text) if _TAGS[0] in tags else None
    extra_metadata = {
        name: value
        for name, value in metadata.items()
        if value is not None and isinstance(name, str) and name not in _OURS and name not in _UNUSABLE
    }
    extra_metadata["tags"] = [tag for tag in tags if tag not in _TAGS]
    return ExistingCard(named and named[1], extra_metadata, text)


def license_id(license: str | None) -> str | None:
    """Return what metadata say of a licence: its identifier, or that it is another."""
    return license if license is None or _LICENSE_ID.fullmatch(license) else "other"


def _metadata(
    directory: Path, index: CacheIndex, provenance: Provenance, extra_metadata: Mapping[str, Any] | None
) -> DatasetCardData:
    extra_metadata = extra_metadata or {}
    size = next((name for bound, name in _SIZES if index.num_samples < bound), "n>1M")
    data = DatasetCardData(
        tags=[*_TAGS, *extra_metadata.get("tags", ())],
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
        data["task_categories"] = [IMAGE_CLASSIFICATION.tag]
    if provenance.dataset_name and is_hub_id(provenance.dataset_name):
        data["source_datasets"] = [provenance.dataset_name]
    if provenance.license:
        data["license"] = license_id(provenance.license)
    stays = data.get("license") in (None, extra_metadata.get("license"))
    for name, value in extra_metadata.items():
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


def _cell(text: str) -> str:
    """Return text for a cell of a table: a bar would begin a new cell, a line break a new row."""
    return " ".join(text.split()).replace("|", "\\|")


def _named(name: str, revision: str | None) -> str:
    """Return a name and its revision for a cell of a table."""
    return _cell(_escaped(name) + (f" at revision `{revision.replace('`', '')}`" if revision else ""))


def unfinished_card(
    directory: Path,
    index: CacheIndex,
    provenance: Provenance | None = None,
    extra_metadata: Mapping[str, Any] | None = None,
) -> str:
    """Render what stands in place of the card while a cache is pushed: that it is unfinished, and of which cache.

    It names no data files.

    Args:
        directory: As for ``cache_card``.
        index: As for ``cache_card``.
        provenance: As for ``cache_card``: what the Hub refuses of it, it refuses before anything large is sent.
        extra_metadata: As for ``cache_card``.
    """
    metadata = _metadata(directory, index, provenance or Provenance(), extra_metadata)
    metadata.pop("dataset_info", None)
    # No such files exist. Without this line the Hub would take all files of all views for rows.
    metadata["configs"] = [
        {"config_name": "unfinished", "data_files": [{"split": "train", "path": "unfinished/*.parquet"}]}
    ]
    return fill_template(
        _TEMPLATES / "unfinished_card.md",
        metadata=metadata.to_yaml(),
        fingerprint=Fingerprint(index.fingerprint).digest,
    )


def cache_card(
    directory: Path,
    index: CacheIndex,
    repo_id: str,
    provenance: Provenance | None = None,
    extra_metadata: Mapping[str, Any] | None = None,
) -> str:
    """Render the card of a cache: metadata that the Hub reads, and text.

    Args:
        directory: The cache, for the columns of its index.
        index: Its index.
        repo_id: Where it is pushed to.
        provenance: What the cache was made of, as far as that is known.
        extra_metadata: Further metadata, as ``read_card`` returns them. Those that the card states itself stand in their
            place.
    """
    provenance = provenance or Provenance()
    revision = provenance.model_revision or ""
    copies = (index.copies or {}).get("configuration", {}).get("codec", index.copies)
    return fill_template(
        _TEMPLATES / "dataset_card.md",
        metadata=_metadata(directory, index, provenance, extra_metadata).to_yaml(),
        index=index,
        repo_id=repo_id,
        provenance=provenance,
        fingerprint=Fingerprint(index.fingerprint),
        model_on_hub=bool(provenance.model_id and is_hub_id(provenance.model_id)),
        # Words of others go into code only if they are no code.
        revision_in_code=revision if re.fullmatch(r"[\w./-]+", revision) else "",
        dtype=str(DTYPES[index.dtype]).removeprefix("torch."),
        codec=_cell(codec_words(index.codec)),
        distortion=_distortion(index.calibration, _is_lossless(index.codec)),
        copies_codec=_cell(codec_words(copies)) if copies and index.copies_calibration else None,
        copies_distortion=_distortion(index.copies_calibration, False),
        escaped=lambda text: _cell(_escaped(text)),
        named=_named,
    )


def _is_lossless(codec: Mapping[str, Any]) -> bool:
    try:
        return codec_from_dict(codec).lossless
    except UnsupportedSetupError:  # it was fitted, and its tensors are not in the index
        return False


def _distortion(calibration: Mapping[str, Any] | None, lossless: bool) -> str:
    if calibration and "distortion" in calibration:
        return _cell(distortion_words(dict(calibration)))
    return "exact" if lossless else "not measured"
