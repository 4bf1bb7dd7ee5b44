"""`topfive load-test` against servers on real sockets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.client.fake_server import Answer, FakeServer, jpeg, refusal

from topfive.cli import _load_plan, main
from topfive.loadtest import Point, open_loop

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
    assert len(asked) == 2 + answered, "each image once, then the loads"
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
    full = refusal(429, "queue-full", "full", Retry_After="0")
    server.script = [models, *[full] * (2 + 3)]  # the two images once, then the load
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
    output = tmp_path / "absent" / "x.png"
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


ONE = ["--connections", "1", "--duration-s", "0.3", "--warmup-s", "0"]


@pytest.fixture
def refused_open_loops(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*arguments: Any) -> Point:
        server.script = [refusal(429, "queue-full", "full")] * 10_000
        return await open_loop(*arguments)

    monkeypatch.setattr(_load_plan, "open_loop", refused)


@pytest.mark.usefixtures("refused_open_loops")
def test_failures_at_a_rate_that_was_asked_for_are_the_exit_status(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load-test", server.url, str(folder), *ONE, "--rates", "200"]) == 1
    out = capsys.readouterr().out
    assert " x 429" in out
    assert "requests failed in loads that were asked for" in out


@pytest.mark.usefixtures("refused_open_loops")
def test_failures_at_rates_that_look_for_the_limit_are_only_told(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load-test", server.url, str(folder), *ONE]) == 0
    out = capsys.readouterr().out
    assert " x 429" in out
    assert "requests failed only at rates that were tried to find the limit" in out


def test_a_rate_that_was_broken_off_as_overloaded_is_a_failure(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.delay_s = 0.2
    asked = ["--rates", "200", "--max-in-flight", "5"]
    assert main(["load-test", server.url, str(folder), *ONE, *asked]) == 1
    assert "overloaded" in capsys.readouterr().out


MORTAL = """
import os, signal, time
from tests.client.fake_server import FakeServer, listening

class Mortal(FakeServer):
    def answer(self, *request):
        if len(self.requests) > 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(*request)

with listening(Mortal()) as server:
    print(server.url, flush=True)
    time.sleep(600)
"""


def test_a_server_that_is_killed_ends_the_test_with_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", MORTAL], cwd=root, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            output = tmp_path / "out.json"
            status = main(["load-test", url, str(folder), *ONE, "--rates", "20", "--json", str(output)])
        finally:
            process.kill()
    captured = capsys.readouterr()
    assert status == 3
    assert "no server answers" in captured.err
    assert " x connection" in captured.out
    assert [point["loop"] for point in json.loads(output.read_text())["points"]] == ["closed"]


def test_an_image_that_the_server_refuses_is_named_and_not_the_servers_failure(
    server: FakeServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "zz [bad].jpg").write_bytes(b"no image")
    outputs = ["--json", str(tmp_path / "out.json")]
    assert main(["load-test", server.url, str(folder), *ONE, "--rates", "20", *outputs]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["images"]["count"] == 2
    assert list(report["images"]["refused"]) == [str(folder / "zz [bad].jpg")]
    assert not any(point["errors"] for point in report["points"])
    assert [request.body for request in server.requests].count(b"no image") == 1
    assert "zz [bad].jpg: the data is not an image" in capsys.readouterr().err


def test_an_image_that_the_server_hangs_up_on_is_left_out(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Answer = (200, {}, b'{"models": []}')
    server.script = [models, ConnectionResetError("scripted")]
    assert main(["load-test", server.url, str(folder), *ONE, "--rates", "20"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("left out, the server refuses it") == 1
    assert " x connection" not in captured.out


def test_images_that_are_all_refused_are_not_called_unanswered(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Answer = (200, {}, b'{"models": []}')
    server.script = [models, *[refusal(415, "unsupported-format", "no image")] * 10_000]
    assert main(["load-test", server.url, str(folder), *ONE]) == 1
    error = capsys.readouterr().err
    assert "refuses every image" in error
    assert "a.jpg: no image" in error


def test_the_search_tries_no_rate_that_sends_next_to_nothing(
    server: FakeServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.delay_s = 0.005
    outputs = ["--json", str(tmp_path / "out.json")]
    assert main(["load-test", server.url, str(folder), *ONE, "--p99-ms", "0.5", *outputs]) == 1
    closed, halved, _, *steps = json.loads((tmp_path / "out.json").read_text())["points"]
    assert (closed["loop"], halved["loop"]) == ("closed", "open")
    assert all(point["asked"] * 0.3 >= 10 for point in steps)
    assert "none of those tried, down to" in capsys.readouterr().out


def test_more_images_than_asked_for_are_left_out_aloud(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        (folder / f"c{number}.jpg").write_bytes(jpeg(10 + number, 10))
    assert main(["load-test", server.url, str(folder), *ONE, "--rates", "20", "--max-images", "5"]) == 0
    assert "5 of 10 images left out" in capsys.readouterr().err
    sent = {request.body for request in server.requests if request.path == "/v1/classify"}
    assert sent == {jpeg(), jpeg(11, 10), jpeg(13, 10), jpeg(15, 10), jpeg(17, 10)}


def test_one_big_file_leaves_out_no_other(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "b.jpg").write_bytes(bytes(100_000))
    assert (
        main(["load-test", server.url, str(folder), *ONE, "--rates", "20", "--max-image-bytes", "50000"]) == 0
    )
    assert "1 of 3 images left out" in capsys.readouterr().err
    sent = {request.body for request in server.requests if request.path == "/v1/classify"}
    assert sent == {jpeg(), jpeg(20, 20)}


@pytest.mark.parametrize("name", ["x.foo", "x"])
def test_a_picture_of_an_unknown_kind_is_refused_before_the_load(
    name: str, server: FakeServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load-test", server.url, str(folder), *ONE, "--plot", str(tmp_path / name)]) == 2
    assert "png" in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize(
    "answer", [(404, {}, b"<p>File not found"), (200, {}, b'{"ok": true}'), (200, {}, b"<p>Welcome")]
)
def test_something_else_at_the_address_is_called_so(
    answer: Answer, server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [answer]
    assert main(["load-test", server.url, str(folder), *ONE]) == 1
    error = capsys.readouterr().err
    assert server.url in error
    assert "not a topfive server" in error


OTHER_JSON: Answer = (200, {}, b'{"other": "json"}')


def test_something_that_answers_images_otherwise_is_called_so(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Answer = (200, {}, b'{"models": []}')
    server.script = [models, *[OTHER_JSON] * 10_000]
    assert main(["load-test", server.url, str(folder), *ONE]) == 1
    assert "no topfive server" in capsys.readouterr().err


def test_answers_that_are_none_are_no_broken_connections(
    server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: Answer = (200, {}, b'{"models": []}')
    images = [refusal(503, "starting", "not yet")] * 2
    server.script = [models, *images, *[OTHER_JSON] * 3]
    assert main(["load-test", server.url, str(folder), *ONE, "--rates", "20"]) == 1
    assert "3 x malformed" in capsys.readouterr().out
