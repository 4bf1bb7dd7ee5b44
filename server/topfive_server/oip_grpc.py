"""The Open Inference Protocol over gRPC, so that stock `tritonclient.grpc` works unchanged.

The messages are those of Triton's own stubs (the `triton` extra); what they say is made by the same functions as the
REST side, and requests pass through the same admission and batcher. A call that its client cancels is dropped.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from topfive._version import __version__
from topfive_server.access import KeyRing
from topfive_server.accounting import CLIENT_GONE, Account, Accounts
from topfive_server.admission import Admission
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.errors import DrainingError, NotReadyError, RequestError
from topfive_server.logs import request_id
from topfive_server.models import Models
from topfive_server.oip import EXTENSIONS, OpenInference
from topfive_server.oip_codec import ProtocolError, describe_output, is_costly, parse_message, to_binary
from topfive_server.oip_compute import compute, find_model, interface_of, note_answers, pick_model, stack
from topfive_server.oip_describe import Statistics, model_config, model_metadata
from topfive_server.repository import oldest_first
from topfive_server.serving import StartError
from topfive_server.session import one_line

if TYPE_CHECKING:
    from topfive_server.traces import Traces

log = logging.getLogger(__name__)

SERVICE: Final = "inference.GRPCInferenceService"

_STATUS: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status -> gRPC status; INTERNAL for what is not here."""

_LATER_S: Final = 60.0
"""gRPC's own limit of a drain: only so much later, that the calls which are cut off can be counted before."""

_Handler = Callable[[Any, Account], Awaitable[Any]]


