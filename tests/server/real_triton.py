"""A real Triton server with the tiny model on it, for tests marked `triton`."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PYTHON_MODEL = """
import numpy as np, onnxruntime, os
import triton_python_backend_utils as utils

class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"))

    def execute(self, requests):
        answers = []
        for request in requests:
            image = utils.get_input_tensor_by_name(request, "image").as_numpy()
            names = ["probabilities", "classes", "scores", "features"]
            arrays = self.session.run(names, {"image": image})
            answers.append(utils.InferenceResponse([utils.Tensor(n, a) for n, a in zip(names, arrays)]))
        return answers
"""
CONFIG = """
name: "tiny"
backend: "python"
max_batch_size: 8
input [ { name: "image" data_type: TYPE_UINT8 dims: [ 12, 12, 3 ] } ]
output [
  { name: "probabilities" data_type: TYPE_FP32 dims: [ 5 ] },
  { name: "classes" data_type: TYPE_INT64 dims: [ 5 ] },
  { name: "scores" data_type: TYPE_FP32 dims: [ 7 ] },
  { name: "features" data_type: TYPE_FP32 dims: [ 3 ] }
]
dynamic_batching { }
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def triton_program() -> Path:
    """Path of `tritonserver`; skips the test where there is none."""
    program = os.environ.get("TOPFIVE_TRITON")
    if not program:
        pytest.skip("TOPFIVE_TRITON does not name a tritonserver; `make triton-env` makes one")
    return Path(program)


@contextmanager
def real_triton(root: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Serve `<root>/tiny/1/model.onnx`; gives the address of the gRPC service, and the process.

    On Triton's python backend: the wheel that it comes from has no other.
    """
    program = triton_program()
    (root / "tiny" / "config.pbtxt").write_text(CONFIG)
    (root / "tiny" / "1" / "model.py").write_text(PYTHON_MODEL)
    http, rpc, metrics = (free_port() for _ in range(3))
    path = root.with_name(f"{root.name}.log")
    with path.open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--model-repository={root}",
                *("--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1"),
                *(f"--grpc-port={rpc}", f"--metrics-port={metrics}", "--exit-timeout-secs=5"),
            ],
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None, path.read_text()
                assert time.monotonic() < deadline, path.read_text()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/models/tiny/ready", timeout=1):
                        break
                except OSError:
                    time.sleep(0.1)
            yield f"127.0.0.1:{rpc}", process
        finally:
            process.terminate()
            process.wait(30)
