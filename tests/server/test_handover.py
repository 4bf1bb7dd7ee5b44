"""Which worker is handed a connection: real sockets, and workers whose every word the test says."""

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from topfive_server.config import ServerConfig
from topfive_server.devices import Device
from topfive_server.handover import ENDED, TAKEN, Handover, Line
from topfive_server.session import RuntimeOptions
from topfive_server.shares import divide
from topfive_server.worker import Worker


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("the condition never held")


class Workers:
    """Two lines, this end of them, and clients of the listener whose connections are dealt out."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        pairs = [socket.socketpair() for _ in range(2)]
        self.ends = [stack.enter_context(theirs) for _, theirs in pairs]
        for end in self.ends:
            end.setblocking(False)
        self.lines = [Line(ours) for ours, _ in pairs]
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self.serving = list(self.lines)
        self.handover = Handover(self.listener, lambda: self.serving)
        for line in self.lines:
            stack.callback(line.close)
            line.on_return = self.handover.take_back
        self.handover.start()

    async def connect(self) -> int:
        """Which worker is handed the next connection: it has been told, and has not said that it took it."""
        before = [line.given for line in self.lines]
        self._stack.enter_context(socket.create_connection(self.address))
        await until(lambda: [line.given for line in self.lines] != before)
        return next(n for n, line in enumerate(self.lines) if line.given != before[n])

    async def say(self, worker: int, *words: int) -> None:
        self.ends[worker].send(bytes(words))
        await asyncio.sleep(0.01)

    def received(self, worker: int) -> int:
        """Connections that arrived there since the last look."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _, descriptors, _, _ = socket.recv_fds(self.ends[worker], 1, 1)
                for descriptor in descriptors:
                    socket.socket(fileno=descriptor).close()
                    count += 1
        return count


@contextlib.asynccontextmanager
async def workers() -> AsyncIterator[Workers]:
    with contextlib.ExitStack() as stack:
        w = Workers(stack)
        yield w
        if w.listener.fileno() >= 0:
            w.serving = []
            await w.handover.finish(0)


def test_connections_that_stay_open_are_shared_out_evenly() -> None:
    async def main() -> None:
        async with workers() as w:
            dealt = [await w.connect() for _ in range(16)]
            assert (dealt.count(0), dealt.count(1)) == (8, 8)
            assert (w.received(0), w.received(1)) == (8, 8)

    asyncio.run(main())


def test_connections_one_after_the_other_go_round() -> None:
    async def main() -> None:
        async with workers() as w:
            dealt = []
            for _ in range(6):
                dealt.append(await w.connect())
                await w.say(dealt[-1], TAKEN, ENDED)
            assert dealt == [0, 1, 0, 1, 0, 1]

    asyncio.run(main())


def test_the_worker_with_fewer_open_connections_has_the_next_whatever_it_was_given() -> None:
    async def main() -> None:
        async with workers() as w:
            assert [await w.connect(), await w.connect()] == [0, 1]
            for _ in range(3):  # those of 0 are short, that of 1 stays
                await w.say(0, TAKEN, ENDED)
                assert await w.connect() == 0

    asyncio.run(main())


def test_what_a_worker_had_not_taken_when_it_ended_goes_to_another() -> None:
    async def main() -> None:
        async with workers() as w:
            assert [await w.connect() for _ in range(4)] == [0, 1, 0, 1]
            await w.say(0, TAKEN)
            w.serving = [w.lines[1]]
            w.ends[0].close()
            await until(lambda: w.lines[1].given == 3)
            assert w.received(1) == 3, "the one that had been taken ends with its worker"

    asyncio.run(main())


def test_a_connection_waits_while_no_worker_serves() -> None:
    async def main() -> None:
        async with workers() as w:
            both, w.serving = w.serving, []
            waiting = asyncio.ensure_future(w.connect())
            await asyncio.sleep(0.1)
            assert not waiting.done()
            w.serving = both
            assert await waiting == 0
            assert await w.connect() == 1, "and later ones are accepted again"

    asyncio.run(main())


@contextlib.contextmanager
def no_descriptor_free() -> Iterator[None]:
    """Every number below the limit is in use."""
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_free_descriptor_the_parent_waits_instead_of_spinning() -> None:
    async def main() -> None:
        async with workers() as w:
            attempts = Mock(side_effect=w.handover._take)
            w.handover._take = attempts  # type: ignore[method-assign]
            with socket.socket() as client:
                client.setblocking(False)
                with no_descriptor_free():
                    client.connect_ex(w.address)
                    await asyncio.sleep(0.3)
                assert 1 <= attempts.call_count < 100  # thousands, where it spins
                await until(lambda: w.lines[0].given == 1)

    asyncio.run(main())


def test_a_connection_for_which_a_worker_has_no_descriptor_goes_to_another() -> None:
    async def main() -> None:
        async with workers() as w:
            assert [await w.connect() for _ in range(3)] == [0, 1, 0]
            share = divide(ServerConfig(), RuntimeOptions(), [Device(kind="cpu", reason="test")])[0]
            worker = Worker(share, Path())
            worker._line = w.ends[0]
            worker._server = server = Mock()
            assert worker._take()
            with no_descriptor_free():
                assert worker._take()
            await until(lambda: w.lines[1].given == 2)
            assert w.received(1) == 2
            # Later ones are taken again, and are let go of here.
            await w.say(1, TAKEN, TAKEN)
            assert (await w.connect(), (w.lines[0].open, w.lines[1].open)) == (0, (2, 2))
            await until(lambda: server.adopt.call_count == 2 and not w.lines[0]._untaken)
            for call in server.adopt.call_args_list:
                call.args[0].close()

    asyncio.run(main())


def test_what_the_kernel_has_accepted_is_handed_out_in_the_end_also_to_a_worker_that_is_slow() -> None:
    async def main() -> None:
        async with workers() as w:
            w.serving = [w.lines[0]]
            give, w.lines[0].give = w.lines[0].give, lambda connection: False  # type: ignore[method-assign]
            with socket.create_connection(w.address), socket.create_connection(w.address):
                finishing = asyncio.ensure_future(w.handover.finish(10))
                await asyncio.sleep(0.1)
                w.lines[0].give = give  # type: ignore[method-assign]
                await finishing
                assert w.received(0) == 2

    asyncio.run(main())
