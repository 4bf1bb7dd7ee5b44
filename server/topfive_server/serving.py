"""From a models folder to versions in service, and later ones into the place of earlier ones."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from topfive.errors import TopfiveError
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import Device, DeviceError
from topfive_server.engine import Engine, EngineError
from topfive_server.errors import RequestError
from topfive_server.many_engines import ManyEngines
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.reload import Found, find
from topfive_server.repository import ModelVersion, Repository, RepositoryError
from topfive_server.served_model import EngineFactory, ServedModel
from topfive_server.session import RuntimeOptions
from topfive_server.variants import Choice, Wanted

log = logging.getLogger(__name__)

EngineMaker = Callable[[ModelVersion], EngineFactory]


class StartError(TopfiveError):
    """The server cannot start; the message says why and what to do."""


def onnx_engines(devices: Sequence[Device], runtime: RuntimeOptions) -> EngineMaker:
    """Makes engines that run in this process: one, or one for each device behind a common queue."""

    def for_version(version: ModelVersion) -> EngineFactory:
        async def build() -> Engine:
            engines = [await asyncio.to_thread(OnnxEngine, version, device, runtime) for device in devices]
            return engines[0] if len(engines) == 1 else ManyEngines(engines)

        return build

    return for_version


class Loader:
    """Brings the versions of a folder into service."""

    def __init__(
        self,
        root: Path,
        *,
        engines: EngineMaker,
        device: Device,
        variant: Wanted,
        config: ServerConfig,
        models: Models,
        pool: DecodePool,
        metrics: Metrics,
    ) -> None:
        self._repository = Repository(root)
        self._engines = engines
        self._device = device
        self._variant = variant
        self._config = config
        self._models = models
        self._pool = pool
        self._metrics = metrics

    async def start(self) -> list[ModelVersion]:
        """Load, warm up and prove the newest versions of every model; returns them.

        Raises:
            StartError: nothing can be served, or the newest version of a model is broken.
        """
        try:
            wanted = await asyncio.to_thread(self.wanted)
            for choice in wanted:
                await self.load(choice.version)
                log.info(
                    "chosen",
                    extra={"model": choice.version.name, "graph": choice.graph, "reason": choice.reason},
                )
        except (RepositoryError, DeviceError, EngineError, RequestError) as error:
            raise StartError(str(error)) from error
        name = self._models.default_name()
        if all(model.info.name != name for model in self._models):
            served = ", ".join(sorted({model.info.name for model in self._models}))
            raise StartError(f"there is no model {name!r} in {self._repository.root}; it holds {served}")
        return [choice.version for choice in wanted]

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
        choices, refused = self.find()
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

    async def load(self, version: ModelVersion) -> None:
        """Bring one version into service beside those that are; on failure nothing has changed.

        Raises:
            EngineError, DeviceError, RequestError: it does not work.
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
        replaced = self._models.add(model)
        log.info(
            "in service",
            extra={
                "model": model.info.name,
                "version": model.info.version,
                "provider": model.info.provider,
                "device": model.info.device,
                "max_batch": model.info.max_batch,
                "seconds": round(monotonic() - started, 2),
            },
        )
        if replaced is not None:
            await replaced.close()
