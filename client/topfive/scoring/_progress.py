"""Progress of a job for the person watching: a bar in a terminal, a line now and then in a log."""

import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_EVERY_S = 30.0


class Reporter(Protocol):
    """Told of a job's progress."""

    def begin(self, *, total: int, done: int, failures: int) -> None:
        """The job has `total` files, of which `done` were scored before, `failures` of them in vain."""
        ...

    def advance(self, *, files: int, failures: int) -> None:
        """`files` more are scored, `failures` of them in vain."""
        ...

    def note(self, sentence: str) -> None:
        """Something the person should know."""
        ...

    def end(self) -> None:
        """No more is to come."""
        ...


class Silent:
    """Reports nothing."""

    def begin(self, *, total: int, done: int, failures: int) -> None:
        """See `Reporter.begin`."""

    def advance(self, *, files: int, failures: int) -> None:
        """See `Reporter.advance`."""

    def note(self, sentence: str) -> None:
        """See `Reporter.note`."""

    def end(self) -> None:
        """See `Reporter.end`."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.1f} images/s")


class Bar:
    """A bar with rate, remaining time and failures, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]} failed"),
            console=console,
            speed_estimate_period=60,
        )
        self._failures = 0
        self._task = self._progress.add_task("scoring", start=False, total=None, failures=0)

    def begin(self, *, total: int, done: int, failures: int) -> None:
        """See `Reporter.begin`."""
        self._failures = failures
        self._progress.update(self._task, total=total, completed=done, failures=failures)
        self._progress.start_task(self._task)
        self._progress.start()

    def advance(self, *, files: int, failures: int) -> None:
        """See `Reporter.advance`."""
        self._failures += failures
        self._progress.update(self._task, advance=files, failures=self._failures)

    def note(self, sentence: str) -> None:
        """See `Reporter.note`."""
        self._progress.console.print(sentence, highlight=False, markup=False)

    def end(self) -> None:
        """See `Reporter.end`."""
        self._progress.stop()


class Lines:
    """The same as lines of text, half a minute apart, where there is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total = self._done = self._failures = self._before = 0
        self._started_s = self._printed_s = time.monotonic()

    def begin(self, *, total: int, done: int, failures: int) -> None:
        """See `Reporter.begin`."""
        self._total, self._done, self._failures, self._before = total, done, failures, done
        self._started_s = self._printed_s = time.monotonic()

    def advance(self, *, files: int, failures: int) -> None:
        """See `Reporter.advance`."""
        self._done += files
        self._failures += failures
        if time.monotonic() - self._printed_s >= _LINE_EVERY_S:
            self._print_line()

    def _print_line(self) -> None:
        self._printed_s = time.monotonic()
        rate = (self._done - self._before) / max(self._printed_s - self._started_s, 1e-9)
        remaining_s = (self._total - self._done) / rate if rate else float("inf")
        self.note(
            f"scored {self._done:,} of {self._total:,} ({self._failures:,} failed), "
            f"{rate:,.1f} images/s, {remaining_s / 60:,.0f} min left"
        )

    def note(self, sentence: str) -> None:
        """See `Reporter.note`."""
        print(sentence, file=self._stream, flush=True)

    def end(self) -> None:
        """See `Reporter.end`."""
