"""Fetches caches from the Hub, whole or in part, and checks every file that came."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from ..cache.index import (
    INDEX_NAME,
    PROVENANCE_NAME,
    CacheIndex,
    Selection,
    load_index,
)
from ..cache.transfer import (
    check_free_space,
    check_vacant,
    file_problem,
    put_in_place,
    scratch_of,
)
from ..errors import (
    CacheCorruptError,
    CacheWriteError,
    FreezeCacheError,
)
from .client import (
    KIND,
    cause_of,
    hub_api,
    hub_errors,
    progress_bars,
    wants_progress,
)
from .provenance import MAX_BYTES

__all__ = ["PullReport", "fetch_cache", "pull_cache"]

logger = logging.getLogger(__name__)


@dataclass
class PullReport:
    """What a pull did.

    Attributes:
        repo_id: The data set on the Hub.
        revision: Commit that was fetched.
        directory: Where the cache lies now.
        files: Files checked against their hashes, ``index.json`` included.
        kept_files: Those of them that were there already.
        total_bytes: Their bytes.
    """

    repo_id: str
    revision: str
    directory: Path
    files: int = 0
    kept_files: int = 0
    total_bytes: int = 0


def _fetch_index(
    repo_id: str, revision: str | None, token: str | bool | None, selection: Selection
) -> tuple[str, CacheIndex, list[str], list[str]]:
    """Return commit, index, names of the files of a cache on the Hub and of what lies beside them for a card.

    Its listing agrees with the index.
    """
    api = hub_api(token)
    sha = str(api.repo_info(repo_id, repo_type=KIND, revision=revision).sha)
    settings: dict[str, Any] = {"repo_type": KIND, "token": token}
    try:
        # By name, so that the local cache knows what that name meant when it is asked offline.
        path = Path(hf_hub_download(repo_id, INDEX_NAME, revision=revision, **settings))
        if path.parent.name != sha:  # a commit came between
            path = Path(hf_hub_download(repo_id, INDEX_NAME, revision=sha, **settings))
    except EntryNotFoundError:
        raise CacheCorruptError(
            f"{repo_id} holds no finished cache: it has no {INDEX_NAME} at revision {sha}. If a push was interrupted, the same "
            "push finishes it."
        ) from None
    try:
        index = load_index(path.parent)
    except CacheCorruptError as error:
        _discard(path)
        raise CacheCorruptError(f"{repo_id} at revision {sha} is refused: {error}") from error
    names = selection.files(index)
    listed = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, repo_type=KIND, recursive=True, revision=sha)
        if isinstance(entry, RepoFile)
    }
    for name in names:  # before anything large is fetched
        entry, record = listed.get(name), index.files[name]
        if entry is None:
            raise CacheCorruptError(f"{repo_id} at revision {sha} is refused: {name} is missing from it.")
        if entry.size != record.bytes or (entry.lfs is not None and entry.lfs.sha256 != record.sha256):
            raise CacheCorruptError(
                f"{repo_id} at revision {sha} is refused: {name} is altered; it has {entry.size} bytes and SHA-256 "
                f"{entry.lfs.sha256 if entry.lfs is not None else 'unknown'}, {INDEX_NAME} says {record.bytes} and {record.sha256}."
            )
    beside = [PROVENANCE_NAME] if PROVENANCE_NAME in listed and listed[PROVENANCE_NAME].size <= MAX_BYTES else []
    return sha, index, names, beside


def _discard(path: Path) -> None:
    """Remove a file that proved wrong from the local download cache, so that the next try fetches it anew."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _check_fetched(folder: Path, index: CacheIndex, names: list[str], repo_id: str, show: bool) -> None:
    for name in tqdm(names, desc="Checking", unit="file", disable=not show):
        problem = file_problem(folder / name, index.files[name])
        if problem is not None:
            _discard(folder / name)
            raise CacheCorruptError(
                f"{repo_id} is refused: {name} is altered: {problem}. The file was discarded; fetch again, and if it is refused "
                "again, it is altered on the Hub."
            )


def fetch_cache(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    selection: Selection | None = None,
    show_progress: bool | None = None,
) -> Path:
    """Fetch a cache, or a part of it, into the local download cache of the Hub, and check every file.

    Everything comes from one commit. Offline, what was fetched before is used.

    Args:
        repo_id: ``user/name``.
        revision: Branch, tag or commit; default ``main``.
        token: Token for the Hub; default the one of ``hf auth login``.
        selection: Views and shards to fetch; default all.
        show_progress: Show progress bars; default as ``huggingface_hub``'s own.

    Returns:
        The folder with ``index.json``.

    Raises:
        CacheCorruptError: The repository holds no finished cache, or a file is altered; the message names it.
        HubError: The Hub could not be reached, has no such repository or revision, or refused.
        IndexError: The cache has no such view or shard.
    """
    selection, show = selection or Selection(), wants_progress(show_progress)
    with hub_errors(f"Fetching {repo_id}", repo_id, revision), progress_bars(show):
        try:
            sha, index, names, beside = _fetch_index(repo_id, revision, token, selection)
        except OfflineModeIsEnabled:
            found = hf_hub_download(repo_id, INDEX_NAME, repo_type=KIND, revision=revision, local_files_only=True)
            folder = Path(found).parent
            index = load_index(folder)
            names = selection.files(index)
        else:
            folder = Path(
                snapshot_download(
                    repo_id,
                    repo_type=KIND,
                    revision=sha,
                    token=token,
                    allow_patterns=[*names, *beside, INDEX_NAME],
                )
            )
        _check_fetched(folder, index, names, repo_id, show)
    return folder


