"""Schemathesis: what `/openapi.json` promises, against a real server, with all of its checks."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz.budget import SECONDS, SEED
from tests.server.onnx_models import write_model
from tests.server.real_server import Process

CONFIG = Path(__file__).with_name("schemathesis.toml")
ROOT = Path(__file__).parents[2]
OUTPUT = ("--continue-on-failure", "--no-color")
KEY = "a-key-for-this-test"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    """With keys, so that the checks on authentication have something to check, and with the admin routes."""
    for version in ("1", "2"):
        write_model(tmp_path / "models", version=version)
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()}  fuzz\n")
    with Process.running(tmp_path / "models", "--versions", 2, "--api-keys", keys, "--admin") as process:
        yield process


@pytest.mark.timeout(300 + SECONDS)
def test_the_server_keeps_what_its_description_promises(server: Process, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("schemathesis"))
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    limit = [f"--max-time={SECONDS}"] if SECONDS else ["--max-examples=15"]
    run = subprocess.run(
        [
            program,
            "--config-file",
            str(CONFIG),
            "run",
            url,
            "--checks=all",
            f"--seed={SEED}",
            *limit,
            *OUTPUT,
        ],
        cwd=tmp_path,
        env={**os.environ, "TOPFIVE_FUZZ_KEY": KEY, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert "Operations:       10 selected / 10 total" in run.stdout, run.stdout
    mistakes = [line for line in server.log if line.get("code") == "internal" or line["level"] == "ERROR"]
    assert mistakes == []
