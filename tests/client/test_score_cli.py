"""`topfive score` as it is typed: exit statuses, sentences, signals."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.client.fake_server import FakeServer
from tests.client.score_fakes import FILES, REPOSITORY, FakeClassifier, draw_folder, rows_of, saved_rows

from topfive.cli import main


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The engine in process is a fake; what it was opened with."""
    opened: list[dict[str, object]] = []

    def open_fake(models: Path, **options: object) -> FakeClassifier:
        opened.append({"models": models, **options})
        return FakeClassifier()

    monkeypatch.setitem(sys.modules, "topfive_server.local", SimpleNamespace(LocalClassifier=open_fake))
    return opened


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "photos", 30)


def test_in_process_by_model(
    photos: Path, tmp_path: Path, engine: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    (models := tmp_path / "models").mkdir()
    output = tmp_path / "new/r.csv"
    words = ["score", str(photos), "--output", str(output), "--model", str(models)]
    assert (
        main([*words, "--model-version", "3", "--device", "cpu", "--engine-threads", "2", "--top-k", "3"])
        == 0
    )
    assert engine == [{"models": models, "model": None, "version": "3", "device": "cpu", "threads": 2}]
    assert len(output.read_text().splitlines()) == 31
    captured = capsys.readouterr()
    assert f"{output}: 30 rows, 0 failed" in captured.out
    assert "fake version 1 in this process" in captured.out
    assert "images/s" in captured.out
    assert main(words) == 2
    assert "exists already; --overwrite" in capsys.readouterr().err


def test_through_a_server_by_url(
    photos: Path, tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "zzz.jpg").write_bytes(b"no image")
    words = [
        "score",
        str(photos),
        "-o",
        str(tmp_path / "r.jsonl"),
        "--url",
        server.url,
        "--request-images",
        "7",
    ]
    assert main(words) == 5, "complete, but a file failed"
    assert "31 rows, 1 failed (1 unsupported-format)" in capsys.readouterr().out
    assert [row["status"] for row in rows_of(tmp_path / "r.jsonl")] == ["ok"] * 30 + ["unsupported-format"]
    assert json.loads((tmp_path / "r.jsonl.stats.json").read_text())["runs_on"] == server.url


def test_a_server_that_is_not_there_is_exit_3(
    photos: Path, tmp_path: Path, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(photos), "-o", str(tmp_path / "r.jsonl"), "--url", nobody]) == 3
    assert nobody in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "r.txt"], "it must end in .jsonl, .csv or .parquet"),
        (["--output", "r.csv", "--model", "nowhere"], "there is no model repository nowhere"),
        (["--output", "r.csv", "--model", "m", "--url", "http://x"], "exclude each other"),
        (["--output", "r.csv", "--top-k", "9"], "top_k is 9; it must be between 1 and 5"),
        (["--output", "r.csv", "--patience-s", "-1"], "patience_s is -1.0; it must be at least 0"),
    ],
)
def test_bad_usage_is_exit_2_with_a_sentence(
    words: list[str],
    sentence: str,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["score", str(photos), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_too_many_failures_are_exit_4(
    photos: Path, tmp_path: Path, engine: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    (tmp_path / "m").mkdir()
    words = ["score", str(photos), "-o", str(tmp_path / "r.csv"), "--model", str(tmp_path / "m")]
    assert main([*words, "--max-failure-rate", "0.1"]) == 4
    assert "--max-failure-rate 0.1 allows" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["score", str(photos), "-o", str(tmp_path / "r.parquet")]) == 1
    assert "pip install 'topfive[scoring]'" in capsys.readouterr().err


SCORE_WITH_SLOW_ENGINE = """
import sys, types
from tests.client.score_fakes import FakeClassifier
from topfive.cli import main
fake = types.SimpleNamespace(LocalClassifier=lambda models, **_: FakeClassifier(delay_s=float(sys.argv[1]), quick_images=30))
sys.modules["topfive_server.local"] = fake
sys.exit(main(["score", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, status: int, tmp_path: Path) -> None:
    folder, output = draw_folder(tmp_path / "photos", FILES), tmp_path / "r.jsonl"
    (tmp_path / "m").mkdir()

    def command(delay_s: float) -> list[str]:
        words = [str(folder), "-o", str(output), "--model", str(tmp_path / "m"), "--save-every-s", "0"]
        return [sys.executable, "-c", SCORE_WITH_SLOW_ENGINE, str(delay_s), *words]

    with subprocess.Popen(command(0.5), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        while saved_rows(output) < 20 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert "the same command goes on from there" in errors
    done = saved_rows(output)
    assert 20 <= done < FILES
    subprocess.run(command(0), cwd=REPOSITORY, check=True)
    assert len(rows_of(output)) == FILES
    assert json.loads((tmp_path / "r.jsonl.stats.json").read_text())["resumed_at"] == done


def test_a_second_signal_ends_it_at_once_and_it_still_resumes(tmp_path: Path) -> None:
    folder, output = draw_folder(tmp_path / "photos", 60), tmp_path / "r.jsonl"
    (tmp_path / "m").mkdir()
    words = [str(folder), "-o", str(output), "--model", str(tmp_path / "m"), "--save-every-s", "0"]
    command = [sys.executable, "-c", SCORE_WITH_SLOW_ENGINE]
    with subprocess.Popen(
        [*command, "30", *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (output.with_name("r.jsonl.parts") / "job.json").exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "press Ctrl-C again" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
    subprocess.run([*command, "0", *words], cwd=REPOSITORY, check=True)
    assert len(rows_of(output)) == 60
