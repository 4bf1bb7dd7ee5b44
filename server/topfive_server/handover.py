"""One listener, many processes: the parent accepts, and hands each connection to the worker that has the fewest.

The kernel could deal connections out by itself (`SO_REUSEPORT`, or a listener that all share), but by chance, and
connections that stay open stay where they fell: of sixteen, up to twelve in one of two processes, or all of them
(docs/lab-notes.md). A connection that waits here, or that a dying worker has not taken yet, is given to another.

A connection travels over a *line*, a Unix socket: one byte with the file descriptor beside it. The worker sends back
`+` when it has taken it, upon which the parent lets go of it, and `-` when it has ended; or `?` when it could not take it.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Final

log = logging.getLogger(__name__)

TAKEN: Final = ord("+")
ENDED: Final = ord("-")
NOT_TAKEN: Final = ord("?")
"""The worker has no file descriptor left."""
_AT_ONCE: Final = 64
"""Connections accepted before the loop does something else."""
_RETRY_S: Final = 0.02
"""Seconds until the next attempt when no worker can take a connection, or none can be accepted."""
_SILENCE_S: Final = 60.0
"""Seconds until the same error is logged again."""
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of `accept` that stay until something is freed (accept(2)); the connection waits in the kernel."""


_told: dict[str, float] = {}


def tell_now_and_then(message: str, *arguments: object) -> None:
    """Log an error that would otherwise fill the log: once a minute."""
    now = monotonic()
    if now - _told.get(message, float("-inf")) >= _SILENCE_S:
        _told[message] = now
        log.error(message, *arguments)


class Line:
    """The parent's end of the line to one worker."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(end.fileno(), self._heard)
        self.given = 0
        """Connections handed over so far."""
        self.open = 0
        """Of those, the ones that have not ended."""
        self.on_return: Callable[[list[socket.socket]], None] = _close_all
        """Gets the connections that the worker could not take, or had not taken when it ended."""
        self._untaken: deque[socket.socket] = deque()

    def give(self, connection: socket.socket) -> bool:
        """Hand a connection over; False when the worker takes none now. It belongs to the line from then on."""
        try:
            socket.send_fds(self._end, [b"+"], [connection.fileno()])
        except OSError:  # it has ended, or it does not read
            return False
        self._untaken.append(connection)
        self.given += 1
        self.open += 1
        return True

    def finish(self) -> None:
        """Say that there will be no more connections."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Give the line up; idempotent."""
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end.fileno())
            self._end.close()
        untaken = [*self._untaken]
        self._untaken.clear()
        if untaken:
            self.on_return(untaken)

    def _heard(self) -> None:
        try:
            words = self._end.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        refused = []
        for word in words:
            if word == TAKEN:
                self._untaken.popleft().close()
                continue
            self.open -= 1
            if word == NOT_TAKEN:
                refused.append(self._untaken.popleft())
        if refused:
            self.on_return(refused)
        if not words:
            self.close()


class Handover:
    """Accepts on a bound listener and hands out."""

    def __init__(self, listener: socket.socket, lines: Callable[[], Iterable[Line]]) -> None:
        """`lines`: those of the workers that serve now."""
        self._listener = listener
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._held: deque[socket.socket] = deque()
        """Accepted, and nobody could take them yet."""
        self._exhausted = False
        """Whether the last connection could not be accepted."""
        self._finishing = False
        self._retry: asyncio.Handle | None = None

    def start(self) -> None:
        """Accept; the listener listens."""
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def take_back(self, connections: list[socket.socket]) -> None:
        """Give connections to others: their worker could not take them, or has ended before it did."""
        if self._listener.fileno() < 0:  # no worker takes any more
            _close_all(connections)
            return
        self._held.extend(connections)
        self._pause()

    async def finish(self, patience_s: float) -> None:
        """Hand out what the kernel has accepted in our name, then close the listener.

        Workers that cannot take them at once have `patience_s` seconds.
        """
        self._pause()
        self._finishing = True
        ends = self._loop.time() + patience_s
        while self._take() or self._held or self._exhausted:
            self._give_held()
            if self._held or self._exhausted:
                if not self._lines() or self._loop.time() > ends:
                    break
                await asyncio.sleep(_RETRY_S)
        self._listener.close()
        _close_all(self._held)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._take():
                break
            self._give_held()
            if self._held:
                break
        if self._held or self._exhausted:
            # What has not been accepted waits in the kernel, and is not lost with this process either.
            self._pause()

    def _take(self) -> bool:
        """Accept one connection; whether there was one, and it could be accepted."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # BlockingIOError: there is no more; or its client has left
            self._exhausted = error.errno in _EXHAUSTED
            if self._exhausted:
                tell_now_and_then(
                    "no connection can be accepted: %s; they wait (raise `ulimit -n`)", error.strerror
                )
            return False
        self._exhausted = False
        connection.setblocking(False)
        self._held.append(connection)
        return True

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        if self._retry is None:
            self._retry = self._loop.call_later(_RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        if self._finishing:
            return
        self._give_held()
        if self._held:
            self._pause()
        else:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _give_held(self) -> None:
        while self._held:
            # Of several with as few, the one that has had the fewest in all: short connections go round.
            lines = sorted(self._lines(), key=lambda line: (line.open, line.given))
            if not any(line.give(self._held[0]) for line in lines):
                return
            self._held.popleft()


def _close_all(connections: Iterable[socket.socket]) -> None:
    for connection in connections:
        connection.close()
