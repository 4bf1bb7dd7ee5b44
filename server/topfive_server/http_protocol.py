"""Uvicorn's HTTP/1.1 protocol with what it lacks.

* Limits on the time and the size of headers, and a lossless goodbye; an idle connection ends whatever drips in.
* Trailers are counted and dropped: appended to the headers, as uvicorn does it, they would replace them.
* What is wrong with a request is never said in the place of an earlier one's answer.
* An answer leaves in one piece: uvicorn writes its head and its body by themselves, which costs a second system call.
* A body in a transfer coding other than `chunked` is refused, not taken as it is.
* A connection is not read from for a moment where the application says so.
* A request knows how long ago its connection was answered, where the application wants to know.
* The body of the hot route reaches the application as the chunks that came from the socket, not copied twice more.
"""

import asyncio
import json
from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from topfive_server.accounting import Account
from topfive_server.config import ServerConfig
from topfive_server.errors import BadRequestError, BodyTimeoutError, HeadersTooLargeError, RequestError
from topfive_server.exchange import ANSWERED, PAUSE, RECEIVED, REFUSED, REQUEST_ID, SINCE_ANSWER
from topfive_server.logs import request_id
from topfive_server.receive import CHUNKS, Chunks

if TYPE_CHECKING:
    from topfive_server.app import Application

GOODBYE_S: Final = 1.0
"""Seconds between the listener's end and the end of idle connections: a request may be on its way in one."""

DIRECT_PATH: Final = "/v1/classify"
"""The hot route; its body does not go through uvicorn's messages."""
_ENOUGH: Final = 1_000_000
"""Bytes that wait in a connection before reading from it pauses."""


