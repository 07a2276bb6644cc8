"""Pushes caches to data sets on the Hub: the files that are missing first, the index and the card last."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from ..cache.fingerprint import Fingerprint
from ..cache.index import (
    FILE_NAME,
    INDEX_NAME,
    PROVENANCE_NAME,
    CacheIndex,
    load_index,
)
from ..cache.verify import verify_cache
from ..errors import (
    CacheCorruptError,
    CacheMismatchError,
    FreezeCacheError,
    HubError,
    UnsupportedSetupError,
)
from .client import (
    KIND,
    hub_api,
    hub_errors,
    progress_bars,
    wants_progress,
)
from .dataset_card import (
    ExistingCard,
    cache_card,
    license_id,
    read_card,
    unfinished_card,
)
from .provenance import (
    MAX_BYTES,
    Provenance,
    provenance_json,
    read_provenance,
)

__all__ = ["PushReport", "push_cache"]

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
#: Files and bytes in one commit; what one upload call takes; the Hub's limits of a repository.
COMMIT_FILES, COMMIT_BYTES = 100, 10 * 2**30
GROUP_FILES, GROUP_BYTES = 8, 512 * 2**20
MAX_FILE_BYTES, MAX_FOLDER_FILES, MAX_FILES = 20 * 10**9, 10_000, 100_000


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
        kept_files: Files that the repository had already.
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
    """Return full id and privacy of the repository, which is made if it does not exist."""
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
            f"{info.id} exists already and is public, and hidden states can reveal the images they were computed from. Make it "
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
    provenance: Provenance | None = None,
    overwrite: bool = False,
    show_progress: bool | None = None,
) -> PushReport:
    """Push a cache to a data set on the Hub, or the rest of it.

    Every bit is checked first. Files that the repository has with the same hash are not sent again; shards are committed in batches,
    ``index.json`` and the card last. Until then a card says that it is unfinished and names no data files: an interrupted
    push is taken neither for a cache nor for rows, and the same call finishes it.

    Args:
        directory: The cache.
        repo_id: ``user/name``, or ``name`` in the namespace of the token.
        private: A repository that is made is private, and a public one is refused. ``False`` makes a public one.
        token: Token for the Hub; default the one of ``hf auth login``.
        revision: Branch, made from ``main`` if it does not exist; default ``main``.
        provenance: What the cache was made of, for the card, as far as its own ``provenance.json`` does not say so already. A card
            in the repository is written again only if the push changes the cache, or if this is not empty.
        overwrite: Replace another cache that is in the repository, or the card of another data set.
        show_progress: Show a progress bar; default as ``huggingface_hub``'s own.

    Raises:
        CacheCorruptError: The cache is unfinished or damaged.
        CacheMismatchError: The repository holds another cache, or another data set.
        HubError: The Hub could not be reached, or refused; what was uploaded is kept.
        UnsupportedSetupError: The name is none, the cache exceeds limits of the Hub, or the Hub does not take the card.
    """
    directory = Path(directory)
    problems = verify_cache(directory)
    if problems:
        more = f" And {len(problems) - 1} more; see hf-freezecache verify." if len(problems) > 1 else ""
        raise CacheCorruptError(f"{directory} is not pushed: {problems[0]}{more}")
    index = load_index(directory)
    _check_limits(index, directory)
    api = hub_api(token)
    show = wants_progress(show_progress)
    with hub_errors(f"Pushing {directory}", repo_id, revision), progress_bars(False):
        repo_id, is_private = _make_repo(api, repo_id, private, revision)
        report = PushReport(repo_id, f"{api.endpoint}/datasets/{repo_id}", private=is_private)
        report.revision = str(api.repo_info(repo_id, repo_type=KIND, revision=revision).sha)
        remote = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, repo_type=KIND, recursive=True, revision=revision)
            if isinstance(entry, RepoFile)
        }
        target = _Target(api, repo_id, revision, token, remote, report)
        stale = [name for name in remote if name not in index.files and FILE_NAME.fullmatch(name)]
        same_cache = INDEX_NAME in remote and _holds_same(target, directory, overwrite)
        requested = provenance or Provenance()
        combined, extra_metadata = Provenance(), dict[str, Any]()
        writes_card = not same_cache or CARD_NAME not in remote or requested != Provenance()
        if writes_card:  # else one that somebody has edited since stays
            remote_known, extra_metadata = _read_repository(
                target, Fingerprint(index.fingerprint).digest, same_cache, overwrite
            )
            combined, extra_metadata = _combined(read_provenance(directory), remote_known, requested, extra_metadata)
        missing = [
            name
            for name, record in sorted(index.files.items())
            if not _same(remote.get(name), directory / name, record.sha256)
        ]
        report.kept_files = len(index.files) - len(missing)
        if missing and report.kept_files:
            logger.info(
                "Going on with %s: the repository has %d of %d files.", repo_id, report.kept_files, len(index.files)
            )
        first: list[Any] = []
        if not same_cache:  # the provenance goes first, too: the call that finishes the push may not be given it again
            first = _card_files(target, unfinished_card(directory, index, combined, extra_metadata), combined)
        _begin(target, same_cache, bool(missing), first)
        _push_files(target, directory, index, missing, show)
        last: list[Any] = [CommitOperationDelete(name) for name in stale]
        if writes_card:
            last += _card_files(target, cache_card(directory, index, repo_id, combined, extra_metadata), combined)
        if not same_cache:
            last.append(CommitOperationAdd(INDEX_NAME, directory / INDEX_NAME))
        if last:
            target.commit(last, f"Index of {index.num_samples:,} samples")
    return report


@dataclass
class _Target:
    """A branch of a repository, and its files when the push began."""

    api: HfApi
    repo_id: str
    revision: str | None
    token: str | bool | None
    remote: dict[str, RepoFile]
    report: PushReport

    def read(self, name: str) -> Path:
        return Path(
            hf_hub_download(
                self.repo_id, name, repo_type=KIND, revision=self.revision, token=self.token, force_download=True
            )
        )

    def commit(self, operations: list[Any], message: str) -> None:
        try:
            info = self.api.create_commit(
                self.repo_id, operations, commit_message=message, repo_type=KIND, revision=self.revision
            )
        except ValueError as error:
            if "metadata in README.md" not in str(error):
                raise
            raise UnsupportedSetupError(
                f"The Hub does not take the card of {self.repo_id}: {error} Give a licence by an identifier that it knows, e.g. "
                "cc-by-4.0, or in words."
            ) from error
        self.report.commits += info.oid != self.report.revision
        self.report.revision = str(info.oid)


def _read_repository(
    target: _Target, digest: str, same_cache: bool, overwrite: bool
) -> tuple[Provenance, dict[str, Any]]:
    """Return what the repository says of the cache with a fingerprint, or said before anything was pushed there.

    Args:
        target: The repository.
        digest: The fingerprint.
        same_cache: Whether that cache is in the repository.
        overwrite: Whether the card of another data set may be written over.

    Raises:
        CacheMismatchError: It is that of another data set.
    """
    card = read_card(target.read(CARD_NAME)) if CARD_NAME in target.remote else ExistingCard()
    same = same_cache or card.fingerprint == digest
    if not (same_cache or card.fingerprint or overwrite):
        others = [
            name
            for name in target.remote
            if name not in (CARD_NAME, INDEX_NAME, ".gitattributes", "LICENSE") and not FILE_NAME.fullmatch(name)
        ]
        if others or card.text:
            what = f"holds {others[0]}" if others else "has a card that is not one of a cache"
            raise CacheMismatchError(
                f"{target.repo_id} is another data set: it {what}. Push to another repository, or write the card over that "
                "of the other (overwrite=True, --overwrite)."
            )
    known = Provenance()
    if same and PROVENANCE_NAME in target.remote and target.remote[PROVENANCE_NAME].size <= MAX_BYTES:
        known = read_provenance(target.read(PROVENANCE_NAME).parent)
    return known, card.extra_metadata if same or not card.text else {}


def _combined(
    local: Provenance, known: Provenance, requested: Provenance, extra_metadata: dict[str, Any]
) -> tuple[Provenance, dict[str, Any]]:
    """Return what goes onto a card.

    Args:
        local: What was written down beside the cache.
        known: What an earlier push wrote down in the repository.
        requested: What this push asks for.
        extra_metadata: Further metadata of the card.

    Returns:
        What is known then; and the metadata, without those of a licence that it replaces.
    """
    combined, license = local.updated(known), extra_metadata.get("license")
    if known != Provenance() and license not in (
        None,
        license_id(combined.license),
    ):  # somebody has written another since
        combined = dataclasses.replace(combined, license=None)
    elsewhere = combined.dataset_name is not None and requested.dataset_name not in (None, combined.dataset_name)
    of_others = combined.license is not None and license != license_id(combined.license)
    if elsewhere or of_others or requested.license not in (None, combined.license):
        extra_metadata = {name: value for name, value in extra_metadata.items() if not name.startswith("license")}
    combined, license = combined.updated(requested), extra_metadata.get("license")
    if combined.license is None and isinstance(license, str) and license != "other":
        combined = dataclasses.replace(combined, license=license)
    return combined, extra_metadata


def _card_files(target: _Target, card: str, combined: Provenance) -> list[Any]:
    """Return what writes a card, and the provenance beside it. A file that is the same already makes no commit."""
    operations: list[Any] = [CommitOperationAdd(CARD_NAME, card.encode())]
    if combined != Provenance():
        operations.append(CommitOperationAdd(PROVENANCE_NAME, provenance_json(combined)))
    elif target.remote.pop(PROVENANCE_NAME, None) is not None:
        operations.append(CommitOperationDelete(PROVENANCE_NAME))
    return operations


def _begin(target: _Target, same_cache: bool, sends: bool, card: list[Any]) -> None:
    """Make the repository ready for shards, in one commit: it is no cache yet, and stores them as large files."""
    operations = list(card)
    if not same_cache and INDEX_NAME in target.remote:
        logger.warning("Replacing the cache in %s.", target.repo_id)
        operations.append(CommitOperationDelete(INDEX_NAME))
    if sends:
        path = target.read(".gitattributes") if ".gitattributes" in target.remote else None
        text = "" if path is None else path.read_bytes().decode("utf-8", "surrogateescape")
        large = {line.split()[0] for line in text.splitlines() if "filter=lfs" in line.split()}
        lines = [f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("safetensors", "parquet")]
        lacking = [line for line in lines if line.split()[0] not in large]
        if lacking:
            whole = text + ("\n" if text and not text.endswith("\n") else "") + "".join(lacking)
            operations.append(CommitOperationAdd(".gitattributes", whole.encode("utf-8", "surrogateescape")))
    if operations:
        target.commit(operations, "Begin a cache" if not same_cache else "Store shards as large files")


def _holds_same(target: _Target, directory: Path, overwrite: bool) -> bool:
    """Say whether the index on the Hub is this one; refuse another, unless that is to be replaced."""
    path = target.read(INDEX_NAME)
    if path.read_bytes() == (directory / INDEX_NAME).read_bytes():
        return True
    if not overwrite:
        try:
            ours, theirs = (Fingerprint(load_index(folder).fingerprint) for folder in (directory, path.parent))
            what = f"differs in: {', '.join(ours.difference(theirs)) or 'its files'}"
        except (FreezeCacheError, OSError) as error:
            what = f"cannot be read: {error}"
        raise CacheMismatchError(
            f"{target.repo_id} holds another cache, which {what}. Push to another repository, or replace it (overwrite=True, "
            "--overwrite)."
        )
    return False


def _push_files(target: _Target, directory: Path, index: CacheIndex, missing: list[str], show: bool) -> None:
    total = sum(index.files[name].bytes for name in missing)
    with tqdm(total=total, desc=f"Pushing {target.repo_id}", unit="B", unit_scale=True, disable=not show) as bar:
        for number, batch in enumerate(_uploads(missing, index, COMMIT_FILES, COMMIT_BYTES), start=1):
            additions = [CommitOperationAdd(name, directory / name) for name in batch]
            by_name = {addition.path_in_repo: addition for addition in additions}
            for group in _uploads(batch, index, GROUP_FILES, GROUP_BYTES):
                target.api.preupload_lfs_files(
                    target.repo_id,
                    [by_name[name] for name in group],
                    repo_type=KIND,
                    revision=target.revision,
                    free_memory=False,
                )
                bar.update(sum(index.files[name].bytes for name in group))
            target.commit(additions, f"Shards, part {number}")
            target.report.uploaded += batch
            target.report.uploaded_bytes += sum(index.files[name].bytes for name in batch)