class GrpcInference(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # it ships no types
    """Answers the calls of `inference.GRPCInferenceService`."""

    def __init__(
        self,
        *,
        config: ServerConfig,
        models: Models,
        admission: Admission,
        accounts: Accounts,
        pool: DecodePool,
        keys: KeyRing | None,
        rest: OpenInference,
        traces: "Traces | None" = None,
    ) -> None:
        """`rest` is the REST side: both count in the same statistics and drain together."""
        self._config = config
        self._models = models
        self._admission = admission
        self._accounts = accounts
        self._pool = pool
        self._keys = keys
        self._rest = rest
        self._traces = traces
        self.under_way = 0
        """Calls that are not answered yet."""
        self.ending = False
        """Whether the drain time is over: calls under way are cut off."""

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Whether the process can still do its work; as `/healthz`."""
        return service_pb2.ServerLiveResponse(live=self._rest.alive())

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Whether every model is ready, and the server is not shutting down."""
        return service_pb2.ServerReadyResponse(ready=await self._rest.healthy())

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether a model version is ready; an unknown one is not."""

        async def answer(request: Any, _: Account) -> Any:
            try:
                ready = find_model(self._models, request.name, request.version or None).health.ready
            except ProtocolError:
                ready = False
            return service_pb2.ModelReadyResponse(ready=ready)

        return await self._call("ModelReady", answer, request, context)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Name, version, extensions."""

        async def answer(_: Any, __: Account) -> Any:
            return service_pb2.ServerMetadataResponse(
                name="topfive", version=__version__, extensions=EXTENSIONS
            )

        return await self._call("ServerMetadata", answer, request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Inputs and outputs of a model."""

        async def answer(request: Any, _: Account) -> Any:
            model = find_model(self._models, request.name, request.version or None)
            versions = (
                [request.version] if request.version else oldest_first(self._models.versions(model.info.name))
            )
            record = model_metadata(interface_of(model, self._config), versions)
            return ParseDict(record, service_pb2.ModelMetadataResponse())

        return await self._call("ModelMetadata", answer, request, context)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The model's configuration, as far as clients read it."""

        async def answer(request: Any, _: Account) -> Any:
            model = find_model(self._models, request.name, request.version or None)
            record = model_config(interface_of(model, self._config))
            config = ParseDict(record, model_config_pb2.ModelConfig(), ignore_unknown_fields=True)
            return service_pb2.ModelConfigResponse(config=config)

        return await self._call("ModelConfig", answer, request, context)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Counters of one model version, or of all."""

        async def answer(request: Any, _: Account) -> Any:
            one = request.name and find_model(self._models, request.name, request.version or None)
            keys = [(m.info.name, m.info.version) for m in ([one] if one else self._models)]
            rows = [self._rest.statistics.get(key, Statistics()).as_json(*key) for key in keys]
            return ParseDict({"model_stats": rows}, service_pb2.ModelStatisticsResponse())

        return await self._call("ModelStatistics", answer, request, context)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Every version in service."""

        async def answer(_: Any, __: Account) -> Any:
            return service_pb2.RepositoryIndexResponse(
                models=[
                    service_pb2.RepositoryIndexResponse.ModelIndex(
                        name=model.info.name,
                        version=model.info.version,
                        state="READY" if model.health.ready else "UNAVAILABLE",
                        reason=model.health.reason,
                    )
                    for model in self._models
                ]
            )

        return await self._call("RepositoryIndex", answer, request, context)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Classify a batch of decoded squares."""
        return await self._call("ModelInfer", self._infer, request, context)

    async def _infer(self, message: Any, account: Account) -> Any:
        started = account.started
        model = pick_model(self._models, message.model_name, message.model_version or None)
        if self._rest.refusing or not model.health.ready:
            raise NotReadyError(f"model '{model.info.name}' is not ready", retry_after_s=5)
        interface = interface_of(model, self._config)
        request = parse_message(_as_header(message), b"".join(message.raw_input_contents), interface)
        account.model, account.version = model.info.name, model.info.version
        account.images = len(request.images_NHWC)
        with self._admission.ticket(model.batcher.forecast.seconds_until_answered) as ticket:
            ticket.add_bytes(request.images_NHWC.nbytes)
            ticket.add_images(len(request.images_NHWC))
            key = model.info.name, model.info.version
            statistics = self._rest.statistics.setdefault(key, Statistics())
            try:
                answers = await compute(
                    model, request, started=started, config=self._config, receive=None, jobs=account.jobs
                )
            except RequestError:
                statistics.failures += 1
                statistics.failure_s += monotonic() - started
                raise
        statistics.add(answers, monotonic() - started)
        note_answers(account, model, answers)
        arrays = stack(answers)

        def encode() -> Any:
            described = [
                describe_output(wanted, arrays[wanted.name], interface) for wanted in request.outputs
            ]
            return service_pb2.ModelInferResponse(
                model_name=interface.name,
                model_version=model.info.version,
                id=message.id,
                outputs=[service_pb2.ModelInferResponse.InferOutputTensor(**row) for row, _ in described],
                raw_output_contents=[to_binary(values) for _, values in described],
            )

        return await self._pool.run(encode) if is_costly(request, arrays) else encode()

    async def _call(self, name: str, handler: _Handler, request: Any, context: Any) -> Any:
        """Check the key, answer, and turn errors into gRPC statuses; counted and logged like every other request."""
        metadata = _metadata(context)
        account = Account(
            request_id=request_id(metadata.get(b"x-request-id")),
            started=monotonic(),
            method="POST",  # as every call is over HTTP/2
            path=f"/{SERVICE}/{name}",
            client=_address(context.peer()),
        )
        account.route, account.bytes_in = f"grpc {name}", request.ByteSize()
        account.timings["receive"] = 0.0  # a message comes whole
        account.status = 200
        context.set_trailing_metadata((("x-request-id", account.request_id),))
        self.under_way += 1
        try:
            if self._keys is not None:
                account.key = self._keys.name_of(metadata)
            return await handler(request, account)
        except ProtocolError as error:
            account.status, account.code, reason = error.status, error.code, str(error)
        except RequestError as error:
            account.status, account.code, reason = error.status, error.code, error.detail
        except asyncio.CancelledError:
            cut_off = (DrainingError.status, DrainingError.code)
            account.status, account.code = cut_off if self.ending else (CLIENT_GONE, "client-gone")
            raise
        except Exception as error:
            log.exception(
                "a gRPC request failed because of a mistake of ours", extra={"request_id": account.request_id}
            )
            account.status, account.code, reason = 500, "internal", one_line(error)
        finally:
            self.under_way -= 1
            ended = monotonic()
            trace_id = "" if self._traces is None else self._traces.record_grpc(metadata, account, ended)
            self._accounts.close(account, ended=ended, trace_id=trace_id)
        return await context.abort(_STATUS.get(account.status, grpc.StatusCode.INTERNAL), reason)


def _address(peer: str) -> str:
    """The address in what gRPC calls a peer: `ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]") or peer


def _metadata(context: Any) -> dict[bytes, bytes]:
    return {
        key.encode(): value.encode() for key, value in context.invocation_metadata() if isinstance(value, str)
    }


def _as_header(message: Any) -> dict[str, Any]:
    """The message in the words of the REST side's JSON, whose parser checks it."""
    inputs = []
    raw = len(message.raw_input_contents) > 0
    for tensor in message.inputs:
        record: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        record["parameters"] = _parameters(tensor.parameters)
        if raw:
            record["parameters"]["binary_data_size"] = sum(map(len, message.raw_input_contents))
        else:
            record["data"] = list(tensor.contents.uint_contents)
        inputs.append(record)
    outputs = [
        {"name": output.name, "parameters": {**_parameters(output.parameters), "binary_data": True}}
        for output in message.outputs
    ]
    parameters = {**_parameters(message.parameters), "binary_data_output": True}
    return {"inputs": inputs, "outputs": outputs, "parameters": parameters}


def _parameters(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for name, value in parameters.items()
    }


class GrpcServer:
    """A server that listens."""

    def __init__(self, server: Any, service: GrpcInference, port: int) -> None:
        self.port = port
        self._server = server
        self._service = service

    async def stop(self, timeout_s: float) -> int:
        """Refuse new calls, and answer those under way for `timeout_s` seconds; how many are cut off then.

        Called again meanwhile with a shorter time, it ends sooner.
        """
        stopping = asyncio.create_task(self._server.stop(timeout_s + _LATER_S))
        await asyncio.wait([stopping], timeout=timeout_s)
        cut_off = self._service.under_way
        self._service.ending = True
        await self._server.stop(None)
        await stopping
        return cut_off


async def start_grpc(
    service: GrpcInference, config: ServerConfig, port: int, *, shared: bool = False
) -> GrpcServer:
    """Listen on `port` of the server's host (0 takes a free one).

    `shared`: other processes listen there, too, and the kernel deals the connections out.

    Raises:
        StartError: the port cannot be had, or the certificate not be read.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.so_reuseport", int(shared)),
        ]
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        if config.tls_certificate is not None and config.tls_key is not None:
            pair = (config.tls_key.read_bytes(), config.tls_certificate.read_bytes())
            bound = server.add_secure_port(f"{host}:{port}", grpc.ssl_server_credentials([pair]))
        else:
            bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise StartError(
            f"cannot listen on {config.host} port {port} for gRPC; give another --grpc-port"
        ) from error
    except OSError as error:
        raise StartError(str(error)) from error
    await server.start()
    log.info("serving gRPC", extra={"address": f"{config.host}:{bound}"})
    return GrpcServer(server, service, bound)
