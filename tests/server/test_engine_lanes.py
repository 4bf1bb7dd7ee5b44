import asyncio
import ctypes
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tests.server.harness import eventually
from tests.server.onnx_models import expected_scores, random_images, write_model

from topfive_server import onnx_engine, pinned
from topfive_server.buckets import bucket_for, make_buckets
from topfive_server.capture import Gate
from topfive_server.devices import Device
from topfive_server.lanes import DeviceLane, HostLane
from topfive_server.network import Whole
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import Repository
from topfive_server.session import RuntimeOptions


@pytest.fixture(name="session")
def open_session(tmp_path: Path) -> Any:
    return onnxruntime.InferenceSession(str(write_model(tmp_path)), providers=["CPUExecutionProvider"])


def device_lane(session: Any, buckets: tuple[int, ...] = (1, 2, 4, 8)) -> DeviceLane:
    return DeviceLane(session, buckets=buckets, side=12, memory="cpu", index=0, first_graph=1)


@pytest.mark.parametrize(
    ("max_batch", "buckets"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (48, (1, 2, 4, 8, 16, 32, 48)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_buckets_are_powers_of_two_up_to_the_largest_batch(max_batch: int, buckets: tuple[int, ...]) -> None:
    assert make_buckets(max_batch) == buckets


def test_every_batch_goes_to_the_smallest_bucket_that_holds_it() -> None:
    buckets = make_buckets(64)
    assert [bucket_for(n, buckets) for n in (1, 2, 3, 4, 5, 33, 64)] == [1, 2, 4, 4, 8, 64, 64]
    assert bucket_for(37, ()) == 37
    with pytest.raises(ValueError, match="65 images is larger than the largest bucket, 64"):
        bucket_for(65, buckets)
    with pytest.raises(ValueError, match="max_batch is 0"):
        make_buckets(0)


def test_padding_changes_no_answer_and_is_not_returned(session: Any) -> None:
    device, host = device_lane(session), HostLane(Whole(session), max_batch=8, side=12)
    for count in (8, 3, 1, 5, 2, 7):  # large before small: the padding holds another batch's images
        images = random_images(count, seed=count)
        device.fill(images)
        host.fill(images)
        device.compute()
        host.compute()
        padded, plain = device.read(), host.read()
        assert padded.scores_BC.shape == (count, 7)
        np.testing.assert_allclose(padded.scores_BC, expected_scores(np.stack(images), 7), atol=1e-5)
        np.testing.assert_array_equal(padded.classes_BT, plain.classes_BT)
        np.testing.assert_allclose(padded.probabilities_BT, plain.probabilities_BT, atol=1e-6)


def test_buffers_stay_where_they_are_and_answers_do_not(session: Any) -> None:
    lane = device_lane(session)
    addresses = {n: (b.image.data_ptr(), *(o.data_ptr() for o in b.outputs)) for n, b in lane._bound.items()}
    first_images = random_images(3, seed=1)
    lane.fill(first_images)
    lane.compute()
    first = lane.read()
    for seed in range(2, 6):
        lane.fill(random_images(3, seed=seed))
        lane.compute()
    assert addresses == {
        n: (b.image.data_ptr(), *(o.data_ptr() for o in b.outputs)) for n, b in lane._bound.items()
    }
    np.testing.assert_allclose(first.scores_BC, expected_scores(np.stack(first_images), 7), atol=1e-5)


def test_every_bucket_of_every_lane_has_a_graph_of_its_own(session: Any) -> None:
    buckets = make_buckets(64)
    names = []
    for lane in range(2):
        first = 1 + lane * len(buckets)
        bound = DeviceLane(session, buckets=buckets, side=12, memory="cpu", index=0, first_graph=first)._bound
        names += [b.run_options.get_run_config_entry("gpu_graph_id") for b in bound.values()]
    assert len(set(names)) == len(names) == 14


def test_the_first_batch_of_each_bucket_captures(session: Any) -> None:
    lane = device_lane(session)
    assert [lane.captures(count) for count in (1, 3, 8)] == [True, True, True]
    lane.fill(random_images(3))
    lane.compute()
    assert [lane.captures(count) for count in (1, 3, 4, 8)] == [True, False, False, True]
    assert not HostLane(Whole(session), max_batch=8, side=12).captures(1)


def test_a_capture_waits_for_batches_and_holds_them_back() -> None:
    gate, order = Gate(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def batch(name: str) -> None:
        with gate.beside_others():
            order.append(f"{name} begins")
            inside.set()
            leave.wait(10)
            order.append(f"{name} ends")

    def capture() -> None:
        with gate.alone():
            order.append("capture")

    first = threading.Thread(target=batch, args=("first",))
    first.start()
    assert inside.wait(10)
    capturing = threading.Thread(target=capture)
    capturing.start()
    eventually(lambda: bool(gate._captures))
    second = threading.Thread(target=batch, args=("second",))
    second.start()
    leave.set()
    for thread in (first, capturing, second):
        thread.join(10)
    assert order == ["first begins", "first ends", "capture", "second begins", "second ends"]


def test_a_batch_that_hangs_does_not_stop_captures_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(patience_s=0.05)
    with gate.beside_others():
        for _ in range(2):
            with gate.alone():
                pass
    assert caplog.text.count("a batch has not ended") == 1  # the second does not wait for it again


def test_a_capture_that_hangs_stops_nobody_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    gate, order = Gate(patience_s=0.05), list[str]()
    began, leave = threading.Event(), threading.Event()

    def hang() -> None:
        with gate.alone():
            began.set()
            leave.wait(30)

    def follow() -> None:
        with gate.beside_others():
            order.append("batch")
        with gate.alone():
            order.append("capture")

    hanging = threading.Thread(target=hang, daemon=True)
    hanging.start()
    assert began.wait(10)
    following = threading.Thread(target=follow, daemon=True)
    following.start()
    following.join(5)
    try:
        assert order == ["batch", "capture"]
    finally:
        leave.set()
        hanging.join(10)
    assert caplog.text.count("a CUDA graph has not ended") == 1  # it is told once, not by every batch
    with gate.beside_others():  # what came back late keeps nobody out
        order.append("another")


def test_an_engine_on_a_gpu_captures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: Any
) -> None:
    """The lanes of a GPU, played by the CPU: making one and each first batch are alone, the others are not."""
    held: list[str] = []

    class Watched(Gate):
        def alone(self) -> Any:
            held.append("alone")
            return super().alone()

        def beside_others(self) -> Any:
            held.append("beside")
            return super().beside_others()

    monkeypatch.setattr(onnx_engine, "GATE", Watched())
    monkeypatch.setattr(onnx_engine, "open_session", lambda *_: session)
    first_graphs: list[int] = []

    def make_lane(*arguments: Any, **options: Any) -> DeviceLane:
        first_graphs.append(options["first_graph"])
        return DeviceLane(*arguments, **{**options, "memory": "cpu"})

    monkeypatch.setattr(onnx_engine, "DeviceLane", make_lane)
    version = Repository(tmp_path).read("tiny")
    engine = OnnxEngine(version, Device(kind="cuda", reason="test"), RuntimeOptions(max_batch=4))

    async def run() -> None:
        await engine.warm_up()
        assert held == ["alone"] * 10  # two lanes: made, then three buckets each; a third of one bucket
        assert sorted(first_graphs) == [1, 4, 7]
        for count in (1, 3, 4):
            images = random_images(count, seed=count)
            answer = await engine.predict(images)
            np.testing.assert_allclose(answer.scores_BC, expected_scores(np.stack(images), 7), atol=1e-5)
        assert held[10:] == ["beside"] * 3
        await engine.close()

    asyncio.run(run())


class FakeDriver:
    """Stands in for libcuda: no GPU is at hand here, so only the calls are tested."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.calls: list[tuple[str, int]] = []

    def cuMemHostRegister_v2(  # noqa: N802
        self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        assert address.value
        assert address.value % 4096 == 0
        assert flags.value == 1
        self.calls.append(("register", size.value))
        return self.status

    def cuMemHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        self.calls.append(("unregister", 0))
        return 0


def test_page_locking_is_undone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(pinned, "load_library", lambda name: driver)
    memory = pinned.PageLocked((2, 3, 3, 3), enabled=True)
    memory.array[:] = 7
    memory.release()
    memory.release()
    assert driver.calls == [("register", 54), ("unregister", 0)]


def test_without_page_locking_the_memory_works_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = FakeDriver(status=712)
    monkeypatch.setattr(pinned, "load_library", lambda name: driver)
    memory = pinned.PageLocked((2, 3), enabled=True)
    memory.array[:] = 7
    memory.release()
    assert "could not be page-locked (cuMemHostRegister_v2: CUDA driver error 712)" in caplog.text
    assert driver.calls == [("register", 6)]
