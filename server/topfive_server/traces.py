"""OpenTelemetry traces: a span for each request, and one below it for each stage that it went through.

Imported only with `--traces`: the SDK is an extra of its own (`telemetry`). Spans are made when a request has ended, from
the times that were measured anyway, so nothing is done for them while it is under way. They leave in batches from a
thread of their own; when the collector is slow or gone, its queue is full and spans are dropped, never a request.

Where they go, under which name and which share of them is said by OpenTelemetry's own environment variables.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from topfive._version import __version__
from topfive_server.accounting import Account
from topfive_server.exchange import Exchange
from topfive_server.stages import Stage

log = logging.getLogger(__name__)

_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NANO: Final = 1_000_000_000
_W3C: Final = TraceContextTextMapPropagator()

_LAST_S: Final = 3.0
"""Seconds that the collector is given at the end: a dead one must not hold up every restart."""

UNTRACED_PATHS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""Asked every few seconds, and nobody wants their traces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ended:
    """A request that has ended; times are on the monotonic clock."""

    name: str
    """The span's: `POST /v1/classify`."""
    headers: Mapping[bytes, bytes]
    """Where `traceparent` and `tracestate` may be."""
    started: float
    ended: float
    failed: str
    """The code of an error that is the server's, else empty: what was a client's mistake is none of its span."""
    stages: Sequence[Stage]
    attributes: Mapping[str, str | int]
    """What else is known of it; empty ones are left out."""


class Traces:
    """Makes the spans of requests, and sends them."""

    def __init__(self) -> None:
        """Begin to send to where the environment says.

        Raises:
            ValueError: the environment asks for a protocol that is not spoken here, or makes no sense.
        """
        for name in _PROTOCOLS:
            if (asked := os.environ.get(name) or "http/protobuf") != "http/protobuf":
                raise ValueError(f"{name} is {asked}; --traces sends by http/protobuf only")
        ours = {"service.name": "topfive", "service.version": __version__}
        self._provider = TracerProvider(
            # `create` lets what it is given win; here the environment does.
            resource=Resource.create({**ours, **OTELResourceDetector().detect().attributes}),
            shutdown_on_exit=False,  # `close` does it, and is bounded
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("topfive_server", __version__)

    def record_http(self, exchange: Exchange, ended: float) -> str:
        """Make the spans of a request that ended at `ended`; returns its trace's id, or nothing where there is none."""
        if exchange.scope["path"] in UNTRACED_PATHS:
            return ""
        return self._try_to_record(
            _Ended(
                name=exchange.method if exchange.route == "other" else f"{exchange.method} {exchange.route}",
                headers=exchange.headers,
                started=exchange.started,
                ended=ended,
                failed=exchange.code if exchange.status >= 500 else "",
                stages=exchange.stages(ended),
                attributes=_http_attributes(exchange),
            )
        )

    def record_grpc(
        self,
        metadata: Mapping[bytes, bytes],
        account: Account,
        ended: float,
    ) -> str:
        """Make the spans of a call that ended at `ended`; returns its trace's id, or nothing where there is none."""
        service, _, method = account.path.strip("/").rpartition("/")
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "topfive.request_id": account.request_id,
            "topfive.code": account.code,
            "topfive.model": account.model,
            "topfive.model_version": account.version,
            "topfive.images": account.images,
        }
        return self._try_to_record(
            _Ended(
                name=account.path.strip("/"),
                headers=metadata,
                started=account.started,
                ended=ended,
                failed=account.code if account.status >= 500 else "",
                stages=account.stages(ended)[1:],  # a message comes whole: there is no time of receiving
                attributes=attributes,
            )
        )

    def _try_to_record(self, request: _Ended) -> str:
        try:
            return self._record(request)
        except Exception:
            log.exception("the trace of a request could not be made")
            return ""

    async def close(self, timeout_s: float) -> None:
        """Send what waits, for at most so long, and never longer than `_LAST_S`."""
        timeout_s = min(timeout_s, _LAST_S)
        sending = threading.Thread(target=self._provider.shutdown, name="last traces", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, timeout_s)
        if sending.is_alive():
            log.warning("the last traces are lost: the collector did not take them within %.1f s", timeout_s)

    def _record(self, request: _Ended) -> str:
        carrier = {
            name: value.decode("latin-1")
            for name in ("traceparent", "tracestate")
            if (value := request.headers.get(name.encode())) is not None
        }
        wall = _Wall(request.started, request.ended)
        span = self._tracer.start_span(
            request.name,
            _W3C.extract(carrier, Context()),
            SpanKind.SERVER,
            {name: value for name, value in request.attributes.items() if value not in {"", 0}},
            start_time=wall.at(request.started),
        )
        if span.is_recording():
            self._record_stages(request, set_span_in_context(span, Context()), wall)
            if request.failed:
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", request.failed)
        span.end(wall.at(request.ended))
        return format_trace_id(span.get_span_context().trace_id)

    def _record_stages(self, request: _Ended, around: Context, wall: "_Wall") -> None:
        for stage in request.stages:
            span = self._tracer.start_span(stage.name, around, start_time=wall.at(stage.begun))
            if stage.batch_size:
                span.set_attribute("topfive.batch_size", stage.batch_size)
            if request.failed and stage is request.stages[-1]:  # where it was when it failed
                span.set_status(StatusCode.ERROR)
            span.end(wall.at(stage.ended))


def _http_attributes(exchange: Exchange) -> dict[str, str | int]:
    """As OpenTelemetry's conventions for HTTP servers name them, and ours."""
    scope = exchange.scope
    client = scope.get("client")
    return {
        "http.request.method": exchange.method,
        "http.route": "" if exchange.route == "other" else exchange.route,
        "http.response.status_code": exchange.status,
        "http.request.body.size": exchange.bytes_in,
        "url.path": scope["path"][:200],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "client.address": client[0] if client else "",
        "user_agent.original": exchange.headers.get(b"user-agent", b"").decode("latin-1")[:200],
        "topfive.request_id": exchange.request_id,
        "topfive.code": exchange.code,
        "topfive.model": exchange.model,
        "topfive.model_version": exchange.version,
        "topfive.images": exchange.images,
    }


class _Wall:
    """Where on the wall clock a request's times lie.

    Looked at once for all its spans: a clock that jumps moves them together and changes no duration.
    """

    def __init__(self, started: float, ended: float) -> None:
        self._started, self._ended = started, ended
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def at(self, moment: float) -> int:
        """Nanoseconds since the epoch; never outside the request."""
        return self._offset_ns + round(min(max(moment, self._started), self._ended) * _NANO)
