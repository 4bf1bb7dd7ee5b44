"""`docs/multi-node.md`, tried: two torchrun "nodes" on loopback, one of whose processes is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from topfive_training.checkpoint import load_tensors
from topfive_training.cli import train
from topfive_training.demo_images import demo_images

FIELDS = {"width": "0.05", "epochs": "6", "batch_size": "20", "schedule": "constant", "seed": "3"}


def start_node(folder: Path, port: int, number: int) -> subprocess.Popen[bytes]:
    options = [word for name, value in FIELDS.items() for word in (f"--{name.replace('_', '-')}", value)]
    with (folder / f"node{number}.log").open("wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"),
                *("--max-restarts", "3", "-m", "topfive", "train", "images", "--out", "run", *options),
            ],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            start_new_session=True,
        )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def logs(folder: Path) -> str:
    return "".join((folder / f"node{number}.log").read_text(errors="replace") for number in (0, 1))


@pytest.mark.slow
def test_a_run_on_two_nodes_survives_the_death_of_a_process(tmp_path: Path) -> None:
    demo_images(tmp_path / "images", classes=2, per_class=50)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = [start_node(tmp_path, port, number) for number in (0, 1)]
    try:
        deadline = time.monotonic() + 150
        while "epoch 2/" not in logs(tmp_path):
            assert time.monotonic() < deadline, logs(tmp_path)
            assert all(node.poll() is None for node in nodes), logs(tmp_path)
            time.sleep(0.05)
        for worker in children(nodes[1].pid):
            os.kill(worker, signal.SIGKILL)
        for node in nodes:
            assert node.wait(timeout=150) == 0, logs(tmp_path)
    finally:
        for node in nodes:
            for worker in children(node.pid) if node.poll() is None else ():
                os.kill(worker, signal.SIGKILL)
            node.kill()
            node.wait()
    assert "resuming at step" in logs(tmp_path)

    # As the same two processes on one node, never interrupted: sums of two do not depend on their order.
    assert train(str(tmp_path / "images"), out=tmp_path / "whole", processes=2, **FIELDS) == 0  # type: ignore[arg-type]
    found, expected = (
        load_tensors(tmp_path / name / "resume" / "state.safetensors")[0] for name in ("run", "whole")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
