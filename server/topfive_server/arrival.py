"""A request on its way to the batcher, before there is an image: it is worth waiting for, but not for long."""

import asyncio
from typing import TYPE_CHECKING

from topfive_server.job import Priority

if TYPE_CHECKING:
    from topfive_server.batcher import Batcher


class Arrival:
    """A request whose body is arriving. Ends with the body, or by itself when that is slow."""

    __slots__ = ("_batcher", "_priority", "_timer")

    def __init__(
        self, batcher: "Batcher", priority: Priority, loop: asyncio.AbstractEventLoop, patience_s: float
    ) -> None:
        self._batcher: Batcher | None = batcher
        self._priority: Priority = priority
        self._timer = loop.call_later(patience_s, self.end)

    def counts_for(self, batcher: "Batcher") -> int:
        """Images that this batcher expects because of it: 1, or 0 after its end or of another model's."""
        return int(self._batcher is batcher)

    def end(self) -> None:
        """It is there, or no longer waited for."""
        if self._batcher is not None:
            self._timer.cancel()
            self._batcher.arrived(self._priority)
            self._batcher = None
