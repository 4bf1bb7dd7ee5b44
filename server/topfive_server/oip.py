"""The Open Inference Protocol's REST routes (`/v2`), so that stock Triton clients work unchanged.

Requests go through the same admission, batcher and engine as `/v1/classify`; only decoding is left out, because the
client sends the decoded square. Not offered: `features`, shared memory, loading and unloading by clients (see
`POST /v1/admin/reload`), tracing and log settings.
"""

import json
import re
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, TypeVar

from topfive._version import __version__
from topfive_server.admission import Admission, Ticket
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.errors import (
    MethodNotAllowedError,
    NotFoundError,
    NotReadyError,
    RequestError,
    UnsupportedImageError,
)
from topfive_server.exchange import ANSWERED, SINCE_ANSWER, Exchange
from topfive_server.job import Answer
from topfive_server.models import Models
from topfive_server.oip_codec import (
    HEADER_LENGTH,
    InferRequest,
    Interface,
    ProtocolError,
    encode_response,
    is_costly,
    parse_request,
)
from topfive_server.oip_compute import (
    compute,
    find_model,
    interface_of,
    note_answers,
    pick_model,
    priority_of,
    stack,
)
from topfive_server.oip_describe import Statistics, model_config, model_metadata
from topfive_server.receive import ClientGoneError, Receive, inflate, read_body
from topfive_server.served_model import ServedModel
from topfive_server.waiting import wait_for_work

T = TypeVar("T")

