"""How a training run on a processor best shares its cores: one process with all of them, or several with one each.

    python benchmarks/processes.py DATA [--processes 1 2] [--rounds 3] [--train-flags '--width 0.25 --epochs 1']

DATA is what `topfive train` takes. Each way is trained for a few epochs by `topfive train` itself, with the allocator as
topfive sets it and as glibc has it. The ways take turns; printed are the median, the lowest and the highest of the rounds'
pace in the last epoch, and the kernel's share of the processor time (page faults, mostly).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

_GLIBC: Final = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
"""Any setting of one's own keeps topfive's hands off the allocator; this one changes nothing."""


def pace(data: str, flags: list[str], processes: int, environment: dict[str, str]) -> tuple[float, float]:
    """Images per second in the last epoch of one run, and the kernel's share of its processor time."""
    program = str(Path(sys.executable).with_name("topfive"))
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [program, "train", data, "--out", folder, "--processes", str(processes), *flags]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        records = [json.loads(line) for line in (Path(folder) / "train.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    kernel, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return float(steps[-1]["images_per_s"]), kernel / (kernel + user)


def main() -> None:
    """Measure every way in every round, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-flags", default="", help="more flags of `topfive train`: '--width 0.25'")
    arguments = parser.parse_args()
    ways = [
        (processes, allocator, environment)
        for processes in arguments.processes
        for allocator, environment in (("topfive's", {}), ("glibc's", _GLIBC))
    ]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for number in range(arguments.rounds):
        for processes, allocator, environment in ways if number % 2 == 0 else reversed(ways):
            found.setdefault((processes, allocator), []).append(
                pace(arguments.data, arguments.train_flags.split(), processes, environment)
            )
    table = Table("processes", "allocator", "images/s, median (lowest-highest)", "kernel's time")
    for (processes, allocator), rounds in found.items():
        rates = [rate for rate, _ in rounds]
        table.add_row(
            str(processes),
            allocator,
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
            f"{statistics.median(share for _, share in rounds):.1%}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"n = {arguments.rounds} rounds, topfive train {arguments.data} {arguments.train_flags}"
    )


if __name__ == "__main__":
    main()
