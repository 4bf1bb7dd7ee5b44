"""What docs/scoring.md says is so: its example for Ray runs, its statuses and exit statuses are the code's."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.client.score_fakes import REPOSITORY, FakeClassifier, draw_folder

from topfive.cli import score as command
from topfive.scoring import InterruptedJobError, RefusedError, ServerGoneError, StoppedError

TEXT = (REPOSITORY / "docs/scoring.md").read_text(encoding="utf-8")


def first_column(heading: str) -> set[str]:
    """Codes of the first column of the table below a row that begins with `heading`."""
    table = TEXT[TEXT.index(f"| {heading} |") :].split("\n\n")[0]
    return {
        cell for row in table.splitlines()[2:] for cell in re.split(r"[`,\s]+", row.split("|")[1]) if cell
    }


def test_the_example_for_ray_classifies_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    def map_batches(function: Any, **options: Any) -> Any:
        calls.update(options, function=function)
        return SimpleNamespace(write_parquet=lambda _: None)

    dataset = SimpleNamespace(map_batches=map_batches)
    ray = SimpleNamespace(data=SimpleNamespace(read_binary_files=lambda *_, **__: dataset))
    monkeypatch.setitem(sys.modules, "ray", ray)
    engine = SimpleNamespace(LocalClassifier=lambda _: FakeClassifier(max_batch=64))
    monkeypatch.setitem(sys.modules, "topfive_server.local", engine)
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    exec(compile(example, "docs/scoring.md", "exec"), {"__name__": "example"})
    files = sorted(draw_folder(tmp_path, 9).rglob("*.png"))
    batch: dict[str, list[Any]] = {
        "path": [str(path) for path in files],
        "bytes": [path.read_bytes() for path in files],
    }
    batch["bytes"][4] = b"no image"
    result = calls["function"]()(batch)
    assert result["class"] == [0, 1, 2, 3, -1, 5, 6, 7, 0]
    assert [bool(error) for error in result["error"]] == [index == 4 for index in range(9)]


def test_exit_statuses_are_the_documented_ones() -> None:
    code = {command.EXIT_OK, command.EXIT_FAILED_ROWS}
    code |= {kind.exit_code for kind in (RefusedError, StoppedError, ServerGoneError, InterruptedJobError)}
    assert {str(each) for each in code} | {"1", "143"} == first_column("Exit status")


def test_every_status_that_the_code_gives_is_documented() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "client/topfive/scoring").glob("_*.py"))
    given = set(re.findall(r'(?:failed\(|ReadError\(|Error: )\s*"([a-z-]+)"', sources)) | {"engine-failed"}
    assert len(given) >= 8
    assert given <= first_column("`status` | What happened")