PREFIX: Final = "/v2"
EXTENSIONS: Final = (
    "classification",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
_MODEL: Final = re.compile(
    r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?(?:/(?P<action>ready|config|stats|infer))?"
)
_FIXED: Final = frozenset({"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats"})
_JSON: Final = "application/json"
_CHEAP_BYTES: Final = 200_000
"""Binary requests up to this size are parsed on the event loop; it takes well under a millisecond."""
_COMPRESSED_FROM: Final = 1024
"""Answers shorter than this are not worth compressing."""


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """An answer to be sent."""

    status: int = 200
    body: bytes = b""
    type: str = _JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @classmethod
    def json(cls, value: object, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> "_Reply":
        return cls(
            status=status,
            body=json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(),
            headers=[*headers],
        )


class OpenInference:
    """Answers every path below `/v2`."""

    def __init__(
        self,
        *,
        config: ServerConfig,
        models: Models,
        pool: DecodePool,
        admission: Admission,
        healthy: Callable[[], Awaitable[bool]],
        alive: Callable[[], bool],
    ) -> None:
        """`healthy` is what `/v2/health/ready` says, `alive` what `/v2/health/live` does."""
        self.refusing = False
        """Set when the listener has closed; what still arrives is refused."""
        self._config = config
        self._models = models
        self._pool = pool
        self._admission = admission
        self.healthy = healthy
        self.alive = alive
        self.statistics: dict[tuple[str, str], Statistics] = {}
        """By model and version; the gRPC side counts here, too."""

    async def __call__(self, exchange: Exchange, receive: Receive) -> None:
        """Answer one request; errors are `{"error": ...}`, as Triton's clients expect."""
        try:
            reply = await self._route(exchange, receive)
        except ProtocolError as error:
            exchange.code = error.code
            reply = _Reply.json({"error": str(error)}, error.status)
        except RequestError as error:
            exchange.code = error.code
            reply = _Reply.json({"error": error.detail}, error.status, error.headers())
        except ClientGoneError:
            exchange.code = "client-gone"
            return
        headers = [(b"content-type", reply.type.encode()), *reply.headers]
        await exchange.respond(reply.status, reply.body, headers)

    async def _route(self, exchange: Exchange, receive: Receive) -> _Reply:
        path, method = exchange.scope["path"], exchange.scope["method"]
        if path == "/v2/repository/index":
            exchange.route = path
            _require(method, "POST")
            return self._index()
        match = _MODEL.fullmatch(path)
        if match is not None and match["action"] == "infer":
            exchange.route = "/v2/models/{model}/infer"
            _require(method, "POST")
            return await self._infer(exchange, receive, match["model"], match["version"])
        if path in _FIXED:
            exchange.route = path
        elif match is not None:
            exchange.route = f"/v2/models/{{model}}/{match['action'] or ''}".rstrip("/")
        _require(method, "GET")
        if path == "/v2/models/stats":
            return _Reply.json({"model_stats": [self._stats(model) for model in self._models]})
        if match is not None:
            return self._about(match["model"], match["version"], match["action"])
        if path == "/v2":
            return _Reply.json({"name": "topfive", "version": __version__, "extensions": list(EXTENSIONS)})
        if path in _FIXED:
            good = self.alive() if path.endswith("live") else await self.healthy()
            return _Reply(status=200 if good else 503, type="text/plain")
        raise ProtocolError("Not Found", 404, NotFoundError.code)

    def _about(self, name: str, version: str | None, action: str | None) -> _Reply:
        if action == "ready":
            try:
                ready = find_model(self._models, name, version).health.ready
            except ProtocolError:
                ready = False
            return (
                _Reply(type="text/plain") if ready else _Reply.json({"error": "Model version not ready"}, 400)
            )
        model = find_model(self._models, name, version)
        if action == "stats":
            return _Reply.json({"model_stats": [self._stats(model)]})
        if action == "config":
            return _Reply.json(model_config(interface_of(model, self._config)))
        versions = [m.info.version for m in self._models if m.info.name == model.info.name]
        return _Reply.json(
            model_metadata(interface_of(model, self._config), versions if version is None else [version])
        )

    def _index(self) -> _Reply:
        rows = [
            {
                "name": model.info.name,
                "version": model.info.version,
                "state": "READY" if model.health.ready else "UNAVAILABLE",
                **({} if model.health.ready else {"reason": model.health.reason}),
            }
            for model in self._models
        ]
        return _Reply.json(rows)

    async def _infer(self, exchange: Exchange, receive: Receive, name: str, version: str | None) -> _Reply:
        model = pick_model(self._models, name, version)
        if self.refusing or not model.health.ready:
            reason = "the server is shutting down" if self.refusing else model.health.reason
            raise NotReadyError(f"model '{name[:80]}' is not ready: {reason}", retry_after_s=5)

        def retry_after_s() -> float:
            return model.batcher.forecast.seconds_until_answered()

        # What can't be admitted anyway is refused before its body is read.
        self._admission.check(expected_bytes=0, retry_after_s=retry_after_s)
        with self._admission.ticket(retry_after_s) as ticket:
            try:
                request = await self._receive(exchange, receive, ticket, model)
            finally:
                exchange.timings["receive"] = monotonic() - exchange.started
            # A hot reload may have happened while the body came in.
            model = pick_model(self._models, name, version, before=model)
            exchange.model, exchange.version = model.info.name, model.info.version
            statistics = self.statistics.setdefault((model.info.name, model.info.version), Statistics())
            try:
                answers = await compute(
                    model,
                    request,
                    started=exchange.started,
                    config=self._config,
                    receive=receive,
                    jobs=exchange.jobs,
                    since_answer_s=exchange.scope.get(SINCE_ANSWER),
                )
            except RequestError:
                statistics.failures += 1
                statistics.failure_s += monotonic() - exchange.started
                raise
            statistics.add(answers, monotonic() - exchange.started)
            exchange.scope[ANSWERED] = model.remember_answer(priority_of(request), answers)
            return await self._reply(exchange, receive, request, model, answers)

    async def _receive(
        self, exchange: Exchange, receive: Receive, ticket: Ticket, model: ServedModel
    ) -> InferRequest:
        limit, timeout_s = self._config.max_body_bytes, self._config.body_timeout_s
        body = await read_body(receive, exchange.headers, ticket, max_bytes=limit, timeout_s=timeout_s)
        size, request = await self._parse(exchange, receive, body, interface_of(model, self._config))
        ticket.add_bytes(size - len(body))
        ticket.add_images(len(request.images_NHWC))
        exchange.images = len(request.images_NHWC)
        return request

    async def _parse(
        self, exchange: Exchange, receive: Receive, body: bytes, interface: Interface
    ) -> tuple[int, InferRequest]:
        """The body's size without its content coding, and what it says."""
        header_length = exchange.headers.get(HEADER_LENGTH.encode())
        coding = exchange.headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()

        def parse() -> tuple[int, InferRequest]:
            plain = _decompress(body, coding, self._config.max_body_bytes)
            length = None if header_length is None else header_length.decode("latin-1")
            return len(plain), parse_request(plain, length, interface)

        if not coding and len(body) < _CHEAP_BYTES and header_length is not None:
            return parse()
        return await self._on_a_thread(parse, exchange, receive)

    async def _reply(
        self,
        exchange: Exchange,
        receive: Receive,
        request: InferRequest,
        model: ServedModel,
        answers: Sequence[Answer],
    ) -> _Reply:
        note_answers(exchange, model, answers)
        interface = interface_of(model, self._config)
        arrays = stack(answers)
        coding = _accepted_coding(exchange.headers.get(b"accept-encoding", b"").decode("latin-1"))

        def encode() -> _Reply:
            body, json_length = encode_response(request, arrays, interface, model.info.version)
            headers = []
            if json_length is not None:
                headers.append((HEADER_LENGTH.encode(), str(json_length).encode()))
            if coding and len(body) >= _COMPRESSED_FROM:
                body = _compress(body, coding)
                headers.append((b"content-encoding", coding.encode()))
            return _Reply(
                body=body, type=_JSON if json_length is None else "application/octet-stream", headers=headers
            )

        costly = is_costly(request, arrays, compressed=coding is not None)
        return await self._on_a_thread(encode, exchange, receive) if costly else encode()

    async def _on_a_thread(self, work: Callable[[], T], exchange: Exchange, receive: Receive) -> T:
        """Do long work outside the event loop, for as long as a request may take."""
        deadline = exchange.started + self._config.request_timeout_s
        return await wait_for_work(self._pool.run(work), deadline=deadline, receive=receive)

    def _stats(self, model: ServedModel) -> dict[str, Any]:
        key = model.info.name, model.info.version
        return self.statistics.get(key, Statistics()).as_json(*key)


def _require(method: str, wanted: str) -> None:
    if method != wanted and (method, wanted) != ("HEAD", "GET"):  # uvicorn leaves the body out
        raise ProtocolError("Method Not Allowed", 405, MethodNotAllowedError.code)


def _decompress(body: bytes, coding: str, limit: int) -> bytes:
    if coding in {"", "identity"}:
        return body
    window = {"gzip": 31, "x-gzip": 31, "deflate": 15}.get(coding)
    if window is None:
        raise ProtocolError("Unsupported compression type", 501, UnsupportedImageError.code)
    return inflate(body, window=window, max_bytes=limit)


def _accepted_coding(accept: str) -> str | None:
    """`gzip` or `deflate`, whichever the client likes better (RFC 9110 section 12.5.3); None for neither."""
    best: tuple[float, str] | None = None
    for item in accept.lower().split(","):
        coding, _, parameters = item.partition(";")
        match = re.fullmatch(r"\s*q=([01](?:\.[0-9]{0,3})?)\s*", parameters)
        quality = float(match[1]) if match else 1.0
        if coding.strip() in {"gzip", "deflate"} and quality > 0 and (best is None or quality > best[0]):
            best = quality, coding.strip()
    return best[1] if best else None


def _compress(body: bytes, coding: str) -> bytes:
    deflate = zlib.compressobj(level=1, wbits=31 if coding == "gzip" else 15)
    return deflate.compress(body) + deflate.flush()
