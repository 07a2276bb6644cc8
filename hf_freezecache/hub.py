"""Caches on the Hub, as data sets: push, resume, pull, and check every file that came. The only module that knows the Hub."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tqdm.auto import tqdm

from .cache.fingerprint import Fingerprint
from .cache.format import FILE_NAME, INDEX_NAME, CacheIndex, load_index
from .cache.reader import verify_cache
from .cache.selection import Selection
from .cache.transfer import check_free_space, check_vacant, file_problem, put_in_place
from .cards import Origin, cache_card
from .errors import CacheCorruptError, CacheMismatchError, FreezeCacheError, HubError, UnsupportedSetupError

__all__ = ["PullReport", "PushReport", "fetch_cache", "is_repo_id", "origin_given", "pull_cache", "push_cache"]

logger = logging.getLogger(__name__)

KIND = "dataset"
#: Files and bytes in one commit; what one upload call takes; the Hub's limits of a repository.
COMMIT_FILES, COMMIT_BYTES = 100, 10 * 2**30
GROUP_FILES, GROUP_BYTES = 8, 512 * 2**20
MAX_FILE_BYTES, MAX_FOLDER_FILES, MAX_FILES = 20 * 10**9, 10_000, 100_000
#: Base of the errors of whatever HTTP client huggingface_hub is built on.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]


@dataclass
class PushReport:
    """What a push did.

    Attributes:
        repo_id: The data set on the Hub.
        url: Its page.
        revision: Commit that holds the whole cache.
        private: Whether it is private.
        uploaded: Names of the files sent by this call.
        uploaded_bytes: Their bytes.
        kept_files: Files that were there already.
        commits: Commits made.
    """

    repo_id: str
    url: str
    revision: str = ""
    private: bool = True
    uploaded: list[str] = field(default_factory=list)
    uploaded_bytes: int = 0
    kept_files: int = 0
    commits: int = 0


@dataclass
class PullReport:
    """What a pull did.

    Attributes:
        repo_id: The data set on the Hub.
        revision: Commit that was fetched.
        directory: Where the cache lies now.
        files: Files checked against their hashes, ``index.json`` included.
        total_bytes: Their bytes.
    """

    repo_id: str
    revision: str
    directory: Path
    files: int = 0
    total_bytes: int = 0


def is_repo_id(name: str) -> bool:
    """Say whether a name could be that of a repository: ``user/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


# ---- Errors ----


def _cause(error: BaseException | None) -> BaseException | None:
    """Return the error of the HTTP client behind an error, if any."""
    while error is not None and not isinstance(error, (HfHubHTTPError, _HTTP_ERROR)):
        error = error.__cause__
    return error


