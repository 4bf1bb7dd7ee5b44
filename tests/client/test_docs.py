"""docs/cli.md and docs/sdk.md against the code."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from tests.client.cli_reference import reference, written
from tests.client.fake_server import FakeServer, jpeg

import topfive
from topfive import cli
from topfive.cli._commands import COMMANDS

SDK = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text(encoding="utf-8")
CLI, REFERENCE = written()


def test_the_reference_has_every_command_and_option_as_it_is_now() -> None:
    assert reference() == REFERENCE, (
        "docs/cli.md is behind: run `python -m tests.client.cli_reference` and read what it changed"
    )
    for command in COMMANDS:
        assert f"### topfive {command.name}\n" in REFERENCE
    assert "[ARGS" not in REFERENCE  # cyclopts' word for what has names


def test_every_exit_status_and_variable_is_explained() -> None:
    statuses = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    statuses |= {getattr(topfive, name).exit_code for name in topfive.__all__ if name.endswith("Error")}
    for status in statuses:
        assert f"\n| {status} | " in CLI
    for variable in ("TOPFIVE_URL", "TOPFIVE_API_KEY", "TOPFIVE_CONFIG", "TOPFIVE_DEBUG"):
        assert f"`{variable}" in CLI


def test_every_extra_that_a_command_needs_is_in_the_list() -> None:
    for extra in {command.extra for command in COMMANDS if command.extra}:
        assert f"pip install '.[{extra}]'" in CLI


def test_every_public_name_is_in_the_documentation() -> None:
    for name in topfive.__all__:
        if name not in {"__version__", "ImageSource", "Label"}:
            assert name in SDK, f"docs/sdk.md does not mention {name}"


@pytest.mark.parametrize("kind", [topfive.RetryPolicy, topfive.BatchLimits])
def test_every_field_is_documented_with_its_default(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        default = "8 MiB" if field.name == "total_bytes" else f"{field.default:g}"
        assert f"| `{field.name}` | {default} | " in SDK


@pytest.mark.parametrize("client", [topfive.Client, topfive.AsyncClient])
def test_every_argument_is_documented(client: Any) -> None:
    functions = [client.__init__, client.classify, client.classify_many]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    for name in names - {"self", "image", "images"}:
        assert re.search(rf"^\|[^|]*`{name}`", SDK, re.MULTILINE), f"docs/sdk.md does not explain {name}"
    for name in (n for n in vars(client) if not n.startswith("_")):
        assert name in SDK or name in {"reset", "close", "aclose"}


def test_every_error_is_documented_with_the_statuses_it_stands_for() -> None:
    for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504):
        name = topfive.errors.class_of_status(status).__name__
        assert re.search(rf"^\| `{name}` \| [^|]*\b{status}\b", SDK, re.MULTILINE)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", SDK, re.DOTALL)


def test_the_examples_run(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOPFIVE_URL", server.url)
    (tmp_path / "photos").mkdir()
    for name in ("cat.jpg", "dog.jpg", "photos/a.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    examples = blocks()
    assert len(examples) == 5
    for example in examples:
        exec(example.replace("http://127.0.0.1:8000", server.url), {})
    assert "photos/a.jpg" in capsys.readouterr().out
    sent = [request.headers.get("traceparent") for request in server.requests]
    assert [header[:5] for header in sent if header] == ["00-0a"]  # the one example that sets it
