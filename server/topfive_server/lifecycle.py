"""From SIGTERM to exit code 0 without losing an accepted request.

1. `/readyz` says no, answers carry `Connection: close`; everything is still served for `drain_delay_s`, so that load
   balancers have time to notice.
2. The listeners close, HTTP's and gRPC's. Requests under way are answered; what still arrives on open connections gets
   503 `draining`.
3. When the last answer is sent, or after `drain_timeout_s`, the models close and the process ends.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from topfive_server.app import Application
from topfive_server.config import ServerConfig
from topfive_server.http_protocol import GuardedProtocol, guarded
from topfive_server.serving import StartError

if TYPE_CHECKING:
    from topfive_server.oip_grpc import GrpcServer

log = logging.getLogger(__name__)

STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end the server: a supervisor's, that of Ctrl-C, and that of a terminal which is closed."""
EXIT_LOST: Final = 1
"""Exit status: requests were cut off, because the drain time was over before they were answered."""
_BACKLOG: Final = 2048
"""Connections that the kernel accepts in our name and keeps until we take them."""
_LAST_WORDS_S: Final = 1.0
"""Seconds that requests which are cut off have to say so."""
_SO_ATTACH_FILTER: Final = 26
"""Linux's; Python's socket module does not name it."""
_DROP_SYN: Final = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that has the flags
    (0x45, 0, 1, 0x02),  # if SYN is set:
    (0x06, 0, 0, 0),  # keep no byte of the packet,
    (0x06, 0, 0, 0xFFFFFFFF),  # else all
)
"""A classic BPF program: code, jump if true, jump if false, operand."""
_HANDSHAKE_S: Final = 0.05
"""Seconds that a handshake is given to end: several round trips between machines that are near each other."""