def _refusal(error: BaseException, doing: str, repo_id: str, revision: str | None) -> FreezeCacheError | None:
    """Return what an error of the Hub means for a user; ``None`` for errors of another kind."""
    where = f"{repo_id} at {constants.ENDPOINT}"
    found = _cause(error)
    status = getattr(getattr(found, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return UnsupportedSetupError(f"{doing} failed: {error} Give a repository as user/name.")
    if isinstance(found, RevisionNotFoundError):
        return HubError(
            f"{doing} failed: {where} has no revision {revision!r}. Give a branch, tag or commit that exists."
        )
    if isinstance(found, RepositoryNotFoundError):
        return HubError(
            f"{doing} failed: there is no data set {where} that this token may see. Check the name; for a private one log in "
            "with hf auth login, or set HF_TOKEN."
        )
    if status == 401:
        return HubError(
            f"{doing} failed: {constants.ENDPOINT} did not accept the token. Log in again with hf auth login."
        )
    if status == 403:
        message = getattr(found, "server_message", None) or found
        return HubError(
            f"{doing} failed: {where} refused it: {message}. The token needs write access there, and the account room. What "
            "was uploaded is kept; the same call goes on from there."
        )
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return HubError(f"{doing} failed: the Hub cannot be asked, and {repo_id} is not in the local cache: {error}")
    if found is not None:
        return HubError(
            f"{doing} failed: {where}: {type(found).__name__}: {found}. What was transferred is kept; the same call goes on "
            "from there."
        )
    return None


@contextmanager
def _explained(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    try:
        yield
    except FreezeCacheError:
        raise
    except Exception as error:
        explained = _refusal(error, doing, repo_id, revision)
        if explained is None:
            raise
        raise explained from error


def _shown(show_progress: bool | None) -> bool:
    return not are_progress_bars_disabled() if show_progress is None else show_progress


@contextmanager
def _bars(show: bool) -> Iterator[None]:
    """Keep the Hub's own progress bars, or switch them off for a while."""
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="hf_freezecache")


def origin_given(**parts: Any) -> Origin | None:
    """Return what was said of the origin of a cache, or ``None`` if nothing was."""
    return Origin(**parts) if any(value is not None for value in parts.values()) else None


# ---- Push ----


def _check_limits(index: CacheIndex, directory: Path) -> None:
    largest = max(index.files, key=lambda name: index.files[name].bytes)
    advice = "Build it again with another shard_chunks (CacheConfig), or push it to a storage bucket."
    if index.files[largest].bytes >= MAX_FILE_BYTES:
        raise UnsupportedSetupError(
            f"{directory / largest} has {index.files[largest].bytes:,} bytes; the Hub takes files below {MAX_FILE_BYTES:,}. "
            + advice
        )
    if index.num_shards >= MAX_FOLDER_FILES or len(index.files) >= MAX_FILES:
        raise UnsupportedSetupError(
            f"{directory} has {len(index.files):,} files, {index.num_shards:,} in a folder; the Hub takes fewer than "
            f"{MAX_FILES:,} and {MAX_FOLDER_FILES:,}. " + advice
        )


def _make_repo(api: HfApi, repo_id: str, private: bool, revision: str | None) -> tuple[str, bool]:
    """Return full id and privacy of the repository, which is made if it is not there."""
    if "/" not in repo_id:  # asked for by itself, such a name may be that of somebody else's data set
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.repo_info(repo_id, repo_type=KIND)
    except RepositoryNotFoundError:
        url = api.create_repo(repo_id, repo_type=KIND, private=private, exist_ok=True)
        repo_id = url.repo_id
        info = api.repo_info(repo_id, repo_type=KIND)
    is_private = bool(info.private)
    if private and not is_private:
        raise HubError(
            f"{info.id} is there already and public, and hidden states can reveal the images they were computed from. Make it "
            "private, push to another name, or say that it may be public (private=False, --public)."
        )
    if revision is not None and revision != "main":
        api.create_branch(info.id, repo_type=KIND, branch=revision, exist_ok=True)
    return info.id, is_private


def _same(remote: Any, path: Path, sha256: str) -> bool:
    return (
        remote is not None
        and remote.size == path.stat().st_size
        and remote.lfs is not None
        and (remote.lfs.sha256 == sha256)
    )


def _uploads(names: Sequence[str], index: CacheIndex, files: int, num_bytes: int) -> Iterator[list[str]]:
    """Cut a list of files into runs of limited length and size."""
    run: list[str] = []
    size = 0
    for name in names:
        if run and (len(run) >= files or size + index.files[name].bytes > num_bytes):
            yield run
            run, size = [], 0
        run.append(name)
        size += index.files[name].bytes
    if run:
        yield run


def push_cache(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    origin: Origin | None = None,
    overwrite: bool = False,
    show_progress: bool | None = None,
) -> PushReport:
    """Push a cache to a data set on the Hub, or the rest of it.

    Every bit is checked first. Files that are there with the same hash are not sent again; shards are committed in batches,
    ``index.json`` and the card last, so an interrupted push is never taken for a cache, and the same call finishes it.

    Args:
        directory: The cache.
        repo_id: ``user/name``, or ``name`` in the namespace of the token.
        private: A repository that is made is private, and a public one is refused. ``False`` makes a public one.
        token: Token for the Hub; default the one of ``hf auth login``.
        revision: Branch, made from ``main`` if it is not there; default ``main``.
        origin: What the cache was made of, for the card.
        overwrite: Replace another cache that is in the repository.
        show_progress: Show a progress bar; default as ``huggingface_hub``'s own.

    Raises:
        CacheCorruptError: The cache is unfinished or damaged.
        CacheMismatchError: The repository holds another cache.
        HubError: The Hub could not be reached, or refused; what was uploaded is kept there.
        UnsupportedSetupError: The name is none, or the cache exceeds limits of the Hub.
    """
    directory = Path(directory)
    problems = verify_cache(directory)
    if problems:
        more = f" And {len(problems) - 1} more; see hf-freezecache verify." if len(problems) > 1 else ""
        raise CacheCorruptError(f"{directory} is not pushed: {problems[0]}{more}")
    index = load_index(directory)
    _check_limits(index, directory)
    api = _api(token)
    show = _shown(show_progress)
    with _explained(f"Pushing {directory}", repo_id, revision), _bars(False):
        repo_id, is_private = _make_repo(api, repo_id, private, revision)
        report = PushReport(repo_id, f"{api.endpoint}/datasets/{repo_id}", private=is_private)
        report.revision = str(api.repo_info(repo_id, repo_type=KIND, revision=revision).sha)
        remote = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, repo_type=KIND, recursive=True, revision=revision)
            if isinstance(entry, RepoFile)
        }
        stale = [name for name in remote if name not in index.files and FILE_NAME.fullmatch(name)]
        there = INDEX_NAME in remote and _holds_same(api, repo_id, revision, directory, overwrite, report, token)
        missing = [
            name
            for name, record in sorted(index.files.items())
            if not _same(remote.get(name), directory / name, record.sha256)
        ]
        report.kept_files = len(index.files) - len(missing)
        if missing and report.kept_files:
            logger.info("Going on with %s: %d of %d files are there.", repo_id, report.kept_files, len(index.files))
        _push_files(api, repo_id, revision, directory, index, missing, report, remote, show)
        if missing or stale or not there or origin is not None:
            last: list[Any] = [CommitOperationDelete(name) for name in stale]
            card = cache_card(directory, index, repo_id, origin).encode()
            last += [CommitOperationAdd("README.md", card), CommitOperationAdd(INDEX_NAME, directory / INDEX_NAME)]
            _commit(api, repo_id, revision, last, f"Index of {index.num_samples:,} samples", report)
        # Else a card that somebody has edited since stays.
    return report


