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
        """A capture that has waited for `patience_s` goes ahead: a batch that hangs must not stop a new engine, too."""
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._batches = 0
        self._capturing = False

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """A batch: not during a capture."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
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
        end = monotonic() + self._patience_s
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._capturing = True
            if not self._changed.wait_for(lambda: not self._batches, max(0.0, end - monotonic())):
                log.warning("a batch has not come back; a CUDA graph is captured beside it")
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._changed.notify_all()


GATE = Gate()
"""Of this process: CUDA's mode knows no finer one."""
