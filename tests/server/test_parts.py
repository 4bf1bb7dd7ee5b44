"""Large batches in parts, each computed by one thread: for the graphs and on the cores for which that is faster."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.harness import eventually
from tests.server.onnx_models import random_images, write_model
from tests.server.test_onnx_engine import FakeLane, check

from topfive_server import onnx_engine
from topfive_server.devices import Device
from topfive_server.engine import EngineError, Predictions
from topfive_server.lanes import HostLane, Images, Lane
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.parts import LEAST, Joined, parts_of_a_batch, split
from topfive_server.repository import ModelVersion, Repository
from topfive_server.session import RuntimeOptions, open_session
from topfive_server.turns import Turns

CPU = Device(kind="cpu", reason="test")


def open_engine(
    root: Path, *, threads: int = 2, max_batch: int = 32, norms: bool = True, **model: Any
) -> OnnxEngine:
    write_model(root, norms=norms, **model)
    return OnnxEngine(
        Repository(root).read("tiny"), CPU, RuntimeOptions(threads=threads, max_batch=max_batch)
    )


def predictions(rows: int, value: float = 0.5) -> Predictions:
    scores = np.full((rows, 7), value, np.float32)
    return Predictions(scores[:, :5], np.full((rows, 5), int(value * 10), np.int64), scores)


@pytest.mark.parametrize(
    ("operators", "threads", "max_batch", "parts"),
    [
        ({"Conv", "LRN"}, 2, 32, 2),
        ({"Conv", "QuantizeLinear"}, 2, 32, 2),
        ({"Conv", "Gemm"}, 2, 32, 1),  # fp32 with banded norms: its weights are read once for each part
        ({"LRN"}, 1, 32, 1),
        ({"LRN"}, 4, 32, 1),  # of 8 images
        ({"LRN"}, 4, 48, 4),
        ({"LRN"}, 2, 23, 1),
    ],
)
def test_parts_are_for_graphs_that_gain_and_large_enough(
    operators: set[str], threads: int, max_batch: int, parts: int
) -> None:
    assert parts_of_a_batch(operators, threads=threads, max_batch=max_batch) == parts


@given(images=st.integers(1, 100), parts=st.integers(1, 5))
def test_parts_are_the_images_in_order_and_of_a_size(images: int, parts: int) -> None:
    marked = [np.full((1, 1, 3), number, np.uint8) for number in range(images)]
    found = split(marked, parts)
    assert [int(image[0, 0, 0]) for part in found for image in part] == list(range(images))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == (parts if images >= LEAST * parts else 1)


@pytest.mark.parametrize("sooner", [0, 1])
def test_joined_answers_are_in_order_whichever_part_ends_first(sooner: int) -> None:
    parts = [Future[Predictions](), Future[Predictions]()]
    joined = Joined(parts)
    for number in (sooner, 1 - sooner):
        assert not joined.done()
        parts[number].set_result(predictions(2 + number, 0.1 + 0.1 * number))
    assert [row[0] for row in joined.result(0).classes_BT] == [1, 1, 2, 2, 2]
    assert [len(array) for array in joined.result(0)] == [5, 5, 5]


def test_a_failed_part_fails_the_batch_once_all_have_ended() -> None:
    parts = [Future[Predictions](), Future[Predictions]()]
    joined = Joined(parts)
    parts[1].set_exception(EngineError("part"))
    assert not joined.done()  # the device still works for it
    parts[0].set_result(predictions(2))
    with pytest.raises(EngineError, match="part"):
        joined.result(0)


def test_a_cancelled_batch_computes_no_part_that_has_not_begun(caplog: pytest.LogCaptureFixture) -> None:
    parts = [Future[Predictions](), Future[Predictions]()]
    joined = Joined(parts)
    parts[0].set_running_or_notify_cancel()
    assert joined.cancel()
    assert parts[1].cancelled()
    parts[0].set_result(predictions(2))
    with pytest.raises(CancelledError):
        joined.result(0)
    assert caplog.text == ""  # where a callback's failure would be


class SlowToCount(int):
    """A number with which whoever counts down without a lock is overtaken."""

    def __sub__(self, other: int) -> "SlowToCount":
        time.sleep(0.02)
        return SlowToCount(int(self) - other)


def test_parts_that_end_at_the_same_time_give_one_answer() -> None:
    parts = [Future[Predictions]() for _ in range(3)]
    joined, answered = Joined(parts), count()
    joined._left = SlowToCount(3)
    joined.add_done_callback(lambda _: next(answered))
    start = threading.Barrier(len(parts))

    def end(part: Future[Predictions]) -> None:
        start.wait()
        part.set_result(predictions(1))

    ending = [threading.Thread(target=end, args=(part,)) for part in parts]
    for thread in ending:
        thread.start()
    for thread in ending:
        thread.join()
    assert len(joined.result(0).classes_BT) == 3
    assert next(answered) == 1


def test_every_batch_size_is_answered_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        engine = open_engine(tmp_path)
        await engine.warm_up()
        for batch in (1, 2, 23, 24, 25, 31, 32):
            images = random_images(batch, seed=batch)
            check(await engine.predict(images), images)
        many = [random_images(batch, seed=batch) for batch in range(20, 33)]
        for images, answer in zip(many, await asyncio.gather(*map(engine.predict, many)), strict=True):
            check(answer, images)
        await engine.close()

    asyncio.run(run())


def test_the_threads_of_parts_compute_alone(tmp_path: Path) -> None:
    work = open_engine(tmp_path)._work
    threads = [each.session.get_session_options().intra_op_num_threads for each in work]
    assert threads == [2, 2, 2, 1, 1]
    assert work[3].session is work[4].session  # one more copy of the weights, not two


def test_a_gpu_computes_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_on_cpu(model: ModelVersion, device: Device, options: RuntimeOptions) -> Any:
        return open_session(model, CPU, options)

    monkeypatch.setattr(onnx_engine, "open_session", open_on_cpu)
    write_model(tmp_path, norms=True)
    model, cuda = Repository(tmp_path).read("tiny"), Device(kind="cuda", reason="test")
    engine = OnnxEngine(model, cuda, RuntimeOptions(threads=2))
    assert [work.share for work in engine._work] == [1, 1, 1]


def test_large_batches_are_computed_by_all_cores_at_once_and_small_ones_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(cores=2)
    seen: list[tuple[int, float]] = []
    together = threading.Barrier(2)
    compute = HostLane.compute

    def spying(lane: HostLane) -> None:
        seen.append((lane._count, turns._taken))
        if lane._count == 13:
            together.wait(20)  # breaks where one part waits for the other
        compute(lane)

    monkeypatch.setattr(onnx_engine, "TURNS", turns)
    monkeypatch.setattr(onnx_engine, "cores", lambda: 2)
    monkeypatch.setattr(HostLane, "compute", spying)
    engine = open_engine(tmp_path)
    assert engine.info.takes_turns
    images = random_images(26)
    check(engine.submit(images).result(20), images)
    assert [size for size, _ in seen] == [13, 13]
    assert seen[-1][1] == 1.0  # both have the machine between them
    seen.clear()
    check(engine.submit(images[:23]).result(20), images[:23])
    assert seen == [(23, 1.0)]
    asyncio.run(engine.close())


def test_one_bad_image_of_a_large_batch_fails_it_and_nothing_else(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, fails_on_white=True)
    good = random_images(30)
    bad = [*random_images(29), np.full((12, 12, 3), 255, np.uint8)]

    async def run() -> None:
        with pytest.raises(EngineError, match="Gather"):
            await engine.predict(bad)
        check(await engine.predict(good), good)
        await engine.close()

    asyncio.run(run())


def test_a_large_batch_that_is_given_up_while_it_waits_is_never_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = [FakeLane() for _ in range(5)]  # two for whole batches, one for lone images, two for parts

    def make(self: OnnxEngine, number: int) -> Lane:
        return lanes[number]

    monkeypatch.setattr(OnnxEngine, "_make_lane", make)
    engine = open_engine(tmp_path)

    async def run() -> None:
        tasks = [asyncio.create_task(engine.predict(random_images(size))) for size in (24, 28, 32)]
        await asyncio.to_thread(eventually, lambda: [lane.filled for lane in lanes[3:]] == [[12], [12]])
        tasks[1].cancel()
        await asyncio.sleep(0)
        for lane in lanes:
            lane.may_compute.set()
        first, given_up, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(given_up, asyncio.CancelledError)
        assert isinstance(first, Predictions)
        assert isinstance(last, Predictions)
        assert (len(first.classes_BT), len(last.classes_BT)) == (24, 32)
        await engine.close()

    asyncio.run(run())
    assert sorted(size for lane in lanes for size in lane.filled) == [12, 12, 16, 16]
    assert all(lane.released for lane in lanes[3:])


def test_parts_are_warmed_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    fill = HostLane.fill

    def noting(lane: HostLane, images: Images) -> None:
        filled.append(len(images))
        fill(lane, images)

    monkeypatch.setattr(HostLane, "fill", noting)
    engine = open_engine(tmp_path, max_batch=33)
    asyncio.run(engine.warm_up())
    asyncio.run(engine.close())
    assert sorted(filled) == [1, 1, 1, 17, 17, 23, 23]
