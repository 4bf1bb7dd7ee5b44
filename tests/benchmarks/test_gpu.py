"""The GPU benchmark runs where there is no GPU, so that it is known to work where there is one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.server.fakes import picture
from tests.server.onnx_models import write_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def report(tmp_path: Path, *flags: str) -> tuple[dict[str, Any], str]:
    variant = {"family": "tiny", "precision": "fp32", "target": "cpu", "views": 1}
    write_model(tmp_path / "models", version="9", report={"passed": True, "variant": variant})
    write_model(tmp_path / "models", version="10", report={"passed": True, "variant": variant})
    half = {"passed": True, "variant": variant | {"precision": "fp16"}}
    write_model(tmp_path / "models", "tiny_fp16", report=half)
    images, out = tmp_path / "images", tmp_path / "out.json"
    images.mkdir()
    (images / "a.jpg").write_bytes(picture(10, form="JPEG"))
    command = [
        sys.executable,
        SCRIPT,
        tmp_path / "models",
        images,
        "--device",
        "cpu",
        "--small",
        "--json",
        out,
    ]
    done = subprocess.run(
        [*map(str, command), *flags], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_the_engine_is_measured_for_every_suited_graph_and_batch(tmp_path: Path) -> None:
    found, text = report(tmp_path, "--no-http")
    (engine,) = found["engine"]
    assert list(engine) == ["tiny"]  # a processor converts fp16: not worth a row
    assert list(engine["tiny"]) == ["1", "4"]
    assert all(row["one"] > 0 and row["two"] > 0 for row in engine["tiny"].values())
    assert "of 28 us" in text


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_http_is_measured_with_one_process_and_with_more(tmp_path: Path) -> None:
    found, text = report(tmp_path, "--processes", "2")
    (http,) = found["http"]
    assert list(http) == ["1", "2"]
    assert all(made > 0 for made in http.values())
    assert "against one" in text
