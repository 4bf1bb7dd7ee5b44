"""An engine from its making to its release: none is left running unseen, and nobody waits for one that hangs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from topfive_server.engine import Engine, EngineError
from topfive_server.session import one_line

log = logging.getLogger(__name__)

EngineFactory: TypeAlias = Callable[[], Awaitable[Engine]]
"""Makes an engine, cold."""

CLOSE_TIMEOUT_S: Final = 5.0
"""Seconds that an engine is given to release its device; a hung one never will."""

_closing: Final[set[asyncio.Task[None]]] = set()
"""Under way: an event loop forgets tasks that nobody holds."""


async def open_engine(build: EngineFactory, *, warm_up_timeout_s: float) -> Engine:
    """Build an engine and warm it up; where that fails or is cancelled, the engine is closed.

    Building takes as long as it takes: reading a model does not hang, and TensorRT compiles it for minutes.

    Raises:
        EngineError: it was not warm within `warm_up_timeout_s` seconds; or what `build` and `Engine.warm_up` raise.
    """
    building = asyncio.ensure_future(build())
    try:
        # A thread that opens a session cannot be stopped; shielded, its engine is not lost.
        engine = await asyncio.shield(building)
    except asyncio.CancelledError:
        building.add_done_callback(_close_unwanted)
        raise
    try:
        async with asyncio.timeout(warm_up_timeout_s):
            await engine.warm_up()
    except BaseException as error:
        await close_engine(engine)
        if isinstance(error, TimeoutError):
            raise EngineError(f"the engine was not warm within {warm_up_timeout_s:g} s") from None
        raise
    return engine


async def close_engine(engine: Engine) -> None:
    """Let an engine finish what it has and release its device; one that has not within 5 s is left to itself.

    It is told to in any case, also where the caller is cancelled. Raises nothing: the log says what went wrong.
    """
    closing = _told_to_close(engine)
    await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
    if not closing.done():
        log.warning(
            "%s has not closed within %g s and is left to itself", closing.get_name(), CLOSE_TIMEOUT_S
        )


def _told_to_close(engine: Engine) -> asyncio.Task[None]:
    name = f"the engine of {engine.info.name} version {engine.info.version}"
    closing = asyncio.get_running_loop().create_task(engine.close(), name=name)
    _closing.add(closing)
    closing.add_done_callback(_closed)
    return closing


def _closed(closing: asyncio.Task[None]) -> None:
    _closing.discard(closing)
    if not closing.cancelled() and (error := closing.exception()) is not None:
        log.warning("%s did not close: %s", closing.get_name(), one_line(error))


def _close_unwanted(building: asyncio.Future[Engine]) -> None:
    """Close an engine that is there only now that nobody waits for it."""
    if not building.cancelled() and building.exception() is None:
        _told_to_close(building.result())
