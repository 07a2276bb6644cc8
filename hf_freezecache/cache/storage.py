"""Where the files of a cache lie, for reading: a local folder, or a folder of any store that fsspec knows.

Nothing here trusts the folder. Of a local one, only regular files are read, and only those that lie in it. So a cache from
elsewhere can neither show other files of this machine nor hang a reader with a pipe.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from typing_extensions import override

from ..errors import (
    CacheCorruptError,
    UnsupportedSetupError,
)

__all__ = [
    "LocalFile",
    "LocalStorage",
    "RemoteFile",
    "RemoteStorage",
    "Storage",
    "StoredFile",
    "as_file",
    "open_storage",
]

_REBUILD = (
    "If the cache was deleted or moved while in use, run the same training again: it goes on from its last checkpoint and "
    "rebuilds what is missing."
)
_RETRY = "Check the address, the connection and your access rights, and run the same command again."


class StoredFile(ABC):
    """One file, which need not exist. ``str`` gives its path or address. It is abstract; its subclasses are final."""

    #: Bytes that are fetched at once where a whole file is read piece by piece.
    block_bytes: int

    @abstractmethod
    def size(self) -> int | None:
        """Return its size in bytes, or ``None`` if there is no such file.

        Raises:
            CacheCorruptError: It is no regular file, lies outside the cache, or is out of reach.
        """

    @abstractmethod
    def read(self, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start`` on, or fewer where the file ends.

        Raises:
            CacheCorruptError: It is missing or cannot be read, or for the reasons of ``size``.
        """


class Storage(ABC):
    """A folder of files. ``str`` gives its path or address. It is abstract; its subclasses are final and cheap to pickle."""

    @abstractmethod
    def file(self, name: str) -> StoredFile:
        """Return the file of a relative path with slashes."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the relative paths of all that lies in the folder but folders, sorted.

        Raises:
            CacheCorruptError: The folder cannot be listed.
        """


# ---- Local folders ----


@dataclass(frozen=True)
class LocalFile(StoredFile):
    """A file of this machine.

    Attributes:
        path: The file.
        roots: Folders, free of links, in one of which the file must lie once links are followed. Empty: anywhere.
    """

    path: Path
    roots: tuple[str, ...] = ()
    block_bytes = 2**20

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def _open(self) -> int:
        if self.roots:
            real = os.path.realpath(self.path)
            if not any(real.startswith(root.rstrip(os.sep) + os.sep) for root in self.roots):
                raise CacheCorruptError(
                    f"{self.path} is a link to {real}, outside of the cache; its files must lie inside. Delete the link, and "
                    "copy the cache again with links followed, or rebuild it."
                )
        # Opening a pipe would wait for a writer.
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CacheCorruptError(
                f"{self.path} is no regular file but a folder, pipe or device. Delete it to rebuild the cache."
            )
        return descriptor

    @override
    def size(self) -> int | None:
        try:
            descriptor = self._open()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CacheCorruptError:
            raise
        except OSError as error:
            raise CacheCorruptError(f"{self.path} cannot be read: {error}. Permit reading, or rebuild it.") from error
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    @override
    def read(self, start: int, length: int) -> bytes:
        try:
            descriptor = self._open()
            try:
                return os.pread(descriptor, length, start)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheCorruptError(f"{self.path} is missing. {_REBUILD}") from None
        except CacheCorruptError:
            raise
        except OSError as error:
            raise CacheCorruptError(
                f"{self.path} cannot be read: {error}. Check the disk and the permissions. {_REBUILD}"
            ) from error


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A folder of this machine.

    Its files may be links to one another. In the cache of the Hugging Face Hub, where ``<repo>/snapshots/<revision>/``
    holds links into ``<repo>/blobs/``, they may be links to there.

    Attributes:
        directory: The folder.
    """

    directory: Path
    _roots: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Follow links to the folder itself, which the user named."""
        root = os.path.realpath(self.directory)
        roots = [root]
        if Path(root).parent.name == "snapshots":
            blobs = Path(root).parent.parent / "blobs"
            if os.path.realpath(blobs) == str(blobs):
                roots.append(str(blobs))
        object.__setattr__(self, "_roots", tuple(roots))

    def __str__(self) -> str:
        """Return the path."""
        return str(self.directory)

    @override
    def file(self, name: str) -> LocalFile:
        return LocalFile(self.directory / name, self._roots)

    @override
    def names(self) -> list[str]:
        """Return the relative paths of all that lies in the folder but folders. Links are not followed."""
        names: list[str] = []
        pending = [self.directory]
        try:
            while pending:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        path = Path(entry.path)
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(path)
                        else:
                            names.append(path.relative_to(self.directory).as_posix())
        except OSError as error:
            raise CacheCorruptError(f"{self.directory} cannot be listed: {error}. Permit reading.") from error
        return sorted(names)


