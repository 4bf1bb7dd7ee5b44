"""What a scoring job asks of whatever classifies: the seam between the job and the engine or server behind it."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from topfive.scoring._answers import Answers
from topfive.scoring._rows import Outcome

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which model answers; two rows of one job always have the same."""

    model: str
    """Name of the model."""
    version: str
    """Version of the model."""
    fingerprint: str
    """Changes when the weights or the preprocessing do."""
    classes: int
    """Number of classes the model tells apart."""
    runs_on: str
    """Where, for people: a server's URL, or the engine."""


class Scorer(Protocol):
    """Classifies files, several at a time, and answers in order."""

    @property
    def identity(self) -> Identity:
        """The model that answers; constant."""
        ...

    @property
    def chunk_files(self) -> int:
        """How many files to hand over at a time."""
        ...

    def score(self, chunks: Iterable[list[str]], answers: Answers | None = None) -> Generator[list[Outcome]]:
        """For each chunk of paths, one outcome per path, in order.

        Takes a bounded number of chunks ahead of what it yields. The same chunk gives the same outcomes whatever
        comes before it; with `answers`, whatever comes before it but files of the same bytes, which are computed once.

        Raises:
            StoppedError: no answer can be had any more (the server is gone, the engine is broken).
        """
        ...

    def close(self) -> None:
        """Free the engine or the connections."""
        ...


def run_ahead(chunks: Iterable[list[str]], start: Callable[[list[str]], T], *, ahead: int) -> Iterator[T]:
    """Start work on up to `ahead` chunks before the first is asked for; yields what `start` returned, in order."""
    pending: deque[T] = deque()
    for chunk in chunks:
        pending.append(start(chunk))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending
