"""`topfive classify`: images to a server, labels to the terminal."""

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import CycloptsError, Parameter
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from topfive import ApiStatusError, Classification, Client, Failure, ImageSource
from topfive._settings import API_KEY_VARIABLE, URL_VARIABLE

STDIN = "-"


def _refuse_options(_: Any, names: list[str]) -> None:
    """cyclopts lets `-` through only together with everything else that begins with a hyphen."""  # noqa: D403
    for name in names:
        if name.startswith("-") and name != STDIN:
            raise CycloptsError(msg=f"There is no option {name}; for a file of that name write ./{name}")


def classify(
    images: Annotated[
        list[str], Parameter(negative=(), allow_leading_hyphen=True, validator=_refuse_options)
    ],
    /,
    *,
    url: Annotated[str | None, Parameter(env_var=URL_VARIABLE)] = None,
    top_k: Annotated[int | None, Parameter(alias="-k")] = None,
    model: str | None = None,
    version: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    timeout: float | None = None,
    deadline: float | None = None,
    api_key: Annotated[str | None, Parameter(env_var=API_KEY_VARIABLE)] = None,
) -> int:
    """Send images to a server and print their labels, as a table or as JSON.

    Exit status: 0 every image was classified, 1 at least one was not, 2 bad usage, 3 no server answers.
    For a whole folder use `topfive score`.

    Args:
        images: image files; `-` reads one from standard input.
        url: address of the server; http://127.0.0.1:8000 by default.
        top_k: labels for each image; 5 by default.
        model: name of the model; the server's default by default.
        version: version of the model; the newest by default.
        as_json: print one JSON object per image and line instead of a table.
        timeout: seconds to wait for the server in each phase of a request; 30 by default, 5 to connect.
        deadline: seconds for each request with its retries; the server drops the work when they have passed.
        api_key: key that the server asks for; better given as `TOPFIVE_API_KEY`, which other users cannot see.
    """
    console = Console(highlight=False)
    failed = False
    with Client(url, api_key=api_key, timeout=timeout) as client:
        results = client.classify_many(
            _sources(images), top_k=top_k, model=model, version=version, deadline=deadline
        )
        for name, result in zip(images, results, strict=True):
            failed |= isinstance(result, Failure)
            if as_json:
                print(json.dumps(as_record(name, result)), flush=True)  # noqa: T201
            else:
                _print_table(console, name, result)
    return 1 if failed else 0


def _sources(names: list[str]) -> Iterator[ImageSource]:
    for name in names:
        yield sys.stdin.buffer.read() if name == STDIN else name


def as_record(name: str, result: Classification | Failure) -> dict[str, Any]:
    """The result as `--json` prints it."""
    if isinstance(result, Classification):
        return {
            "filename": name,
            "width": result.width,
            "height": result.height,
            "model": result.model,
            "version": result.version,
            "top": [
                {"label": top.label, "class": top.class_index, "probability": top.probability}
                for top in result.top
            ],
        }
    error: dict[str, Any] = {"detail": sentence_of(result)}
    if isinstance(result.error, ApiStatusError):
        error |= {"status": result.error.status, "code": result.error.code}
    return {"filename": name, "error": error}


def sentence_of(failure: Failure) -> str:
    """Why, in one sentence."""
    if isinstance(failure.error, IsADirectoryError):
        return "this is a folder; for all images in it use `topfive score`"
    if isinstance(failure.error, OSError):
        return failure.error.strerror or str(failure.error)
    return str(failure.error)


def _print_table(console: Console, name: str, result: Classification | Failure) -> None:
    heading = _text(name, "bold")
    if isinstance(result, Failure):
        console.print(Text.assemble(heading, ": ", _text(sentence_of(result), "red")), soft_wrap=True)
        return
    details = f"{result.width} x {result.height}, {result.model} version {result.version}"
    console.print(Text.assemble(heading, "  ", _text(details, "dim")), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=24)
    table.add_column(justify="right")
    table.add_column()
    for top in result.top:
        bar = ProgressBar(total=1.0, completed=top.probability, width=20)
        table.add_row(_text("  " + top.label), f"{top.probability:.1%}", bar)
    console.print(table)


def _text(text: str, style: str = "") -> Text:
    """Text for a terminal: what a file name or a server may contain must not drive it."""
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text), style)
