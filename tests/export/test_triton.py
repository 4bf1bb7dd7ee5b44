"""A real Triton loads the exported repository as it is, and answers as ONNX Runtime does here.

The Triton at hand bundles the python backend alone, so a copy of the repository swaps `backend: "onnxruntime"` for a
few lines that run the same file; every other line of `config.pbtxt` is judged by Triton itself.
"""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from topfive.model_spec import Preprocessing
from topfive_export.corpus import decoded, drawn_pictures
from topfive_export.graphs import OUTPUT_NAMES
from topfive_export.pipeline import ExportConfig, run_export

pytestmark = [pytest.mark.slow, pytest.mark.triton]

MODELS = ("alexnet", "alexnet_image", "alexnet_int8", "alexnet_views10")
PYTHON_MODEL = """
import os

import onnxruntime
import triton_python_backend_utils as triton

NAMES = ["probabilities", "classes", "scores", "features"]


class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        answers = []
        for request in requests:
            image = triton.get_input_tensor_by_name(request, "image").as_numpy()
            outputs = self.session.run(NAMES, {"image": image})
            wanted = request.requested_output_names()
            tensors = [triton.Tensor(n, o) for n, o in zip(NAMES, outputs) if n in wanted]
            answers.append(triton.InferenceResponse(tensors))
        return answers
"""


@pytest.fixture(scope="module")
def repository(checkpoint: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four variants of one checkpoint, as exported."""
    folder = tmp_path_factory.mktemp("triton")
    out = folder / "models"
    run_export(ExportConfig(run=checkpoint, out=out))
    run_export(ExportConfig(run=checkpoint, out=out, views=10))
    run_export(ExportConfig(run=checkpoint, out=out, precision="int8", images=photographs))
    return out


@pytest.fixture(scope="module")
def address(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Triton that serves a copy of it; its gRPC address."""
    program = os.environ.get("TOPFIVE_TRITON")
    if not program:
        pytest.skip("TOPFIVE_TRITON does not name a tritonserver; `make triton-env` makes one")
    folder = tmp_path_factory.mktemp("server")
    copy = folder / "models"
    shutil.copytree(repository, copy)
    for name in MODELS:
        config = copy / name / "config.pbtxt"
        text = config.read_text()
        assert text.count('backend: "onnxruntime"') == 1
        config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
        (copy / name / "1" / "model.py").write_text(PYTHON_MODEL)
    http, grpc, metrics = (_free_port() for _ in range(3))
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                program,
                f"--model-repository={copy}",
                "--http-address=127.0.0.1",
                f"--http-port={http}",
                "--grpc-address=127.0.0.1",
                f"--grpc-port={grpc}",
                f"--metrics-port={metrics}",
                "--exit-timeout-secs=5",
                "--strict-readiness=true",
            ],
            stdout=file,
            stderr=file,
        )
        try:
            _wait_until_ready(f"http://127.0.0.1:{http}/v2/health/ready", process, log)
            yield f"127.0.0.1:{grpc}"
        finally:
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.2)
    pytest.fail(log.read_text())


def _ask(address: str, model: str, images: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
    grpc = pytest.importorskip("tritonclient.grpc", reason="needs pip install 'topfive[triton]'")
    with grpc.InferenceServerClient(address) as client:
        image = grpc.InferInput("image", list(images.shape), "UINT8")
        image.set_data_from_numpy(images)
        result = client.infer(
            model, [image], outputs=[grpc.InferRequestedOutput(name) for name in OUTPUT_NAMES]
        )
        return {name: result.as_numpy(name) for name in OUTPUT_NAMES}


def _pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        ("alexnet", [(1, 227, 227, 3), (5, 227, 227, 3)]),
        ("alexnet_image", [(1, 40, 300, 3), (2, 333, 250, 3)]),
        ("alexnet_int8", [(3, 227, 227, 3)]),
        ("alexnet_views10", [(2, 256, 256, 3)]),
    ],
)
def test_answers_are_those_of_onnx_runtime(
    address: str, repository: Path, model: str, batches: list[tuple[int, ...]]
) -> None:
    session = onnxruntime.InferenceSession(
        repository / model / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for shape in batches:
        images = _pixels(*shape)
        expected = dict(zip(OUTPUT_NAMES, session.run(OUTPUT_NAMES, {"image": images}), strict=True))
        actual = _ask(address, model, images)
        assert np.array_equal(actual["classes"], expected["classes"])
        for name in ("probabilities", "scores", "features"):
            assert np.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-6), name


def test_many_at_once_are_batched_and_each_gets_its_own_answer(address: str, repository: Path) -> None:
    session = onnxruntime.InferenceSession(
        repository / "alexnet" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    images = _pixels(24, 227, 227, 3)
    expected = session.run(["scores"], {"image": images})[0]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: _ask(address, "alexnet", image[None])["scores"], images))
    assert np.allclose(np.concatenate(answers), expected, rtol=1e-4, atol=1e-6)


def test_the_configuration_means_what_was_written(address: str) -> None:
    grpc = pytest.importorskip("tritonclient.grpc", reason="needs pip install 'topfive[triton]'")
    with grpc.InferenceServerClient(address) as client:
        config = client.get_model_config("alexnet").config
        ready = {model.name: model.state for model in client.get_model_repository_index().models}
    assert config.max_batch_size == 64
    assert config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [227, 227, 3]
    assert [output.name for output in config.output] == list(OUTPUT_NAMES)
    assert ready == dict.fromkeys(MODELS, "READY")


def test_tritons_own_classification_knows_our_labels(address: str) -> None:
    grpc = pytest.importorskip("tritonclient.grpc", reason="needs pip install 'topfive[triton]'")
    images = _pixels(2, 227, 227, 3)
    own = _ask(address, "alexnet", images)
    with grpc.InferenceServerClient(address) as client:
        image = grpc.InferInput("image", list(images.shape), "UINT8")
        image.set_data_from_numpy(images)
        output = grpc.InferRequestedOutput("scores", class_count=2)
        answers = client.infer("alexnet", [image], outputs=[output]).as_numpy("scores")
    for row, classes in zip(answers, own["classes"], strict=True):
        named = [entry.decode().split(":")[1:] for entry in row]
        assert named == [[str(index), f"kind {index}"] for index in classes[:2]]


def test_the_drawn_pictures_agree_too(address: str, repository: Path) -> None:
    images = decoded(drawn_pictures()[:16], Preprocessing(), 227)
    session = onnxruntime.InferenceSession(
        repository / "alexnet" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    classes = session.run(["classes"], {"image": images})[0]
    assert np.array_equal(_ask(address, "alexnet", images)["classes"], classes)
