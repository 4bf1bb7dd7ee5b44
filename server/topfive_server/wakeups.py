"""Tasks of one event loop that wait until something holds; for the batcher, whose every step begins so."""

import asyncio
from collections.abc import Callable
from time import monotonic


class Wakeups:
    """Those who wait, each with its condition. Whoever changes what conditions look at calls `look`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def until(self, condition: Callable[[], bool], *, deadline: float | None = None) -> None:
        """Wait until the condition holds, or a deadline on the monotonic clock passes."""
        if condition() or (deadline is not None and deadline <= monotonic()):
            return
        wakeup = self._loop.create_future()
        timer = None if deadline is None else self._loop.call_later(deadline - monotonic(), _set, wakeup)
        waiter = (condition, wakeup)
        self._waiting.append(waiter)
        try:
            await wakeup
        finally:
            self._waiting.remove(waiter)
            if timer is not None:
                timer.cancel()

    def look(self) -> None:
        """Wake those whose condition holds now."""
        for condition, wakeup in self._waiting:
            if condition():
                _set(wakeup)


def _set(wakeup: asyncio.Future[None]) -> None:
    if not wakeup.done():
        wakeup.set_result(None)
