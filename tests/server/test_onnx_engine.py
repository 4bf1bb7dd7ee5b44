import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.server.onnx_models import expected_scores, make_spec, random_images, write_model

from topfive_server import onnx_engine
from topfive_server.devices import Device, DeviceError
from topfive_server.engine import Engine, EngineDead, EngineError, EngineOutOfMemory, Predictions
from topfive_server.lanes import Images, Lane
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import Repository
from topfive_server.session import RuntimeOptions, check_placement, engine_error, provider_options

CPU = Device(kind="cpu", reason="test")


def open_engine(root: Path, max_batch: int = 8, threads: int = 1, **model: Any) -> OnnxEngine:
    write_model(root, **model)
    return OnnxEngine(
        Repository(root).read("tiny"), CPU, RuntimeOptions(threads=threads, max_batch=max_batch)
    )


def check(predictions: Predictions, images: list[NDArray[np.uint8]], classes: int = 7) -> None:
    scores_BC = expected_scores(np.stack(images), classes)
    np.testing.assert_allclose(predictions.scores_BC, scores_BC, atol=1e-5)
    top = np.argsort(-scores_BC, axis=1)[:, : min(5, classes)]
    np.testing.assert_array_equal(predictions.classes_BT, top)
    np.testing.assert_allclose(predictions.probabilities_BT, np.take_along_axis(scores_BC, top, 1), atol=1e-5)
    assert predictions.classes_BT.dtype == np.int64


class FakeLane:
    """A lane whose computing the test controls."""

    def __init__(self) -> None:
        self.filled: list[int] = []
        self.computing = threading.Semaphore(0)
        self.may_compute = threading.Event()
        self.failure: Exception | None = None
        self.released = False

    def fill(self, images: Images) -> None:
        self.filled.append(len(images))

    def captures(self, count: int) -> bool:
        return False

    def compute(self) -> None:
        self.computing.release()
        assert self.may_compute.wait(20)
        if self.failure is not None:
            raise self.failure

    def read(self) -> Predictions:
        rows = self.filled[-1]
        scores = np.full((rows, 7), 1 / 7, np.float32)
        return Predictions(scores[:, :5], np.zeros((rows, 5), np.int64), scores)

    def release(self) -> None:
        self.released = True


def with_lanes(monkeypatch: pytest.MonkeyPatch, root: Path) -> tuple[OnnxEngine, list[FakeLane]]:
    lanes = [FakeLane() for _ in range(3)]  # two for batches, one for lone images

    def open_lane(number: int, sizes: tuple[int, ...]) -> Lane:
        return lanes[number]

    monkeypatch.setattr(onnx_engine, "_open", lambda *_: open_lane)
    return open_engine(root), lanes


def test_answers_each_image_in_order_at_every_batch_size(tmp_path: Path) -> None:
    async def run() -> None:
        engine: Engine = open_engine(tmp_path, max_batch=8)
        await engine.warm_up()
        for batch in range(1, 9):
            images = random_images(batch, seed=batch)
            check(await engine.predict(images), images)
        await engine.close()

    asyncio.run(run())


def test_says_what_it_serves_and_where(tmp_path: Path) -> None:
    info = open_engine(tmp_path, version="3", max_batch=8).info
    assert (info.name, info.version, info.max_batch, info.buckets) == ("tiny", "3", 8, ())
    assert (info.provider, info.device) == ("CPUExecutionProvider", "cpu")
    assert info.spec == make_spec()


def test_fewer_classes_than_five_give_fewer_columns(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, spec=make_spec(classes=2))
    images = random_images(3)
    predictions = asyncio.run(engine.predict(images))
    assert predictions.classes_BT.shape == (3, 2)
    check(predictions, images, classes=2)


