"""One HTTP exchange: what the log and the metrics need to know of it, and how it is answered."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qsl

from topfive_server.accounting import Account
from topfive_server.errors import BadRequestError, QueueFullError, RequestError
from topfive_server.load_shedding import Refusals

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

KEY: Final = "topfive.exchange"
"""Where the ASGI scope holds the exchange."""
PAUSE: Final = "topfive.pause"
"""Where the ASGI scope holds for how many seconds the connection is not to be read from after the answer."""
ANSWERED: Final = "topfive.answered"
"""Where the ASGI scope holds whether the connection is to remember when the request was answered."""
SINCE_ANSWER: Final = "topfive.since_answer"
"""Where the ASGI scope of the next one holds the seconds since then."""
RECEIVED: Final = "topfive.received"
"""Where the ASGI scope holds how many bytes of the request's body have come."""
REFUSED: Final = "topfive.refused"
"""Where the ASGI scope holds the error that the protocol has answered in the application's place."""
REQUEST_ID: Final = "topfive.request_id"
"""Where the ASGI scope holds the request's id, for whichever of the two answers."""
_JSON: Final = (b"content-type", b"application/json")
_PROBLEM: Final = (b"content-type", b"application/problem+json")
_NO_STORE: Final = (b"cache-control", b"no-store")
_CLOSE: Final = (b"connection", b"close")
_NO_SNIFF: Final = (b"x-content-type-options", b"nosniff")
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)
"""`json.dumps` makes one for each call."""


class Exchange(Account):
    """A request under way over HTTP."""

    __slots__ = ("closing", "headers", "refusals", "scope", "send")

    def __init__(
        self,
        scope: Scope,
        send: Send,
        *,
        headers: Mapping[bytes, bytes],
        request_id: str,
        started: float,
        closing: bool,
        refusals: Refusals,
    ) -> None:
        client = scope.get("client")
        super().__init__(
            request_id=request_id,
            started=started,
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else None,
        )
        self.scope = scope
        self.send = send
        self.closing = closing
        """Whether the connection is to end with this answer, because the server is draining."""
        self.refusals = refusals
        """The server's."""
        self.headers = headers
        """Header names in lower case; of a repeated header the last."""

    def query(self) -> dict[str, str]:
        """The query parameters; of a repeated one the last.

        Raises:
            BadRequestError: not UTF-8.
        """
        raw = self.scope["query_string"]
        if not raw:
            return {}
        try:
            return dict(
                parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=64)
            )
        except ValueError as error:  # UnicodeDecodeError among them
            raise BadRequestError(f"the query string is malformed: {error}") from error

    async def answer_json(self, body: object, *, status: int = 200) -> None:
        """Answer with JSON."""
        await self.respond(status, _ENCODER.encode(body).encode(), [_JSON])

    async def answer_problem(self, error: RequestError, **members: object) -> None:
        """Answer with an `application/problem+json` document (RFC 9457)."""
        self.code = error.code
        body = json.dumps({**error.problem(), "request_id": self.request_id, **members}, ensure_ascii=False)
        await self.respond(error.status, body.encode(), [_PROBLEM, *error.headers()])

    async def forward(self, message: MutableMapping[str, Any]) -> None:
        """Send an answer that FastAPI made, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.route = getattr(self.scope.get("route"), "path", "other")
            if self.status >= 400 and self.code == "ok":
                self.code = "other"
            extra = [(b"x-request-id", self.request_id.encode("ascii")), _NO_SNIFF]
            if self.closing:
                extra.append(_CLOSE)
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await self.send(message)

    async def respond(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with these headers and those that every answer has; who is refused too often is answered slowly."""
        self.status = status
        if status == QueueFullError.status:
            self.scope[PAUSE] = self.refusals.refuse()
        headers += [
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self.request_id.encode("ascii")),
            _NO_STORE,
            _NO_SNIFF,
        ]
        if self.closing and _CLOSE not in headers:
            headers.append(_CLOSE)
        if self.timings:
            timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in self.timings.items())
            headers.append((b"server-timing", timing.encode("ascii")))
        if self.method == "HEAD":
            body = b""
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
