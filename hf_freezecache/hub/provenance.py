"""Provenance of a cache: the data set and the model that it was made of. Its card needs it; nothing else depends on it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.index import (
    PROVENANCE_NAME,
    CacheIndex,
    atomic_write,
)
from ..model.hashing import hash_prefix
from ..model.split import split_model
from .client import quiet_libraries

__all__ = [
    "MAX_BYTES",
    "Provenance",
    "is_hub_id",
    "keep_provenance",
    "provenance_json",
    "provenance_of_dataset",
    "provenance_of_model",
    "read_provenance",
]

logger = logging.getLogger(__name__)

#: What the Hub's metadata takes for the id of a repository.
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Where ``datasets`` keeps what it made of files of the Hub: owner, name, configuration, version and commit.
_DOWNLOADED = re.compile(r"/([\w.-]+?)___([\w.-]+)/[^/]+/[\d.]+/([0-9a-f]{40})/[^/]+$")
#: A larger file is none of ours: the names of 21,843 classes take 1 MB.
MAX_BYTES = 2**24


def _line(text: Any) -> str:
    """Return text, or what stands in its place, as one line that any file and any terminal takes: no control characters, no halves of characters."""
    kinds = {"Cc": " ", "Cs": "\N{REPLACEMENT CHARACTER}"}
    return " ".join("".join(kinds.get(unicodedata.category(character), character) for character in str(text)).split())


@dataclass(frozen=True)
class Provenance:
    """What a cache was made of, as far as it is known. What is not known, or is blank, is not written.

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

    def __post_init__(self) -> None:
        """Make one clean line of each text: whatever it came from, it ends on cards and in terminals."""
        for name, value in vars(self).items():
            if value is not None:
                clean = tuple(map(_line, value)) if isinstance(value, (list, tuple)) else _line(value) or None
                object.__setattr__(self, name, clean)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Provenance:
        """Return the provenance that a mapping holds. Its other keys are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in settings.items() if name in names and value is not None}
        if "label_names" in values:
            values["label_names"] = tuple(values["label_names"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, as plain JSON."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return known if self.label_names is None else {**known, "label_names": list(self.label_names)}

    def words(self) -> str:
        """Return the provenance as one line. It is empty if nothing but names of classes is known."""
        source = [self.dataset_name or ("images" if self.license else "")]
        source += [f"at revision {self.dataset_revision}"] if self.dataset_revision else []
        source += [f"({self.license})"] if self.license else []
        model = [f"model {self.model_id}"] if self.model_id else []
        model += [f"at revision {self.model_revision}"] if model and self.model_revision else []
        return ", ".join(filter(None, (" ".join(filter(None, source)), " ".join(model))))

    def updated(self, newer: Provenance) -> Provenance:
        """Return this provenance with the values of a newer one. Nothing is kept of another data set or model."""
        known, new = dataclasses.asdict(self), dataclasses.asdict(newer)
        for name, others in (("dataset_name", ("dataset_revision", "license")), ("model_id", ("model_revision",))):
            if new[name] not in (None, known[name]):
                known |= dict.fromkeys(others)
        return Provenance(**{**known, **{name: value for name, value in new.items() if value is not None}})


def is_hub_id(name: str) -> bool:
    """Say whether a name has the form of a repository's on the Hub: ``user/name``."""
    return _REPO_ID.fullmatch(name) is not None


# ---- Where it is known from ----


