"""`topfive benchmark`: times what is there, recommends the fastest that was verified, and loads no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from topfive_export.benchmark import Candidate, Timing, benchmark, find, recommend
from topfive_export.variant import ExportError


def _timing(name: str, rate: float) -> Timing:
    return Timing(
        name=name, version=1, batch=1, latency_ms=1.0, best_ms=1.0, images_per_s=rate, ceiling_share=None
    )


def _candidate(name: str, views: int = 1) -> Candidate:
    return Candidate(name=name, version=1, path=Path(name), report={"variant": {"views": views}})


def test_a_table_for_people_and_json_for_programs(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(exported, batch_sizes=(1, 2), rounds=2)
    table = capsys.readouterr().out
    assert "images/s" in table
    assert "serve alexnet here" in table
    assert "GFLOP/s" in table
    benchmark(exported, batch_sizes=(1,), rounds=1, threads=1, as_json=True)
    alone = json.loads(capsys.readouterr().out)
    assert alone["matrix_product_gflops"] is alone["timings"][0]["ceiling_share"] is None
    benchmark(exported, batch_sizes=(1, 2), rounds=2, as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["matrix_product_gflops"] > 0
    assert record["serve"] == "alexnet"
    assert [(entry["name"], entry["batch"]) for entry in record["timings"]] == [
        ("alexnet", 1),
        ("alexnet", 2),
    ]
    for entry in record["timings"]:
        assert 0 < entry["best_ms"] <= entry["latency_ms"]
        assert entry["images_per_s"] == pytest.approx(entry["batch"] / entry["best_ms"] * 1e3, rel=0.05)
        assert entry["ceiling_share"] > 0


def test_the_fastest_that_answers_one_view_is_recommended() -> None:
    timings = [_timing("net", 50), _timing("net_int8", 200), _timing("net_views10", 900)]
    candidates = [_candidate("net"), _candidate("net_int8"), _candidate("net_views10", 10)]
    assert recommend(timings, candidates) == "net_int8"
    assert recommend(timings[2:], candidates[2:]) == "net_views10"


def test_only_the_newest_verified_version_for_the_device_counts(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(exported, copy)
    shutil.copytree(copy / "alexnet" / "1", copy / "alexnet" / "3")
    shutil.copytree(copy / "alexnet", copy / "unverified")
    for path in (copy / "unverified").rglob("report.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"passed": False}))
    assert [(found.name, found.version) for found in find(copy, "cpu")] == [("alexnet", 3)]
    shutil.rmtree(copy / "alexnet")
    with pytest.raises(ExportError, match="no verified model for cpu"):
        find(copy, "cpu")
    with pytest.raises(ExportError, match="is not a folder"):
        find(tmp_path / "nowhere", "cpu")


def test_nonsense_is_refused(exported: Path) -> None:
    with pytest.raises(ExportError, match="--batch-sizes"):
        benchmark(exported, batch_sizes=(0,))
    with pytest.raises(ExportError, match="--rounds"):
        benchmark(exported, rounds=0)


def test_neither_torch_nor_onnx_is_loaded() -> None:
    script = "import sys, topfive_export.benchmark; print(sorted({'torch', 'onnx', 'onnxscript'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
