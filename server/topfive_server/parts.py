"""Parts of a batch, each computed by one thread of the processor from its first layer to its last.

Threads that share a batch wait for each other at every layer, and whatever interrupts one of them keeps them all. Those that
have a part each wait once, at the end. Against it: every part reads all the weights, and a small one makes little of
them. So a batch is computed in parts where that was measured to be faster (docs/lab-notes.md): in int8, whose weights are
a quarter, and where the LRN operator takes most of the time; and only if each part is large enough.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Final

import numpy as np

from topfive_server.engine import Predictions
from topfive_server.lanes import Images

GAIN: Final = frozenset({"LRN", "QuantizeLinear", "QLinearConv"})
"""Operators of the graphs for which it is faster, as they are in the file."""
LEAST: Final = 12
"""Least images of a part: two of 8 are no faster than a batch of 16, two of 4 are slower than one of 8."""


def parts_of_a_batch(operators: Iterable[str], *, threads: int, max_batch: int) -> int:
    """How many parts large batches are computed in on a processor, by the operators of the graph; 1: as a whole.

    By default on two cores only: on more, the parts of a full batch would be too small.
    """
    gains = not GAIN.isdisjoint(operators)
    return threads if gains and max_batch >= LEAST * threads else 1


def split(images: Images, parts: int) -> list[Images]:
    """The images in so many parts, in order, whose sizes differ by one at most; as a whole where they would be too small."""
    if len(images) < LEAST * parts:
        return [images]
    borders = [len(images) * part // parts for part in range(parts + 1)]
    return [images[begin:end] for begin, end in pairwise(borders)]


class Joined(Future[Predictions]):
    """The predictions for all parts in order, or the first one's error, once all have ended."""

    def __init__(self, parts: Sequence[Future[Predictions]]) -> None:
        super().__init__()
        self._parts = parts
        self._left = len(parts)
        self._counting = threading.Lock()
        for part in parts:
            part.add_done_callback(self._part_ended)

    def cancel(self) -> bool:
        """Compute no part that has not begun."""
        cancelled = super().cancel()
        for part in self._parts:
            part.cancel()
        return cancelled

    def _part_ended(self, _: Future[Predictions]) -> None:
        with self._counting:  # two may end at the same time
            self._left -= 1
            if self._left:
                return
        if not self.set_running_or_notify_cancel():
            return
        try:
            predictions = [part.result() for part in self._parts]
        except Exception as error:  # noqa: BLE001  whatever the part's caller would have got
            self.set_exception(error)
        else:
            self.set_result(Predictions(*(np.concatenate(rows) for rows in zip(*predictions, strict=True))))
