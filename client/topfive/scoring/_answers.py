"""Answers by content: with `--dedupe`, files of the same bytes get the answer that the first of them was given.

Only answers are shared. A file that failed may have failed for a reason that has passed, so its bytes are tried again.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Final, Self, TypeVar

from topfive.scoring._errors import StoppedError
from topfive.scoring._rows import Label, Outcome

T = TypeVar("T")

_CACHE_KB: Final = 64 * 1024
"""What the table may hold in memory, however many answers there are."""


class Answers:
    """The outcomes of a job by the SHA-256 of the file; may be shared between threads.

    They are in an SQLite table in the job's folder. The rows that the job saves are what survives a crash: the table is
    made anew of them by each run, so it is written without a journal and never flushed.
    """

    def __init__(self, path: Path) -> None:
        """Begin an empty table.

        Raises:
            StoppedError: it cannot be written.
        """
        path.unlink(missing_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Outcome]] = {}
        with self._stopping():
            self._table = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for statement in (
            "PRAGMA journal_mode=OFF",
            "PRAGMA synchronous=OFF",
            f"PRAGMA cache_size=-{_CACHE_KB}",
            "CREATE TABLE answers (sha256 BLOB PRIMARY KEY, outcome TEXT NOT NULL)",
            "BEGIN",  # never to be committed: pages are written when the cache is full, and not for each answer
        ):
            self._execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._path.unlink(missing_ok=True)

    def find(self, sha256: str) -> Outcome | None:
        """The answer that a file with these bytes was given, as that of one more.

        Raises:
            StoppedError: the table cannot be read.
        """
        with self._lock:
            return self._find(sha256)

    def add(self, outcome: Outcome) -> None:
        """Keep the answer of a file, if it is one and its content is known.

        Raises:
            StoppedError: the table cannot be written.
        """
        with self._lock:
            self._add(outcome)

    def of(
        self, files: Sequence[tuple[str, T]], compute: Callable[[Sequence[T]], Sequence[Outcome]]
    ) -> list[Outcome]:
        """The outcomes of several files, each with the SHA-256 of its bytes.

        `compute` is called once, for one file of each content that has no answer and of which no other thread is
        computing it now; its outcome, also a failure, is that of the files which wait for it.

        Raises:
            StoppedError: the table cannot be read or written.
            BaseException: what `compute` raises, here or in the thread that was waited for.
        """
        mine: dict[str, T] = {}
        found: list[Outcome | Future[Outcome]] = []
        try:
            with self._lock:
                for sha256, file in files:
                    known = self._find(sha256) or self._under_way.get(sha256)
                    if known is None:
                        known = self._under_way[sha256] = Future()
                        mine[sha256] = file
                    found.append(known)
            computed = compute(list(mine.values())) if mine else ()
            for sha256, outcome in zip(mine, computed, strict=True):
                self._settle(sha256, replace(outcome, sha256=sha256))
        except BaseException as error:
            self._abandon(mine, error)
            raise
        # Those that others compute were claimed before ours, all at one go: no two threads wait for each other.
        outcomes = [each.result() if isinstance(each, Future) else each for each in found]
        for position, (sha256, _) in enumerate(files):
            if sha256 in mine:
                del mine[sha256]
            elif outcomes[position].ok:
                outcomes[position] = replace(outcomes[position], duplicate=True)
        return outcomes

    def _settle(self, sha256: str, outcome: Outcome) -> None:
        with self._lock:
            self._add(outcome)
            future = self._under_way.pop(sha256)
        future.set_result(outcome)

    def _abandon(self, mine: Iterable[str], error: BaseException) -> None:
        with self._lock:
            futures = [self._under_way.pop(sha256) for sha256 in mine if sha256 in self._under_way]
        for future in futures:
            future.set_exception(error)

    def _find(self, sha256: str) -> Outcome | None:
        row = self._execute("SELECT outcome FROM answers WHERE sha256 = ?", bytes.fromhex(sha256)).fetchone()
        if row is None:
            return None
        width, height, top = json.loads(row[0])
        labels = [Label(*label) for label in top]
        return Outcome(width=width, height=height, top=labels, sha256=sha256, duplicate=True)

    def _add(self, outcome: Outcome) -> None:
        if outcome.ok and outcome.sha256 is not None:
            answer = json.dumps([outcome.width, outcome.height, outcome.top])
            self._execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?)", bytes.fromhex(outcome.sha256), answer
            )

    def _execute(self, statement: str, *values: bytes | str) -> sqlite3.Cursor:
        with self._stopping():
            return self._table.execute(statement, values)

    @contextlib.contextmanager
    def _stopping(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoppedError(f"cannot use the table of answers {self._path}: {error}") from error


def content_sha256(content: bytes) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
