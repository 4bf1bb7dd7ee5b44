"""What a job keeps on disk until its results are complete: the folder `<output>.parts`.

    lock                                     held while a process works on the job
    job.json                                 what is being scored and by which model; written last, so it vouches for
    listing.jsonl                            every file of the job, one JSON string a line, in order
    000000000-000004096.jsonl                finished rows [0, 4096): the rows of the listing's first lines
    000004096-000008000.jsonl                …
    answers.sqlite                           with --dedupe: made anew of the rows by each run

Every file is written under another name, flushed to the disk and renamed: whenever the process or the machine dies,
what has its final name is whole. Rows are saved in order, so the parts are always an unbroken beginning of the
listing; a job that is resumed goes on at the next line.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from topfive.scoring._errors import RefusedError, StoppedError
from topfive.scoring._rows import Row, display_path, to_line

_SCHEMA_VERSION: Final = 1
_LOCK_ATTEMPTS: Final = 100
"""A job's folder may be removed while it is being locked, by the process that had it; hardly so many times in a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What must be the same for rows to belong to one job, and the listing they belong to."""

    folder: str
    """Location of the source, absolute."""
    all_files: bool
    """Whether files without an image's ending were listed too."""
    top_k: int
    """Labels per row."""
    model: str
    """Name of the model."""
    version: str
    """Version of the model."""
    fingerprint: str
    """Fingerprint of the model's files and its preprocessing, as the server lists it or as it is computed here."""
    dedupe: bool = False
    """Whether files of the same bytes are computed once; jobs from before there was a choice computed each."""
    files: int = 0
    """Number of files in the listing."""
    listing_sha256: str = ""
    """SHA-256 of `listing.jsonl`."""
    schema_version: int = _SCHEMA_VERSION
    """Layout of the folder; another one is refused."""

    def differences(self, other: "JobRecord") -> list[str]:
        """Sentences naming what differs, but for the listing (`self` is the earlier one)."""
        names = (
            "schema_version",
            "folder",
            "all_files",
            "top_k",
            "model",
            "version",
            "fingerprint",
            "dedupe",
        )
        return [
            f"{name} was {getattr(self, name)}, now {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


class JobState:
    """The folder of one job, locked for as long as the object is open."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".parts")

    @classmethod
    @contextlib.contextmanager
    def claim(cls, output: Path, *, overwrite: bool) -> Generator[Self]:
        """Lock the job's folder, making it if need be; it goes in the end if no job has begun.

        Raises:
            RefusedError: another process has it, or the output exists and is not to be overwritten.
        """
        state = cls(output)
        if output.is_dir():
            raise RefusedError(f"--output {output} is a folder; name a file in it")
        with state._locked():
            try:
                if output.exists() and not overwrite and not state.begun:
                    raise RefusedError(f"{output} exists already; --overwrite scores again and replaces it")
                if overwrite or not state.begun:
                    state.clear()
                yield state
            finally:
                if not state.begun:
                    state._remove()

    def _locked(self) -> BinaryIO:
        """The folder's lock, held until it is closed.

        Raises:
            RefusedError: another process holds it, or the folder cannot be written.
        """
        path = self.folder / "lock"
        for left in reversed(range(_LOCK_ATTEMPTS)):
            try:
                with contextlib.ExitStack() as unless_locked:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    lock = unless_locked.enter_context(path.open("wb"))
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Else it is that of a folder which was removed after we opened it.
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        unless_locked.pop_all()
                        return lock
            except BlockingIOError:
                break
            except OSError as error:
                removed_meanwhile = isinstance(error, FileExistsError | FileNotFoundError)
                if not (removed_meanwhile and left):
                    raise RefusedError(f"cannot write to {self.folder}: {error.strerror}") from error
        raise RefusedError(f"another process is scoring into {self.output} at this moment")

    def _remove(self) -> None:
        """Remove the folder, the lock last: whoever takes the next one finds nothing of ours, nor we anything of theirs."""
        with contextlib.suppress(OSError):
            self.clear()
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    @property
    def answers(self) -> Path:
        """Where a run keeps its table of answers by content."""
        return self.folder / "answers.sqlite"

    @property
    def begun(self) -> bool:
        """Whether there is a job to resume."""
        return (self.folder / "job.json").is_file()

    def clear(self) -> None:
        """Forget the job. Its record goes first: without it, whatever is left counts for nothing."""
        (self.folder / "job.json").unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    # --- the record and the listing

    def write_listing(self, paths: Iterable[str]) -> tuple[int, str]:
        """Save the listing; returns the number of files and the SHA-256 of what was written."""
        digest, count = hashlib.sha256(), 0
        with self.saving("listing.jsonl") as file:
            for path in paths:
                line = json.dumps(path).encode("ascii") + b"\n"
                digest.update(line)
                file.write(line)
                count += 1
        return count, digest.hexdigest()

    def begin(self, record: JobRecord) -> None:
        """Save the record: from here on there is a job to resume."""
        with self.saving("job.json") as file:
            file.write(json.dumps(dataclasses.asdict(record), indent=2).encode() + b"\n")

    def record(self) -> JobRecord:
        """The record of the job to resume.

        Raises:
            RefusedError: the record or the listing is damaged.
        """
        try:
            known: Mapping[str, Any] = json.loads((self.folder / "job.json").read_bytes())
            record = JobRecord(**known)
            with (self.folder / "listing.jsonl").open("rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == record.listing_sha256
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(error) from error
        if not intact:
            raise self._damaged("listing.jsonl is not the one it was begun with")
        return record

    def listing(self, start: int = 0) -> Iterator[str]:
        """Paths from line `start` on."""
        with (self.folder / "listing.jsonl").open("rb") as file:
            for number, line in enumerate(file):
                if number >= start:
                    path: str = json.loads(line)
                    yield path

    # --- the rows

    def save_part(self, first: int, rows: list[Row]) -> None:
        """Save rows [first, first + len(rows))."""
        with self.saving(f"{first:09}-{first + len(rows):09}.jsonl") as file:
            file.writelines(to_line(row).encode() for row in rows)

    def rows(self) -> Iterator[Row]:
        """All saved rows, in order, each checked against the listing.

        Raises:
            RefusedError: a part is missing in between, or is not what was saved.
        """
        paths = self.listing()
        expected = 0
        for part in sorted(self.folder.glob("*-*.jsonl")):
            first, end = (int(number) for number in part.stem.split("-"))
            if first != expected:
                raise self._damaged(f"rows {expected} to {first} are missing")
            with part.open("rb") as file:
                for line in file:
                    yield self._checked(line, next(paths, None), part)
                    expected += 1
            if expected != end:
                raise self._damaged(f"{part.name} holds {expected - first} rows")

    def _checked(self, line: bytes, path: str | None, part: Path) -> Row:
        try:
            row: Row = json.loads(line)
        except ValueError as error:
            raise self._damaged(f"{part.name}: {error}") from error
        if path is None or row.get("path") != display_path(path):
            raise self._damaged(f"{part.name} has a row of another file, {row.get('path')}")
        return row

    # --- writing

    @contextlib.contextmanager
    def saving(self, name: str) -> Generator[BinaryIO]:
        """Write a file of the job's folder that appears whole or not at all."""
        final = self.folder / name
        temporary = final.with_name(name + ".tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            self._rename(temporary, final)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self.disk_error(error) from error

    def publish(self, temporary: Path, final: Path) -> None:
        """Make `temporary`, in the job's folder, the file `final` beside it, for good."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._rename(temporary, final)

    @staticmethod
    def _rename(temporary: Path, final: Path) -> None:
        temporary.rename(final)
        for folder in {temporary.parent, final.parent}:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def disk_error(self, error: OSError) -> StoppedError:
        """The sentence for a failed write."""
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        reason = "the disk is full" if full else f"{error.strerror or error}"
        return StoppedError(f"cannot write to {self.folder}: {reason}")

    def _damaged(self, reason: object) -> RefusedError:
        return RefusedError(f"{self.folder} is damaged ({reason}); --overwrite scores everything again")
