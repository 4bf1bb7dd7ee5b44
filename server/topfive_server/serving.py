"""From a models folder to versions in service, and later ones into the place of earlier ones."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from topfive.errors import TopfiveError
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import Device, DeviceError
from topfive_server.engine import Engine, EngineError
from topfive_server.errors import RequestError
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import GraphKind, ModelVersion, Repository, RepositoryError
from topfive_server.served_model import EngineFactory, ServedModel
from topfive_server.session import RuntimeOptions

log = logging.getLogger(__name__)

EngineMaker = Callable[[ModelVersion], EngineFactory]


class StartError(TopfiveError):
    """The server cannot start; the message says why and what to do."""


def onnx_engines(device: Device, runtime: RuntimeOptions) -> EngineMaker:
    """Makes engines that run in this process."""

    def for_version(version: ModelVersion) -> EngineFactory:
        async def build() -> Engine:
            return await asyncio.to_thread(OnnxEngine, version, device, runtime)

        return build

    return for_version


class Loader:
    """Brings the versions of a folder into service."""

    def __init__(
        self,
        root: Path,
        *,
        engines: EngineMaker,
        config: ServerConfig,
        models: Models,
        pool: DecodePool,
        metrics: Metrics,
    ) -> None:
        self._repository = Repository(root)
        self._engines = engines
        self._config = config
        self._models = models
        self._pool = pool
        self._metrics = metrics

    async def start(self) -> None:
        """Load, warm up and prove the newest versions of every model.

        Raises:
            StartError: nothing can be served, or the newest version of a model is broken.
        """
        try:
            wanted = await asyncio.to_thread(self.wanted)
            for version in wanted:
                await self.load(version)
        except (RepositoryError, DeviceError, EngineError, RequestError) as error:
            raise StartError(str(error)) from error
        name = self._models.default_name()
        if all(model.info.name != name for model in self._models):
            served = ", ".join(sorted({model.info.name for model in self._models}))
            raise StartError(f"there is no model {name!r} in {self._repository.root}; it holds {served}")

    def wanted(self) -> list[ModelVersion]:
        """The versions that ought to be in service: the newest of each model that takes decoded squares.

        Raises:
            RepositoryError: no such folder, no model, none of a servable kind, or a broken newest version.
        """
        repository = self._repository
        names = repository.names()
        newest = [
            repository.read(name, version)
            for name in names
            for version in repository.versions(name)[-self._config.versions :]
        ]
        servable = [version for version in newest if version.kind is not GraphKind.WHOLE]
        if not servable:
            raise RepositoryError(
                f"{repository.root} holds no model to serve (<name>/<version>/model.onnx); `topfive export` makes one"
            )
        return servable

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