def _holds_same(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    directory: Path,
    overwrite: bool,
    report: PushReport,
    token: str | bool | None,
) -> bool:
    """Say whether the index on the Hub is this one; refuse to replace another, or take it away before its shards change."""
    path = hf_hub_download(repo_id, INDEX_NAME, repo_type=KIND, revision=revision, token=token, force_download=True)
    if Path(path).read_bytes() == (directory / INDEX_NAME).read_bytes():
        return True
    if not overwrite:
        try:
            ours, theirs = (Fingerprint(load_index(folder).fingerprint) for folder in (directory, Path(path).parent))
            what = f"differs in: {', '.join(ours.difference(theirs)) or 'its files'}"
        except (FreezeCacheError, OSError) as error:
            what = f"cannot be read: {error}"
        raise CacheMismatchError(
            f"{repo_id} holds another cache, which {what}. Push to another repository, or replace it (overwrite=True, "
            "--overwrite)."
        )
    logger.warning("Replacing the cache in %s.", repo_id)
    _commit(api, repo_id, revision, [CommitOperationDelete(INDEX_NAME)], "Begin another cache", report)
    return False


def _push_files(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    directory: Path,
    index: CacheIndex,
    missing: list[str],
    report: PushReport,
    remote: dict[str, Any],
    show: bool,
) -> None:
    total = sum(index.files[name].bytes for name in missing)
    attributes: list[Any] = []
    if ".gitattributes" not in remote:
        lines = [f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("safetensors", "parquet")]
        attributes = [CommitOperationAdd(".gitattributes", "".join(lines).encode())]
    if attributes:  # before any shard: it decides how these are stored
        _commit(api, repo_id, revision, attributes, "Store shards as large files", report)
    with tqdm(total=total, desc=f"Pushing {repo_id}", unit="B", unit_scale=True, disable=not show) as bar:
        for number, batch in enumerate(_uploads(missing, index, COMMIT_FILES, COMMIT_BYTES), start=1):
            additions = [CommitOperationAdd(name, directory / name) for name in batch]
            by_name = {addition.path_in_repo: addition for addition in additions}
            for group in _uploads(batch, index, GROUP_FILES, GROUP_BYTES):
                api.preupload_lfs_files(
                    repo_id,
                    [by_name[name] for name in group],
                    repo_type=KIND,
                    revision=revision,
                    free_memory=False,
                )
                bar.update(sum(index.files[name].bytes for name in group))
            _commit(api, repo_id, revision, additions, f"Shards, part {number}", report)
            report.uploaded += batch
            report.uploaded_bytes += sum(index.files[name].bytes for name in batch)


