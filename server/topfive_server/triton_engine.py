"""`TritonEngine`: batches go to a fleet of Triton servers over gRPC. The way past one machine.

The fleet serves the same exported repository, which needs no change. Triton does not hand out an ONNX file's metadata,
so classes and preprocessing are read from the local copy of the repository, and the fleet's idea of the model is
compared with it at the start.

A batch that an endpoint does not answer goes to the next one: inference changes nothing, so asking twice is safe. An
endpoint that failed is left alone for a while. When none answers, the engine is dead: its owner says "not ready" and
connects anew until the fleet is back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from topfive_server.engine import EngineDead, EngineError, EngineInfo, Predictions
from topfive_server.lanes import INPUT, OUTPUTS, Images
from topfive_server.repository import ModelVersion
from topfive_server.session import engine_error, one_line

log = logging.getLogger(__name__)

_ELSEWHERE: Final = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED", "NOT_FOUND", "UNIMPLEMENTED"}
)
"""gRPC statuses after which another endpoint may do better: down, slow, full, or without this model."""
_FIRST_REST_S: Final = 0.5
_LONGEST_REST_S: Final = 30.0
"""How long an endpoint is left alone after a failure: doubled by each one that follows."""
_IN_FLIGHT: Final = 2
"""Batches for each endpoint: one computes while the next travels."""


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Where the fleet is, and how patient to be with it."""

    endpoints: tuple[str, ...]
    """`host:port` of each server's gRPC service."""
    timeout_s: float = 10.0
    """Seconds that one endpoint may take for one batch, its queue included."""
    connect_timeout_s: float = 5.0
    """Seconds that an endpoint may take to describe the model at the start."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        if not self.endpoints:
            raise ValueError(
                "endpoints is empty; name at least one host:port of a Triton server's gRPC service"
            )
        for endpoint in self.endpoints:
            host, colon, port = endpoint.rpartition(":")
            if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"endpoints has {endpoint!r}; each must be host:port")
        for field in ("timeout_s", "connect_timeout_s"):
            if not 0 < getattr(self, field) <= 3600:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be above 0, up to 3600 seconds")


class _Endpoint:
    """One server of the fleet, and how it has been doing."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = InferenceServerClient(address)
        self.in_flight = 0
        self.asked_at = float("-inf")
        self.failures = 0
        self.rests_until = 0.0

    def succeeded(self) -> None:
        self.failures = 0
        self.rests_until = 0.0

    def failed(self) -> None:
        self.failures += 1
        rest_s = min(_FIRST_REST_S * 2 ** (self.failures - 1), _LONGEST_REST_S)
        self.rests_until = monotonic() + rest_s


class TritonEngine:
    """Runs one model version on a fleet; made by `connect`."""

    def __init__(
        self, info: EngineInfo, model: str, side: int, options: TritonOptions, endpoints: list[_Endpoint]
    ) -> None:
        """Use `connect`."""
        self.info = info
        self._model = model
        self._side = side
        self._options = options
        self._endpoints = endpoints
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def connect(cls, version: ModelVersion, options: TritonOptions) -> Self:
        """Look at the fleet and compare its model with the local copy of the repository.

        Endpoints that do not answer are tried again later, as long as one does.

        Raises:
            EngineDead: no endpoint serves this version of the model; the message has each one's reason.
            EngineError: one serves something else under its name.
        """
        side = version.input_side
        if side is None:
            raise EngineError(f"model {version.name} takes images of any size; an engine needs fixed squares")
        # The folder: a family's name is known to our clients, not to Triton.
        model = version.graph
        endpoints = [_Endpoint(address) for address in options.endpoints]
        try:
            max_batch = await _survey(endpoints, model, version, options)
            fingerprint = await asyncio.to_thread(version.fingerprint)
        except BaseException:
            await asyncio.gather(*(endpoint.client.close() for endpoint in endpoints))
            raise
        info = EngineInfo(
            name=version.name,
            version=version.version,
            spec=version.spec,
            provider="triton",
            device=",".join(options.endpoints),
            max_batch=max_batch,
            buckets=(),
            fingerprint=fingerprint,
            graph=version.graph,
            precision=version.precision,
            verified=version.verified,
            parallel=_IN_FLIGHT * len(endpoints),
        )
        return cls(info, model, side, options, endpoints)

    async def predict(self, images: Images) -> Predictions:
        """Classify a batch on the endpoint with the least to do; see `Engine.predict`."""
        if self._closed:
            raise EngineDead(f"the engine of {self.info.name}/{self.info.version} was closed")
        if not 1 <= len(images) <= self.info.max_batch:
            raise ValueError(f"a batch has {len(images)} images; it must have 1 to {self.info.max_batch}")
        images_BHWC = np.stack(images)
        expected = (len(images), self._side, self._side, 3)
        if images_BHWC.shape != expected or images_BHWC.dtype != np.uint8:
            raise ValueError(
                f"a batch is {images_BHWC.dtype} {images_BHWC.shape}; it must be uint8 {expected}"
            )
        reasons: list[str] = []
        for endpoint in self._order():
            predictions = await self._predict_on(endpoint, images_BHWC, reasons)
            if predictions is not None:
                return predictions
        raise EngineDead(f"no Triton server answered ({'; '.join(reasons)})")

    async def warm_up(self) -> None:
        """Send the smallest and the largest batch to every endpoint that is up; see `Engine.warm_up`.

        One that does not answer rests, as after any batch, as long as another does.
        """
        reasons: list[str] = []
        for batch in sorted({1, self.info.max_batch}):
            images_BHWC = np.zeros((batch, self._side, self._side, 3), np.uint8)
            up = [endpoint for endpoint in self._endpoints if endpoint.rests_until <= monotonic()]
            answers = [await self._predict_on(endpoint, images_BHWC, reasons) for endpoint in up]
            if all(answer is None for answer in answers):
                raise EngineDead(f"no Triton server answered ({'; '.join(reasons)})")

    async def close(self) -> None:
        """Close the connections; idempotent. Batches under way are answered first."""
        self._closed = True
        await self._idle.wait()
        await asyncio.gather(*(endpoint.client.close() for endpoint in self._endpoints))

    def _order(self) -> Sequence[_Endpoint]:
        """Endpoints to try: those that are well first, the least busy first; the resting ones as a last resort.

        Of several that are idle the one not asked for longest: others may ask this fleet, too, and not all of them the
        first of the list.
        """
        now = monotonic()
        return sorted(self._endpoints, key=lambda e: (max(e.rests_until - now, 0), e.in_flight, e.asked_at))

    async def _predict_on(
        self, endpoint: _Endpoint, images_BHWC: NDArray[np.uint8], reasons: list[str]
    ) -> Predictions | None:
        """The endpoint's answer; None, with another reason, where the next one may do better.

        Raises:
            EngineError: another one would do no better.
        """
        tensor = InferInput(INPUT, list(images_BHWC.shape), "UINT8")
        tensor.set_data_from_numpy(images_BHWC)
        try:
            answer = await self._ask(endpoint, tensor)
        except InferenceServerException as error:
            failure = engine_error(error)
            if _status(error) not in _ELSEWHERE and not isinstance(failure, EngineDead):
                raise failure from error
            endpoint.failed()
            reasons.append(f"{endpoint.address}: {_reason(error)}")
            log.warning("a Triton server did not answer a batch: %s", reasons[-1])
            return None
        endpoint.succeeded()
        return self._predictions(answer, len(images_BHWC), endpoint)

    async def _ask(self, endpoint: _Endpoint, tensor: InferInput) -> Any:
        endpoint.in_flight += 1
        endpoint.asked_at = monotonic()
        self._idle.clear()
        try:
            return await endpoint.client.infer(
                self._model,
                [tensor],
                model_version=self.info.version,
                outputs=[InferRequestedOutput(name) for name in OUTPUTS],
                client_timeout=self._options.timeout_s,
            )
        finally:
            endpoint.in_flight -= 1
            if not any(e.in_flight for e in self._endpoints):
                self._idle.set()

    def _predictions(self, answer: Any, count: int, endpoint: _Endpoint) -> Predictions:
        arrays = [answer.as_numpy(name) for name in OUTPUTS]
        classes = self.info.spec.architecture.classes
        top = min(5, classes)
        shapes = [None if array is None else array.shape for array in arrays]
        if shapes != [(count, top), (count, top), (count, classes)]:
            raise EngineError(f"{endpoint.address} answered {count} images with arrays of {shapes}")
        if not np.isfinite(arrays[0]).all():
            raise EngineError(f"{endpoint.address} gave answers that are not numbers")
        return Predictions(*arrays)


