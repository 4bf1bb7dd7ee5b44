"""Threads that turn image files into the network's pixels, outside the event loop.

Pillow releases the GIL while it decodes and resizes, so threads use all cores. How many images wait here is bounded
by `admission`, which counts every image in flight.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic, perf_counter
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from topfive.model_spec import Preprocessing
from topfive.preprocessing import ImageError, decode
from topfive_server.devices import cores
from topfive_server.errors import InternalError, NotReadyError, RequestError, from_image_error
from topfive_server.estimate import Average
from topfive_server.job import Job
from topfive_server.turns import TURNS

log = logging.getLogger(__name__)
T = TypeVar("T")


class Pixels(NamedTuple):
    """A decoded image."""

    image: NDArray[np.uint8]
    """RGB [side, side, 3]."""
    width: int
    height: int


Outcome: TypeAlias = Pixels | RequestError | None
"""What decoding comes to: the pixels, an error, or None when nobody wanted the image any more and nothing was decoded."""


class DecodePool:
    """Runs `topfive.preprocessing.decode` on threads."""

    def __init__(self, *, threads: int, max_pixels: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._since = [float("inf")] * threads
        """When each thread began what it does, on the monotonic clock; infinity while it waits for work."""
        self._max_pixels = max_pixels
        self._at_once = min(threads, cores(hyper_threads=True))
        self._each_s = Average()
        """Of one thread for one image."""
        self._loop = asyncio.get_running_loop()
        for number in range(threads):
            # Daemons, which an executor's threads are not: one that is stuck must not keep the process from ending.
            threading.Thread(target=self._serve, args=(number,), name=f"decode-{number}", daemon=True).start()

    def decode(
        self,
        data: bytes | memoryview,
        preprocessing: Preprocessing,
        side: int,
        job: Job,
        done: Callable[[Job, Outcome], None],
    ) -> None:
        """Cut the central square of `side` pixels out of an image file, and call `done` on the loop."""
        waiting = [data]
        # Work stays in the queue until a thread is free, also for nobody; the file it need not keep so long.
        job.answer.add_done_callback(lambda _: waiting.clear())
        self._work.put(partial(self._decode, waiting, preprocessing, side, job, done))

    def decode_here(
        self, data: bytes | memoryview, preprocessing: Preprocessing, side: int, job: Job
    ) -> Outcome:
        """Cut it out in the calling thread."""
        TURNS.wait()
        # A future's state may be read from another thread; being late by a moment costs one decode.
        return self._cut_out(data, preprocessing, side) if job.wanted else None

    @property
    def seconds_per_image(self) -> float:
        """Seconds for each of many images when all threads decode, as measured; 0 while nothing is known."""
        return self._each_s.or_zero() / self._at_once

    def why_stuck(self, patience_s: float) -> str:
        """A sentence when every thread has been at one and the same image or body for longer than so many seconds.

        Empty while one is free or makes progress. A thread cannot be stopped: only a new process helps.
        """
        stuck_s = monotonic() - max(self._since)
        if stuck_s <= patience_s:
            return ""
        return f"decoding has been stuck for {stuck_s:.0f} s in every thread; restart the process"

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do other long work (unpacking a large body) on one of the threads, unless the future is cancelled before."""
        answer: asyncio.Future[T] = self._loop.create_future()
        waiting = [work]
        answer.add_done_callback(lambda _: waiting.clear())  # it holds the body
        self._work.put(partial(self._run, waiting, answer))
        return answer

    def close(self) -> None:
        """Forget what waits, and end the threads once they have finished what they do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._work.get_nowait()
        for _ in self._since:
            self._work.put(None)

    def _serve(self, number: int) -> None:
        while (work := self._work.get()) is not None:
            self._since[number] = monotonic()
            work()
            self._since[number] = float("inf")
            del work  # and what it holds, while the thread waits for more

    def _run(self, waiting: list[Callable[[], T]], answer: asyncio.Future[T]) -> None:
        try:
            work = waiting.pop()
        except IndexError:
            return  # nobody wants it any more
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  the caller's
            self._tell(_settle, answer, error)
        else:
            self._tell(_settle, answer, result)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        # RuntimeError: the loop has been closed, and the server has ended without this thread.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *arguments)

    def _cut_out(self, data: bytes | memoryview, preprocessing: Preprocessing, side: int) -> Outcome:
        begun = perf_counter()
        try:
            decoded = decode(data, preprocessing, crop=side, max_pixels=self._max_pixels)
            pixels = Pixels(np.asarray(decoded.image), decoded.width, decoded.height)
        except ImageError as error:
            return from_image_error(error)
        except MemoryError:
            return NotReadyError("there was no memory to decode the image", retry_after_s=1)
        except Exception:
            log.exception("decoding failed in a way that has no name")
            return InternalError("the image could not be decoded because of a mistake in the server")
        self._each_s.observe(perf_counter() - begun)  # from several threads; a lost one is no loss
        return pixels

    def _decode(
        self,
        waiting: list[bytes | memoryview],
        preprocessing: Preprocessing,
        side: int,
        job: Job,
        done: Callable[[Job, Outcome], None],
    ) -> None:
        outcome: Outcome = None
        try:
            data = waiting.pop()
        except IndexError:
            pass  # nobody wants it any more
        else:
            outcome = self.decode_here(data, preprocessing, side, job)
        self._tell(done, job, outcome)


def _settle(answer: asyncio.Future[T], outcome: T | Exception) -> None:
    """Answer, unless nobody waits any more."""
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
