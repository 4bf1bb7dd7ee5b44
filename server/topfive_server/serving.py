"""From a models folder to versions in service, and later ones into the place of earlier ones."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from topfive.errors import TopfiveError
from topfive_server import tensorrt
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import Device, DeviceError, resolve_all
from topfive_server.engine import Engine, EngineError
from topfive_server.engine_life import EngineFactory, close_engine
from topfive_server.errors import RequestError
from topfive_server.folder import Found, find
from topfive_server.many_engines import ManyEngines
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import ModelVersion, Repository, RepositoryError
from topfive_server.served_model import ServedModel
from topfive_server.session import RuntimeOptions
from topfive_server.variants import Choice, Wanted

if TYPE_CHECKING:
    from topfive_server.traces import Traces

log = logging.getLogger(__name__)

EngineMaker = Callable[[ModelVersion], EngineFactory]


class StartError(TopfiveError):
    """The server cannot start; the message says why and what to do."""


def onnx_engines(devices: Sequence[Device], runtime: RuntimeOptions) -> EngineMaker:
    """Makes engines that run in this process: one, or one for each device behind a common queue."""

    def for_version(version: ModelVersion) -> EngineFactory:
        async def build() -> Engine:
            engines: list[OnnxEngine] = []
            try:
                for device in devices:
                    engines += [await asyncio.to_thread(OnnxEngine, version, device, runtime)]
            except BaseException:
                await asyncio.gather(*map(close_engine, engines))
                raise
            return engines[0] if len(engines) == 1 else ManyEngines(engines)

        return build

    return for_version


def computing(
    config: ServerConfig, runtime: RuntimeOptions, devices: Sequence[Device] | None = None
) -> tuple[Device, EngineMaker, Wanted]:
    """What computes: this process's devices (those of `config.device`, or the given), or a fleet of Triton servers.

    Raises:
        DeviceError: the device cannot be used.
        ValueError: an endpoint is not host:port.
    """
    if not runtime.triton:
        devices = devices or resolve_all(config.device)
        if runtime.tensorrt:
            tensorrt.require(devices[0])
        return devices[0], onnx_engines(devices, runtime), runtime.variant
    from topfive_server.triton_engine import TritonOptions, triton_engines  # noqa: PLC0415  an extra of its own

    fleet = ", ".join(runtime.triton)
    # What the fleet's devices are is not known here, so the one graph that runs everywhere is the default.
    variant = "fp32" if runtime.variant == "auto" else runtime.variant
    device = Device(kind="cpu", reason=f"Triton servers compute: {fleet}")
    return device, triton_engines(TritonOptions(endpoints=runtime.triton)), variant


def make_traces() -> "Traces":
    """Sends traces to where the environment says.

    Raises:
        StartError: the extra is missing, or the environment makes no sense.
    """
    try:
        from topfive_server.traces import Traces  # noqa: PLC0415  an extra of its own
    except ModuleNotFoundError as error:
        raise StartError(
            f"--traces needs {error.name}, which is not installed: pip install 'topfive[telemetry]'"
        ) from error
    try:
        return Traces()
    except ValueError as error:
        raise StartError(str(error)) from error


class Offer:
    """What a folder offers to a device, and which of it ought to be in service."""

    def __init__(self, root: Path, *, device: Device, variant: Wanted, config: ServerConfig) -> None:
        self._repository = Repository(root)
        self._device = device
        self._variant = variant
        self._config = config

    async def start(self, load: Callable[[ModelVersion], Awaitable[object]]) -> list[ModelVersion]:
        """Load the newest versions of every model with `load`.

        Raises:
            StartError: nothing can be served, the default model is not there, or the newest version of one is broken.
        """
        try:
            wanted = await asyncio.to_thread(self.wanted)
            self._see_default({choice.version.name for choice in wanted})
            for choice in wanted:
                await load(choice.version)
                log.info(
                    "chosen",
                    extra={"model": choice.version.name, "graph": choice.graph, "reason": choice.reason},
                )
        except (RepositoryError, DeviceError, EngineError, RequestError) as error:
            raise StartError(str(error)) from error
        return [choice.version for choice in wanted]

    def _see_default(self, offered: set[str]) -> None:
        if self._config.model and self._config.model not in offered:
            raise StartError(
                f"there is no model {self._config.model!r} in {self._repository.root}; "
                f"it holds {', '.join(sorted(offered))}"
            )

    def find(self) -> Found:
        """What the folder offers now.

        Raises:
            RepositoryError: no such folder, or no model.
        """
        return find(self._repository, self._device, self._variant)

    def wanted(self) -> list[Choice]:
        """The versions that ought to be in service: the newest of each model that takes decoded squares.

        Raises:
            RepositoryError: no such folder, no model, none of a servable kind, or a broken newest version.
        """
        choices, refused, _ = self.find()
        wanted: list[Choice] = []
        for name in sorted({choice.version.name for choice in choices}):
            wanted += [choice for choice in choices if choice.version.name == name][-self._config.versions :]
        newest = {choice.version.name: int(choice.version.version) for choice in wanted}
        for row in refused:
            # An older version that is broken is nobody's business; a newest one is not quietly replaced by an older.
            if int(row.version) > newest.get(row.name, 0):
                raise RepositoryError(row.reason)
        if not wanted:
            raise RepositoryError(
                f"{self._repository.root} holds no model to serve (<name>/<version>/model.onnx); `topfive export` makes one"
            )
        return wanted


class Loader:
    """Brings versions into service in this process."""

    def __init__(
        self,
        *,
        engines: EngineMaker,
        config: ServerConfig,
        models: Models,
        pool: DecodePool,
        metrics: Metrics,
    ) -> None:
        self._engines = engines
        self._config = config
        self._models = models
        self._pool = pool
        self._metrics = metrics
        self._closing: set[asyncio.Task[None]] = set()
        """Of versions that answer what they have accepted."""

    async def load(self, version: ModelVersion) -> None:
        """Bring one version into service beside those that are; on failure nothing has changed.

        Raises:
            EngineError, DeviceError, RequestError: it does not work.
            BrokenModelError: its file is not the one that was verified.
        """
        self.install(await self.prepare(version))

    async def prepare(self, version: ModelVersion) -> ServedModel:
        """Open, warm up and prove a version, out of every request's sight.

        Raises:
            EngineError, DeviceError, RequestError: it does not work.
            BrokenModelError: its file is not the one that was verified.
        """
        started = monotonic()
        assert version.input_side is not None  # noqa: S101  `wanted` leaves out graphs that take any size
        model = ServedModel(
            self._engines(version),
            input_side=version.input_side,
            config=self._config,
            pool=self._pool,
            observer=lambda info: self._metrics.observer(info.name, info.version),
        )
        await model.start()
        seconds = round(monotonic() - started, 2)
        log.info("warmed up", extra={"model": version.name, "version": version.version, "seconds": seconds})
        return model

    def install(self, model: ServedModel) -> None:
        """Let a prepared version answer, in the place of the one of its name and version if there is one."""
        replaced = self._models.add(model)
        log.info(
            "in service",
            extra={
                "model": model.info.name,
                "version": model.info.version,
                "provider": model.info.provider,
                "device": model.info.device,
                "max_batch": model.info.max_batch,
            },
        )
        if replaced is not None:
            self.retire(replaced)

    def retire(self, model: ServedModel) -> None:
        """Close a version that is out of service; nobody waits for what it still has to answer."""
        closing = asyncio.get_running_loop().create_task(model.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