class OnePiece:
    """A transport that sends what is written within one turn of the event loop at once."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it with whatever else is written in this turn."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        """Send what was written, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._transport.write(b"".join(pieces))


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    limits: ServerConfig
    """Set by `guarded`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._bytes_besides = 0
        """Come since the request began or since the last of its body: headers, trailers, the framing of chunks."""
        self._reading_headers = False
        self._expecting_since = 0.0
        self._begun = False
        self._leaving = False
        self._message_complete = False
        self._answering: RequestResponseCycle | None = None
        """The request that the application has, or had last; `cycle` may be a later one, which waits in `pipeline`."""
        self._deaf = False
        """Whether what comes is ignored, because the connection ends with the answers that are due."""
        self._pause: asyncio.TimerHandle | None = None
        self._answered_at: float | None = None
        """When the last request was answered, if that is to be remembered."""
        self._chunks: Chunks | None = None
        """Of the request under way, on the hot route."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start the clock for the first request."""
        super().connection_made(OnePiece(transport, self.loop))  # type: ignore[arg-type]  # it does what one does
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes before the end of the headers, and behind the body."""
        if self._deaf:
            return
        self._bytes_besides += len(data)
        # Uvicorn stops the clock of an idle connection at every byte, also at what is left of a body that was answered
        # before its end; nothing would ever start it again. Out of its sight, it goes on until a request begins.
        idle_timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)
        if idle_timer is not None:
            if self._idle() and not self._reading_headers:
                self.timeout_keep_alive_task = idle_timer
            else:
                idle_timer.cancel()
        if self._bytes_besides > self.limits.max_header_bytes:
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        """Start the clock for a further request of the connection."""
        super().on_message_begin()
        if not self._reading_headers:
            self._expect_headers()
        self._begun = True
        self._message_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; drop a trailer, which must not be taken for one (RFC 9110 section 6.5.1)."""
        if self._reading_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock, and hand the request on unless its headers are too large."""
        self._stop_timer()
        self._bytes_besides = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._refuse(self._too_large())
            return
        if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            # Its body would be taken as it is. RFC 9112 section 6.1 has 501 for this: a "should", for a client's mistake.
            self._refuse(
                BadRequestError("Transfer-Encoding must be chunked; to compress, use Content-Encoding")
            )
            return
        if self._deaf or self.transport.is_closing():
            self._reading_headers = False
            return
        super().on_headers_complete()  # fails on a URL that is none: there is no cycle for it then
        self._reading_headers = False
        self._chunks = None
        if self._answered_at is not None:
            self.scope[SINCE_ANSWER] = self.loop.time() - self._answered_at  # type: ignore[typeddict-unknown-key]
        if self.scope["path"] == DIRECT_PATH:
            self._chunks = self.scope[CHUNKS] = Chunks()  # type: ignore[typeddict-unknown-key]
        if self._leaving:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Hand the body on; ignore that of a request that was refused."""
        self._bytes_besides = 0
        if self._deaf or self._idle():
            return
        scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]  # ours
        scope[RECEIVED] = scope.get(RECEIVED, 0) + len(body)
        if self._chunks is None:
            super().on_body(body)
            return
        self._chunks.add(body)
        if self._chunks.size > _ENOUGH:
            self.flow.pause_reading()  # until the application has taken it
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Likewise."""
        self._message_complete = True
        if self.cycle is not None:
            super().on_message_complete()
            self._begin_pause()

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it."""
        assert self._answering is not None  # noqa: S101  it is what was answered
        self._answered_at = self.loop.time() if self._answering.scope.get(ANSWERED) else None
        super().on_response_complete()
        self._begin_pause()

    def shutdown(self) -> None:
        """Finish the request under way; close an idle connection after a moment, when nothing is on its way in it."""
        self._leaving = True
        self._end_pause()
        if self._idle():
            self.loop.call_later(GOODBYE_S, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with a problem document like every other error."""
        self._refuse(BadRequestError(f"this is not a valid HTTP/1.1 request ({msg.rstrip('.')})"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Remember which request the application has."""
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _begin_pause(self) -> None:
        """Read nothing for a while, where the answer says so, once it is out and what it answers is in."""
        seconds: float = self.cycle.scope.get(PAUSE, 0.0)  # type: ignore[assignment]  # ours
        due = seconds and self._message_complete and self._idle() and not self._leaving
        if due and self._pause is None and not self.transport.is_closing():
            self.flow.pause_reading()
            self._pause = self.loop.call_later(seconds, self._end_pause)

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            if not self.transport.is_closing():
                self.flow.resume_reading()

    def _close_if_idle(self) -> None:
        if self._idle():
            self.transport.close()

    def _idle(self) -> bool:
        cycle: RequestResponseCycle | None = (
            self.cycle
        )  # None before the first request, whatever uvicorn declares
        return cycle is None or cycle.response_complete

    def _expect_headers(self) -> None:
        self._reading_headers = True
        self._expecting_since = monotonic()
        self._begun = False
        self._bytes_besides = 0
        self._stop_timer()
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._headers_too_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_too_slow(self) -> None:
        if not self._begun:
            self.transport.close()  # an idle connection has asked nothing; there is nothing to answer
        else:
            seconds = self.limits.header_timeout_s
            self._refuse(
                BodyTimeoutError(f"the request's headers were not complete within {seconds:g} seconds")
            )

    def _too_large(self) -> HeadersTooLargeError:
        limit = self.limits.max_header_bytes
        return HeadersTooLargeError(
            f"the request line and headers, or the trailers, have more than {limit:,} bytes"
        )

    def _refuse(self, error: RequestError) -> None:
        """Answer below the application, and close; but what came before is answered first, and then nothing more."""
        self._stop_timer()
        has_cycle = not self._reading_headers and not self._message_complete  # it is wrong behind its headers
        begun = self._reading_headers and self._begun
        self._reading_headers = False
        if self._deaf or self.transport.is_closing():
            return
        if has_cycle and self.pipeline:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering  # type: ignore[assignment]
            has_cycle = False
        if not has_cycle and not self._idle():
            self.cycle.keep_alive = False
            self._deaf = True
            return
        if not has_cycle:
            self._answer(error, self._account(error, begun=begun))
        elif not self.cycle.response_started:
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]  # ours
            scope[REFUSED] = error
            # There is no id when the application has not run since the headers came.
            self._answer(error, scope.setdefault(REQUEST_ID, request_id(_sent_id(scope["headers"]))))
        self.transport.close()

    def _account(self, error: RequestError, *, begun: bool) -> str:
        """Count and log what never became a request of the application; returns its id."""
        # Unless it has begun, `url` and `headers` are those of the request before.
        headers, url = (self.headers, self.url) if begun else ([], b"")
        account = Account(
            request_id=request_id(_sent_id(headers)),
            started=self._expecting_since if begun else monotonic(),
            method="",
            path=url.partition(b"?")[0].decode("latin-1"),
            client=self.client[0] if self.client else None,
        )
        account.status, account.code = error.status, error.code
        account.timings["receive"] = monotonic() - account.started
        application: Application = self.app  # what `lifecycle.Server` serves
        application.accounts.close(account)
        return account.request_id

    def _answer(self, error: RequestError, id_: str) -> None:
        body = json.dumps({**error.problem(), "request_id": id_}).encode()
        head = (
            b"content-type: application/problem+json\r\nx-request-id: %s\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % (id_.encode("ascii"), len(body))
        )
        self.transport.write(STATUS_LINE[error.status] + head + body)


def _sent_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    return dict(headers).get(b"x-request-id")


def guarded(limits: ServerConfig) -> type[GuardedProtocol]:
    """The protocol class for a server of these limits (uvicorn wants a class)."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})
