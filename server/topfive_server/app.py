"""The routes, and what is done for every request: its id, its key, its line in the log, its place in the metrics.

`Application` is the ASGI application. The hot route goes straight to `ClassifyEndpoint`, Triton's protocol to
`OpenInference`; everything else is FastAPI.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, MutableMapping
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from topfive._version import __version__
from topfive_server import admin, pages
from topfive_server.access import KeyRing
from topfive_server.accounting import Accounts
from topfive_server.admission import Admission
from topfive_server.classify import ClassifyEndpoint
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.errors import (
    BadRequestError,
    DrainingError,
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    RequestError,
)
from topfive_server.exchange import KEY, RECEIVED, REFUSED, REQUEST_ID, Exchange, Scope, Send
from topfive_server.load_shedding import Refusals
from topfive_server.logs import request_id
from topfive_server.metrics import CONTENT_TYPE, Metrics, gauge
from topfive_server.models import Models
from topfive_server.oip import PREFIX, OpenInference
from topfive_server.openapi import describe_api
from topfive_server.receive import Receive
from topfive_server.server_status import ServerStatus, SingleProcess

if TYPE_CHECKING:
    from topfive_server.oip_grpc import GrpcServer
    from topfive_server.traces import Traces

log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/openapi.json", *pages.PATHS})
"""Answered without an API key: what probes ask, and pages that hold nothing but themselves."""
INFERENCE_ROUTES: Final = frozenset({"/v1/classify", "/v2/models/{model}/infer"})
"""Where images are classified: what is answered here allows refusals to be answered."""


class Application:
    """One server's state and its ASGI entry."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        models: Models,
        pool: DecodePool,
        metrics: Metrics,
        reloader: admin.Operator | None = None,
        traces: "Traces | None" = None,
        server_status: ServerStatus | None = None,
    ) -> None:
        """`reloader` opens the admin routes; without `traces` none are made; `server_status` speaks for several processes."""
        self.config = config
        self.models = models
        self.metrics = metrics
        self.accounts = Accounts(config, metrics)
        self.admission = Admission(max_images=config.max_queue_images, max_bytes=config.max_queue_bytes)
        self._refusals = Refusals()
        self.draining = False
        self.cut_off = 0
        """Requests that were still under way when the drain time was over."""
        self.reloader = reloader
        self._traces = traces
        self._pool = pool
        self.server_status: ServerStatus = server_status or SingleProcess(self)
        self._keys = None if config.api_keys is None else KeyRing.read(config.api_keys)
        self._classify = ClassifyEndpoint(config=config, models=models, pool=pool, admission=self.admission)
        self._oip = OpenInference(
            config=config,
            models=models,
            pool=pool,
            admission=self.admission,
            healthy=self.server_status.healthy,
            alive=lambda: not self.stuck,
        )
        self._rest = make_fastapi(self)
        metrics.add_gauges(self._gauges)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        headers = dict(scope["headers"])
        exchange = Exchange(
            scope,
            send,
            headers=headers,
            request_id=scope.setdefault(REQUEST_ID, request_id(headers.get(b"x-request-id"))),
            started=monotonic(),
            closing=self.draining,
            refusals=self._refusals,
        )
        try:
            await self._route(exchange, receive)
        except RequestError as error:
            await exchange.answer_problem(error)
        except asyncio.CancelledError:  # only at the end of the drain time
            self.cut_off += 1
            if not exchange.status:
                await exchange.answer_problem(
                    DrainingError("the server stopped before the answer was there", retry_after_s=1)
                )
        except Exception:
            log.exception(
                "a request failed because of a mistake of ours", extra={"request_id": exchange.request_id}
            )
            if exchange.status:
                raise  # half an answer is out; uvicorn closes the connection
            await exchange.answer_problem(InternalError("the server made a mistake; its log has the details"))
        finally:
            self._account(exchange, scope)

    async def start_grpc(self, port: int, *, shared: bool = False) -> "GrpcServer":
        """Offer Triton's protocol over gRPC, too, until the caller stops the server.

        `shared`: other processes listen on the same port.

        Raises:
            StartError: the port cannot be had.
        """
        from topfive_server.oip_grpc import GrpcInference, start_grpc  # noqa: PLC0415  an extra of its own

        service = GrpcInference(
            config=self.config,
            models=self.models,
            admission=self.admission,
            accounts=self.accounts,
            pool=self._pool,
            keys=self._keys,
            rest=self._oip,
            traces=self._traces,
        )
        return await start_grpc(service, self.config, port, shared=shared)

    @property
    def stuck(self) -> str:
        """Why no image can be decoded any more; empty while one can."""
        return self._pool.why_stuck(self.config.engine_timeout_s)

    def begin_drain(self) -> None:
        """Say no to `/readyz`, and ask every client to reconnect (elsewhere)."""
        self.draining = True

    def refuse_new(self) -> None:
        """Refuse to classify: the listener is closed."""
        self._classify.draining = self._oip.refusing = True

    async def _route(self, exchange: Exchange, receive: Receive) -> None:
        path = exchange.path
        if path == "/v1/classify":
            exchange.route = path  # whatever becomes of it
        if self._keys is not None and path not in OPEN_PATHS:
            exchange.key = self._keys.name_of(exchange.headers)
        if path == "/v1/classify":
            # `curl -T cat.jpg` sends PUT, and means the same.
            if exchange.method not in {"POST", "PUT"}:
                raise MethodNotAllowedError("send the image with POST or PUT", allow="POST, PUT")
            await self._classify(exchange, receive)
        elif path.startswith(f"{PREFIX}/") or path == PREFIX:
            await self._oip(exchange, receive)
        else:
            if exchange.method == "HEAD":  # as GET; uvicorn leaves the body out (RFC 9110 section 9.3.2)
                exchange.scope = {**exchange.scope, "method": "GET"}
            exchange.scope[KEY] = exchange
            await self._rest(exchange.scope, receive, exchange.forward)

    def _account(self, exchange: Exchange, scope: Scope) -> None:
        """`scope`: as it came, which the protocol knows; a route may have been given another."""
        ended = monotonic()
        exchange.bytes_in = scope.get(RECEIVED, 0)
        refused = scope.get(REFUSED)
        if refused is not None:
            exchange.status, exchange.code = refused.status, refused.code
        elif exchange.status == 200 and exchange.route in INFERENCE_ROUTES:
            self._refusals.answered()
        trace_id = "" if self._traces is None else self._traces.record_http(exchange, ended)
        self.accounts.close(exchange, ended=ended, trace_id=trace_id)

    def _gauges(self) -> Iterable[Metric]:
        """What is read at the time of a scrape."""
        yield gauge("topfive_workers", "Server processes that serve.", 1)
        yield gauge("topfive_inflight_images", "Images accepted and not answered yet.", self.admission.images)
        yield gauge("topfive_inflight_bytes", "Bytes of request bodies in memory.", self.admission.bytes)
        depth = GaugeMetricFamily(
            "topfive_queue_images", "Decoded images that wait for the engine.", labels=["model", "version"]
        )
        ready = GaugeMetricFamily(
            "topfive_ready", "Whether the model version is ready (1) or not (0).", labels=["model", "version"]
        )
        info = GaugeMetricFamily(
            "topfive_model_info",
            "Always 1; the labels tell what is served, and where it runs.",
            labels=["model", "version", "provider", "device"],
        )
        for model in self.models:
            labels = [model.info.name, model.info.version]
            depth.add_metric(labels, model.batcher.depth)
            ready.add_metric(labels, float(model.health.ready and not self.draining))
            info.add_metric([*labels, model.info.provider, model.info.device], 1)
        yield from (depth, ready, info)


