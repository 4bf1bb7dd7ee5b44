"""Decoding and a processor's arithmetic take turns on the same cores.

The threads of a batch wait for each other at every layer. One that has to share its core with a decoder keeps them all
waiting, spinning, so that what the decoder gains is lost twice. While a batch computes on all cores, no further image is
decoded: 3-6 % more requests a second at 16 and 64 connections, on two cores (docs/lab-notes.md). Where each core computes
a part of the batch (`parts`), the one that ends first is the decoders' at once.
"""

import contextlib
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Final

from topfive_server.config import available_cores


class Turns:
    """Batches go first, decoders have the cores that are left."""

    PATIENCE_S: Final = 2.0
    """Seconds after its beginning from which a batch is waited for no longer: a hung engine must not stop decoding."""

    def __init__(self, cores: int) -> None:
        """`cores`: those that both have."""
        self._cores = cores
        self._changed = threading.Condition()
        self._begun: dict[object, tuple[float, float]] = {}
        """What computes: since when, and on which share of the cores."""
        self._decoding = 0
        """Images that are being decoded."""

    @contextlib.contextmanager
    def computing(self, share: float = 1.0) -> Iterator[None]:
        """A batch that computes on all cores, or a part of one on its share of them."""
        this = object()
        with self._changed:
            self._begun[this] = monotonic(), share
        try:
            yield
        finally:
            with self._changed:
                del self._begun[this]
                self._changed.notify_all()

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """An image that is decoded as soon as there is a core for it.

        At the latest when all that computes now has ended, or has computed for too long. What begins meanwhile is not
        waited for: where clients send squares that need no decoding, one batch follows on the other, and files would never
        be decoded.
        """
        with self._changed:
            before = set(self._begun)
            while not self._has_room() and (left_s := self._left_s(before)) > 0:
                self._changed.wait(left_s)
            self._decoding += 1
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= 1
                self._changed.notify()

    @property
    def _taken(self) -> float:
        """Share of the cores that is computed on."""
        return sum(share for _, share in self._begun.values())

    def _has_room(self) -> bool:
        return self._decoding < round(self._cores * (1 - self._taken))

    def _left_s(self, before: set[object]) -> float:
        newest = max(
            (begun for this, (begun, _) in self._begun.items() if this in before), default=float("-inf")
        )
        return newest + self.PATIENCE_S - monotonic()


TURNS: Final = Turns(available_cores())
"""Of this process: its engines and decoders have the same cores."""
