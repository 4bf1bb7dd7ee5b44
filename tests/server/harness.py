"""The real application on a real socket, in a thread, with a fake engine behind it; and clients as raw as needed."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop
from tests.server.fakes import CROP, FakeEngine

from topfive_server.app import Application
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.engine import Engine
from topfive_server.lifecycle import Server, listen
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.served_model import ServedModel

T = TypeVar("T")


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The last part of a problem document's type."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.json["status"] == self.status
        return str(self.json["type"].rpartition(":")[2])

    @property
    def classes(self) -> list[int]:
        """The first class of each image."""
        return [image["top"][0]["class"] for image in self.json["images"]]


class Harness:
    """A running server. Attributes may be looked at from the test's thread; `call` runs on the server's."""

    def __init__(self, engines: list[FakeEngine], config: ServerConfig) -> None:
        self.engines = engines
        self.config = config
        self.listener = listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.loop: asyncio.AbstractEventLoop
        self.application: Application
        self.server: Server
        self.error: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main)

    @property
    def engine(self) -> FakeEngine:
        """The first engine."""
        return self.engines[0]

    @property
    def model(self) -> ServedModel:
        return next(iter(self.application.models))

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)
        if self.error:
            raise self.error

    def stop(self) -> None:
        if self._thread.is_alive() and self.server._draining is None:
            self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def on_loop(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return self.call(run())

    def hold(self) -> None:
        """Batches do not come back from the engine until `release`."""
        self.on_loop(self.engine.gate.clear)

    def release(self) -> None:
        self.on_loop(self.engine.gate.set)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        chunked: bool = False,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}), encode_chunked=chunked)
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, fields, answer.read())

    def classify(self, body: Any, query: str = "", **headers: str) -> Reply:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", f"/v1/classify{query}", body, fields)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def raw(self, data: bytes) -> Reply:
        """Send bytes as they are, and read one answer."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_reply(connection)

    def metric(self, name: str, **labels: str) -> float:
        return self.on_loop(lambda: self.application.metrics.registry.get_sample_value(name, labels)) or 0.0

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._run())
        except BaseException as error:  # noqa: BLE001  handed to the test's thread
            self.error = error
        finally:
            self.listener.close()
            self._started.set()

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        pool = DecodePool(threads=2, max_pixels=self.config.max_pixels)
        models, metrics = Models(self.config.model), Metrics()
        self.application = Application(self.config, models=models, pool=pool, metrics=metrics)
        try:
            for engine in self.engines:
                model = ServedModel(
                    factory(engine),
                    input_side=CROP,
                    config=self.config,
                    pool=pool,
                    observer=lambda info: metrics.observer(info.name, info.version),
                )
                await model.start()
                models.add(model)
                engine.batches.clear()
            self.server = Server(self.application, self.config, on_listening=self._started.set)
            await self.server.serve(sockets=[self.listener])
        finally:
            for engine in self.engines:
                engine.gate.set()
            for model in list(models):
                await model.close()
            pool.close()


def factory(engine: FakeEngine) -> Callable[[], Coroutine[Any, Any, Engine]]:
    """Gives the engine itself at first, and after its death the engine revived."""

    async def build() -> Engine:
        engine.closed = False
        return engine

    return build


def read_reply(connection: socket.socket) -> Reply:
    """Read one answer from a socket."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    fields = {name.lower(): value for name, value in answer.getheaders()}
    return Reply(answer.status, fields, answer.read())


@contextlib.contextmanager
def serving(*engines: FakeEngine, **settings: Any) -> Iterator[Harness]:
    """A server with these settings; stopped at the end."""
    defaults: dict[str, Any] = {"drain_delay_s": 0.0, "drain_timeout_s": 5.0, "log_requests": False}
    harness = Harness(list(engines) or [FakeEngine()], ServerConfig(**{**defaults, **settings}))
    harness.start()
    try:
        yield harness
    finally:
        harness.stop()


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds; fail when it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.005)
