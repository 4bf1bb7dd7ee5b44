"""What each decision of the 2012 recipe is worth: the same run with the opposite decision, over several seeds.

    python benchmarks/ablations.py DATA --out DIR [--epochs 20] [--width 0.25] [--seeds 3] [--jobs 2]

DATA is what `topfive train` takes. `--jobs` runs at once share the cores, which on
a CPU is faster than one run over all of them. Runs are kept in DIR: the same command goes on where it stopped,
`--report` only prints. The table has the error on the held-out split in the last epoch, averaged over seeds with the 95 % Wilson
interval of all answers together (n images x seeds), and beside each decision what the paper says it was worth on
ImageNet. The split has a seed of its own, so every run is judged on the same images.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from topfive_training.evaluate import Share, wilson


class Decision(NamedTuple):
    """One decision, turned into its opposite."""

    name: str
    opposite: tuple[str, ...]
    """Arguments of `topfive train`."""
    paper: str
    """Top-1 / top-5 points that the published decision was worth on ImageNet (paper sections 3.3, 3.4, 4.1)."""


DECISIONS = (
    Decision("2012", (), "-"),
    Decision("no response norm", ("--normalization", "none"), "1.4 / 1.2"),
    Decision("no overlap in pooling", ("--overlapping-pooling", "false"), "0.4 / 0.3"),
    Decision("no color noise", ("--color-noise", "0"), "> 1 / -"),
    Decision("std .01 in conv3-5", ("--std-late", "0.01"), "-"),
)


def run_one(arguments: argparse.Namespace, decision: Decision, seed: int) -> None:
    """Train one, or go on with it; a finished run is left alone."""
    out = folder(arguments.out, decision, seed)
    command = [
        "topfive", "train", arguments.data, "--out", str(out), "--seed", str(seed), "--epochs", str(arguments.epochs),
        "--width", str(arguments.width), "--batch-size", str(arguments.batch_size), "--cache", str(arguments.out / "cache"),
        "--processes", str(arguments.processes), *arguments.train_flags.split(), *decision.opposite,
    ]  # fmt: skip
    cores = len(os.sched_getaffinity(0)) // (arguments.jobs * arguments.processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores))}
    if (out / "resume").is_dir():
        command.append("--resume")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "output.txt").open("ab") as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, check=False, env=environment
        ).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}; see {out / 'output.txt'}")


def folder(out: Path, decision: Decision, seed: int) -> Path:
    """Where a run is kept."""
    return out / f"{decision.name.replace(' ', '-')}-{seed}"


def last_epoch(run: Path, epochs: int) -> dict[str, Any] | None:
    """What was measured after the last epoch, or nothing if the run has not come so far."""
    log = run / "train.jsonl"
    if not log.is_file():
        return None
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    done = [record for record in records if record["kind"] == "epoch" and record["epoch"] == epochs]
    return done[-1] if done else None


def error(records: Sequence[dict[str, Any]], key: str) -> Share:
    """The share of wrong answers of all runs together."""
    images = sum(record["val_images"] for record in records)
    right = sum(round(record[key] * record["val_images"]) for record in records)
    return wilson(images - right, images)


def show(share: Share) -> str:
    """In percent."""
    return f"{share.share:.1%} [{share.low:.1%}, {share.high:.1%}]"


def print_table(arguments: argparse.Namespace) -> None:
    """Every decision that has at least one finished run."""
    table = Table(title=f"{arguments.data}, width {arguments.width:g}, {arguments.epochs} epochs")
    for column in (
        "decision",
        "seeds",
        "top-1 error [95 %]",
        "top-5 error [95 %]",
        "seed by seed",
        "paper: worth",
    ):
        table.add_column(column)
    for decision in DECISIONS:
        found = [
            last_epoch(folder(arguments.out, decision, seed), arguments.epochs)
            for seed in range(arguments.seeds)
        ]
        records = [record for record in found if record is not None]
        if records:
            each = " ".join(f"{1 - record['val_top1']:.1%}" for record in records)
            top1, top5 = error(records, "val_top1"), error(records, "val_top5")
            table.add_row(decision.name, str(len(records)), show(top1), show(top5), each, decision.paper)
    console = Console(width=150)
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    """Run what is missing, seed by seed so that an early end leaves whole rows, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--report", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--train-flags", default="", help="more flags of `topfive train`: '--crop 196'")
    arguments = parser.parse_args()
    if not arguments.report:
        with ThreadPoolExecutor(arguments.jobs) as jobs:
            runs = [
                jobs.submit(run_one, arguments, decision, seed)
                for seed in range(arguments.seeds)
                for decision in DECISIONS
                if last_epoch(folder(arguments.out, decision, seed), arguments.epochs) is None
            ]
            for run in runs:
                run.result()
    print_table(arguments)


if __name__ == "__main__":
    main()