def make_fastapi(application: Application) -> FastAPI:
    """Everything but the hot route."""
    api = FastAPI(
        title="topfive",
        version=__version__,
        summary="An image in, five labels out.",
        docs_url=None,
        redoc_url=None,
        telemetry={"auto_configure": False},
        # A redirect would lead to whatever the Host header says, or behind a proxy to where nobody can go.
        redirect_slashes=False,
    )
    models = application.models
    describe_api(api, open_paths=None if application.config.api_keys is None else OPEN_PATHS)
    pages.add(api)
    if application.reloader is not None:
        admin.add(api, application.reloader)

    @api.get("/v1/models", tags=["models"], summary="The models in service")
    async def list_models() -> JSONResponse:
        return JSONResponse({"models": [describe(models, model) for model in models]})

    @api.get("/v1/models/{name}/labels", tags=["models"], summary="A model's classes, in order")
    async def labels(name: str, version: Annotated[str | None, Query()] = None) -> JSONResponse:
        return JSONResponse({"labels": list(models.get(name, version).info.spec.labels)})

    @api.get("/healthz", tags=["probes"], summary="Whether the process is alive")
    async def healthz() -> JSONResponse:
        status = application.stuck or "alive"
        return JSONResponse(
            {"status": status, "version": __version__}, status_code=200 if status == "alive" else 503
        )

    @api.get("/readyz", tags=["probes"], summary="Whether an image gets through the whole path now")
    async def readyz() -> JSONResponse:
        return await answer_ready(application)

    @api.get("/metrics", tags=["probes"], summary="Metrics in Prometheus' text format")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await application.server_status.metrics(), media_type=CONTENT_TYPE)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        path = request.url.path[:200]
        if error.status_code == 404:
            return problem(request, NotFoundError(f"there is nothing at {path}; see /docs"))
        if error.status_code == 405:
            exchange: Exchange = request.scope[KEY]
            allow = (error.headers or {}).get("Allow", "GET")
            allow = re.sub(r"\bGET\b(?!.*\bHEAD\b)", "GET, HEAD", allow)
            detail = f"{exchange.method} does not work on {path}; see /docs"
            return problem(request, MethodNotAllowedError(detail, allow=allow))
        return problem(request, BadRequestError(str(error.detail)))

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        first = error.errors()[0]
        return problem(request, BadRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))

    @api.exception_handler(RequestError)
    async def request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)  # noqa: S101
        return problem(request, error)

    return api