async def _survey(
    endpoints: Sequence[_Endpoint], model: str, version: ModelVersion, options: TritonOptions
) -> int:
    """The largest batch that every endpoint takes which answers; the others rest.

    Raises:
        EngineDead: none serves the version.
        EngineError: one serves something else under the model's name.
    """
    limits, reasons = [], []
    for endpoint in endpoints:
        try:
            limits.append(await _describe(endpoint, model, version, options))
        except InferenceServerException as error:
            endpoint.failed()
            reasons.append(f"{endpoint.address}: {_reason(error)}")
    if not limits:
        raise EngineDead(f"no Triton server serves {model} version {version.version} ({'; '.join(reasons)})")
    if reasons:
        log.warning("some Triton servers do not serve %s now: %s", model, "; ".join(reasons))
    return min(limits)


async def _describe(endpoint: _Endpoint, model: str, version: ModelVersion, options: TritonOptions) -> int:
    """The largest batch that the endpoint takes, after comparing its model with ours.

    Raises:
        InferenceServerException: it does not answer, or does not serve the version.
        EngineError: it serves something else.
    """
    limits = {"model_version": version.version, "client_timeout": options.connect_timeout_s, "as_json": True}
    metadata = await endpoint.client.get_model_metadata(model, **limits)
    config = (await endpoint.client.get_model_config(model, **limits))["config"]
    side, classes = version.input_side, version.spec.architecture.classes
    found = {tensor["name"]: [int(size) for size in tensor["shape"]] for tensor in metadata["inputs"]}
    gives = {tensor["name"]: [int(size) for size in tensor["shape"]] for tensor in metadata["outputs"]}
    if (
        found != {INPUT: [-1, side, side, 3]}
        or not set(OUTPUTS) <= set(gives)
        or gives["scores"] != [-1, classes]
    ):
        raise EngineError(
            f"{endpoint.address} serves another model under the name {model}: it takes {found} and gives {gives}; "
            f"here version {version.version} takes [-1, {side}, {side}, 3] and knows {classes} classes"
        )
    return int(config.get("max_batch_size", 0)) or 1


def _status(error: InferenceServerException) -> str:
    """The gRPC status's name, e.g. `UNAVAILABLE`."""
    return str(error.status() or "").removeprefix("StatusCode.")


def _reason(error: InferenceServerException) -> str:
    return one_line(Exception(f"{_status(error)} {error.message() or ''}".strip()), 200)


def triton_engines(options: TritonOptions) -> Callable[[ModelVersion], Callable[[], Awaitable[TritonEngine]]]:
    """Makes engines for versions of models: what `serving.Loader` needs to serve from a fleet."""
    return lambda version: lambda: TritonEngine.connect(version, options)
