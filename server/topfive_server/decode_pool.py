"""Threads that turn image files into the network's pixels, outside the event loop.

Pillow releases the GIL while it decodes and resizes, so threads use all cores. How many images wait here is bounded
by `admission`, which counts every image in flight.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
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
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._max_pixels = max_pixels
        self._at_once = min(threads, cores(hyper_threads=True))
        self._each_s = Average()
        """Of one thread for one image."""
        self._loop = asyncio.get_running_loop()

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
        # The executor keeps its work until a thread is free, also for nobody; the file it need not keep so long.
        job.answer.add_done_callback(lambda _: waiting.clear())
        self._threads.submit(self._decode, waiting, preprocessing, side, job, done)

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

    async def run(self, work: Callable[[], T]) -> T:
        """Run other long work (unpacking a large body) on one of the threads."""
        return await self._loop.run_in_executor(self._threads, work)

    def close(self) -> None:
        """Forget what waits, and end the threads once they have finished what they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)

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
        self._loop.call_soon_threadsafe(done, job, outcome)
