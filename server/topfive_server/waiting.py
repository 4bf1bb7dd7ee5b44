"""Waiting for what is made of a request and for the answers to its images, for as long as somebody wants them."""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any, TypeVar

from topfive_server.errors import DeadlineExceededError, RequestError
from topfive_server.job import Answer, Job
from topfive_server.receive import ClientGoneError, Receive

T = TypeVar("T")


async def wait_for_work(work: asyncio.Future[T], *, deadline: float, receive: Receive) -> T:
    """What comes of work on another thread; it is cancelled when nobody waits for it any more.

    Args:
        work: on the request's body or its answer.
        deadline: on the monotonic clock.
        receive: of the request, whose body has been read.

    Raises:
        ClientGoneError: the client left.
        DeadlineExceededError: the deadline passed first.
        RequestError: what the work raises.
    """
    watch = asyncio.get_running_loop().create_task(_gone(receive))
    either: list[asyncio.Future[Any]] = [work, watch]
    try:
        left_s = max(deadline - monotonic(), 0)
        await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if watch.done():
            raise ClientGoneError
        raise DeadlineExceededError("the deadline passed before a thread had dealt with the request")
    finally:
        work.cancel()
        watch.cancel()


async def wait_for_answers(
    jobs: Sequence[Job], *, deadline: float, receive: Receive | None
) -> list[Answer | RequestError]:
    """Each image's answer or error, in order.

    Args:
        jobs: the images on their way; when nobody waits any more they are dropped wherever they are.
        deadline: on the monotonic clock.
        receive: of the request, whose body has been read; None where a client that leaves cancels the caller.

    Raises:
        ClientGoneError: the client left.
        DeadlineExceededError: the deadline passed first.
    """
    loop = asyncio.get_running_loop()
    watch = None if receive is None else loop.create_task(_gone(receive))
    if watch is not None:
        watch.add_done_callback(lambda _: _cancel(jobs))
    late = DeadlineExceededError("the deadline passed before the answer was there")
    timer = loop.call_later(max(deadline - monotonic(), 0), _fail, jobs, late)
    outcomes: list[Answer | RequestError] = []
    try:
        for job in jobs:
            try:
                outcomes.append(await job.answer)
            except RequestError as error:
                outcomes.append(error)
    except asyncio.CancelledError:
        if watch is not None and watch.done() and not watch.cancelled():
            raise ClientGoneError from None
        _cancel(jobs)  # the server itself gives up, at the end of the drain
        raise
    finally:
        timer.cancel()
    if late in outcomes:
        raise late
    return outcomes


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancel()


def _fail(jobs: Sequence[Job], error: RequestError) -> None:
    for job in jobs:
        job.fail(error)


async def _gone(receive: Receive) -> None:
    """Return when the client has left, or when it has been answered: the watch ends by itself."""
    while (await receive())["type"] != "http.disconnect":
        pass
