"""The Open Inference Protocol over gRPC, asked by the stock client."""

import asyncio
import hashlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.server.fakes import CLASSES, CROP, FakeEngine, make_info, picture, pixels, predictions
from tests.server.harness import Harness, eventually, serving
from tests.server.onnx_models import expected_scores, random_images, write_model
from tests.server.real_triton import free_port
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    service_pb2,
    service_pb2_grpc,
)
from tritonclient.utils import InferenceServerException

from topfive_server.serving import StartError


@contextmanager
def offered(*engines: FakeEngine, **settings: Any) -> Iterator[tuple[Harness, InferenceServerClient]]:
    with serving(*engines, grpc_port=0, **settings) as server:
        assert server.server._grpc is not None
        client = InferenceServerClient(f"127.0.0.1:{server.server._grpc.port}")
        try:
            yield server, client
        finally:
            client.close()


def tensor(*reds: int) -> InferInput:
    images = np.stack([pixels(red) for red in reds])
    made = InferInput("image", list(images.shape), "UINT8")
    made.set_data_from_numpy(images)
    return made


def test_health_and_metadata() -> None:
    with offered(FakeEngine(make_info("fake", "1")), FakeEngine(make_info("fake", "2"))) as (server, client):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("fake", "1")
        assert not client.is_model_ready("fake", "3")
        assert client.get_server_metadata().name == "topfive"
        metadata = client.get_model_metadata("fake")
        assert list(metadata.versions) == ["1", "2"]
        assert list(metadata.inputs[0].shape) == [-1, CROP, CROP, 3]
        assert [(o.name, o.datatype) for o in metadata.outputs] == [
            ("probabilities", "FP32"),
            ("classes", "INT64"),
            ("scores", "FP32"),
        ]
        config = client.get_model_config("fake").config
        assert (config.max_batch_size, list(config.input[0].dims)) == (64, [CROP, CROP, 3])
        index = client.get_model_repository_index().models
        assert [(m.name, m.version, m.state) for m in index] == [
            ("fake", "1", "READY"),
            ("fake", "2", "READY"),
        ]
        server.on_loop(server.application.begin_drain)
        assert not client.is_server_ready()
        server.on_loop(lambda: setattr(server.application, "draining", False))


def test_tensors_in_and_out() -> None:
    with offered() as (server, client):
        result = client.infer("fake", [tensor(7, 200, 90)], request_id="r", priority=1, timeout=5_000_000)
        expected = predictions([7, 200, 90])
        np.testing.assert_array_equal(result.as_numpy("probabilities"), expected.probabilities_BT)
        np.testing.assert_array_equal(result.as_numpy("classes"), expected.classes_BT)
        np.testing.assert_array_equal(result.as_numpy("scores"), expected.scores_BC)
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("r", "fake", "1")
        one = client.infer("fake", [tensor(7)], outputs=[InferRequestedOutput("classes")])
        assert one.as_numpy("classes")[0, 0] == 7
        assert one.as_numpy("scores") is None
        top = client.infer("fake", [tensor(7)], outputs=[InferRequestedOutput("scores", class_count=2)])
        assert top.as_numpy("scores").tolist() == [[b"0.500000:7:red 7", b"0.250000:8:red 8"]]
        stats = client.get_inference_statistics("fake", "1").model_stats[0]
        assert (stats.inference_count, stats.inference_stats.success.count) == (5, 3)
        assert server.metric("topfive_requests_total", route="grpc ModelInfer", status="200", code="ok") == 3


def test_values_in_the_message_instead_of_raw_bytes() -> None:
    with offered() as (_, client):
        message = service_pb2.ModelInferRequest(model_name="fake")
        data = tensor(33)._get_content()
        values = np.frombuffer(data, np.uint8).tolist()
        given = message.inputs.add(name="image", datatype="UINT8", shape=[1, CROP, CROP, 3])
        given.contents.uint_contents.extend(values)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(client._channel)
        answer = stub.ModelInfer(message)
        assert np.frombuffer(answer.raw_output_contents[1], np.int64)[0] == 33
        given.contents.uint_contents[0] = 256
        with pytest.raises(grpc.RpcError, match="between 0 and 255"):
            stub.ModelInfer(message)


