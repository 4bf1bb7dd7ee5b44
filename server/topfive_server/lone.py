"""An image that has the engine to itself: the engine's thread decodes it, and goes on with it.

On the way that every image can take, four threads hand a request on: the event loop to a decode thread, that back to
the loop, the loop to the engine's thread, that back again. Each is woken, on another core, with cold caches, and two of
them may want the interpreter at once. A client who is alone waits for all of it (docs/lab-notes.md).
"""

import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from topfive_server.decode_pool import Outcome, Pixels
from topfive_server.job import Job

if TYPE_CHECKING:
    import asyncio


class LoneImage:
    """One image on that way. The engine's thread calls it; everything else is for the event loop's."""

    __slots__ = (
        "_decided",
        "_decode",
        "_not_after",
        "_since",
        "begun",
        "decoded",
        "given_up",
        "job",
        "outcome",
        "shared",
        "timer",
    )

    def __init__(
        self,
        job: Job,
        decode: Callable[[], Outcome],
        decoded: Callable[[Job, Outcome], None],
        *,
        not_after: float,
    ) -> None:
        """A computation that begins after `not_after` would come too late; on the monotonic clock."""
        self.job = job
        self.decoded = decoded
        """Takes the outcome where it is not computed at once."""
        self.timer: asyncio.TimerHandle
        """Looks after an engine that does not answer."""
        self.given_up = False
        """Whether it did not."""
        self.outcome: Outcome = None
        self.begun = 0.0
        """When the engine began to compute, on the monotonic clock; 0 before."""
        self.shared = False
        """Whether `share` was in time."""
        self._decode = decode
        self._not_after = not_after
        self._since = monotonic()
        # Taken once and never given back, by whoever is first: the engine's thread to compute, or the loop to share.
        self._decided = threading.Lock()

    def __call__(self) -> NDArray[np.uint8] | None:
        """Decode. The pixels are to be computed at once; None is not."""
        job, outcome = self.job, self._decode()
        self.outcome = outcome
        now = monotonic()
        worthwhile = job.wanted and now < self._not_after
        if not isinstance(outcome, Pixels) or not worthwhile or not self._decided.acquire(blocking=False):
            return None
        # What the queue would have written. Nobody else writes to the job, from here until it is answered.
        job.width, job.height = outcome.width, outcome.height
        job.decode_s = now - self._since
        job.queued_at = job.ready_at = self.begun = now
        return outcome.image

    def share(self) -> bool:
        """Do not compute it at once: it is to join others. Whether that was in time."""
        self.shared = self._decided.acquire(blocking=False)
        return self.shared

    def watch(self, loop: "asyncio.AbstractEventLoop", timeout_s: float, overdue: Callable[[], None]) -> None:
        """Call `overdue` when the engine has not answered for so long; what decoding took is not its fault."""
        left_s = (self.begun or monotonic()) + timeout_s - monotonic()
        if left_s > 0:
            self.timer = loop.call_later(left_s, self.watch, loop, timeout_s, overdue)
        else:
            self.given_up = True
            overdue()
