"""What a cache was made of, in words for its card: a small file beside the cache, on which nothing depends."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache.format import ORIGIN_NAME, atomic_write

__all__ = ["Origin", "is_hub_id", "keep_origin", "origin_json", "origin_of_dataset", "origin_of_model", "read_origin"]

logger = logging.getLogger(__name__)

#: What the Hub's metadata takes for the id of a repository.
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Where ``datasets`` keeps what it made of files of the Hub: owner, name, configuration, version and commit.
_DOWNLOADED = re.compile(r"/([\w.-]+?)___([\w.-]+)/[^/]+/[\d.]+/([0-9a-f]{40})/[^/]+$")
#: A larger file is none of ours: the names of 21,843 classes take 1 MB.
_MAX_BYTES = 2**24


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

    @classmethod
    def among(cls, settings: Mapping[str, Any]) -> Origin:
        """Return what settings, of which others may be about something else, say of an origin."""
        names = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in settings.items() if name in names and value is not None}
        if "label_names" in found:
            found["label_names"] = tuple(found["label_names"])
        return cls(**found)

    def parts(self) -> dict[str, Any]:
        """Return what is known, as JSON holds it."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return known if self.label_names is None else {**known, "label_names": list(self.label_names)}

    def words(self) -> str:
        """Return it in a line; empty if nothing but names of classes is known."""
        source = [self.dataset_name or ("images" if self.license else "")]
        source += [f"at revision {self.dataset_revision}"] if self.dataset_revision else []
        source += [f"({self.license})"] if self.license else []
        model = [f"model {self.model_id}"] if self.model_id else []
        model += [f"at revision {self.model_revision}"] if model and self.model_revision else []
        return ", ".join(filter(None, (" ".join(filter(None, source)), " ".join(model))))

    def updated(self, given: Origin) -> Origin:
        """Return this with what is given in place of what was known; nothing is kept of another data set or model."""
        known, new = dataclasses.asdict(self), dataclasses.asdict(given)
        for name, others in (("dataset_name", ("dataset_revision", "license")), ("model_id", ("model_revision",))):
            if new[name] not in (None, known[name]):
                known |= dict.fromkeys(others)
        return Origin(**{**known, **{name: value for name, value in new.items() if value is not None}})


def is_hub_id(name: str) -> bool:
    """Say whether a name has the form of a repository's on the Hub: ``user/name``."""
    return _REPO_ID.fullmatch(name) is not None


# ---- Where it is known from ----


def origin_of_dataset(dataset: Any) -> dict[str, Any]:
    """Return what a ``datasets.Dataset`` says of itself: Hub id and commit, licence, names of its classes.

    A name is taken only where all the data came from the Hub: a local folder is nobody else's business. Of data sets that
    were concatenated all names are, and no licence, since each has its own.
    """
    import datasets  # takes longer to load than all that reading needs

    found: dict[str, Any] = {}
    if not isinstance(dataset, datasets.Dataset):
        return found
    sources: list[tuple[str, str] | None] = []
    for url in dataset.info.download_checksums or {}:
        match = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", str(url))
        sources.append(None if match is None else (match[1], match[2]))
    for file in dataset.cache_files if not sources else []:  # by default no checksums are kept, but the folder tells
        match = _DOWNLOADED.search(Path(file["filename"]).as_posix())
        sources.append(None if match is None else (f"{match[1]}/{match[2]}", match[3]))
    known = sorted({source for source in sources if source is not None})
    if None not in sources:
        if len(known) == 1:
            found["dataset_name"], found["dataset_revision"] = known[0]
        elif known:
            found["dataset_name"] = ", ".join(f"{name} at revision {revision}" for name, revision in known)
    license = dataset.info.license
    if isinstance(license, str) and license.strip() and len(set(sources)) <= 1:
        found["license"] = license.strip()
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
    from huggingface_hub import try_to_load_from_cache

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name or Path(name).exists() or not is_hub_id(name):
        return {}
    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        return {}
    # Configurations of transformers 5 do not hold the commit that they came from.
    commits = [path.name for path in Path(found).parents[1].iterdir()]
    return {"model_id": name, **({"model_revision": commits[0]} if len(commits) == 1 else {})}


# ---- The file ----


def origin_json(origin: Origin) -> bytes:
    """Return the content of the file."""
    return (json.dumps(origin.parts(), indent=1, ensure_ascii=False) + "\n").encode()


def keep_origin(directory: Path, origin: Origin) -> bool:
    """Write down what a cache was made of, unless it is there already: what built the cache knew best.

    Returns:
        Whether it is there now. A folder that cannot be written is no error: only the card will say less.
    """
    path = directory / ORIGIN_NAME
    if path.is_file():
        return True
    try:
        with atomic_write(path) as file:
            file.write(origin_json(origin))
    except OSError as error:
        logger.debug("%s could not be written: %s", path, error)
        return False
    return True


def read_origin(directory: Path) -> Origin:
    """Return what is written down of a cache; nothing, with a warning, if that cannot be understood."""
    path = directory / ORIGIN_NAME
    if not path.is_file():
        return Origin()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {_MAX_BYTES:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("label_names", []), list):
            raise ValueError("it is not of the form that is written here")
        origin = Origin.among(found)
        texts = {**vars(origin), "label_names": None}.values()
        if not all(isinstance(text, str) for text in [*filter(None, texts), *(origin.label_names or ())]):
            raise ValueError("it holds something other than text")
        return origin
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is passed over: %s. Delete it, or say on pushing what it should hold.", path, error)
        return Origin()
