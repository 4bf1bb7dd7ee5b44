"""Where the images are: a local folder, or any folder that fsspec can reach (`s3://…`, `gs://…`, `memory://…`).

A source lists its files once, in an order that does not change from run to run, and reads them one by one. A path is
relative to the folder, with `/` between its parts. A path that ends in `/` is a folder that could not be listed: it
becomes a failed row, because silently scoring fewer files than there are is the worst of the outcomes.
"""

import contextlib
import importlib
import os
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol

from topfive._folders import has_image_name
from topfive.scoring._errors import RefusedError, StoppedError


class ReadError(Exception):
    """One file could not be read; `status` is the code for its row and the message a sentence."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Source(Protocol):
    """A folder of images."""

    @property
    def location(self) -> str:
        """The folder, absolute: resuming a job compares it."""
        ...

    def list(self, *, all_files: bool) -> Iterator[str]:
        """Relative paths of the images (or of `all_files`), each once, in a stable order."""
        ...

    def read(self, path: str) -> bytes:
        """The content of one listed file.

        Raises:
            ReadError: this file cannot be read.
            StoppedError: the whole folder is gone.
        """
        ...


def open_source(folder: str, *, skip: AbstractSet[Path] = frozenset(), max_bytes: int) -> Source:
    """The source for a local folder or a URL.

    Args:
        folder: a path, or a URL with `://` in it.
        skip: local files and folders to leave out of the listing (the job's own output).
        max_bytes: a larger file is not read; its row says so.

    Raises:
        RefusedError: there is no such folder.
        ModuleNotFoundError: the folder is a URL and the `scoring` extra is not installed.
    """
    if "://" in folder:
        return RemoteFolder(folder, max_bytes=max_bytes)
    path = Path(folder)
    if path.is_file():
        raise RefusedError(
            f"{folder} is a file; score takes a folder (`topfive classify` takes single images)"
        )
    if not path.is_dir():
        raise RefusedError(f"there is no folder {folder}")
    return LocalFolder(path, skip=skip, max_bytes=max_bytes)


def _wanted(name: str, all_files: bool) -> bool:
    return all_files or has_image_name(name)


def _too_large(size: int, limit: int) -> ReadError:
    return ReadError("too-large", f"the file is {size:,} bytes; the limit is {limit:,} (--max-bytes)")


class LocalFolder:
    """A folder of this machine's file systems, walked depth first in order of names.

    Links to files and folders are followed, except to a folder that the walk is already inside of.
    """

    def __init__(self, folder: Path, *, skip: AbstractSet[Path] = frozenset(), max_bytes: int) -> None:
        self._root = folder.resolve()
        self._skip = {path.resolve() for path in skip}
        self._max_bytes = max_bytes

    @property
    def location(self) -> str:
        """The folder, absolute, links resolved."""
        return os.fspath(self._root)

    def list(self, *, all_files: bool) -> Iterator[str]:
        """Depth first, names in order of code points; holds the names of one branch at a time."""
        return self._walk("", all_files, frozenset())

    def _walk(self, prefix: str, all_files: bool, inside: frozenset[tuple[int, int]]) -> Iterator[str]:
        folder = self._root / prefix
        try:
            about = folder.stat()
            with os.scandir(folder) as scan:
                entries = sorted((entry.name, _is_folder(entry)) for entry in scan)
        except OSError:
            yield prefix
            return
        if (about.st_dev, about.st_ino) in inside:
            return
        inside |= {(about.st_dev, about.st_ino)}
        skipped = {path.name for path in self._skip if path.parent == folder}
        for name, is_folder in entries:
            if name in skipped:
                continue
            if is_folder:
                yield from self._walk(f"{prefix}{name}/", all_files, inside)
            elif _wanted(name, all_files):
                yield prefix + name

    def read(self, path: str) -> bytes:
        """See `Source.read`."""
        if path.endswith("/"):
            raise ReadError("unreadable", "the folder could not be listed; check its permissions")
        try:
            with open(self._root / path, "rb", opener=_open_at_once) as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise ReadError("unreadable", "not a regular file")
                if about.st_size > self._max_bytes:
                    raise _too_large(about.st_size, self._max_bytes)
                return file.read()
        except OSError as error:
            if not self._root.is_dir():
                raise StoppedError(f"the folder {self._root} is gone ({error.strerror})") from error
            if isinstance(error, FileNotFoundError):
                raise ReadError("not-found", "the file was listed but is no longer there") from error
            raise ReadError("unreadable", f"the file cannot be read: {error.strerror or error}") from error


def _open_at_once(path: str, flags: int) -> int:
    """Open a named pipe without waiting for a writer that never comes."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a circle of links: reading it as a file says so in its row
        return entry.is_dir()
    return False


class RemoteFolder:
    """A folder behind fsspec; credentials and options come from its own configuration and environment."""

    def __init__(self, url: str, *, max_bytes: int) -> None:
        fsspec = importlib.import_module("fsspec")
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
            found = filesystem.isdir(root)
        except (OSError, ValueError, ImportError) as error:
            raise RefusedError(f"the folder {url} cannot be opened: {error}") from error
        if not found:
            raise RefusedError(f"there is no folder {url}")
        self._url = url
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/") + "/"
        self._max_bytes = max_bytes

    @property
    def location(self) -> str:
        """The URL as given."""
        return self._url

    def list(self, *, all_files: bool) -> Iterator[str]:
        """In order of code points of the whole path; fsspec hands the listing over at once, so it is held."""
        try:
            paths = sorted(self._filesystem.find(self._root))
        except Exception as error:  # each of fsspec's backends raises its own
            raise RefusedError(f"the folder {self._url} cannot be listed: {error}") from error
        for path in paths:
            if _wanted(path, all_files):
                yield path.removeprefix(self._root)

    def read(self, path: str) -> bytes:
        """See `Source.read`."""
        try:
            with self._filesystem.open(self._root + path, "rb") as file:
                content: bytes = file.read(self._max_bytes + 1)
        except FileNotFoundError as error:
            raise ReadError("not-found", "the file was listed but is no longer there") from error
        except Exception as error:  # each of fsspec's backends raises its own
            raise ReadError("unreadable", f"the file cannot be read: {error!r}") from error
        if len(content) > self._max_bytes:
            raise ReadError("too-large", f"the file is larger than {self._max_bytes:,} bytes (--max-bytes)")
        return content
