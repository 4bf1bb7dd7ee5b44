"""Threads that turn image files into the network's pixels, outside the event loop.

Pillow releases the GIL while it decodes and resizes, so threads use all cores. How many images wait here is bounded
by `admission`, which counts every image in flight.
"""

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from topfive.model_spec import Preprocessing
from topfive.preprocessing import ImageError, decode
from topfive_server.batcher import Job
from topfive_server.errors import InternalError, NotReadyError, RequestError, from_image_error

log = logging.getLogger(__name__)
T = TypeVar("T")


_NICE: Final = 10
"""Of the decoding threads; the event loop and the engine have 0."""


class Pixels(NamedTuple):
    """A decoded image."""

    image: NDArray[np.uint8]
    """RGB [side, side, 3]."""
    width: int
    height: int


class DecodePool:
    """Runs `topfive.preprocessing.decode` on threads."""

    def __init__(self, *, threads: int, max_pixels: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=_yield_to_others)
        self._max_pixels = max_pixels
        self._loop = asyncio.get_running_loop()

    def decode(
        self,
        data: bytes | memoryview,
        preprocessing: Preprocessing,
        side: int,
        job: Job,
        done: Callable[[Job, Pixels | RequestError | None], None],
    ) -> None:
        """Cut the central square of `side` pixels out of an image file and call `done` on the loop.

        `done` gets the pixels, an error, or None when nobody wanted the image any more and nothing was decoded.
        """
        self._threads.submit(self._decode, data, preprocessing, side, job, done)

    async def run(self, work: Callable[[], T]) -> T:
        """Run other long work (unpacking a large body) on one of the threads."""
        return await self._loop.run_in_executor(self._threads, work)

    def close(self) -> None:
        """Forget what waits, and end the threads once they have finished what they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _decode(
        self,
        data: bytes | memoryview,
        preprocessing: Preprocessing,
        side: int,
        job: Job,
        done: Callable[[Job, Pixels | RequestError | None], None],
    ) -> None:
        outcome: Pixels | RequestError | None
        # A future's state may be read from another thread; being late by a moment costs one decode.
        if not job.wanted:
            outcome = None
        else:
            try:
                decoded = decode(data, preprocessing, crop=side, max_pixels=self._max_pixels)
                outcome = Pixels(np.asarray(decoded.image), decoded.width, decoded.height)
            except ImageError as error:
                outcome = from_image_error(error)
            except MemoryError:
                outcome = NotReadyError("there was no memory to decode the image", retry_after_s=1)
            except Exception:
                log.exception("decoding failed in a way that has no name")
                outcome = InternalError("the image could not be decoded because of a mistake in the server")
        self._loop.call_soon_threadsafe(done, job, outcome)


def _yield_to_others() -> None:
    """Let whoever has almost an answer have the core first: the engine, whose threads wait for each other, and the loop."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        me = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, me, max(_NICE, os.getpriority(os.PRIO_PROCESS, me)))