class Server(uvicorn.Server):
    """Uvicorn, driven by us: its signal handling would end the process with the signal instead of 0."""

    def __init__(
        self,
        application: Application,
        config: ServerConfig,
        *,
        on_listening: Callable[[], None] = lambda: None,
        protocol: type[GuardedProtocol] | None = None,
        shared: bool = False,
    ) -> None:
        """`shared`: other processes listen on the same gRPC port."""
        super().__init__(
            uvicorn.Config(
                application,
                loop="none",  # the caller's
                http=protocol or guarded(config),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]  # a delay, for `call_later`
                ssl_certfile=config.tls_certificate,
                ssl_keyfile=config.tls_key,
            )
        )
        self._application = application
        self._limits = config
        self._shared = shared
        self._on_listening = on_listening
        self._grpc: GrpcServer | None = None
        self._adopting: set[asyncio.Task[None]] = set()
        self._closing = False
        self._drain_ends = float("inf")
        self._draining: asyncio.Task[None] | None = None
        self._forced: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Begin to drain at the first signal that ends the server; stop at once at the second.

        A signal that comes after the drain, while engines close, ends the process then and there: all is answered or lost.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        loop = asyncio.get_running_loop()
        heeded = heeded_signals()
        for number in heeded:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in heeded:  # until the loop is closed
                loop.add_signal_handler(number, self._end_now)

    def stop(self) -> None:
        """Begin to drain; called again: stop at once."""
        if self._draining is None:
            delay_s = self._limits.drain_delay_s
            log.info("draining", extra={"delay_s": delay_s})
            self._drain_ends = monotonic() + delay_s + self._limits.drain_timeout_s
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.stop_at_once()

    def stop_at_once(self) -> None:
        """Cut off what is under way, over HTTP and over gRPC."""
        log.warning("stopping at once; requests under way are lost")
        self.should_exit = self.force_exit = True
        for handshake in self._adopting:
            handshake.cancel()
        self._forced = asyncio.get_running_loop().create_task(self._stop_grpc(0.0))

    def _end_now(self) -> None:
        log.warning("ended before the engines had closed")
        os._exit(EXIT_LOST if self.lost_requests else 0)

    async def _drain(self) -> None:
        self._application.begin_drain()
        await asyncio.sleep(self._limits.drain_delay_s)
        self._application.refuse_new()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, for gRPC too where it is asked for; then call `on_listening`: from here on nobody is refused.

        Raises:
            StartError: a port cannot be had.
        """
        await super().startup([])
        for listener in sockets or []:
            start_listening(listener)
        if self._limits.grpc_port is not None:
            self._grpc = await self._application.start_grpc(self._limits.grpc_port, shared=self._shared)
        for listener in sockets or []:
            server = await asyncio.get_running_loop().create_server(
                self._make_protocol, sock=listener, backlog=_BACKLOG, **self._tls()
            )
            self.servers.append(server)
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners without resetting the connections that the kernel has accepted in our name; then drain."""
        await admit_the_last(sockets or [])
        adopted = [connection for listener in sockets or [] for connection in accept_all(listener)]
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in adopted:
            self.adopt(connection)
        grpc = asyncio.create_task(self._stop_grpc(self._left_s))
        self._closing = True
        for protocol in list(self.server_state.connections):
            protocol.shutdown()
        if self._adopting:
            # A handshake may take as long as the others' requests; one that is not over by then has asked for nothing.
            await asyncio.wait(self._adopting, timeout=self._left_s)
        # Not 0, which is over before uvicorn has looked whether there is anything to wait for.
        self.config.timeout_graceful_shutdown = max(0.1, self._left_s)  # type: ignore[assignment]  # for `wait_for`
        await super().shutdown()
        await grpc
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_S)

    def adopt(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        task = asyncio.get_running_loop().create_task(self._adopt(connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    async def _adopt(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, protocol = await loop.connect_accepted_socket(self._make_protocol, connection, **self._tls())
        except OSError:  # its client has left, or its TLS handshake failed
            self.not_adopted()
        else:
            if self._closing:
                protocol.shutdown()

    def not_adopted(self) -> None:
        """Called when a connection to be adopted was none any more."""

    async def _stop_grpc(self, timeout_s: float) -> None:
        if self._grpc is not None:
            cut_off = await self._grpc.stop(timeout_s)
            self._application.cut_off += cut_off  # HTTP's own may have come meanwhile

    @property
    def lost_requests(self) -> bool:
        """Whether requests were cut off: at the end of the drain time, or by force."""
        return self.force_exit or self._application.cut_off > 0

    @property
    def drain_left_s(self) -> float:
        """What is left of the drain time for goodbyes, at least a second; nothing when it has to stop at once."""
        return 0.0 if self.force_exit else max(1.0, self._left_s)

    @property
    def _left_s(self) -> float:
        """Seconds of the drain time that are left for requests."""
        if self.force_exit:
            return 0.0
        return max(0.0, min(self._drain_ends - monotonic(), self._limits.drain_timeout_s))

    def _make_protocol(self) -> GuardedProtocol:
        protocol: type[GuardedProtocol] = self.config.http_protocol_class  # type: ignore[assignment]  # ours
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _tls(self) -> dict[str, Any]:
        """What the event loop is to know of TLS, where it is spoken. Its own limit for a handshake is a minute."""
        if self.config.ssl is None:
            return {}
        return {"ssl": self.config.ssl, "ssl_handshake_timeout": self._limits.header_timeout_s}


def heeded_signals() -> list[signal.Signals]:
    """Those of `STOPPING` that are acted on: all but a SIGHUP that is ignored, as `nohup` has it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPPING if number is not signal.SIGHUP or not ignored]


def accept_all(listener: socket.socket) -> list[socket.socket]:
    """The connections that wait to be accepted."""
    accepted = []
    with contextlib.suppress(OSError):  # BlockingIOError: there is no more
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            accepted.append(connection)
    return accepted


async def admit_the_last(listeners: Sequence[socket.socket]) -> None:
    """Let the kernel begin no further handshake on listeners that are to be closed, and finish those that it has begun.

    Between the last `accept` and `close` somebody could still connect, and would be reset. A filter that drops what
    opens a connection leaves him unanswered; he tries again after a second, and is refused (socket(7),
    SO_ATTACH_FILTER). Elsewhere than on Linux that moment stays.
    """
    if sys.platform != "linux" or not listeners:  # a worker is handed its connections
        return
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _DROP_SYN))
    program = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(instructions))
    for listener in listeners:
        with contextlib.suppress(OSError):  # a kernel without filters
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    await asyncio.sleep(_HANDSHAKE_S)


def listen(host: str, port: int) -> socket.socket:
    """Bind, so that a port in use is known before any model is loaded; `start_listening` comes later.

    Raises:
        OSError: the address cannot be bound.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def start_listening(listener: socket.socket) -> None:
    """Let the kernel accept connections on a bound socket.

    Raises:
        StartError: another server, bound when this one was, listens there by now (socket(7), SO_REUSEADDR).
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise StartError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what listens there, or give another --port"
        ) from error


def url_of(listener: socket.socket, config: ServerConfig) -> str:
    """Where a bound listener is reached."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.tls_certificate else 'http'}://{shown}:{port}"