def refused(client: InferenceServerClient, *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(*args, **kwargs)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def test_mistakes_have_the_statuses_that_triton_gives() -> None:
    with offered(FakeEngine(guilty={66}), max_images=4) as (server, client):
        assert refused(client, "nope", [tensor(1)]) == (
            "NOT_FOUND",
            "Request for unknown model: 'nope' is not found",
        )
        assert refused(client, "fake", [tensor(1)], "7")[0] == "NOT_FOUND"
        assert refused(client, "fake", [tensor(1, 2, 3, 4, 5)])[0] == "INVALID_ARGUMENT"
        wrong = InferInput("image", [1, 3, CROP, CROP], "UINT8")
        wrong.set_data_from_numpy(np.zeros((1, 3, CROP, CROP), np.uint8))
        status, reason = refused(client, "fake", [wrong])
        assert (status, reason.split(". ")[1]) == (
            "INVALID_ARGUMENT",
            "Expected [-1,16,16,3], got [1,3,16,16]",
        )
        assert (
            refused(client, "fake", [tensor(1)], outputs=[InferRequestedOutput("features")])[0]
            == "INVALID_ARGUMENT"
        )
        assert refused(client, "fake", [tensor(66)])[0] == "INTERNAL"
        server.hold()
        assert refused(client, "fake", [tensor(1)], timeout=50_000)[0] == "DEADLINE_EXCEEDED"
        server.release()
        server.on_loop(server.application.refuse_new)
        assert refused(client, "fake", [tensor(1)])[0] == "UNAVAILABLE"
        assert server.application.admission.images == 0


def test_a_full_queue_and_a_cancelled_call() -> None:
    with offered(max_queue_images=2, max_images=2) as (server, client):
        server.hold()
        done: Future[Any] = Future()
        client.async_infer("fake", [tensor(1)], lambda result, error: done.set_result((result, error)))
        eventually(lambda: server.engine.seen == [1])
        call = client.async_infer("fake", [tensor(2)], lambda result, error: None)
        eventually(lambda: server.model.batcher.depth == 1)
        assert refused(client, "fake", [tensor(3)])[0] == "RESOURCE_EXHAUSTED"
        call.cancel()
        eventually(lambda: server.application.admission.images == 1)
        server.release()
        assert done.result(10)[1] is None
        assert client.infer("fake", [tensor(4)]).as_numpy("classes")[0, 0] == 4
        assert server.engine.seen == [1, 4]


def test_a_call_that_is_cut_off_at_the_end_of_the_drain_is_a_loss() -> None:
    with offered(drain_timeout_s=0.3) as (server, client), ThreadPoolExecutor() as threads:
        server.hold()
        done: Future[Any] = Future()
        client.async_infer("fake", [tensor(1)], lambda result, error: done.set_result(error))
        eventually(lambda: server.engine.seen == [1])
        beside = threads.submit(server.classify, picture(2))
        eventually(lambda: server.application.admission.images == 2)
        server.stop()
        assert done.result(10).status() == "StatusCode.UNAVAILABLE"
        assert beside.result(10).code == "draining"
        assert server.server.lost_requests
        assert server.application.cut_off == 2
        counted = {"route": "grpc ModelInfer", "status": "503", "code": "draining"}
        assert server.application.metrics.registry.get_sample_value("topfive_requests_total", counted) == 1


def test_a_call_under_way_is_answered_in_the_drain() -> None:
    with offered(FakeEngine(delay_s=0.4)) as (server, client):
        done: Future[Any] = Future()
        client.async_infer("fake", [tensor(1)], lambda result, error: done.set_result((result, error)))
        eventually(lambda: server.engine.seen == [1])
        server.stop()
        assert done.result(10)[1] is None
        assert not server.server.lost_requests


def test_a_second_signal_cuts_calls_off() -> None:
    with offered(drain_timeout_s=600) as (server, client):
        server.hold()
        done: Future[Any] = Future()
        client.async_infer("fake", [tensor(1)], lambda result, error: done.set_result(error))
        eventually(lambda: server.engine.seen == [1])
        server.loop.call_soon_threadsafe(server.server.stop)
        eventually(lambda: server.server._closing)
        server.loop.call_soon_threadsafe(server.server.stop)
        assert done.result(10).status() == "StatusCode.UNAVAILABLE"
        server.stop()


def test_a_key_is_needed_where_there_are_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{hashlib.sha256(b'secret').hexdigest()} somebody\n")
    with offered(api_keys=keys) as (_, client):
        assert client.is_server_live()
        assert refused(client, "fake", [tensor(1)])[0] == "UNAUTHENTICATED"
        assert refused(client, "fake", [tensor(1)], headers={"x-api-key": "wrong"})[0] == "UNAUTHENTICATED"
        assert (
            client.infer("fake", [tensor(1)], headers={"authorization": "Bearer secret"})
            .as_numpy("scores")
            .size
            == CLASSES
        )


def test_a_port_in_use_is_a_sentence() -> None:
    with offered() as (server, client):
        port = int(client._channel._channel.target().decode().rpartition(":")[2])
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1 port {port} for gRPC"):
            server.call(server.application.start_grpc(port))


def test_topfive_serve_offers_it_and_answers_what_is_under_way(tmp_path: Path) -> None:
    write_model(tmp_path)
    rpc = free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "topfive",
            "serve",
            tmp_path,
            "--port",
            "0",
            "--grpc-port",
            str(rpc),
            "--device",
            "cpu",
        ],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if b"serving gRPC" in line:
                break
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        images = np.stack(random_images(3))
        asked = InferInput("image", list(images.shape), "UINT8")
        asked.set_data_from_numpy(images)
        with InferenceServerClient(f"127.0.0.1:{rpc}") as client:
            scores = client.infer("tiny", [asked]).as_numpy("scores")
        np.testing.assert_allclose(scores, expected_scores(images, 7), atol=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_nothing_is_left_of_the_event_loop() -> None:
    """gRPC's own poller must not outlive a server; this is what a second one in the same process would trip over."""
    for _ in range(2):
        with offered() as (_, client):
            assert client.is_server_live()
    assert asyncio.run(asyncio.sleep(0, "fine")) == "fine"
