"""Against stand-ins on real gRPC connections always, and against a real Triton where there is one."""

import asyncio
import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tests.server.fakes import picture
from tests.server.onnx_models import expected_scores, make_spec, random_images, write_model
from tests.server.real_server import Process
from tests.server.real_triton import free_port, real_triton
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from topfive.preprocessing import decode
from topfive_server.engine import EngineDead, EngineError, EngineOutOfMemory, Predictions
from topfive_server.repository import ModelVersion, Repository
from topfive_server.triton_engine import TritonEngine, TritonOptions


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # untyped
    """Serves the tiny model on a real port; fails as told."""

    status: grpc.StatusCode | None = None
    message: str = "told to fail"
    crop: int = 12
    delay_s: float = 0.0
    short_answer: bool = False
    batches: list[int] = field(default_factory=list)
    address: str = ""

    async def start(self, stack: AsyncExitStack, port: int = 0) -> "FakeTriton":
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        await server.start()
        stack.push_async_callback(server.stop, None)
        return self

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.status:
            await context.abort(self.status, self.message)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        shapes = {"probabilities": 5, "classes": 5, "scores": 7, "features": 3}
        return service_pb2.ModelMetadataResponse(
            name=request.name,
            versions=["1"],
            inputs=[tensor(name="image", datatype="UINT8", shape=[-1, self.crop, self.crop, 3])],
            outputs=[tensor(name=n, datatype="FP32", shape=[-1, size]) for n, size in shapes.items()],
        )

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=4)
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        assert (request.model_name, request.model_version) == ("tiny", "1")
        count = request.inputs[0].shape[0]
        self.batches.append(count)
        await asyncio.sleep(self.delay_s)
        if self.status:
            await context.abort(self.status, self.message)
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(count, 12, 12, 3)
        scores = expected_scores(images, 7).astype(np.float32)[: count - self.short_answer]
        classes = np.argsort(-scores, axis=1)[:, :5].astype(np.int64)
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "probabilities": np.take_along_axis(scores, classes, 1),
            "classes": classes,
            "scores": scores,
        }
        wanted = [output.name for output in request.outputs]
        return service_pb2.ModelInferResponse(
            model_name="tiny",
            outputs=[
                service_pb2.ModelInferResponse.InferOutputTensor(
                    name=name, datatype="INT64" if name == "classes" else "FP32", shape=arrays[name].shape
                )
                for name in wanted
            ],
            raw_output_contents=[arrays[name].tobytes() for name in wanted],
        )


def version(root: Path) -> ModelVersion:
    write_model(root)
    return Repository(root).read("tiny")


def check(predictions: Predictions, images: list[Any]) -> None:
    scores = expected_scores(np.stack(images), 7)
    np.testing.assert_allclose(predictions.scores_BC, scores, atol=1e-5)
    np.testing.assert_array_equal(predictions.classes_BT, np.argsort(-scores, axis=1)[:, :5])
    assert predictions.probabilities_BT.dtype == np.float32
    assert predictions.classes_BT.dtype == np.int64


Body = Callable[[TritonEngine, list[FakeTriton]], Awaitable[None]]


def with_fleet(
    root: Path, fleet: list[FakeTriton], body: Body, *, also: tuple[str, ...] = (), **options: Any
) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            for server in fleet:
                await server.start(stack)
            addresses = (*also, *(server.address for server in fleet))
            engine = await TritonEngine.connect(version(root), TritonOptions(endpoints=addresses, **options))
            stack.push_async_callback(engine.close)
            await body(engine, fleet)

    asyncio.run(run())