@pytest.fixture(name="shared", scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    return open_engine(tmp_path_factory.mktemp("models"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=12), seed=st.integers(0, 10_000))
def test_concurrent_batches_get_their_own_answers(shared: OnnxEngine, sizes: list[int], seed: int) -> None:
    async def run() -> None:
        batches = [random_images(size, seed=seed + i) for i, size in enumerate(sizes)]
        answers = await asyncio.gather(*(shared.predict(images) for images in batches))
        for images, predictions in zip(batches, answers, strict=True):
            check(predictions, images)

    asyncio.run(run())


def test_later_batches_do_not_write_into_earlier_answers(shared: OnnxEngine) -> None:
    async def run() -> None:
        images = random_images(4, seed=1)
        first = await shared.predict(images)
        for seed in range(2, 8):
            await shared.predict(random_images(4, seed=seed))
        check(first, images)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], "0 images; it must have 1 to 8"),
        (random_images(9), "9 images; it must have 1 to 8"),
        (
            [*random_images(1), *random_images(1, side=13)],
            r"uint8 \(13, 13, 3\); it must be uint8 \(12, 12, 3\)",
        ),
        ([random_images(1)[0].astype(np.float32)], "an image is float32"),
    ],
)
def test_a_callers_mistake_is_a_value_error(shared: OnnxEngine, images: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        asyncio.run(shared.predict(images))


def test_a_failing_batch_does_not_hurt_the_next(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, fails_on_white=True)
    good = random_images(3)
    bad = [*random_images(2), np.full((12, 12, 3), 255, np.uint8)]

    async def run() -> None:
        with pytest.raises(EngineError, match="Gather") as caught:
            await engine.predict(bad)
        assert type(caught.value) is EngineError
        check(await engine.predict(good), good)

    asyncio.run(run())


def test_answers_that_are_not_numbers_are_an_error(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, weight_scale=float("nan"))
    with pytest.raises(EngineError, match=r"tiny/1 gave answers that are not numbers"):
        asyncio.run(engine.warm_up())


def test_a_corrupt_file_is_a_sentence(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    model = Repository(tmp_path).read("tiny")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EngineError, match=r"^tiny/1 cannot be loaded: ") as caught:
        OnnxEngine(model, CPU)
    assert "\n" not in str(caught.value)


def test_a_graph_for_any_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="takes images of any size"):
        open_engine(tmp_path, side="image")


def test_the_next_batch_is_filled_while_one_computes_and_only_one_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, lanes = with_lanes(monkeypatch, tmp_path)
    futures = [engine.submit(random_images(n)) for n in (1, 2, 3)]
    deadline = time.monotonic() + 20
    while sum(len(lane.filled) for lane in lanes) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    computing = [lane for lane in lanes if lane.computing.acquire(timeout=0.05)]
    assert len(computing) == 1
    assert sorted(n for lane in lanes for n in lane.filled) == [1, 2]
    for lane in lanes:
        lane.may_compute.set()
    assert [len(future.result(20).scores_BC) for future in futures] == [1, 2, 3]


def test_a_batch_that_is_cancelled_while_it_waits_is_never_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, lanes = with_lanes(monkeypatch, tmp_path)

    async def run() -> None:
        tasks = [asyncio.create_task(engine.predict(random_images(n))) for n in (1, 2, 3, 4)]
        while sum(len(lane.filled) for lane in lanes) < 2:  # noqa: ASYNC110  lanes are filled by threads
            await asyncio.sleep(0.001)
        tasks[2].cancel()
        await asyncio.sleep(0)
        for lane in lanes:
            lane.may_compute.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[2], asyncio.CancelledError)
        await engine.close()

    asyncio.run(run())
    assert sorted(n for lane in lanes for n in lane.filled) == [1, 2, 4]


def test_a_lost_device_kills_the_engine_and_out_of_memory_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, lanes = with_lanes(monkeypatch, tmp_path)
    for lane in lanes:
        lane.may_compute.set()

    async def run() -> None:
        for lane in lanes:
            lane.failure = RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for 9 bytes")
        with pytest.raises(EngineOutOfMemory):
            await engine.predict(random_images(2))
        for lane in lanes:
            lane.failure = RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0")
        with pytest.raises(EngineDead, match="illegal memory access"):
            await engine.predict(random_images(2))
        for lane in lanes:
            lane.failure = None
        with pytest.raises(EngineDead, match="illegal memory access"):
            await engine.predict(random_images(2))

    asyncio.run(run())


