"""The way of an image that has the engine to itself: decoded and computed by one thread, unless others come."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.server.fakes import FakeEngine, make_info, picture, pixels
from tests.server.harness import eventually, serving
from tests.server.onnx_models import random_images
from tests.server.test_app import send_files
from tests.server.test_batcher import Bench, on_loop, red_of, settle
from tests.server.test_onnx_engine import check, open_engine

from topfive import preprocessing
from topfive_server.batcher import Batcher
from topfive_server.decode_pool import Outcome, Pixels
from topfive_server.engine import EngineDead, EngineError, Predictions
from topfive_server.errors import (
    BadRequestError,
    DeadlineExceededError,
    EngineFailedError,
    NotReadyError,
    RequestError,
)
from topfive_server.job import Job


class LoneBench(Bench):
    """A batcher, and a lone image whose decoding ends when the test says so."""

    def decode_lone(
        self, red: int = 7, outcome: RequestError | None = None, *, timeout_s: float = 10
    ) -> tuple[Job, threading.Event]:
        """The job of an image that is alone, and what ends its decoding."""
        job = Job(deadline=monotonic() + timeout_s, priority="interactive", loop=asyncio.get_running_loop())
        end = threading.Event()

        def decode() -> Outcome:
            assert end.wait(10)
            return outcome or Pixels(pixels(red), 24, 20)

        def decoded(job: Job, outcome: Outcome) -> None:
            if isinstance(outcome, Pixels) and job.wanted:
                job.image = outcome.image
                self.batcher.submit(job)
                return
            self.batcher.withdraw(job.priority)
            if isinstance(outcome, RequestError):
                job.fail(outcome)

        arrival = self.batcher.arriving("interactive")
        assert self.batcher.is_alone(arrival)
        self.batcher.expect("interactive")
        self.batcher.compute_lone(job, decode, decoded)
        arrival.end()
        return job, end

    @property
    def idle(self) -> bool:
        batcher = self.batcher
        return not batcher.expected and not batcher.depth and not batcher._computing and batcher._lone is None


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  what the engine's thread does tells no event
        await asyncio.sleep(0.001)


def test_a_lone_image_is_decoded_and_computed_in_one_go() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        job, end = bench.decode_lone(7)
        await settle()
        assert bench.engine.batches == []
        assert bench.batcher.forecast.images_before("interactive") == 1  # who comes now has it before him
        end.set()
        answer = await job.answer
        assert (red_of(job), job.width, job.height) == (7, 24, 20)
        assert (answer.batch_size, answer.queue_s, answer.batch_s) == (1, 0, 0)
        assert job.decode_s > 0
        assert answer.infer_s > 0
        assert bench.log.events == [("done", 1)]
        await settle()
        assert bench.idle

    on_loop(test)


def test_others_who_come_while_it_is_decoded_are_computed_with_it() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine(), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 5.0), (8, 5.0)])
        job, end = bench.decode_lone(7)
        bench.batcher.expect("interactive")
        await settle()
        end.set()
        await until(lambda: bench.batcher.depth == 1)
        other = bench.send(8, expected=True)
        await asyncio.gather(job.answer, other.answer)
        assert (red_of(job), red_of(other)) == (7, 8)
        assert bench.engine.batches == [[7, 8]]
        await settle()
        assert bench.idle

    on_loop(test)


def test_the_first_who_comes_back_after_a_batch_is_not_alone() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        batcher = bench.batcher

        def alone() -> bool:
            arrival = batcher.arriving("interactive")
            found = batcher.is_alone(arrival)
            arrival.end()
            return found

        await bench.send(1).answer
        await settle()
        assert alone(), "of one nobody else can come back"
        await asyncio.gather(*(bench.send(red).answer for red in (2, 3)))
        await settle()
        assert bench.engine.batches == [[1], [2, 3]]
        assert not alone()
        await asyncio.sleep(0.03)
        assert alone()

    on_loop(test)


def test_a_square_that_comes_decoded_does_not_wait_for_the_decoding() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine(), max_delay_s=0)
        job, end = bench.decode_lone(7)
        square = bench.send(8)
        await square.answer
        assert bench.engine.batches == [[8]]
        end.set()
        await job.answer
        assert bench.engine.batches == [[8], [7]]

    on_loop(test)


def test_others_who_come_while_it_is_computed_are_the_next_batch() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        bench.engine.gate.clear()
        job, end = bench.decode_lone(7)
        end.set()
        await until(lambda: bench.engine.batches == [[7]])
        others = [bench.send(8), bench.send(9)]
        await settle()
        assert bench.engine.batches == [[7]]
        bench.engine.gate.set()
        await asyncio.gather(*(each.answer for each in (job, *others)))
        assert bench.engine.batches == [[7], [8, 9]]
        assert [red_of(each) for each in (job, *others)] == [7, 8, 9]

    on_loop(test)


def test_who_is_not_alone_is_not_taken_for_it() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        batcher = bench.batcher
        arrival = batcher.arriving("interactive")
        assert batcher.is_alone(arrival)
        second = batcher.arriving("batch")
        assert not batcher.is_alone(arrival)
        second.end()
        assert batcher.is_alone(arrival)
        bench.engine.gate.clear()
        computed = bench.send(1)
        assert not batcher.is_alone(arrival)  # it is in the queue
        arrival.end()
        await settle()
        assert not batcher.is_alone(arrival)  # it is computed
        bench.engine.gate.set()
        await computed.answer
        await settle()
        assert batcher.is_alone(arrival)  # which has come to its end, and counts no longer
        # An arrival that another model's batcher expects is nobody to this one.
        other = Bench(FakeEngine()).batcher.arriving("interactive")
        assert batcher.is_alone(other)
        batcher.expect("interactive")
        assert not batcher.is_alone(other)

    on_loop(test)


def test_an_engine_that_cannot_decode_is_not_asked_to() -> None:
    class Plain:
        def __init__(self, engine: FakeEngine) -> None:
            self.info, self.predict = engine.info, engine.predict
            self.warm_up, self.close = engine.warm_up, engine.close

    async def test() -> None:
        bench = Bench(FakeEngine())
        plain = type(bench.batcher)(Plain(bench.engine), observer=bench.log, on_dead=bench.log.deaths.append)
        assert not plain.is_alone(plain.arriving("interactive"))

    on_loop(test)


def test_what_does_not_decode_fails_and_is_not_computed() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        job, end = bench.decode_lone(outcome=BadRequestError("not an image"))
        end.set()
        with pytest.raises(BadRequestError):
            await job.answer
        assert bench.engine.batches == []
        await settle()
        assert bench.idle

    on_loop(test)


@pytest.mark.parametrize("leaves", [True, False])
def test_nothing_is_computed_for_who_has_left_or_would_be_answered_too_late(leaves: bool) -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        bench.batcher.times.calibrate([(1, 5.0), (8, 5.0)])
        job, end = bench.decode_lone(timeout_s=10 if leaves else 3.9)
        if leaves:
            job.answer.cancel()
        end.set()
        await asyncio.wait([job.answer])
        if not leaves:
            with pytest.raises(DeadlineExceededError):
                job.answer.result()
        await until(lambda: bench.idle)
        assert bench.engine.batches == []

    on_loop(test)


def test_an_image_that_the_engine_fails_on_fails_alone() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine(guilty={7}))
        job, end = bench.decode_lone(7)
        end.set()
        with pytest.raises(EngineFailedError):
            await job.answer
        assert bench.log.events == [("failed", "error")]
        await settle()
        assert bench.idle
        good = bench.send(8)
        await good.answer

    on_loop(test)


@pytest.mark.parametrize("wrong", ["two rows", "not a number"])
def test_an_answer_that_cannot_be_is_not_believed(wrong: str) -> None:
    class Wrong(FakeEngine):
        async def predict(self, images: Sequence[NDArray[np.uint8]]) -> Predictions:
            found = await super().predict([*images, *images] if wrong == "two rows" else images)
            if wrong == "not a number":
                found.probabilities_BT[:] = np.nan
            return found

    async def test() -> None:
        bench = LoneBench(Wrong())
        job, end = bench.decode_lone(7)
        end.set()
        with pytest.raises(EngineFailedError):
            await job.answer
        assert bench.log.events == [("failed", "error")]

    on_loop(test)


@pytest.mark.parametrize("kind", ["dead", "hung", "closed"])
def test_an_engine_that_is_gone_is_noticed(kind: str) -> None:
    async def test() -> None:
        engine = FakeEngine(make_info(), dead=kind == "dead", hangs=kind == "hung", closed=kind == "closed")
        bench = LoneBench(engine, engine_timeout_s=0.02)
        job, end = bench.decode_lone(7)
        end.set()
        with pytest.raises(NotReadyError, match="being rebuilt"):
            await job.answer
        assert len(bench.log.deaths) == 1
        assert ("failed", "hung" if kind == "hung" else "dead") in bench.log.events
        assert not bench.batcher.is_alone(bench.batcher.arriving("interactive"))
        await asyncio.sleep(0.05)  # and only once
        assert len(bench.log.deaths) == 1
        assert not bench.batcher._computing

    on_loop(test)


def test_an_engine_that_answers_after_it_was_given_up_is_not_listened_to() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine(), engine_timeout_s=0.02)
        bench.engine.gate.clear()
        job, end = bench.decode_lone(7)
        end.set()
        with pytest.raises(NotReadyError, match="being rebuilt"):
            await job.answer
        bench.engine.gate.set()
        await asyncio.sleep(0.02)
        assert ("done", 1) not in bench.log.events
        assert bench.batcher.expected == 0

    on_loop(test)


def test_decoding_that_takes_long_is_no_hung_engine() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine(), engine_timeout_s=0.02)
        job, end = bench.decode_lone(7)
        await asyncio.sleep(0.07)
        end.set()
        await job.answer
        assert red_of(job) == 7
        assert bench.log.deaths == []

    on_loop(test)


def test_an_engine_that_died_while_others_came_leaves_nobody_expected() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine())
        job, end = bench.decode_lone(7)
        lone = bench.batcher._lone
        assert lone is not None
        other = bench.batcher.arriving("interactive")
        bench.batcher._lone_failed(lone, EngineDead("the lane could not be made"))
        other.end()
        with pytest.raises(NotReadyError):
            await job.answer
        assert bench.batcher.expected == 0
        lone.given_up = True
        end.set()

    on_loop(test)


def test_close_answers_it_first() -> None:
    async def test() -> None:
        bench = LoneBench(FakeEngine(delay_s=0.01))
        job, end = bench.decode_lone(7)
        closing = asyncio.create_task(bench.batcher.close())
        await settle()
        assert not closing.done()
        end.set()
        await closing
        assert red_of(job) == 7

    on_loop(test)


def test_the_engine_decodes_in_one_and_the_same_thread_of_its_own(tmp_path: Path) -> None:
    images = random_images(4)
    threads: set[str] = set()

    async def run() -> None:
        engine = open_engine(tmp_path)
        await engine.warm_up()
        for image in images:

            def decode(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = image) -> object:
                threads.add(threading.current_thread().name)
                return image

            found = await asyncio.wrap_future(engine.predict_lone(decode))  # type: ignore[arg-type]
            assert found is not None
            check(found, [image])
        assert await asyncio.wrap_future(engine.predict_lone(lambda: None)) is None
        with pytest.raises(EngineError, match=r"it must be uint8 \(12, 12, 3\)"):
            await asyncio.wrap_future(engine.predict_lone(lambda: np.zeros((9, 9, 3), np.uint8)))
        await engine.close()
        with pytest.raises(EngineDead, match="was closed"):
            engine.predict_lone(lambda: None)

    asyncio.run(run())
    assert threads == {"engine-tiny-2"}


@pytest.fixture(name="threads")
def decoding_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name of the thread in which each image is decoded."""
    threads: list[str] = []
    decode = preprocessing.decode

    def watched(*arguments: object, **options: object) -> object:
        threads.append(threading.current_thread().name)
        return decode(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("topfive_server.decode_pool.decode", watched)
    return threads


def test_a_request_that_is_alone_leaves_the_decode_threads_alone(threads: list[str]) -> None:
    with serving() as server, ThreadPoolExecutor() as clients:
        threads.clear()  # the golden image goes the way that all can go
        assert server.classify(picture(3)).classes == [3]
        assert len(threads) == 1
        assert not threads[0].startswith("decode")
        server.hold()
        replies = [clients.submit(server.classify, picture(4))]
        eventually(lambda: server.engine.seen[-1:] == [4])
        replies += [clients.submit(server.classify, picture(red)) for red in (5, 6)]
        eventually(lambda: server.model.batcher.depth == 2)
        server.release()
        assert [reply.result().classes for reply in replies] == [[4], [5], [6]]
        assert sum(name.startswith("decode") for name in threads) == 2


def test_images_that_come_together_are_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lone: list[int] = []
    compute_lone = Batcher.compute_lone

    def watched(self: Batcher, *arguments: Any) -> None:
        lone.append(1)
        compute_lone(self, *arguments)

    monkeypatch.setattr(Batcher, "compute_lone", watched)
    with serving() as server:
        assert send_files(server, ("a.png", picture(1)), ("b.png", picture(2))).classes == [1, 2]
        assert lone == []
        time.sleep(0.05)  # until nobody is expected to come back
        assert send_files(server, ("a.png", picture(3))).classes == [3]
        assert lone == [1]


def test_the_golden_image_goes_through_the_decode_threads(threads: list[str]) -> None:
    with serving() as server:
        threads.clear()
        server.on_loop(lambda: setattr(server.model.batcher, "last_success", float("-inf")))
        assert server.request("GET", "/readyz").status == 200
    assert [name[:6] for name in threads] == ["decode"]
