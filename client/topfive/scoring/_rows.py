"""A row of the results: what is known of one file, and its column names and types.

Rows are flat and the same in every format, so that a table of a million of them loads anywhere. The file name is
made valid UTF-8 (`display_path`), because neither Parquet nor CSV can hold anything else.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

Cell: TypeAlias = str | int | float | None
Row: TypeAlias = dict[str, Cell]

OK: Final = "ok"
"""Status of a file that was classified; any other status is the code of what went wrong."""

ENGINE_FAILED: Final = "engine-failed"
"""Status of a file on which the engine failed, here or in the server."""

_LEADING: Final[dict[str, type]] = {
    "path": str,
    "status": str,
    "error": str,
    "model": str,
    "version": str,
    "width": int,
    "height": int,
}

_OF_THE_JOB: Final = frozenset({"sha256", "duplicate"})
"""Cells of saved rows that are not in the results."""


class Label(NamedTuple):
    """One of the most likely classes."""

    label: str
    class_index: int
    probability: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What scoring one file came to."""

    status: str = OK
    """`ok`, or a code: `corrupt-image`, `unsupported-format`, `not-found` … (docs/scoring.md lists them)."""
    error: str | None = None
    """A sentence saying what went wrong; None when `status` is `ok`."""
    width: int | None = None
    """Width of the original, upright, in pixels; None when its header could not be read."""
    height: int | None = None
    """Height of the original, upright, in pixels."""
    top: Sequence[Label] = ()
    """The most likely classes, most likely first."""
    sha256: str | None = None
    """SHA-256 of the file, in hexadecimal, where answers are shared by content."""
    duplicate: bool = False
    """Whether the answer is that of another file with the same bytes."""

    @property
    def ok(self) -> bool:
        """Whether the file was classified."""
        return self.status == OK


def failed(status: str, error: object) -> Outcome:
    """The outcome of a file that could not be classified, on one line."""
    return Outcome(status=status, error=" ".join(str(error).split()) or status)


def columns(top_k: int) -> dict[str, type]:
    """Names and types of the columns, in order, for `top_k` labels a row."""
    return _LEADING | {
        f"{name}_{rank}": kind
        for rank in range(1, top_k + 1)
        for name, kind in (("label", str), ("class", int), ("probability", float))
    }


def make_row(path: str, outcome: Outcome, *, model: str, version: str, top_k: int) -> Row:
    """The row of the file at `path`; with what is known of its content, which is for the job alone (`published`).

    Probabilities keep six significant digits: what float32 arithmetic reproduces whatever the batch size.
    """
    row: Row = dict.fromkeys(columns(top_k))
    row |= {"path": display_path(path), "status": outcome.status, "error": outcome.error}
    row |= {"model": model, "version": version, "width": outcome.width, "height": outcome.height}
    for rank, (label, index, probability) in enumerate(outcome.top[:top_k], start=1):
        row |= {
            f"label_{rank}": label,
            f"class_{rank}": index,
            f"probability_{rank}": float(f"{probability:.6g}"),
        }
    if outcome.sha256 is not None:
        row |= {"sha256": outcome.sha256, "duplicate": outcome.duplicate}
    return row


def outcome_of(row: Row) -> Outcome:
    """What `make_row` made a row of, with its probabilities as they are there."""
    values: dict[str, Any] = dict(row)
    ranks = range(1, 1 + sum(name.startswith("label_") for name in row))
    top = [
        Label(values[f"label_{rank}"], values[f"class_{rank}"], values[f"probability_{rank}"])
        for rank in ranks
        if values[f"label_{rank}"] is not None
    ]
    return Outcome(
        status=values["status"],
        error=values["error"],
        width=values["width"],
        height=values["height"],
        top=top,
        sha256=values.get("sha256"),
        duplicate=values.get("duplicate", False),
    )


def published(row: Row) -> Row:
    """The row as it is in the results."""
    return {name: cell for name, cell in row.items() if name not in _OF_THE_JOB}


def to_line(row: Row) -> str:
    """The row as a line of JSON, newline included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def display_path(path: str) -> str:
    r"""The path as valid UTF-8: bytes of a file name that are not are written `\xNN`."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")
