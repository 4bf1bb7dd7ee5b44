"""While a CUDA graph is captured, no other thread of the process talks to a GPU.

ONNX Runtime captures in CUDA's global mode (`cudaStreamCaptureModeGlobal`): an allocation or a synchronous copy that any
other thread makes meanwhile fails, and spoils the capture. Other threads are the engine's other lane, the lanes of other
GPUs, and the version in service while a new one is warmed up. So captures have the GPUs to themselves, for milliseconds.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from time import monotonic

log = logging.getLogger(__name__)


class Gate:
    """Many batches at a time, or one capture."""

    def __init__(self, *, patience_s: float = 5.0) -> None:
        """What takes longer than `patience_s` is waited for no longer: one engine that hangs must not stop the others."""
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._batches: dict[object, float] = {}
        self._captures: dict[object, float] = {}
        """Those under way, and when each began, on the monotonic clock."""

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """A batch: not during a capture."""
        batch = object()
        with self._changed:
            self._wait_for(self._captures, "the capture of a CUDA graph")
            self._batches[batch] = monotonic()
        try:
            yield
        finally:
            self._end(self._batches, batch)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A capture, and the allocations before it: nothing beside it."""
        capture = object()
        with self._changed:
            self._wait_for(self._captures, "the capture of a CUDA graph")
            # Nobody begins any more; it begins when those who have are done, which is given as long again.
            self._captures[capture] = monotonic() + self._patience_s
            self._wait_for(self._batches, "a batch")
            self._captures[capture] = monotonic()
        try:
            yield
        finally:
            self._end(self._captures, capture)

    def _wait_for(self, others: dict[object, float], what: str) -> None:
        """Until they have ended, or the last to begin has taken too long: then they are forgotten."""
        while others and (left_s := max(others.values()) + self._patience_s - monotonic()) > 0:
            self._changed.wait(left_s)
        if others:
            log.warning("%s has not ended within %g s; it is waited for no longer", what, self._patience_s)
            others.clear()

    def _end(self, among: dict[object, float], one: object) -> None:
        with self._changed:
            among.pop(one, None)
            self._changed.notify_all()


GATE = Gate()
"""Of this process: CUDA's mode knows no finer one."""
