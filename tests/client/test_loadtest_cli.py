"""`topfive load-test` against servers on real sockets."""

import json
import sys
from pathlib import Path

import pytest
from tests.client.fake_server import Answer, FakeServer, jpeg, refusal

from topfive.cli import _load_plan, main

QUICK = ["--connections", "1", "4", "--duration-s", "0.3", "--warmup-s", "0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "images" / "deep" / "b.PNG").write_bytes(jpeg(20, 20))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_the_command_prints_a_table_and_writes_numbers_and_a_picture(
    server: FakeServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert main(["load-test", server.url, str(folder), *QUICK, "--rates", "20", "40", *outputs]) == 0
    captured = capsys.readouterr()
    assert "closed 4" in captured.out
    assert "open 40.0/s" in captured.out
    assert "closed loop, 1 connection," in captured.err
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(p["loop"], p["asked"]) for p in report["points"]] == [
        ("closed", 1),
        ("closed", 4),
        ("open", 20),
        ("open", 40),
    ]
    assert all(p["answered"] > 0 and not p["errors"] for p in report["points"])
    assert report["images"]["count"] == 2
    assert report["models"][0]["name"] == "alexnet"
    assert report["generator"]["cores"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    answered = sum(p["answered"] for p in report["points"])
    asked = [r for r in server.requests if r.path == "/v1/classify"]
    assert len(asked) == answered
    assert {r.body for r in asked} == {jpeg(), jpeg(20, 20)}


def test_what_was_measured_before_ctrl_c_is_not_lost(
    server: FakeServer,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_load_plan, "open_loop", interrupted)
    outputs = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert main(["load-test", server.url, str(folder), *QUICK, "--rates", "20", *outputs]) == 130
    captured = capsys.readouterr()
    assert "interrupted; what was measured until then" in captured.err
    assert "closed 4" in captured.out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [point["asked"] for point in report["points"]] == [1, 4]
    assert report["models"][0]["name"] == "alexnet"
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_the_command_searches(server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load-test", server.url, str(folder), *QUICK, "--p99-ms", "0.001"]) == 1
    assert "highest rate with p99 within 0.001 ms: none" in capsys.readouterr().out


def test_refusals_are_shown_and_not_retried(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Answer = (200, {}, b'{"models": []}')
    server.script = [models, *[refusal(429, "queue-full", "full", Retry_After="0")] * 3]
    assert main(["load-test", server.url, str(folder), *QUICK, "--rates", "10"]) == 1
    assert "3 x 429" in capsys.readouterr().out


def test_a_folder_without_images_an_absent_server_and_a_missing_library(
    server: FakeServer,
    nobody: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["load-test", server.url, str(tmp_path / "empty")]) == 1
    assert "empty" in capsys.readouterr().err
    assert main(["load-test", nobody, str(folder)]) == 3
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["load-test", server.url, str(folder), "--plot", "x.png"]) == 1
    assert "pip install 'topfive[plot]'" in capsys.readouterr().err
    assert server.requests == [], "it fails before the load"


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_output_that_cannot_be_written_is_found_out_before_the_load(
    option: str, server: FakeServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "absent" / "x"
    assert main(["load-test", server.url, str(folder), option, str(output)]) == 1
    assert str(output) in capsys.readouterr().err
    assert server.requests == []


def test_an_earlier_output_stays_when_the_load_fails(
    server: FakeServer, nobody: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text("{}")
    for name in ("old.json", "new.json"):
        assert main(["load-test", nobody, str(folder), "--json", str(tmp_path / name)]) == 3
    assert [path.name for path in tmp_path.glob("*.json")] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "{}"


def test_images_that_the_server_refuses_are_not_called_unanswered(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Answer = (200, {}, b'{"models": []}')
    server.script = [models, *[refusal(415, "unsupported-format", "no image")] * 10_000]
    arguments = ["load-test", server.url, str(folder), "--connections", "1", "--duration-s", "0.2"]
    assert main([*arguments, "--warmup-s", "0"]) == 1
    error = capsys.readouterr().err
    assert "no image was classified" in error
    assert " x 415)" in error
