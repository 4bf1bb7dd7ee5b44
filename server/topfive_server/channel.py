"""Questions and answers between the parent and a worker: lines of JSON over a Unix socket, in both directions."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self

from topfive.errors import TopfiveError
from topfive_server.errors import RequestError
from topfive_server.session import one_line

log = logging.getLogger(__name__)

_LONGEST: Final = 64 * 1024 * 1024
"""Bytes of one message; metrics are some tens of kilobytes."""

Handler = Callable[..., Awaitable[Any]]


class ChannelError(TopfiveError):
    """The other side did not do what it was asked for; the message is its reason."""


class ChannelClosedError(ChannelError):
    """The other side has ended."""


class Channel:
    """One end. `handlers` answer what the other side asks, by name."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: dict[str, Handler]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._handlers = handlers
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._answering: set[asyncio.Task[None]] = set()
        self.closed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def over(cls, end: socket.socket, handlers: dict[str, Handler]) -> Self:
        """A channel over one end of a socket pair."""
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=_LONGEST)
        return cls(reader, writer, handlers)

    async def ask(self, what: str, **arguments: Any) -> Any:
        """What the other side's handler returns.

        Raises:
            ChannelError: its reason why not.
            ChannelClosedError: it has ended, before or meanwhile.
        """
        if self.closed.is_set():
            raise ChannelClosedError("the process has ended")
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._send({"ask": number, "what": what, "arguments": arguments})
            return await answer
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """End the conversation; idempotent."""
        self._writer.close()
        self._task.cancel()
        self._ended()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "ask" in message:
                    task = asyncio.get_running_loop().create_task(self._answer(message))
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
                else:
                    self._receive(message)
        except OSError:
            pass  # as good as the end
        finally:
            self._ended()

    def _receive(self, message: dict[str, Any]) -> None:
        answer = self._waiting.get(message["answer"])
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if "error" in message:
            answer.set_exception(ChannelError(message["error"]))
        else:
            answer.set_result(message["value"])

    async def _answer(self, message: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"answer": message["ask"]}
        try:
            reply["value"] = await self._handlers[message["what"]](**message["arguments"])
        except (TopfiveError, RequestError, OSError, ValueError, TimeoutError) as error:
            reply["error"] = one_line(error)
        except Exception as error:
            log.exception("a mistake of ours: %s", message["what"])
            reply["error"] = f"a mistake of ours, {type(error).__name__}: {one_line(error)}"
        self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended, which the reader notices
            self._writer.write(json.dumps(message).encode() + b"\n")

    def _ended(self) -> None:
        self.closed.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ChannelClosedError("the process has ended"))
