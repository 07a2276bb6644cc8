"""What pushing and pulling share: the Hub's client, and what its errors mean for a user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from ..errors import (
    FreezeCacheError,
    HubError,
    UnsupportedSetupError,
)

__all__ = [
    "KIND",
    "cause_of",
    "hub_api",
    "hub_errors",
    "is_repo_id",
    "progress_bars",
    "quiet_libraries",
    "wants_progress",
]

#: Kind of the repositories that hold caches.
KIND = "dataset"
#: Base of the errors of whatever HTTP client huggingface_hub is built on.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]


def is_repo_id(name: str) -> bool:
    """Say whether a name could be that of a repository: ``user/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


# ---- Errors ----


def cause_of(error: BaseException | None) -> BaseException | None:
    """Return the error of the HTTP client behind an error, if any."""
    while error is not None and not isinstance(error, (HfHubHTTPError, _HTTP_ERROR)):
        error = error.__cause__
    return error


def _refusal(error: BaseException, doing: str, repo_id: str, revision: str | None) -> FreezeCacheError | None:
    """Return what an error of the Hub means for a user; ``None`` for errors of another kind."""
    where = f"{repo_id} at {constants.ENDPOINT}"
    cause = cause_of(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return UnsupportedSetupError(f"{doing} failed: {error} Give a repository as user/name.")
    if isinstance(cause, RevisionNotFoundError):
        return HubError(
            f"{doing} failed: {where} has no revision {revision!r}. Give a branch, tag or commit that exists."
        )
    if isinstance(cause, RepositoryNotFoundError):
        return HubError(
            f"{doing} failed: there is no data set {where} that this token may see. Check the name; for a private one log in "
            "with hf auth login, or set HF_TOKEN."
        )
    if status == 401:
        return HubError(
            f"{doing} failed: {constants.ENDPOINT} did not accept the token. Log in again with hf auth login."
        )
    if status == 403:
        message = getattr(cause, "server_message", None) or cause
        return HubError(
            f"{doing} failed: {where} refused it: {message}. The token needs write access there, and the account room. What "
            "was uploaded is kept; the same call goes on from there."
        )
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return HubError(f"{doing} failed: the Hub cannot be asked, and {repo_id} is not in the local cache: {error}")
    if cause is not None:
        return HubError(
            f"{doing} failed: {where}: {type(cause).__name__}: {cause}. What was transferred is kept; the same call goes on "
            "from there."
        )
    return None


@contextmanager
def hub_errors(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub into errors that say what was wrong and what to do. Other errors pass.

    Args:
        doing: What is being done, to begin the message with.
        repo_id: ``user/name``.
        revision: The revision that was asked for.

    Raises:
        HubError: The Hub could not be reached, has no such repository or revision, or refused.
        UnsupportedSetupError: The name cannot be that of a repository.
    """
    try:
        yield
    except FreezeCacheError:
        raise
    except Exception as error:
        refusal = _refusal(error, doing, repo_id, revision)
        if refusal is None:
            raise
        raise refusal from error


def wants_progress(show_progress: bool | None) -> bool:
    """Say whether to show progress bars: as the caller asks, else as ``huggingface_hub`` is set."""
    return not are_progress_bars_disabled() if show_progress is None else show_progress


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Keep the progress bars of ``huggingface_hub``, or switch them off within the context."""
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def quiet_libraries(show_progress: bool = False) -> Iterator[None]:
    """Show only errors of ``transformers`` within the context: its report on loading a head of other classes is long.

    Args:
        show_progress: Leave the progress bars of transformers and datasets as they are, instead of hiding them.
    """
    import datasets  # late: they take longer to load than most of what is done here
    import transformers

    verbosity = transformers.logging.get_verbosity()
    loading, mapping = transformers.logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    if not show_progress:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if loading:
            transformers.logging.enable_progress_bar()
        if mapping:
            datasets.enable_progress_bars()


def hub_api(token: str | bool | None) -> HfApi:
    """Return a client that uses a token. Without one it uses that of ``hf auth login``."""
    return HfApi(token=token, library_name="hf_freezecache")
