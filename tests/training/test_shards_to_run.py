"""`topfive prepare`, then `topfive train` and `topfive evaluate`, as a user calls them."""

import json
from pathlib import Path

import pytest
from tests.training.train_runs import CLASSES, train_words

from topfive.cli import main
from topfive_training.checkpoint import load_model

SHAPE = ("--short-side", "200", "--crop", "196")


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def shards(
    request: pytest.FixtureRequest, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    dest = tmp_path_factory.mktemp("prepared") / "shards"
    words = ["prepare", str(photographs), str(dest), "--format", request.param, "--short-side", "200"]
    assert main([*words, "--shard-images", "5", "--processes", "1"]) == 0
    return dest


def last_epoch(out: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    found: dict[str, float] = [record for record in records if record["kind"] == "epoch"][-1]
    return found


def test_a_run_learns_from_shards(
    shards: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    fast = ["--epochs", "10", "--rate", "0.002", "--bias", "0.1", "--schedule", "cosine"]
    plain = ["--dropout", "0", "--images-per-crop", "1", "--color-noise", "0"]
    assert main(train_words(shards, out, *SHAPE, *fast, *plain)) == 0
    said = capsys.readouterr().err
    assert "3 classes, 24 training and 6 validation images" in said
    assert load_model(out).spec.labels == CLASSES
    assert last_epoch(out)["val_images"] == 6
    # Told apart by their colour: learned, and from the right labels, or evaluate would not agree on the photographs.
    assert last_epoch(out)["val_top1"] == 1.0
    assert main(["evaluate", str(out), str(photographs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1_error"]["count"] == 0


def test_shards_of_another_size_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_words(shards, tmp_path / "run", "--epochs", "1")) == 1
    said = capsys.readouterr().err
    assert "200" in said
    assert "256" in said
    assert "Traceback" not in said