def problem(request: Request, error: RequestError) -> Response:
    """An `application/problem+json` answer of a FastAPI route."""
    exchange: Exchange = request.scope[KEY]
    exchange.code = error.code
    return JSONResponse(
        {**error.problem(), "request_id": exchange.request_id},
        status_code=error.status,
        headers={name.decode(): value.decode() for name, value in error.headers()},
        media_type="application/problem+json",
    )


def describe(models: Models, model: Any) -> MutableMapping[str, Any]:
    """One row of `/v1/models`."""
    info = model.info
    return {
        "name": info.name,
        "version": info.version,
        "default": models.is_default(model),
        "ready": model.health.ready,
        "architecture": info.spec.architecture.name,
        "classes": info.spec.architecture.classes,
        "crop": info.spec.preprocessing.crop,
        "max_batch": model.batcher.max_batch,
        "provider": info.provider,
        "device": info.device,
        "graph": info.graph,
        "precision": info.precision,
        "verified": info.verified,
        "fingerprint": info.fingerprint,
        "labels_url": f"/v1/models/{info.name}/labels?version={info.version}",
    }


async def answer_ready(application: Application) -> JSONResponse:
    """`/readyz`: 200 when every model version answers, 503 with the reasons when one does not, or in the drain."""
    body = await application.server_status.readiness()
    headers = {} if body["ready"] else {"Retry-After": "1"}
    return JSONResponse(body, status_code=200 if body["ready"] else 503, headers=headers)