def test_batches_travel_and_come_back_in_order(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        assert engine.info.spec == make_spec()
        assert (engine.info.provider, engine.info.device) == ("triton", fleet[0].address)
        assert (engine.info.max_batch, engine.info.parallel) == (4, 2)
        await engine.warm_up()
        assert sorted(fleet[0].batches) == [1, 4]
        batches = [random_images(n, seed=n) for n in (1, 2, 3, 4)]
        for images, answer in zip(batches, await asyncio.gather(*map(engine.predict, batches)), strict=True):
            check(answer, images)

    with_fleet(tmp_path, [FakeTriton()], body)


def test_every_server_of_the_fleet_is_warmed_up_and_one_that_fails_is_passed_over(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        fleet[1].status = grpc.StatusCode.UNAVAILABLE
        await engine.warm_up()
        assert [server.batches for server in fleet] == [[1, 4], [1], [1, 4]]
        fleet[0].status = fleet[2].status = grpc.StatusCode.UNAVAILABLE
        with pytest.raises(EngineDead, match="no Triton server answered"):
            await engine.warm_up()

    with_fleet(tmp_path, [FakeTriton() for _ in range(3)], body)


def test_batches_spread_over_the_fleet(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        assert engine.info.parallel == 6
        await asyncio.gather(*(engine.predict(random_images(1)) for _ in range(6)))
        assert [len(server.batches) for server in fleet] == [2, 2, 2]

    with_fleet(tmp_path, [FakeTriton(delay_s=0.2) for _ in range(3)], body)


def test_one_batch_after_the_other_goes_round(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        for _ in range(6):
            await engine.predict(random_images(1))
        assert [len(server.batches) for server in fleet] == [2, 2, 2]

    with_fleet(tmp_path, [FakeTriton() for _ in range(3)], body)


@pytest.mark.parametrize(
    "status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
def test_a_batch_moves_on_from_a_server_that_cannot_and_that_one_rests(
    tmp_path: Path, status: grpc.StatusCode
) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        fleet[0].status = status
        for _ in range(4):
            images = random_images(2)
            check(await engine.predict(images), images)
        assert len(fleet[0].batches) == 1
        assert len(fleet[1].batches) == 4

    with_fleet(tmp_path, [FakeTriton(), FakeTriton()], body)


def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        fleet[0].status = grpc.StatusCode.UNAVAILABLE
        await engine.predict(random_images(1))
        fleet[0].status, fleet[1].status = None, grpc.StatusCode.UNAVAILABLE
        images = random_images(1)
        check(await engine.predict(images), images)
        assert len(fleet[0].batches) == 2

    with_fleet(tmp_path, [FakeTriton(), FakeTriton()], body)


def test_a_server_that_hangs_is_given_up_in_time(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        fleet[0].delay_s = 30
        images = random_images(2)
        check(await engine.predict(images), images)

    with_fleet(tmp_path, [FakeTriton(), FakeTriton()], body, timeout_s=0.3)


def test_an_endpoint_that_is_down_from_the_start_is_passed_over(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        images = random_images(2)
        check(await engine.predict(images), images)

    with_fleet(tmp_path, [FakeTriton()], body, also=(f"127.0.0.1:{free_port()}",), connect_timeout_s=1)


def test_a_fleet_that_is_gone_kills_the_engine(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        for server in fleet:
            server.status = grpc.StatusCode.UNAVAILABLE
        with pytest.raises(
            EngineDead, match=r"no Triton server answered \(127.*UNAVAILABLE told to fail; 127"
        ):
            await engine.predict(random_images(1))

    with_fleet(tmp_path, [FakeTriton(), FakeTriton()], body)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape", EngineError),
        (
            grpc.StatusCode.INTERNAL,
            "onnx runtime error 6: Failed to allocate memory for 9",
            EngineOutOfMemory,
        ),
    ],
)
def test_what_another_server_would_answer_too_is_not_asked_again(
    tmp_path: Path, status: grpc.StatusCode, message: str, kind: type[EngineError]
) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        for server in fleet:
            server.status, server.message = status, message
        with pytest.raises(EngineError, match=message) as caught:
            await engine.predict(random_images(1))
        assert type(caught.value) is kind
        assert sum(len(server.batches) for server in fleet) == 1

    with_fleet(tmp_path, [FakeTriton(), FakeTriton()], body)


def test_a_broken_gpu_of_one_server_is_not_the_fleets(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        fleet[0].status, fleet[0].message = (
            grpc.StatusCode.INTERNAL,
            "CUDA failure 700: illegal memory access",
        )
        images = random_images(1)
        check(await engine.predict(images), images)

    with_fleet(tmp_path, [FakeTriton(), FakeTriton()], body)


def test_an_answer_of_the_wrong_length_is_an_error(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        with pytest.raises(EngineError, match=r"answered 3 images with arrays of \[\(2, 5\)"):
            await engine.predict(random_images(3))

    with_fleet(tmp_path, [FakeTriton(short_answer=True)], body)


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        raise AssertionError("it connected")

    with pytest.raises(EngineError, match=r"serves another model under the name tiny: it takes .*14, 14"):
        with_fleet(tmp_path, [FakeTriton(crop=14)], body)


def test_no_fleet_at_all_is_a_sentence(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        raise AssertionError("it connected")

    with pytest.raises(
        EngineDead, match=r"no Triton server serves tiny version 1 \(127.0.0.1:[0-9]+: UNAVAILABLE"
    ):
        with_fleet(tmp_path, [], body, also=(f"127.0.0.1:{free_port()}",), connect_timeout_s=1)


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        with pytest.raises(ValueError, match="5 images; it must have 1 to 4"):
            await engine.predict(random_images(5))
        with pytest.raises(ValueError, match=r"\(1, 13, 13, 3\); it must be uint8 \(1, 12, 12, 3\)"):
            await engine.predict(random_images(1, side=13))
        await engine.close()
        await engine.close()
        with pytest.raises(EngineDead, match="was closed"):
            await engine.predict(random_images(1))

    with_fleet(tmp_path, [FakeTriton()], body)


def test_close_answers_what_is_under_way(tmp_path: Path) -> None:
    async def body(engine: TritonEngine, fleet: list[FakeTriton]) -> None:
        images = random_images(2)
        waiting = asyncio.create_task(engine.predict(images))
        while not fleet[0].batches:  # noqa: ASYNC110  the other side of a socket
            await asyncio.sleep(0.005)
        await engine.close()
        check(waiting.result(), images)

    with_fleet(tmp_path, [FakeTriton(delay_s=0.2)], body)


@pytest.mark.parametrize("endpoints", [(), ("host",), ("host:",), (":8001",), ("host:0",), ("host:99999",)])
def test_endpoints_are_checked(endpoints: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="endpoints"):
        TritonOptions(endpoints=endpoints)


@pytest.mark.triton
def test_a_real_triton_answers_and_its_death_is_noticed(tmp_path: Path) -> None:
    async def run(address: str, process: "subprocess.Popen[bytes]") -> None:
        engine = await TritonEngine.connect(model, TritonOptions(endpoints=(address,)))
        assert engine.info.max_batch == 8
        await engine.warm_up()
        batches = [random_images(n, seed=n) for n in range(1, 9)]
        for images, answer in zip(batches, await asyncio.gather(*map(engine.predict, batches)), strict=True):
            check(answer, images)
        process.terminate()
        process.wait(30)
        with pytest.raises(EngineDead, match="no Triton server answered"):
            await engine.predict(random_images(1))
        await engine.close()
        with pytest.raises(EngineDead, match="no Triton server serves tiny version 1"):
            await TritonEngine.connect(model, TritonOptions(endpoints=(address,), connect_timeout_s=1))

    root = tmp_path / "models"
    model = version(root)
    with real_triton(root) as (address, process):
        asyncio.run(run(address, process))


@pytest.mark.triton
def test_the_server_as_the_front_of_a_real_triton(tmp_path: Path) -> None:
    """`topfive serve --triton`: JPEG in, labels out, computed elsewhere."""
    root = tmp_path / "models"
    write_model(root)
    photograph = io.BytesIO()
    Image.new("RGB", (40, 30), (10, 200, 90)).save(photograph, "JPEG", quality=95)
    with real_triton(root) as (address, process):
        port = free_port()
        server = subprocess.Popen(
            [sys.executable, "-m", "topfive", "serve", root, "--triton", address, "--port", str(port)],
            stderr=subprocess.PIPE,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            assert _get(f"{url}/readyz")["models"][0]["provider"] == "triton"
            answer = _get(f"{url}/v1/classify", photograph.getvalue())
            crop = decode(photograph.getvalue(), make_spec().preprocessing).image
            expected = expected_scores(np.asarray(crop)[None], 7)[0]
            assert answer["images"][0]["top"][0]["class"] == int(expected.argmax())
            assert answer["images"][0]["top"][0]["probability"] == pytest.approx(expected.max(), abs=1e-4)
            process.terminate()
            process.wait(30)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}/v1/classify", photograph.getvalue(), timeout=20)
            assert caught.value.code == 503
            caught.value.close()
        finally:
            server.terminate()
            _, log = server.communicate(timeout=30)
    assert server.returncode == 0, log.decode()


def _get(url: str, body: bytes | None = None) -> Any:
    """JSON from a server that may still be starting."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, body, timeout=20) as reply:
                return json.load(reply)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_several_processes_feed_one_fleet(tmp_path: Path) -> None:
    write_model(tmp_path / "models")
    body = picture(10, size=(40, 30), form="JPEG")

    async def run() -> None:
        async with AsyncExitStack() as stack:
            fleet = [await FakeTriton().start(stack) for _ in range(2)]
            flags = [flag for server in fleet for flag in ("--triton", server.address)]
            answers, log = await asyncio.to_thread(serve_and_ask, tmp_path / "models", flags, body)
            assert {json.loads(answer)["model"] for answer in answers} == {"tiny"}
            workers = [line["worker"] for line in log if line.get("path") == "/v1/classify"]
            assert sorted(workers) == [1] * 4 + [2] * 4
            assert all(server.batches for server in fleet)

    asyncio.run(run())


def serve_and_ask(models: Path, flags: list[str], body: bytes) -> tuple[list[bytes], list[dict[str, Any]]]:
    with Process.running(models, "--processes", 2, *flags) as process:
        answers = []
        for _ in range(8):
            status, answer = process.request("POST", "/v1/classify", body)
            assert status == 200, answer
            answers.append(answer)
        assert process.stop() == 0
    return answers, process.log
