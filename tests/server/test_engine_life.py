"""An engine from its making to its release, and the model around it, whatever fails or hangs on the way."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.fakes import CROP, FakeEngine, picture, pixels
from tests.server.harness import eventually
from tests.server.onnx_models import random_images, write_model

from topfive_server import engine_life, served_model
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import Device
from topfive_server.engine import Engine, EngineDead, EngineError
from topfive_server.errors import NotReadyError
from topfive_server.job import Job
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.network import open_network
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import Repository
from topfive_server.served_model import ServedModel, close_all
from topfive_server.serving import Loader, onnx_engines
from topfive_server.session import RuntimeOptions

CPU = Device(kind="cpu", reason="test")
TINY_SIDE = 12
"""Of the model that `write_model` writes."""


class Hung(FakeEngine):
    """Neither warms up nor closes."""

    async def warm_up(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True
        await asyncio.Event().wait()


class Workshop:
    """What a served model needs, and a series of engines to build it on."""

    def __init__(self, *engines: FakeEngine, **settings: Any) -> None:
        self.config = ServerConfig(**settings)
        self.pool = DecodePool(threads=2, max_pixels=self.config.max_pixels)
        self.metrics = Metrics()
        self.waiting = list(engines)

    async def build(self) -> Engine:
        return self.waiting.pop(0)

    def model(self, build: Callable[[], Awaitable[Engine]] | None = None, side: int = CROP) -> ServedModel:
        return ServedModel(
            build or self.build,
            input_side=side,
            config=self.config,
            pool=self.pool,
            observer=lambda info: self.metrics.observer(info.name, info.version),
        )


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, condition)


def engine_threads() -> int:
    return sum(thread.name.startswith("engine-") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_engine_is_left_over() -> Iterator[None]:
    before = engine_threads()
    yield
    end = time.monotonic() + 10
    while engine_threads() > before:
        assert time.monotonic() < end, "an engine's threads have not ended"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_life, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(served_model, "_WARM_UP_BATCHES", 1)


# ---------------------------------------------------------------------- building


def test_what_was_opened_before_another_device_failed_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[OnnxEngine] = []

    def second_fails(*arguments: Any) -> OnnxEngine:
        if opened:
            raise EngineError("no memory")
        opened.append(OnnxEngine(*arguments))
        return opened[0]

    async def test() -> None:
        write_model(tmp_path)
        monkeypatch.setattr("topfive_server.serving.OnnxEngine", second_fails)
        build = onnx_engines([CPU, CPU], RuntimeOptions(threads=1))(Repository(tmp_path).read("tiny"))
        with pytest.raises(EngineError, match="no memory"):
            await build()
        with pytest.raises(EngineDead, match="was closed"):
            await opened[0].predict(random_images(1))

    on_loop(test)


def test_an_engine_that_is_there_too_late_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, may_open, opened = asyncio.Event(), threading.Event(), list[OnnxEngine]()

    async def test() -> None:
        loop = asyncio.get_running_loop()

        def slow(*arguments: Any) -> OnnxEngine:
            loop.call_soon_threadsafe(opening.set)
            assert may_open.wait(20)
            opened.append(OnnxEngine(*arguments))
            return opened[0]

        write_model(tmp_path)
        monkeypatch.setattr("topfive_server.serving.OnnxEngine", slow)
        build = onnx_engines([CPU], RuntimeOptions(threads=1))(Repository(tmp_path).read("tiny"))
        starting = asyncio.create_task(Workshop().model(build, TINY_SIDE).start())
        await opening.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        may_open.set()
        await until(lambda: bool(opened) and not engine_threads())

    on_loop(test)


def test_an_engine_that_hangs_in_its_warm_up_is_given_up_and_another_built() -> None:
    async def test() -> None:
        dying, hung, last = FakeEngine(), Hung(), FakeEngine()
        shop = Workshop(dying, hung, last, engine_timeout_s=0.5)
        model = shop.model()
        await model.start()
        dying.dead = True
        with pytest.raises(NotReadyError):
            await model.classify(picture(1), deadline=time.monotonic() + 10, priority="interactive").answer
        await until(lambda: model.health.ready)  # after a pause of a second
        assert hung.closed
        assert not shop.waiting
        answer = await model.classify(
            picture(3), deadline=time.monotonic() + 10, priority="interactive"
        ).answer
        assert answer.classes_T[0] == 3
        await model.close()

    on_loop(test)


def test_a_model_that_does_not_warm_up_says_so() -> None:
    async def test() -> None:
        with pytest.raises(EngineError, match=r"was not warm within 0\.5 s"):
            await Workshop(Hung(), engine_timeout_s=0.5).model().start()

    on_loop(test)


def test_a_model_that_never_started_is_not_rebuilt_behind_its_owners_back() -> None:
    class DiesOfTheGoldenImage(FakeEngine):
        async def predict(self, images: Any) -> Any:
            if images[0].any():  # what is timed before is black
                raise EngineDead("the device fell off the bus")
            return await super().predict(images)

    async def test() -> None:
        engine = DiesOfTheGoldenImage()
        shop = Workshop(engine, FakeEngine())
        with pytest.raises(NotReadyError, match="fell off the bus"):
            await shop.model().start()
        assert engine.closed
        await asyncio.sleep(0.1)
        assert len(shop.waiting) == 1

    on_loop(test)


# ---------------------------------------------------------------------- closing


def test_a_dead_engine_is_closed_though_images_are_still_being_decoded() -> None:
    async def test() -> None:
        dying = FakeEngine()
        shop = Workshop(dying, FakeEngine())
        model = shop.model()
        await model.start()
        batcher = model.batcher
        for _ in range(2):
            batcher.expect("interactive")
        loop = asyncio.get_running_loop()
        decoded, slow = (
            Job(deadline=time.monotonic() + 10, priority="interactive", loop=loop) for _ in range(2)
        )
        decoded.image = pixels(1)
        dying.dead = True
        batcher.submit(decoded)
        with pytest.raises(NotReadyError):
            await decoded.answer
        await until(lambda: model.health.ready)
        assert dying.closed
        assert batcher._task.done()
        slow.image = pixels(2)
        batcher.submit(slow)  # its decoding has ended at last
        with pytest.raises(NotReadyError):
            await slow.answer
        await model.close()

    on_loop(test)


def test_replacing_a_version_whose_engine_hangs_keeps_nobody_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sticky(FakeEngine):
        close = Hung.close

    async def test() -> None:
        shop = Workshop(Sticky(), FakeEngine())
        models = Models()
        loader = Loader(
            engines=lambda _: shop.build,
            config=shop.config,
            models=models,
            pool=shop.pool,
            metrics=shop.metrics,
        )
        old, new = shop.model(), shop.model()
        await old.start()
        await new.start()
        loader.install(old)
        old.batcher.expect("interactive")  # an image is still being decoded, and answered
        started = time.monotonic()
        loader.install(new)
        assert models.get() is new
        assert time.monotonic() - started < 1
        await asyncio.sleep(0.05)
        job = Job(deadline=time.monotonic() + 10, priority="interactive", loop=asyncio.get_running_loop())
        job.image = pixels(7)
        old.batcher.submit(job)
        assert (await job.answer).classes_T[0] == 7
        await until(lambda: "fake version 1 has not closed within 0.2 s" in caplog.text)
        await new.close()

    on_loop(test)


def test_closing_takes_bounded_time_whatever_does_not_end() -> None:
    class Sticky(FakeEngine):
        close = Hung.close

    async def test() -> None:
        engine = Sticky()
        model = Workshop(engine, request_timeout_s=0.1).model()
        await model.start()
        engine.batches.clear()
        engine.gate.clear()
        deadline = time.monotonic() + 10
        model.classify(picture(1), deadline=deadline, priority="interactive")
        await until(lambda: engine.batches == [[1]])
        model.batcher.expect("interactive")  # for ever
        waits = model.classify(picture(2), deadline=deadline, priority="interactive")
        await until(lambda: model.batcher.depth == 1)
        await model.close()
        assert engine.closed
        with pytest.raises(NotReadyError, match="taken out of service"):
            await waits.answer
        await close_all([model])

    on_loop(test)


@pytest.mark.parametrize("fails", [False, True])
def test_closing_an_engine_releases_what_it_computes_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    networks: list[weakref.ref[Any]] = []

    def noting(*arguments: Any) -> Any:
        network = open_network(*arguments)

        def call(images: Any) -> Any:
            if fails and len(images) == 3:
                raise EngineDead("the device fell off the bus")
            return network(images)

        networks.append(weakref.ref(network))
        return call

    monkeypatch.setattr("topfive_server.onnx_engine.open_network", noting)
    write_model(tmp_path)
    build = onnx_engines([CPU], RuntimeOptions(threads=1))(Repository(tmp_path).read("tiny"))

    async def test() -> None:
        model = Workshop().model(build, TINY_SIDE)
        await model.start()
        engine = model._engine
        kept: list[BaseException] = []
        if fails:
            try:
                await engine.predict(random_images(3))
            except EngineDead as error:
                kept.append(error)  # as whoever reports it may
        gc.collect()
        gc.disable()  # without its help
        try:
            assert networks[0]() is not None
            await model.close()
            assert networks[0]() is None
        finally:
            gc.enable()

    on_loop(test)


# ---------------------------------------------------------------------- readiness


def test_a_golden_image_that_is_not_answered_in_time_is_no_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        shop = Workshop(FakeEngine(), engine_timeout_s=0.5)
        model = shop.model()
        await model.start()
        monkeypatch.setattr(served_model, "_GOLDEN_DECODE_S", 0.1)
        model.batcher.last_success = float("-inf")
        free = threading.Event()
        for _ in range(2):  # both decode threads are busy
            shop.pool.run(lambda: free.wait(20))
        try:
            assert not await model.ready()
        finally:
            free.set()
        await model.close()

    on_loop(test)
