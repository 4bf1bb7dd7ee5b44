"""Decoding and a processor's arithmetic take turns on the same cores.

Threads that share a layer wait for each other at its end. One that has to share its core with a decoder keeps them all
waiting, spinning, so that what the decoder gains is lost twice. While a batch computes on all cores, no further image is
decoded: 3-6 % more requests a second at 16 and 64 connections, on two cores. Where each thread takes pieces of the batch
(`network`) decoders beside them gave no fewer, but later answers (docs/lab-notes.md).
"""

import contextlib
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Final


class Turns:
    """Batches go first, decoders wait for them."""

    PATIENCE_S: Final = 2.0
    """Seconds after its beginning from which a batch is waited for no longer: a hung engine must not stop decoding."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun: dict[object, float] = {}
        """Batches that compute on all cores, and since when."""

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A batch that computes on all cores."""
        batch = object()
        with self._changed:
            self._begun[batch] = monotonic()
        try:
            yield
        finally:
            with self._changed:
                del self._begun[batch]
                self._changed.notify_all()

    def wait(self) -> None:
        """Until the batches that compute now have ended, or have computed for too long.

        Not for those that begin meanwhile: where clients send squares that need no decoding, one follows on the other, and
        files would never be decoded.
        """
        if not self._begun:  # almost always, and without a lock
            return
        with self._changed:
            before = dict(self._begun)
            while (left_s := self._left_s(before)) > 0:
                self._changed.wait(left_s)

    def _left_s(self, before: dict[object, float]) -> float:
        newest = max(
            (begun for batch, begun in before.items() if batch in self._begun), default=float("-inf")
        )
        return newest + self.PATIENCE_S - monotonic()


TURNS: Final = Turns()
"""Of this process: its engines and decoders have the same cores."""
