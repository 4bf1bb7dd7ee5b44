"""The three formats of results: JSON lines, CSV and Parquet, with the same columns and the same content."""

import csv
import importlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from topfive.scoring._errors import RefusedError
from topfive.scoring._rows import Row, columns, to_line

SUFFIXES: Final = (".jsonl", ".csv", ".parquet")
"""Endings of `--output`; each is a format."""
_ROW_GROUP: Final = 50_000
"""Rows of a Parquet row group: fixed, so that the same rows make the same file."""


def check_format(output: Path) -> None:
    """Refuse an output that could not be written at the end of the night.

    Raises:
        RefusedError: an unknown ending.
        ModuleNotFoundError: Parquet without pyarrow, which is in the `scoring` extra.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise RefusedError(
            f"--output is {output}; it must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    if output.suffix.lower() == ".parquet":
        importlib.import_module("pyarrow.parquet")


def write_table(path: Path, rows: Iterable[Row], *, suffix: str, top_k: int) -> None:
    """Write `rows` to `path` in the format of `suffix`, holding no more than a row group of them.

    Raises:
        OSError: the disk is full, and the like; `path` may be left half-written.
    """
    writer = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}[suffix.lower()]
    writer(path, iter(rows), top_k)


def _write_jsonl(path: Path, rows: Iterator[Row], top_k: int) -> None:  # noqa: ARG001  one signature for all
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(map(to_line, rows))


def _write_csv(path: Path, rows: Iterator[Row], top_k: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns(top_k)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: Iterator[Row], top_k: int) -> None:
    parquet, pyarrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    types = {str: pyarrow.string(), int: pyarrow.int32(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns(top_k).items()])
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
