"""`topfive benchmark`: times what is there, recommends the fastest that was verified, and loads no torch."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from topfive import _processor
from topfive.cli import main
from topfive_export.benchmark import Candidate, Timing, benchmark, find, recommend
from topfive_export.variant import ExportError, OptionError


def _timing(name: str, rate: float) -> Timing:
    return Timing(
        name=name, version=1, batch=1, latency_ms=1.0, best_ms=1.0, images_per_s=rate, ceiling_share=None
    )


def _candidate(name: str, views: int = 1, *, saturates: bool = False) -> Candidate:
    return Candidate(name=name, version=1, path=Path(name), views=views, saturates=saturates)


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
    candidates[1] = _candidate("net_int8", saturates=True)
    assert recommend(timings, candidates) == "net"
    assert recommend(timings[1:], candidates[1:]) == "net_int8"


def test_only_the_newest_verified_version_for_the_device_counts(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(exported, copy)
    shutil.copytree(copy / "alexnet" / "1", copy / "alexnet" / "3")
    shutil.copytree(copy / "alexnet", copy / "unverified")
    for path in (copy / "unverified").rglob("report.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"passed": False}))
    assert [(found.name, found.version) for found in find(copy, "cpu")] == [("alexnet", 3)]
    shutil.rmtree(copy / "alexnet")
    assert find(copy, "cpu") == []
    with pytest.raises(ExportError, match="no verified model for cpu"):
        benchmark(copy)
    with pytest.raises(ExportError, match="is not a folder"):
        find(tmp_path / "nowhere", "cpu")


def test_nonsense_is_refused(exported: Path) -> None:
    with pytest.raises(OptionError, match="--batch-sizes"):
        benchmark(exported, batch_sizes=(0,))
    with pytest.raises(OptionError, match="--rounds"):
        benchmark(exported, rounds=0)


def _copy(exported: Path, models: Path, name: str, **changes: object) -> Path:
    """A version 1 of another name in `models`; `changes` are the report's, None leaves an entry out."""
    version = models / name / "1"
    shutil.copytree(exported / "alexnet" / "1", version)
    report = {**json.loads((version / "report.json").read_text()), **changes}
    report = {key: value for key, value in report.items() if value is not None}
    (version / "report.json").write_text(json.dumps(report))
    return version


def test_what_cannot_be_compared_is_named_and_the_others_are_timed(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _copy(exported, tmp_path, "good")
    _copy(exported, tmp_path, "uncounted", multiply_adds=None, agreement=None)
    _copy(exported, tmp_path, "odd", variant={"graph": "hot"})
    _copy(exported, tmp_path, "unread").joinpath("report.json").write_text("{")
    _copy(exported, tmp_path, "unverified", passed=None)
    exchanged = _copy(exported, tmp_path, "exchanged") / "model.onnx"
    exchanged.write_bytes(exchanged.read_bytes() + b"\0")
    cut = b"\x08\x0a, and then the copy was interrupted"
    (
        _copy(exported, tmp_path, "cut", file={"sha256": hashlib.sha256(cut).hexdigest()}) / "model.onnx"
    ).write_bytes(cut)
    assert main(["benchmark", str(tmp_path), "--batch-sizes", "1", "2", "--rounds", "1"]) == 0
    said = capsys.readouterr()
    rows = [line.split()[:2] for line in said.out.splitlines()[1:5]]
    assert rows == [["good", "1"], ["good", "2"], ["uncounted", "1"], ["uncounted", "2"]]
    for name, why in (
        ("odd", "is not one that `topfive export` wrote"),
        ("unread", "it has no report.json that says that it passed"),
        ("unverified", "it has no report.json that says that it passed"),
        ("exchanged", "is not the file that its report.json is about"),
        ("cut", "Protobuf parsing failed"),
    ):
        [line] = [line for line in said.err.splitlines() if f"/{name}/1 is left out" in line]
        assert why in line


def test_int8_that_saturates_here_is_warned_of(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_processor, "int8_dot_products", lambda: False)
    variant = {"graph": "hot", "precision": "int8", "target": "cpu", "views": 1}
    _copy(exported, tmp_path, "net", made_with={"int8_dot_products": True})
    _copy(exported, tmp_path, "net_int8", variant=variant, made_with={"int8_dot_products": True})
    benchmark(tmp_path, batch_sizes=(1,), rounds=1)
    said = capsys.readouterr()
    assert "net_int8 saturates on this processor" in said.err
    assert "serve net here: the fastest of those that do not saturate" in said.out


def test_a_device_that_is_not_there_is_told_in_one_sentence(exported: Path) -> None:
    # In a process of its own: the library writes to the file descriptor.
    script = "import sys; from topfive.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", script, "benchmark", str(exported), "--device", "cuda"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        pytest.skip("there is a GPU")
    assert answer.stderr.splitlines() == [
        "topfive: ONNX Runtime cannot use CUDA here; `topfive doctor` says what is missing"
    ]


def test_neither_torch_nor_onnx_is_loaded() -> None:
    script = "import sys, topfive_export.benchmark; print(sorted({'torch', 'onnx', 'onnxscript'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
