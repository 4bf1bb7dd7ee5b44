"""The parent's view of one worker process: how it is started, asked, and ended."""

import asyncio
import contextlib
import multiprocessing
import signal
import socket
from collections.abc import Awaitable, Generator, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from topfive_server import worker
from topfive_server.channel import Channel, ChannelError, Handler
from topfive_server.engine import EngineError
from topfive_server.handover import Line
from topfive_server.lifecycle import STOPPING
from topfive_server.repository import ModelVersion
from topfive_server.shares import Share

T = TypeVar("T")


class WorkerProcess:
    """One worker, from its start to its end; another takes its place."""

    def __init__(self, share: Share, process: Any, channel: Channel, line: Line) -> None:
        self.share = share
        self.number = share.number
        self.channel = channel
        self.line = line
        self.serving = False
        """Whether it is handed connections."""
        self.rows: list[list[Any]] = []
        """What its `health` said last."""
        self.ended = asyncio.Event()
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.sentinel, self._has_ended)

    @classmethod
    async def start(cls, share: Share, models: Path, handlers: dict[str, Handler]) -> Self:
        """Start the process; it answers once it has imported what it needs.

        Spawned, not forked: the libraries that compute have threads, which a fork does not copy.
        """
        control, control_there = socket.socketpair()
        line, line_there = socket.socketpair()
        process = multiprocessing.get_context("spawn").Process(
            target=worker.main,
            args=(share, models, control_there, line_there),
            name=f"topfive worker {share.number}",
        )
        with control_there, line_there, _signals_held_back():
            process.start()
        return cls(share, process, await Channel.over(control, handlers), Line(line))

    @property
    def exit_status(self) -> int | None:
        """As of `multiprocessing`: negative for a signal, None while it lives."""
        status: int | None = self._process.exitcode
        return status

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    async def prepare(self, version: ModelVersion) -> str:
        """Let it load a version, out of every request's sight; returns the fingerprint of what it loaded.

        Raises:
            EngineError: it cannot.
        """
        try:
            fingerprint: str = await self.channel.ask(
                "prepare", name=version.name, version=version.version, graph=version.graph
            )
        except ChannelError as error:
            raise EngineError(f"worker {self.number}: {error}") from error
        return fingerprint

    async def tell(self, what: str, **arguments: Any) -> None:
        """Ask for something that only a dead worker does not do; it will be told when it is back."""
        with contextlib.suppress(ChannelError):
            await self.channel.ask(what, **arguments)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    async def reap(self) -> None:
        """Wait for its end, and free what was kept for it."""
        await self.ended.wait()
        await asyncio.to_thread(self._process.join)
        self.channel.close()
        self.line.close()

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self.serving = False
        self.ended.set()


async def wait_for_all(attempts: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all, then raise the first failure: none is left running."""
    results = await asyncio.gather(*attempts, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


@contextlib.contextmanager
def _signals_held_back() -> Generator[None, None, None]:
    """A signal must not end a process that has not come to ignoring it; the mask is inherited, dispositions are not kept."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