def provenance_of_dataset(dataset: Any) -> dict[str, Any]:
    """Return what a ``datasets.Dataset`` says of itself: Hub id and commit, licence, names of its classes.

    A name is taken only where all the data came from the Hub: a local folder is nobody else's business, nor what was added
    in memory. Of data sets that were concatenated all names are, and no licence, since each has its own.
    """
    import datasets  # takes longer to load than all that reading needs

    found: dict[str, Any] = {}
    if not isinstance(dataset, datasets.Dataset):
        return found
    # What was merged of several data sets belongs to no builder; a map puts its result beside the first of them.
    whole = dataset.info.builder_name is not None
    concatenated = getattr(dataset.data, "blocks", None)
    blocks = [dataset.data] if concatenated is None else [block for row in concatenated for block in row]
    sources: set[tuple[str, str] | None] = set()
    for block in blocks:
        path = Path(getattr(block, "path", ""))  # what is in memory has none
        match = _DOWNLOADED.search(path.as_posix()) if whole or not path.name.startswith("cache-") else None
        sources.add(None if match is None else (f"{match[1]}/{match[2]}", match[3]))
    if None not in sources:
        known = sorted(filter(None, sources))
        if len(known) == 1:
            found["dataset_name"], found["dataset_revision"] = known[0]
        else:
            found["dataset_name"] = ", ".join(f"{name} at revision {revision}" for name, revision in known)
    license = str(dataset.info.license or "").strip()
    # Merged ones are put together with an empty line between them, and say nothing of data that had none.
    if license and len(sources) == 1 and (whole or (concatenated is None and "\n\n" not in license)):
        found["license"] = license
    for name in ("labels", "label"):
        feature = dataset.features.get(name)
        if isinstance(feature, datasets.ClassLabel):
            found["label_names"] = tuple(feature.names)
            break
    return found


def provenance_of_model(model: Any, index: CacheIndex) -> dict[str, Any]:
    """Return Hub id and commit of the model that a cache was computed with, if it can be shown to be that of the Hub.

    A model keeps the name that it was loaded by, however it was trained since. So what this machine's download cache of the
    Hub holds under that name is loaded once more, and the weights of its prefix compared with those of the cache.

    Args:
        model: The model.
        index: Index of the cache.

    Returns:
        Nothing of a model that was loaded from a folder, or whose prefix was changed since.
    """
    from huggingface_hub import constants

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not is_hub_id(name) or Path(name).exists():
        return {}
    fetched = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    # Configurations of transformers 5 do not hold the commit that they came from. That of main first: it mostly is.
    main = (fetched / "refs" / "main").read_text().strip() if (fetched / "refs" / "main").is_file() else ""
    snapshots = fetched / "snapshots"
    for folder in sorted(snapshots.glob("*/"), key=lambda folder: (folder.name != main, folder.name)):
        if _prefix_of(folder, model, index.split_point) == index.fingerprint.get("prefix weights", ""):
            return {"model_id": name, "model_revision": folder.name}
    return {}


def _prefix_of(folder: Path, like: Any, split_point: int) -> str | None:
    """Return the hash of the weights of the prefix of a stored model, which is of a model's kind; ``None`` if it is not."""
    import torch

    try:
        # The head may be another, and is drawn anew: training goes on with the numbers it would have drawn without this.
        with quiet_libraries(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = type(like).from_pretrained(
                folder, dtype=like.dtype, local_files_only=True, ignore_mismatched_sizes=True
            )
        return hash_prefix(split_model(model, split_point))
    except Exception as error:  # whatever a model's own code raises: this is for words on a card
        logger.debug("%s could not be loaded: %s", folder, error)
        return None


# ---- The file ----


def provenance_json(provenance: Provenance) -> bytes:
    """Return the content of the file."""
    return (json.dumps(provenance.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()


def keep_provenance(directory: Path, find: Callable[[], Provenance]) -> bool:
    """Write the provenance of a cache, unless its file exists already: what built the cache knew best.

    Args:
        directory: The cache.
        find: Returns the provenance; called only if it is to be written.

    Returns:
        Whether the file exists now. A folder that cannot be written is no error: only the card will say less.
    """
    path = directory / PROVENANCE_NAME
    if path.is_file():
        return True
    try:
        with atomic_write(path) as file:
            file.write(provenance_json(find()))
    except OSError as error:
        logger.debug("%s could not be written: %s", path, error)
        return False
    return True


def read_provenance(directory: Path) -> Provenance:
    """Read the provenance of a cache. It is empty, with a warning, if the file cannot be understood."""
    path = directory / PROVENANCE_NAME
    if not path.is_file():
        return Provenance()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("label_names", []), list):
            raise ValueError("it is not of the form that is written here")
        names = {field.name for field in dataclasses.fields(Provenance)} - {"label_names"}
        texts = [value for name, value in values.items() if name in names and value is not None]
        if not all(isinstance(text, str) for text in [*texts, *values.get("label_names", [])]):
            raise ValueError("it holds something other than text")
        return Provenance.from_dict(values)
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is passed over: %s. Delete it, or say on pushing what it should hold.", path, error)
        return Provenance()
