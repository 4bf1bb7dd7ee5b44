"""`topfive classify` and `topfive doctor`, as a user runs them."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.client.fake_server import FakeServer, jpeg, refusal

from topfive import __version__
from topfive.cli import doctor as doctor_module
from topfive.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def photo(tmp_path: Path) -> str:
    (tmp_path / "cat.jpg").write_bytes(jpeg(40, 30))
    return str(tmp_path / "cat.jpg")


def test_a_table_with_name_size_labels_and_probabilities(
    server: FakeServer, photo: str, capsys: Capture
) -> None:
    assert main(["classify", photo, "--url", server.url, "--top-k", "2"]) == 0
    out = capsys.readouterr().out
    first, *rows = out.splitlines()
    assert first == f"{photo}  40 x 30, alexnet version 1"
    assert re.match(r"  [0-9a-f]{8}-0 +50\.0% ", rows[0])
    assert re.match(r"  [0-9a-f]{8}-1 +25\.0% ", rows[1])
    assert "\x1b" not in out, "no colors where there is no terminal"


def test_json_is_one_object_per_image_in_order(
    server: FakeServer, photo: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    images = [photo, str(tmp_path / "notes.txt"), str(tmp_path / "absent.jpg"), str(tmp_path), photo]
    assert main(["classify", *images, "--url", server.url, "--json"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["filename"] for record in records] == images
    good, text, absent, folder, again = records
    assert good == again
    assert (good["width"], good["height"], good["model"], good["version"]) == (40, 30, "alexnet", "1")
    assert len(good["top"]) == 5
    assert good["top"][0].keys() == {"label", "class", "probability"}
    assert (text["error"]["status"], text["error"]["code"]) == (415, "unsupported-format")
    assert absent["error"] == {"detail": "No such file or directory"}
    assert "topfive score" in folder["error"]["detail"]


def test_failures_stand_in_the_table_and_in_the_status(
    server: FakeServer, photo: str, capsys: Capture
) -> None:
    assert main(["classify", "absent.jpg", photo, "--url", server.url]) == 1
    out = capsys.readouterr().out
    assert out.startswith("absent.jpg: No such file or directory\n")
    assert "alexnet" in out


def test_standard_input(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(jpeg(17, 9))))
    assert main(["classify", "-", "--url", server.url, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["filename"], record["width"], record["height"]) == ("-", 17, 9)


def test_options_reach_the_server(
    server: FakeServer, photo: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TOPFIVE_URL", server.url)
    monkeypatch.setenv("TOPFIVE_API_KEY", "key")
    options = ["-k", "3", "--model", "cats", "--version", "7", "--deadline", "20", "--timeout", "5"]
    assert main(["classify", photo, *options]) == 0
    [request] = server.requests
    assert request.query == {"top_k": "3", "model": "cats", "version": "7"}
    assert request.headers["authorization"] == "Bearer key"
    assert 0 < int(request.headers["x-timeout-ms"]) <= 20_000
    assert "cats version 7" in capsys.readouterr().out


def test_no_server_exits_3_with_one_sentence(nobody: str, photo: str, capsys: Capture) -> None:
    assert main(["classify", photo, "--url", nobody]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        rf"topfive: no server answers at {nobody} \(.*\); start one with `topfive serve`.*\n", captured.err
    )


def test_refusals_of_the_request_exit_1_in_the_servers_words(
    server: FakeServer, photo: str, capsys: Capture
) -> None:
    server.script = [refusal(404, "unknown-model", "there is no model dogs; there is alexnet")]
    assert main(["classify", photo, "--url", server.url, "--model", "dogs"]) == 1
    assert capsys.readouterr().err == "topfive: there is no model dogs; there is alexnet\n"


@pytest.mark.parametrize(
    "options",
    [[], ["x.jpg", "--top-k", "many"], ["x.jpg", "--colour"], ["x.jpg", "--json=3"], ["-x"], ["--", "-x"]],
)
def test_bad_usage_exits_2(options: list[str]) -> None:
    assert main(["classify", *options]) == 2


@pytest.mark.parametrize(
    ("options", "says"), [(["--url", "localhost"], "http://"), (["--top-k", "0"], "top_k is 0")]
)
def test_bad_values_are_sentences(photo: str, options: list[str], says: str, capsys: Capture) -> None:
    assert main(["classify", photo, *options]) == 2
    assert says in capsys.readouterr().err


def test_what_names_contain_does_not_drive_the_terminal(
    server: FakeServer, photo: str, tmp_path: Path
) -> None:
    evil = tmp_path / b"\x1b]0;owned\x07[red]caf\xe9.jpg".decode("utf-8", "surrogateescape")
    evil.write_bytes(jpeg())
    for encoding in ("utf-8", "ascii"):
        run = subprocess.run(
            [sys.executable, "-m", "topfive", "classify", evil, "--url", server.url],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, b"")
        assert b"\x1b" not in run.stdout
        assert b"[red]caf" in run.stdout


def test_doctor_reports_the_base_and_every_extra(capsys: Capture) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["topfive"]["detail"] == __version__
    assert found["python"]["status"] == "ok"
    assert "libjpeg" in found["pillow"]["detail"]
    offered = set(importlib.metadata.metadata("topfive").get_all("Provides-Extra") or []) - {"all", "dev"}
    assert offered <= found.keys()
    assert report["ok"] == (status == 0)
    assert main(["doctor"]) == status
    assert "pillow" in capsys.readouterr().out


def findings(capsys: Capture) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--json"])
    return status, {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}


def test_doctor_names_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    _, found = findings(capsys)
    assert found["scoring"]["status"] == "missing"
    assert found["scoring"]["fix"] == "pip install 'topfive[scoring]'"
    assert "pyarrow" in found["scoring"]["detail"]


def test_doctor_tells_broken_from_missing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # installed, and its import fails
    status, found = findings(capsys)
    assert status == 1
    assert found["scoring"]["status"] == "broken"
    assert "--force-reinstall" in found["scoring"]["fix"]


def test_doctor_sees_two_runtimes_that_overwrite_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(doctor_module, "_is_installed", lambda name: True)
    status, _ = findings(capsys)
    assert status == 1
    assert any("overwrite each other" in f.detail for f in doctor_module.examine())


def test_doctor_passes_on_what_the_server_finds(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    checks = [("cpu", True, "2 cores", ""), ("cudnn", False, "libcudnn.so.9 is not there", "pip install it")]
    monkeypatch.setitem(sys.modules, "made_up_devices", SimpleNamespace(describe=lambda: checks))
    monkeypatch.setattr(doctor_module, "DEVICES", "made_up_devices:describe")
    status, found = findings(capsys)
    assert status == 1
    assert found["cudnn"] == {
        "name": "cudnn",
        "status": "broken",
        "detail": "libcudnn.so.9 is not there",
        "fix": "pip install it",
    }
    assert found["cpu"]["status"] == "ok"
