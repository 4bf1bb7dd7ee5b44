"""One of several server processes: it does what its parent says, and serves the connections that it is handed.

It listens nowhere, heeds no signal, and loads nothing by itself. When its parent ends without a word, it answers what
it has accepted and ends, too.
"""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from topfive.allocator import keep_large_buffers
from topfive_server import logs
from topfive_server.app import Application
from topfive_server.canary import Canary
from topfive_server.channel import Channel
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.handover import ENDED, NOT_TAKEN, TAKEN, tell_now_and_then
from topfive_server.http_protocol import GuardedProtocol
from topfive_server.lifecycle import EXIT_LOST, STOPPING, Server
from topfive_server.metrics import Metrics
from topfive_server.metrics_sum import Snapshot, snapshot
from topfive_server.models import Models
from topfive_server.repository import Repository
from topfive_server.served_model import ServedModel, close_all
from topfive_server.server_status import MultiProcess, SingleProcess
from topfive_server.serving import Loader, computing, make_traces
from topfive_server.shares import Share

if TYPE_CHECKING:
    from topfive_server.traces import Traces

log = logging.getLogger(__name__)

_ORPHAN_S: Final = 10.0
"""Seconds beyond the drain time that a worker without a parent may still live."""
_EXHAUSTED_S: Final = 0.1
"""Seconds until the next attempt to take a connection when no file descriptor was free."""
_CLOSE_ON_EXEC: Final[int] = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
"""Where the system has it (recvmsg(2)); macOS does not."""


def main(share: Share, models: Path, control: socket.socket, line: socket.socket) -> None:
    """The process, from its first line of ours to its exit status."""
    for number in STOPPING:  # the parent acts on them; a terminal and systemd send them to every process
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # the parent blocked them until here
    keep_large_buffers()
    gc.freeze()  # what was imported stays; the collector need not look through it again and again
    logs.configure(share.config.log_format, common={"worker": share.number})
    patience_s = share.config.drain_timeout_s + _ORPHAN_S
    threading.Thread(target=_end_with_parent, args=(patience_s,), daemon=True).start()
    with asyncio.Runner(loop_factory=uvloop.Loop) as runner:
        sys.exit(runner.run(Worker(share, models).run(control, line)))


