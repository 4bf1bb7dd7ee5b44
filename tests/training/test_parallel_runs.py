import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.training.train_runs import environment, paint_photographs, train_command
from torch import Tensor

from topfive_training.checkpoint import load_tensors
from topfive_training.cli import train
from topfive_training.demo_images import demo_images
from topfive_training.parallel import Mode
from topfive_training.trainer import Trainer

FIELDS = {"width": "0.05", "batch_size": "4", "epochs": "2", "schedule": "constant"}


def state(run: Path) -> dict[str, Tensor]:
    """Weights, velocities and running sums, as they are saved."""
    return load_tensors(run / "resume" / "state.safetensors")[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    demo_images(tmp_path / "pictures", classes=2, per_class=6)
    return tmp_path / "pictures"


def test_a_run_goes_on_in_another_way(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process up to the middle of the first epoch, then two ranks each way: as if nothing had happened."""
    options: dict[str, Any] = {"cache": tmp_path / "cache", **FIELDS}
    assert train(str(data), out=tmp_path / "whole", processes=1, **options) == 0

    calls = 0
    step = Trainer.step

    def interrupted(self: Trainer, *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train(str(data), out=tmp_path / "half", processes=1, **options) == 128 + signal.SIGTERM
    expected = state(tmp_path / "whole")
    before = state(tmp_path / "half")
    assert not torch.allclose(before["network.fc7.weight"], expected["network.fc7.weight"], atol=1e-5)

    for mode in get_args(Mode):
        shutil.copytree(tmp_path / "half", tmp_path / mode)
        assert train(str(data), out=tmp_path / mode, processes=2, parallel=mode, resume=True, **options) == 0
        found = state(tmp_path / mode)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            scale = max(1.0, float(tensor.abs().max()))
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-4 * scale), f"{mode}: {name}"
        # The checkpoint, too, is of one process.
        weights, _ = load_tensors(tmp_path / mode / "model.safetensors")
        assert torch.equal(weights["fc7.weight"], found["network.fc7.weight"])
        assert weights.keys() == load_tensors(tmp_path / "whole" / "model.safetensors")[0].keys()


def test_ctrl_c_while_the_processes_start_is_no_traceback(tmp_path: Path) -> None:
    data = paint_photographs(tmp_path / "photographs", 4)
    with subprocess.Popen(
        train_command(data, tmp_path / "run", "--processes", "2", "--epochs", "1"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        # The resource tracker, and two ranks that import by now.
        while len(children.read_text().split()) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        printed, _ = process.communicate(timeout=120)
    assert "Traceback" not in printed
    assert process.returncode == 130
