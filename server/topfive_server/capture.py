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
        self._batches = 0
        self._capture: object | None = None
        self._overdue_at = 0.0
        """When that will have taken too long, on the monotonic clock."""

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """A batch: not during a capture."""
        with self._changed:
            self._wait_for_capture()
            self._batches += 1
        try:
            yield
        finally:
            with self._changed:
                self._batches -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A capture, and the allocations before it: nothing beside it."""
        capture = object()
        with self._changed:
            self._wait_for_capture()
            self._capture, self._overdue_at = capture, monotonic() + 2 * self._patience_s
            if not self._changed.wait_for(lambda: not self._batches, self._patience_s):
                log.warning("a batch has not come back; a CUDA graph is captured beside it")
            self._overdue_at = monotonic() + self._patience_s
        try:
            yield
        finally:
            with self._changed:
                if self._capture is capture:
                    self._capture = None
                self._changed.notify_all()

    def _wait_for_capture(self) -> None:
        while self._capture is not None:
            left_s = self._overdue_at - monotonic()
            if left_s <= 0:
                log.warning("the capture of a CUDA graph has not ended; nothing waits for it any more")
                self._capture = None
            else:
                self._changed.wait(left_s)


GATE = Gate()
"""Of this process: CUDA's mode knows no finer one."""