def _commit(
    api: HfApi, repo_id: str, revision: str | None, operations: list[Any], message: str, report: PushReport
) -> None:
    info = api.create_commit(repo_id, operations, commit_message=message, repo_type=KIND, revision=revision)
    report.commits += info.oid != report.revision
    report.revision = str(info.oid)


# ---- Pull ----


def _fetch_index(
    repo_id: str, revision: str | None, token: str | bool | None, selection: Selection
) -> tuple[str, CacheIndex, list[str]]:
    """Return commit, index and names of the files of a cache on the Hub, whose listing agrees with the index."""
    api = _api(token)
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
    return sha, index, names


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
    selection, show = selection or Selection(), _shown(show_progress)
    with _explained(f"Fetching {repo_id}", repo_id, revision), _bars(show):
        try:
            sha, index, names = _fetch_index(repo_id, revision, token, selection)
        except OfflineModeIsEnabled:
            found = hf_hub_download(repo_id, INDEX_NAME, repo_type=KIND, revision=revision, local_files_only=True)
            folder = Path(found).parent
            index = load_index(folder)
            names = selection.files(index)
        else:
            folder = Path(
                snapshot_download(
                    repo_id, repo_type=KIND, revision=sha, token=token, allow_patterns=[*names, INDEX_NAME]
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
    """Pull a cache, or a part of it, into a folder, which appears once every file is checked.

    An interrupted pull goes on where it stopped: until it is complete the files lie in a hidden folder beside.

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
        CacheWriteError: The folder is not empty and does not hold this cache, or the disk is full.
        HubError: The Hub could not be reached, has no such repository or revision, or refused.
        IndexError: The cache has no such view or shard.
    """
    directory, selection = Path(directory), Selection.of(views, shards)
    show = _shown(show_progress)
    with _explained(f"Pulling {repo_id}", repo_id, revision), _bars(show):
        sha, index, names = _fetch_index(repo_id, revision, token, selection)
        report = PullReport(repo_id, sha, directory, len(names) + 1)
        if _holds(directory, index):
            _check_fetched(directory, index, names, str(directory), show)
        else:
            check_vacant(directory)
            scratch = directory.with_name(f".{directory.name}.pull")
            scratch.mkdir(parents=True, exist_ok=True)
            there = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
            check_free_space(scratch, sum(index.files[name].bytes for name in names) - there)
            snapshot_download(
                repo_id,
                repo_type=KIND,
                revision=sha,
                token=token,
                allow_patterns=[*names, INDEX_NAME],
                local_dir=scratch,
            )
            _check_fetched(scratch, index, names, repo_id, show)
            wanted = {*names, INDEX_NAME}
            for path in [path for path in scratch.rglob("*") if path.is_file()]:
                if str(path.relative_to(scratch)) not in wanted:
                    path.unlink()
            shutil.rmtree(scratch / ".cache", ignore_errors=True)
            if load_index(scratch) != index:
                raise CacheCorruptError(f"{repo_id} is refused: {INDEX_NAME} is altered.")
            put_in_place(scratch, directory)
        report.total_bytes = sum((directory / name).stat().st_size for name in [*names, INDEX_NAME])
    return report


def _holds(directory: Path, index: CacheIndex) -> bool:
    try:
        return dataclasses.asdict(load_index(directory)) == dataclasses.asdict(index)
    except (FreezeCacheError, OSError):
        return False