def pull_cache(
    repo_id: str,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    views: Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    show_progress: bool | None = None,
) -> PullReport:
    """Pull a cache, or a part of it, into a folder, which appears, or becomes a cache, once every file is checked.

    An interrupted pull goes on where it stopped: until it is complete the files lie in a hidden folder beside, or in the
    folder if that is there. Of a cache that is there, files are fetched that are missing or damaged.

    Args:
        repo_id: ``user/name``.
        directory: A new or empty folder, or one that holds this cache already.
        revision: Branch, tag or commit; default ``main``.
        token: Token for the Hub; default the one of ``hf auth login``.
        views: Views to fetch; default all.
        shards: Shards to fetch, the same of each view; default all.
        show_progress: Show progress bars; default as ``huggingface_hub``'s own.

    Raises:
        CacheCorruptError: The repository holds no finished cache, or a file is altered; the message names it.
        CacheWriteError: The folder is not empty and does not hold this cache, or cannot be written, or the disk is full.
        HubError: The Hub could not be reached, has no such repository or revision, or refused.
        IndexError: The cache has no such view or shard.
    """
    selection = Selection.of(views, shards)
    place = Path(directory).resolve()  # a path that leads back from a folder that is not there yet leads somewhere else
    scratch = scratch_of(place, "freezecache-pull")
    show = wants_progress(show_progress)
    with hub_errors(f"Pulling {repo_id}", repo_id, revision), progress_bars(show):
        sha, index, names, beside = _fetch_index(repo_id, revision, token, selection)
        report = PullReport(repo_id, sha, Path(directory), len(names) + 1)
        lacking = [*names, INDEX_NAME]
        if _holds(place, index):
            lacking = _problems(place, index, names, show)
            report.kept_files = report.files - len(lacking)
            if (place / PROVENANCE_NAME).exists():
                beside = []  # what built the cache knew best
        elif not (scratch.is_dir() and scratch.parent == place) or any(
            (place / name).exists() for name in (INDEX_NAME, PROVENANCE_NAME)
        ):
            check_vacant(place)
        # Else a pull into it was interrupted.
        if lacking or beside:
            try:
                _fetch_into(scratch, repo_id, sha, token, index, [*lacking, *beside], show)
                put_in_place(scratch, place)
            except OSError as error:
                if not lacking:
                    logger.debug("%s was not fetched into %s: %s", PROVENANCE_NAME, directory, error)
                    return _counted(report, place, names)
                known = (FreezeCacheError, LocalEntryNotFoundError, OfflineModeIsEnabled)
                if isinstance(error, known) or cause_of(error) is not None:
                    raise
                raise CacheWriteError(
                    f"{directory} could not be written: {error}. What was fetched is kept; the same call goes on from there."
                ) from error
    return _counted(report, place, names)


def _counted(report: PullReport, folder: Path, names: list[str]) -> PullReport:
    report.total_bytes = sum((folder / name).stat().st_size for name in [*names, INDEX_NAME])
    return report


def _problems(folder: Path, index: CacheIndex, names: list[str], show: bool) -> list[str]:
    bar = tqdm(names, desc="Checking", unit="file", disable=not show)
    return [name for name in bar if file_problem(folder / name, index.files[name]) is not None]


def _fetch_into(
    scratch: Path,
    repo_id: str,
    revision: str,
    token: str | bool | None,
    index: CacheIndex,
    names: list[str],
    show: bool,
) -> None:
    """Fetch files of a cache, and what lies beside them, into a folder that then holds these alone, checked."""
    scratch.mkdir(parents=True, exist_ok=True)
    files = [name for name in names if name in index.files]
    there = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    check_free_space(scratch, sum(index.files[name].bytes for name in files) - there)
    snapshot_download(repo_id, repo_type=KIND, revision=revision, token=token, allow_patterns=names, local_dir=scratch)
    _check_fetched(scratch, index, files, repo_id, show)
    shutil.rmtree(scratch / ".cache", ignore_errors=True)
    for path in [path for path in scratch.rglob("*") if path.is_file()]:
        if path.relative_to(scratch).as_posix() not in names:
            path.unlink()
    if INDEX_NAME in names and load_index(scratch) != index:
        raise CacheCorruptError(f"{repo_id} is refused: {INDEX_NAME} is altered.")


def _holds(directory: Path, index: CacheIndex) -> bool:
    try:
        return dataclasses.asdict(load_index(directory)) == dataclasses.asdict(index)
    except (FreezeCacheError, OSError):
        return False