def test_close_answers_what_was_accepted_and_then_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, lanes = with_lanes(monkeypatch, tmp_path)

    async def run() -> None:
        waiting = [asyncio.create_task(engine.predict(random_images(n))) for n in (1, 2, 3)]
        lone = asyncio.wrap_future(engine.predict_lone(lambda: random_images(1)[0]))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        with pytest.raises(EngineDead, match="tiny/1 was closed"):
            await engine.predict(random_images(1))
        for lane in lanes:
            lane.may_compute.set()
        await closing
        assert [len(task.result().scores_BC) for task in waiting] == [1, 2, 3]
        assert (answer := lone.result()) is not None
        assert len(answer.scores_BC) == 1
        await engine.close()

    asyncio.run(run())
    assert all(lane.released for lane in lanes)


def test_warm_up_runs_in_every_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, lanes = with_lanes(monkeypatch, tmp_path)
    for lane in lanes:
        lane.may_compute.set()
    asyncio.run(engine.warm_up())
    assert [lane.filled for lane in lanes] == [[1, 8], [1, 8], [1]]


def test_a_hung_device_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    write_model(tmp_path)
    script = f"""
    import threading
    from pathlib import Path
    from topfive_server.devices import Device
    from topfive_server import onnx_engine
    from topfive_server.onnx_engine import OnnxEngine
    from topfive_server.repository import Repository
    import numpy as np
    class Hung:
        def captures(self, count): return False
        def fill(self, images): pass
        def compute(self): threading.Event().wait()
    onnx_engine._open = lambda *_: lambda number, sizes: Hung()
    engine = OnnxEngine(Repository(Path({str(tmp_path)!r})).read("tiny"), Device(kind="cpu", reason=""))
    engine.submit([np.zeros((12, 12, 3), np.uint8)])
    engine.stop()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), EngineOutOfMemory),
        (RuntimeError("std::bad_alloc"), EngineOutOfMemory),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=a"), EngineOutOfMemory),
        (RuntimeError("Available memory of 1024 is smaller than requested bytes of 4096"), EngineOutOfMemory),
        (RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"), EngineOutOfMemory),
        (RuntimeError("CUDA failure 719: unspecified launch failure"), EngineDead),
        (RuntimeError("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED"), EngineDead),
        (RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : indices out of range"), EngineError),
        (ValueError(), EngineError),
    ],
)
def test_errors_say_what_the_caller_can_do(error: Exception, kind: type[EngineError]) -> None:
    failure = engine_error(error)
    assert type(failure) is kind
    assert str(failure)


def test_heavy_nodes_off_the_device_are_refused_by_name() -> None:
    cuda = Device(kind="cuda", reason="test")
    gpu, cpu = cuda.provider, CPU.provider
    check_placement([(gpu, "Conv"), (gpu, "Gemm"), (cpu, "Shape")], cuda, "alexnet/1")
    with pytest.raises(
        DeviceError, match="alexnet/1 would run 2 QLinearConv on the CPU although cuda:0 was asked"
    ):
        check_placement([(gpu, "Conv"), (cpu, "QLinearConv"), (cpu, "QLinearConv")], cuda, "alexnet/1")
    with pytest.raises(DeviceError, match="does not say where"):
        check_placement([], cuda, "alexnet/1")


def test_a_silent_fallback_to_the_cpu_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a GPU, ONNX Runtime opens a CUDA session all the same, on the CPU."""
    write_model(tmp_path)
    with pytest.raises(
        DeviceError, match="could not start CUDAExecutionProvider and offers only CPUExecution"
    ):
        OnnxEngine(Repository(tmp_path).read("tiny"), Device(kind="cuda", reason="test"))
    capfd.readouterr()  # what ONNX Runtime itself has to say about it


def test_provider_options_follow_the_settings() -> None:
    cuda = Device(kind="cuda", index=2, reason="test")
    options = RuntimeOptions(tf32=False, gpu_memory_bytes=5)
    first: Any = provider_options(cuda, options, cuda_graphs=True)[0]
    assert first[0] == "CUDAExecutionProvider"
    settings_ = first[1]
    assert settings_["device_id"] == "2"
    assert settings_["use_tf32"] == "0"
    assert settings_["enable_cuda_graph"] == "1"
    assert settings_["gpu_mem_limit"] == "5"
    assert provider_options(CPU, RuntimeOptions(), cuda_graphs=True) == ["CPUExecutionProvider"]


def test_options_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="threads is -1; it must be between 0 and 1024"):
        RuntimeOptions(threads=-1)
    with pytest.raises(ValueError, match="max_batch is 5000"):
        RuntimeOptions(max_batch=5000)