# ---- Everything else ----


def _filesystem(url: str) -> tuple[Any, str]:
    """Return file system and path of an address. This is cheap, also after a fork: fsspec keeps one instance per process.

    Raises:
        UnsupportedSetupError: An unknown protocol, or one whose package is not installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UnsupportedSetupError(
            f"{url} cannot be opened: {error}. Give a local folder, or an address such as hf://datasets/user/name whose "
            "protocol fsspec knows and whose package is installed."
        ) from error
    return filesystem, str(path)


@dataclass(frozen=True)
class RemoteFile(StoredFile):
    """A file of a store.

    Attributes:
        url: Its address.
        known_size: Its size, if a listing gave it.
    """

    url: str
    known_size: int | None = None
    block_bytes = 16 * 2**20

    def __str__(self) -> str:
        """Return the address."""
        return self.url

    @override
    def size(self) -> int | None:
        if self.known_size is not None:
            return self.known_size
        filesystem, path = _filesystem(self.url)
        try:
            info = filesystem.info(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # stores raise what they like
            raise CacheCorruptError(
                f"{self.url} cannot be looked at: {type(error).__name__}: {error}. {_RETRY}"
            ) from error
        if info.get("type") == "directory" or not isinstance(info.get("size"), int):
            raise CacheCorruptError(f"{self.url} is no file of known size but {info.get('type')!r}. {_RETRY}")
        return int(info["size"])

    @override
    def read(self, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        filesystem, path = _filesystem(self.url)
        # The default way to fetch a range opens a file that reads ahead by megabytes.
        fetches_ranges = type(filesystem).cat_file is not fsspec.AbstractFileSystem.cat_file
        settings = {} if fetches_ranges else {"cache_type": "none"}
        try:
            data = bytes(filesystem.cat_file(path, start=start, end=start + length, **settings))
        except FileNotFoundError:
            raise CacheCorruptError(f"{self.url} is missing. {_RETRY}") from None
        except Exception as error:
            raise CacheCorruptError(f"{self.url} cannot be read: {type(error).__name__}: {error}. {_RETRY}") from error
        if len(data) > length:
            raise CacheCorruptError(
                f"{self.url}: the store sent {len(data)} bytes where {length} were asked for. {_RETRY}"
            )
        return data


@dataclass
class RemoteStorage(Storage):
    """A folder of a store.

    Attributes:
        url: Its address, for example ``hf://datasets/user/name``.
    """

    url: str
    _sizes: dict[str, int] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        """Drop slashes at the end of the address."""
        self.url = self.url.rstrip("/")

    def __str__(self) -> str:
        """Return the address."""
        return self.url

    def _listing(self) -> dict[str, int]:
        """Return the sizes of all files by name. It takes a few requests, where asking for each file would take thousands."""
        if self._sizes is None:
            filesystem, path = _filesystem(self.url)
            root = path.rstrip("/") + "/"
            try:
                files = filesystem.find(path, detail=True)
            except Exception as error:
                raise CacheCorruptError(
                    f"{self.url} cannot be listed: {type(error).__name__}: {error}. {_RETRY}"
                ) from error
            self._sizes = {
                name.removeprefix(root): info["size"]
                for name, info in files.items()
                if name.startswith(root) and isinstance(info.get("size"), int)
            }
        return self._sizes

    @override
    def file(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self.url}/{name}", None if self._sizes is None else self._sizes.get(name))

    @override
    def names(self) -> list[str]:
        return sorted(self._listing())


def open_storage(place: str | Path | Storage) -> Storage:
    """Return the folder of a local path, or of an address with ``://`` in it.

    Raises:
        UnsupportedSetupError: An address of an unknown protocol.
    """
    if isinstance(place, Storage):
        return place
    if isinstance(place, str) and place.startswith(("file://", "local://")):
        return LocalStorage(Path(LocalFileSystem._strip_protocol(place)))
    if isinstance(place, str) and ("://" in place or "::" in place):
        _filesystem(place)
        return RemoteStorage(place)
    return LocalStorage(Path(place))


def as_file(file: Path | StoredFile) -> StoredFile:
    """Return a path as a file. The caller names the path, so it may lie, or link, anywhere."""
    return file if isinstance(file, StoredFile) else LocalFile(Path(file))