def _end_with_parent(patience_s: float) -> None:
    """Whatever the event loop does, no orphan stays: a thread of its own sees to it."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101
    parent.join()
    time.sleep(patience_s)
    os._exit(EXIT_LOST)


class Worker:
    """Answers the parent's questions, each a method named in `_handlers`."""

    def __init__(self, share: Share, models: Path) -> None:
        self._share = share
        self._config = share.config
        self._repository = Repository(models)
        self._models = Models(share.config.model)
        self._metrics = Metrics()
        self._prepared: dict[tuple[str, str], ServedModel] = {}
        self._untold = b""
        """What has become of connections, as far as the parent has not been told."""
        self._parent: Channel
        self._line: socket.socket
        self._pool: DecodePool
        self._loader: Loader
        self._application: Application
        self._traces: Traces | None = None
        self._server: _Handed | None = None
        self._serving: asyncio.Task[None] | None = None
        self._started = asyncio.Event()

    async def run(self, control: socket.socket, line: socket.socket) -> int:
        """Obey until told to finish; the exit status."""
        self._line = line
        line.setblocking(False)
        self._pool = DecodePool(
            threads=self._config.resolved_decode_threads, max_pixels=self._config.max_pixels
        )
        handlers = (
            *(self.open, self.prepare, self.discard, self.install, self.remove, self.canaries, self.serve),
            *(self.health, self.readiness, self.metrics, self.drain, self.finish, self.stop),
        )
        self._parent = await Channel.over(control, {handler.__name__: handler for handler in handlers})
        try:
            await self._until_finished()
            if self._traces is not None and self._server is not None:
                await self._traces.close(self._server.drain_left_s)
            return EXIT_LOST if self._server is not None and self._server.lost_requests else 0
        finally:
            await close_all((*self._models, *self._prepared.values()))
            self._pool.close()

    async def _until_finished(self) -> None:
        closed = asyncio.create_task(self._parent.closed.wait())
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait([closed, started], return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._serving is None:
            return
        await asyncio.wait([closed, self._serving], return_when=asyncio.FIRST_COMPLETED)
        if not self._serving.done():
            log.error("the parent process has ended; what was accepted is answered, then this one ends, too")
            await self.drain()
            await self.finish()
        closed.cancel()
        await self._serving

    # ------------------------------------------------------------------ models

    async def open(self) -> None:
        """Make everything but the models."""
        share = self._share
        _, engines, _ = computing(self._config, share.runtime, share.devices)
        self._loader = Loader(
            engines=engines,
            config=self._config,
            models=self._models,
            pool=self._pool,
            metrics=self._metrics,
        )
        server_status = MultiProcess(self._parent)
        self._traces = make_traces() if self._config.traces else None
        self._application = Application(
            self._config,
            models=self._models,
            pool=self._pool,
            metrics=self._metrics,
            reloader=server_status if self._config.admin else None,
            traces=self._traces,
            server_status=server_status,
        )

    async def prepare(self, name: str, version: str, graph: str) -> str:
        """Load a version from the folder of `graph`, out of every request's sight; returns its fingerprint."""
        found = await asyncio.to_thread(self._repository.read, graph, version)
        model = await self._loader.prepare(dataclasses.replace(found, name=name))
        self._prepared[name, version] = model
        return model.info.fingerprint

    async def discard(self, name: str, version: str) -> None:
        """Forget a prepared version: another process could not load it."""
        model = self._prepared.pop((name, version), None)
        if model is not None:
            await model.close()

    async def install(self, name: str, version: str, canaries: dict[str, Any]) -> None:
        """Let a prepared version answer."""
        self._set(canaries)
        self._loader.install(self._prepared.pop((name, version)))

    async def remove(self, name: str, version: str, canaries: dict[str, Any]) -> None:
        """Take a version out of service; it answers what it has accepted."""
        self._set(canaries)
        model = self._models.remove(name, version)
        if model is not None:
            self._loader.retire(model)

    async def canaries(self, canaries: dict[str, Any]) -> None:
        """Which versions are on trial, and their shares."""
        self._set(canaries)

    def _set(self, canaries: dict[str, Any]) -> None:
        current = self._models.canaries
        for name in set(current) - set(canaries):
            del current[name]
        for name, wanted in canaries.items():
            canary = current.get(name)
            if canary is not None and (canary.version, canary.stable) == (
                wanted["version"],
                wanted["stable"],
            ):
                canary.share = wanted["share"]
            else:
                current[name] = Canary(**wanted)

    # ------------------------------------------------------------------ what it says

    async def health(self) -> list[list[Any]]:
        """Of each version in service: name, version, whether it is ready, why not, images answered and failed.

        It ends the process where only another in its place helps; the parent starts one.
        """
        if not self._application.draining and (why := self._application.stuck):
            log.error("%s", why)
            os._exit(EXIT_LOST)
        return [
            [m.info.name, m.info.version, m.health.ready, m.health.reason, m.tally.answered, m.tally.failed]
            for m in list(self._models)
        ]

    async def readiness(self) -> dict[str, Any]:
        """The body of `/readyz` as if there were no other process."""
        return await SingleProcess(self._application).readiness()

    async def metrics(self) -> Snapshot:
        """What it has counted."""
        return snapshot(self._metrics.registry)

    # ------------------------------------------------------------------ serving

    async def serve(self) -> None:
        """Serve the connections that come over the line, from now on."""
        listening = asyncio.Event()
        server = _Handed(
            self._application, self._config, on_ready=listening.set, on_end=self._connection_ended
        )
        self._server = server
        serving = asyncio.create_task(server.serve(sockets=[]))
        started = asyncio.create_task(listening.wait())
        await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if serving.done():
            serving.result()  # raises what went wrong
        asyncio.get_running_loop().add_reader(self._line.fileno(), self._take)
        self._serving = serving
        self._started.set()

    async def drain(self) -> None:
        """Say no to `/readyz`, and ask every client to reconnect elsewhere."""
        self._application.begin_drain()

    async def finish(self) -> None:
        """Answer what has been accepted, then end."""
        assert self._server is not None  # noqa: S101
        # Everything that was handed over before this word is on the line already.
        while self._take():
            pass
        self._server.stop()

    async def stop(self) -> None:
        """End at once; requests under way are lost."""
        if self._server is not None:
            self._server.stop_at_once()

    def _take(self) -> bool:
        """Take one connection from the line; whether there was one."""
        assert self._server is not None  # noqa: S101
        try:
            data, descriptors, _, _ = socket.recv_fds(self._line, 1, 1, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors = b"", []
        if descriptors:
            self._server.adopt(socket.socket(fileno=descriptors[0]))
            self._tell(TAKEN)
        elif (
            data
        ):  # the kernel has dropped the descriptor: there was no free number for it (recvmsg(2), MSG_CTRUNC)
            self._tell(NOT_TAKEN)
            self._pause()
        else:
            asyncio.get_running_loop().remove_reader(self._line.fileno())
        return bool(data)

    def _pause(self) -> None:
        """Take none for a moment, in which the parent may give them to others, or a connection may end here."""
        tell_now_and_then("no file descriptor is free; connections wait or go to others (raise `ulimit -n`)")
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._line.fileno())
        loop.call_later(_EXHAUSTED_S, loop.add_reader, self._line.fileno(), self._take)

    def _connection_ended(self) -> None:
        self._tell(ENDED)

    def _tell(self, word: int) -> None:
        self._untold += bytes([word])
        with contextlib.suppress(OSError):  # the parent is busy, and is told with the next; or it has ended
            self._untold = self._untold[self._line.send(self._untold) :]


class _Counted(GuardedProtocol):
    """A connection whose end is told."""

    on_end: Callable[[], None]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell."""
        super().connection_lost(exc)
        self.on_end()


class _Handed(Server):
    """A server without listener and signals."""

    def __init__(
        self,
        application: Application,
        config: ServerConfig,
        *,
        on_ready: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        protocol = type("_Counted", (_Counted,), {"limits": config, "on_end": staticmethod(on_end)})
        super().__init__(application, config, on_listening=on_ready, protocol=protocol, shared=True)
        self._on_end = on_end

    def not_adopted(self) -> None:
        """Tell."""
        self._on_end()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The parent heeds them."""
        yield
