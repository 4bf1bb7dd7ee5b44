"""`topfive train` with real processes: the result, exact resumption, signals, failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.training.train_runs import environment, paint_photographs, run, train_command, train_words
from torch import Tensor

from topfive.cli import main
from topfive_training.checkpoint import load_model, load_tensors, save_tensors
from topfive_training.initialization import initialize
from topfive_training.journal import Journal
from topfive_training.network import AlexNet
from topfive_training.recipe import Recipe

STATE = "resume/state.safetensors"
SAVE_EVERY_STEP = ("--save-every-minutes", "1e-9")
FOUR_EPOCHS = ("--epochs", "4", "--schedule", "constant")
STEADILY = ("--rate", "0.0001")
"""For runs that are compared but for rounding. At the usual rate so narrow a network is chaotic: a batch in two halves is
rounded otherwise on some processors, and each step makes ten times as much of it; here it stays below a hundred-thousandth."""


def weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / "model.safetensors")[0]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one: Path, other: Path) -> None:
    """The weights of two runs (`STEADILY`) are apart by less than a thousandth of how far training has moved them.

    Not element by element: where two values of a pool are equal but for rounding, another processor takes the other,
    and the gradient of some weights jumps. A gradient lost or counted twice moves whole layers by their own length.
    """
    spec = load_model(one).spec
    start = AlexNet(spec.architecture)
    initialize(start, Recipe(**cast("dict[str, Any]", spec.recipe)))
    trained, expected = weights(one), weights(other)
    for name, first in start.state_dict().items():
        apart, moved = trained[name] - expected[name], expected[name] - first
        assert apart.norm() <= 0.001 * moved.norm(), name
    for name in expected.keys() - start.state_dict().keys():
        torch.testing.assert_close(trained[name], expected[name])


def start_and_wait_for(command: list[str], file: Path, *, step: int) -> subprocess.Popen[str]:
    """Start; return once a state of at least `step` has been saved."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists() and json.loads(load_tensors(file)[1]["state"])["step"] >= step:
            return process
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no state of step {step} within two minutes: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def whole(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 4 epochs of 6 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(train_command(photographs, out, *FOUR_EPOCHS))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def steady(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with steps so small that another rounding stays one."""
    out = tmp_path_factory.mktemp("steady") / "run"
    done = run(train_command(photographs, out, *FOUR_EPOCHS, *STEADILY))
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_everything_and_says_so(whole: Path) -> None:
    model = load_model(whole)
    assert model.spec.labels == ("blue", "green", "red")
    assert model.spec.recipe["schedule"] == "constant"
    assert model.spec.preprocessing.mean_image
    assert model.spec.metrics["images"] == 6  # each validation image once
    assert model.spec.metrics["epoch"] == 4
    epochs = [record for record in records(whole) if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    assert all(record["val_images"] == 6 for record in epochs)
    best = max(record["val_top1"] for record in epochs)
    assert load_model(whole / "best").spec.metrics["top1"] == best
    assert any((whole / "tensorboard").iterdir())
    assert len((whole / "validation.txt").read_text().splitlines()) == 6
    assert not (whole / "cache").exists()


def test_it_learns_three_colors(whole: Path) -> None:
    # Guessing is right in a third of the cases.
    assert load_model(whole / "best").spec.metrics["top1"] >= 5 / 6


def test_two_processes_compute_what_one_does(photographs: Path, steady: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(train_command(photographs, out, *FOUR_EPOCHS, *STEADILY, "--processes", "2"))
    assert done.returncode == 0, done.stderr
    assert_close(out, steady)


def test_kill_in_mid_epoch_and_resume_gives_the_same_bits(
    photographs: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = train_command(photographs, out, *FOUR_EPOCHS, *SAVE_EVERY_STEP)
    process = start_and_wait_for(command, out / STATE, step=8)
    process.kill()
    process.communicate()
    saved = json.loads(load_tensors(out / STATE)[1]["state"])["step"]
    assert 8 <= saved < 24
    done = run([*command, "--resume"])
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {saved}" in done.stderr
    assert_same_bits(weights(out), weights(whole))
    # The log tells of each step once, and the sums of the broken epoch are whole.
    steps = [(record["kind"], record["step"]) for record in records(out)]
    assert steps == [(record["kind"], record["step"]) for record in records(whole)]
    for one, other in zip(records(out), records(whole), strict=True):
        for name in ("loss", "train_loss", "val_loss", "val_top1"):
            assert one.get(name) == other.get(name)


@pytest.mark.slow
def test_resume_with_another_number_of_processes(photographs: Path, steady: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = (*FOUR_EPOCHS, *STEADILY, *SAVE_EVERY_STEP)
    process = start_and_wait_for(
        train_command(photographs, out, *options, "--processes", "2"), out / STATE, step=5
    )
    process.kill()
    process.communicate()
    done = run([*train_command(photographs, out, *options), "--resume"])
    assert done.returncode == 0, done.stderr
    assert_close(out, steady)


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, "2"),
        pytest.param(signal.SIGINT, "1", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(
    photographs: Path, tmp_path: Path, number: signal.Signals, processes: str
) -> None:
    out = tmp_path / "run"
    command = train_command(photographs, out, "--epochs", "400", "--processes", processes, *SAVE_EVERY_STEP)
    process = start_and_wait_for(command, out / STATE, step=2)
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    saved = re.search(r"saved at step (\d+) of 2400; to go on: .*--resume", said)
    assert saved, said
    assert json.loads(load_tensors(out / STATE)[1]["state"])["step"] == int(saved[1])
    assert "Traceback" not in said


def test_a_rank_that_dies_takes_the_others_along_and_is_named(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = train_command(photographs, out, "--epochs", "400", "--processes", "2", *SAVE_EVERY_STEP)
    process = start_and_wait_for(command, out / STATE, step=1)
    ranks = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"rank \d of 2 was ended by SIGKILL", said), said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_signal_in_validation_is_obeyed_too(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    assert main(train_words(photographs, undisturbed, "--epochs", "2", *STEADILY)) == 0
    show = Journal.show

    def and_interrupt(self: Journal, what: str, *details: Any) -> None:
        show(self, what, *details)
        if what == "validation":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as context:
        context.setattr(Journal, "show", and_interrupt)
        assert main(train_words(photographs, out, "--epochs", "2", *STEADILY)) == 128 + signal.SIGTERM
    assert "saved at step 6 of 12" in capsys.readouterr().err
    assert main(train_words(photographs, out, "--epochs", "2", *STEADILY, "--resume")) == 0
    assert [record["step"] for record in records(out)] == [record["step"] for record in records(undisturbed)]
    assert_close(out, undisturbed)


def test_a_full_disk_leaves_the_last_state_whole(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--epochs", "40", "--cache", str(tmp_path / "cache"), *SAVE_EVERY_STEP)
    process = start_and_wait_for(train_command(photographs, out, *options), out / STATE, step=2)
    process.kill()
    process.communicate()
    before = (out / STATE).read_bytes()
    # No file may grow beyond half of the state: what a full disk looks like from inside.
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    python, flag, program, *words = train_command(photographs, out, *options, "--resume")
    done = run([python, flag, limited + program, *words])
    assert done.returncode == 1
    assert re.search(r"state.safetensors could not be written: .*File too large", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert (out / STATE).read_bytes() == before
    assert [path.name for path in (out / "resume").iterdir()] == ["state.safetensors"]


@pytest.mark.slow
def test_no_rank_outlives_the_program(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = train_command(photographs, out, "--epochs", "400", "--processes", "2", *SAVE_EVERY_STEP)
    process = start_and_wait_for(command, out / STATE, step=1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.slow
def test_torchrun_starts_it_too(photographs: Path, steady: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, _, program, *words = train_command(photographs, out, *FOUR_EPOCHS, *STEADILY)
    script = tmp_path / "program.py"
    script.write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, str(script), *words])
    assert done.returncode == 0, done.stderr
    assert_close(out, steady)


def test_divergence_stops_with_step_rate_and_advice(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(train_words(photographs, tmp_path / "run", "--rate", "1000", "--epochs", "4"))
    said = capsys.readouterr().err
    assert status == 1
    assert re.search(r"at step \d+ \(epoch 1\), with rate 1000: the run has diverged.*--rate", said)
    assert "Traceback" not in said


def test_bad_files_are_counted_and_the_rest_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = paint_photographs(tmp_path / "photographs", 6)
    (folder / "blue" / "notes.txt").write_text("not an image")
    (folder / "green" / "empty.png").touch()
    (folder / "yellow").mkdir()
    status = main(train_words(folder, tmp_path / "run", "--epochs", "1"))
    said = capsys.readouterr().err
    assert status == 0
    assert "yellow: empty" in said
    assert "2 files skipped" in said
    assert "blue/notes.txt: the data is not an image" in said
    assert "green/empty.png: the image is empty" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "already holds a run; add --resume"),
        (["--resume", "--rate", "0.5"], r"holds a run with rate 0.01, not 0.5"),
        (["--resume", "--validation-fraction", "0.4"], "other training images"),
        (["--batsch-size", "4"], "batsch_size is no field of a recipe; did you mean batch_size"),
        (["--resume", "--processes", "0"], "--processes is 0; it must be at least 1"),
    ],
)
def test_refusals_are_sentences(
    photographs: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = weights(out)
    status = main(train_words(photographs, out, *options))
    said = capsys.readouterr().err
    assert status != 0
    assert re.search(sentence, said)
    assert "Traceback" not in said
    assert_same_bits(weights(out), before)


def test_a_finished_run_resumes_to_nothing(photographs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    status = main(train_words(photographs, out, "--resume"))
    assert status == 0
    assert_same_bits(weights(out), weights(whole))


def test_a_run_from_before_two_decisions_were_fields_goes_on_as_it_began(
    photographs: Path, tmp_path: Path
) -> None:
    """A state saved by a program without `within_map_norm` and `bias_rate_drops` is of a run without the one, with the other."""
    out = tmp_path / "run"
    words = train_words(photographs, out, "--epochs", "1")
    assert main([*words, "--within-map-norm", "false", "--bias-rate-drops", "true"]) == 0
    tensors, metadata = load_tensors(out / STATE)
    state, spec = json.loads(metadata["state"]), json.loads(metadata["spec"])
    for record in (state["recipe"], spec["recipe"]):
        del record["within_map_norm"], record["bias_rate_drops"]
    del spec["architecture"]["within_map_norm"]
    save_tensors(out / STATE, tensors, {"state": json.dumps(state), "spec": json.dumps(spec)})
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume", "--within-map-norm", "true"]) == 1
