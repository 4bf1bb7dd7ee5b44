"""topfive against the servers that people would otherwise use: one ONNX file, the same JPEGs, the same cores, one run.

    make compare-env                                    # once: an environment for each of them (needs the network)
    topfive export CHECKPOINT --target cuda --out same  # fp32 with ONNX's own LRN operator: what every exporter writes
    python benchmarks/compare.py same/ photographs/ --own models/ --rounds 3 --json compare.json

In a round every server has its turn, alone on the machine: it is started, must give topfive's answers to a few of the
photographs, is warmed up, and is loaded by `wrk` (closed loop; on the same cores) with each number of connections; then
it is ended. One turn is the ceiling: decoding and inference in one process without HTTP. The order turns from round to
round. Absolute rates drift with the machine; a server's ratio to topfive is taken within a round.

The measurements are kept in the JSON file after every turn. Called again with the same file it goes on where it was, so
a long comparison can be made in pieces (`--for-s`), and `--rounds` can be raised later. The services are in `servers/`,
their settings in `contestants.py`. To be able to be started, each needs its environment under `--environments`; who has
none is left out, and said so.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.contestants import Answer, Arena, Contestant, body, contestants, read_answer
from benchmarks.serve import Ceiling, hardware, hot_model, wrk

CEILING = "in process"
"""Name of the turn without a server."""
REFERENCE = "topfive"
"""Whose answers and rates the others' are compared with."""
CHECKED = 5
"""Photographs that every server must answer as topfive does."""
TOLERANCE = 1e-4
"""Most that a probability may differ: the same file on the same processor."""

DISTURBED = 0.05
"""Share of the cores' time that other guests of the machine may take from a turn; more, and its figures are worth nothing."""

Turn = dict[str, Any]
"""One server in one round: `round`, `name`, `ready_s`, `load` by connections, `others`."""


# ---------------------------------------------------------------------- the order, and what came out


def plan(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Round and name of every turn: each round begins with another server, every other one runs backwards."""
    turns = []
    for number in range(rounds):
        shift = number * (len(names) // 3 + 1) % len(names)
        order = [*names[shift:], *names[:shift]]
        turns += [(number, name) for name in (reversed(order) if number % 2 else order)]
    return turns


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One server with one number of connections, over the rounds."""

    rates: tuple[float, ...]
    """Requests a second, one for each round."""
    ratios: tuple[float, ...]
    """To topfive's in the same round."""
    p99_ms: float
    """The rounds' median."""
    failed: int
    """Bad answers and socket errors of all rounds."""
    disturbed: int
    """Rounds in which other guests took more than `DISTURBED` of the cores."""

    def text(self) -> str:
        """For the table: the median rate and, after it, the median of the ratios with their range."""
        ratio = ""
        if self.ratios:
            low, high = min(self.ratios), max(self.ratios)
            ratio = f" ({statistics.median(self.ratios):.2f}; {low:.2f}-{high:.2f})"
        marks = " FAILED" * bool(self.failed) + " DISTURBED" * bool(self.disturbed)
        return f"{statistics.median(self.rates):.0f}{ratio}{marks}"


def summarize(
    turns: Sequence[Turn], names: Sequence[str], connections: Sequence[int]
) -> dict[str, list[Cell]]:
    """A row for each name that had a turn: a cell for each number of connections."""
    rates = {
        (turn["round"], turn["name"], int(c)): load for turn in turns for c, load in turn["load"].items()
    }
    others = {(turn["round"], turn["name"]): turn.get("others", 0.0) for turn in turns}
    rows = {}
    for name in names:
        mine = sorted({turn["round"] for turn in turns if turn["name"] == name})
        if not mine:
            continue
        rows[name] = [
            Cell(
                rates=tuple(rates[number, name, c]["rate"] for number in mine),
                ratios=tuple(
                    rates[number, name, c]["rate"] / rates[number, REFERENCE, c]["rate"]
                    for number in mine
                    if name != REFERENCE and rates.get((number, REFERENCE, c), {"rate": 0})["rate"]
                ),
                p99_ms=statistics.median(rates[number, name, c]["p99_ms"] for number in mine),
                failed=sum(rates[number, name, c]["failed"] for number in mine),
                disturbed=sum(others[number, name] > DISTURBED for number in mine),
            )
            for c in connections
        ]
    return rows


def table(rows: Mapping[str, Sequence[Cell]], connections: Sequence[int]) -> str:
    """Markdown."""
    lines = [
        "| requests/s at | " + " | ".join(map(str, connections)) + " | p99 ms |",
        "|---|" + "---|" * (len(connections) + 1),
    ]
    for name, cells in rows.items():
        p99 = " / ".join("-" if math.isnan(cell.p99_ms) else f"{cell.p99_ms:.0f}" for cell in cells)
        lines.append(f"| {name} | " + " | ".join(cell.text() for cell in cells) + f" | {p99} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- one turn


def stolen_s(stat: Path = Path("/proc/stat")) -> float:
    """Seconds of the cores that the hypervisor gave to other guests since the machine started."""
    steal = int(stat.read_text().split(maxsplit=9)[8])
    return steal / os.sysconf("SC_CLK_TCK")


def ask(url: str, contestant: Contestant, image: bytes) -> Answer:
    """One answer."""
    headers = {"Content-Type": "application/octet-stream"}
    headers |= dict(header.split(": ", 1) for header in contestant.headers)
    request = urllib.request.Request(url + contestant.path, body(contestant.body, image), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        length = response.headers.get("Inference-Header-Content-Length")
        return read_answer(contestant, response.read(), length)


def settle(request: Callable[[], object], *, most: int = 50, alike: float = 1.3) -> None:
    """Ask until an answer takes no longer than the quickest before it, about.

    wrk leaves when its time is up, and what it had asked for last is computed all the same: up to 64 images, which the
    next measurement would have to wait for.
    """
    times: list[float] = []
    for _ in range(most):
        started = time.monotonic()
        request()
        times.append(time.monotonic() - started)
        if len(times) >= 3 and max(times[-2:]) <= alike * min(times):
            return


def difference(mine: Sequence[Answer], theirs: Sequence[Answer]) -> str:
    """Why two servers' answers to the same photographs are not the same; empty when they are."""
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a[0]["label"] != b[0]["label"]:
            return f"photograph {number} is {b[0]['label']!r}, and {a[0]['label']!r} for topfive"
        worst = max(abs(x["probability"] - y["probability"]) for x, y in zip(a, b, strict=True))
        if worst > TOLERANCE:
            return f"probabilities of photograph {number} differ by {worst:.2g} from topfive's"
    return ""


class Comparison:
    """What a run needs; one turn at a time."""

    def __init__(self, options: argparse.Namespace, bodies: Path) -> None:
        self._options = options
        self._arena = Arena(
            model=hot_model(options.models, "cpu", "fp32"),
            models=options.models,
            own=options.own,
            environments=options.environments,
        )
        self._bodies = bodies
        self._images = [path.read_bytes() for path in sorted(options.images.iterdir())]
        everyone = {name: c for name, c in contestants().items() if not options.only or name in options.only}
        self.missing = [name for name, c in everyone.items() if not self._arena.has(c)]
        self.present = {name: c for name, c in everyone.items() if name not in self.missing}
        self.names = [CEILING, *self.present]

    def head(self) -> dict[str, Any]:
        """What the figures hold for."""
        file = self._arena.model.path
        return {
            "hardware": hardware(),
            "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "images": len(self._images),
            "seconds": self._options.seconds,
            "connections": self._options.connections,
            "contestants": {
                name: {"settings": c.settings, "versions": self._arena.versions(c)}
                for name, c in self.present.items()
            },
            "turns": [],
        }

    def reference(self) -> list[Answer]:
        """What topfive answers to the photographs that are checked."""
        return self._checked(contestants()[REFERENCE])

    def turn(self, number: int, name: str, reference: Sequence[Answer]) -> Turn:
        """Start, check, warm up, load, end."""
        shift = number % len(self._options.connections)
        order = [*self._options.connections[shift:], *self._options.connections[:shift]]
        if name == CEILING:
            return {"round": number, "name": name, "ready_s": 0.0, "load": self._ceiling(order)}
        contestant = self.present[name]
        folder = self._folder(contestant.body)
        with self._arena.start(contestant) as served:
            answers = [ask(served.url, contestant, image) for image in self._images[:CHECKED]]
            # topfive's own graphs compute otherwise; their differences are what `topfive export` verifies.
            if contestant.models == "same" and (why := difference(reference, answers)):
                sys.exit(f"{name} does not answer as topfive does, so there is nothing to compare: {why}")
            load: dict[str, Any] = {}
            for seconds in (1, self._options.seconds):  # the first pass warms up
                for connections in order:
                    settle(lambda: ask(served.url, contestant, self._images[0]))
                    url = served.url + contestant.path
                    load[str(connections)] = wrk(url, folder, connections, seconds, contestant.headers)
            for result in load.values():
                result["failed"] = result["bad_status"] + result["socket_errors"]
            return {"round": number, "name": name, "ready_s": served.ready_s, "load": load}

    def _ceiling(self, order: Sequence[int]) -> dict[str, Any]:
        """One image after the other for one connection; for more, the best of some ways to batch."""
        ceiling = Ceiling(self._options.models, self._options.images, "cpu", "fp32")
        try:
            ceiling.measure("one_after_the_other", seconds=1)
            load = {}
            for connections in order:
                if connections == 1:
                    rate = ceiling.measure("one_after_the_other", seconds=self._options.seconds)
                else:
                    batch = min(32, connections)
                    rate = max(
                        ceiling.measure(
                            "batched", seconds=self._options.seconds / 2, batch=batch, overlap=overlap
                        )
                        for overlap in (False, True)
                    )
                load[str(connections)] = {"rate": rate, "p99_ms": math.nan, "failed": 0}
            return load
        finally:
            ceiling.end()

    def _checked(self, contestant: Contestant) -> list[Answer]:
        with self._arena.start(contestant) as served:
            return [ask(served.url, contestant, image) for image in self._images[:CHECKED]]

    def _folder(self, kind: str) -> Path:
        """The requests' bodies as files, for wrk."""
        folder = self._bodies / kind
        if not folder.exists():
            folder.mkdir()
            for number, image in enumerate(self._images):
                (folder / f"{number:05}").write_bytes(body(kind, image))
        return folder


# ---------------------------------------------------------------------- the run


def resume(path: Path | None, head: dict[str, Any]) -> dict[str, Any]:
    """The report so far, or a new one.

    Raises:
        SystemExit: the file holds another comparison, whose figures cannot be put beside these.
    """
    if path is None or not path.exists():
        return head
    report: dict[str, Any] = json.loads(path.read_text())
    for name in ("model_sha256", "images", "seconds", "connections"):
        if report[name] != head[name]:
            sys.exit(
                f"{path} is of another comparison: its {name} is {report[name]}, not {head[name]}; give another file"
            )
    for name, now in head["contestants"].items():
        if report["contestants"].setdefault(name, now) != now:
            sys.exit(f"{path} has {name} with other settings or versions; give another file")
    return report


def run(
    comparison: Comparison, report: dict[str, Any], rounds: int, save: Callable[[], None], until: float
) -> None:
    """The turns that are not in the report yet, as long as the time lasts."""
    done = {(turn["round"], turn["name"]) for turn in report["turns"]}
    longest = 0.0
    reference = report.setdefault("reference", None) or comparison.reference()
    report["reference"] = reference
    for number, name in plan(comparison.names, rounds):
        if (number, name) in done:
            continue
        started = time.monotonic()
        if started + longest > until:
            print("the time is up; call again with the same file to go on", file=sys.stderr)
            return
        others_s = stolen_s()
        turn = comparison.turn(number, name, reference)
        took_s = time.monotonic() - started
        turn["others"] = (stolen_s() - others_s) / took_s / (os.cpu_count() or 1)
        longest = max(longest, took_s)
        report["turns"].append(turn)
        save()
        rates = ", ".join(
            f"{c}: {load['rate']:.1f}" for c, load in sorted(turn["load"].items(), key=lambda x: int(x[0]))
        )
        print(f"round {number + 1}, {name} (ready after {turn['ready_s']:.1f} s): {rates}", flush=True)
        if turn["others"] > DISTURBED:
            print(
                f"  other guests took {turn['others']:.0%} of the cores meanwhile: repeat it on a quiet machine",
                flush=True,
            )


@contextlib.contextmanager
def ending_servers_when_told_to() -> Iterator[None]:
    """A SIGTERM unwinds the stack, as Ctrl-C does: no server is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository with the one file that all serve")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument(
        "--own", type=Path, help="model repository with topfive's own graphs, for two more rows"
    )
    parser.add_argument(
        "--environments", type=Path, default=Path(".venv-compare"), help="of the other servers"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(contestants()),
        metavar="NAME",
        help="only these (topfive must be one)",
    )
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement (whole: wrk)")
    parser.add_argument(
        "--for-s", type=float, default=math.inf, help="begin no turn that would end later than this"
    )
    parser.add_argument(
        "--json", type=Path, help="every measurement; a file of an earlier call is gone on with"
    )
    options = parser.parse_args()
    until = time.monotonic() + options.for_s
    if shutil.which("wrk") is None:
        sys.exit("this needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as bodies, ending_servers_when_told_to():
        comparison = Comparison(options, Path(bodies))
        if comparison.missing:
            print(
                f"not installed under {options.environments}, left out: {', '.join(comparison.missing)}",
                file=sys.stderr,
            )
        report = resume(options.json, comparison.head())

        def save() -> None:
            if options.json:
                temporary = options.json.with_suffix(".tmp")
                temporary.write_text(json.dumps(report, indent=1) + "\n")
                temporary.replace(options.json)

        run(comparison, report, options.rounds, save, until)
    h = report["hardware"]
    print(f"\n{h['cpu']}, {h['cores']} cores; Python {h['python']}, ONNX Runtime {h['onnxruntime-gpu']}; "
          f"n = {len({turn['round'] for turn in report['turns']})} rounds of {options.seconds} s; "
          "median (ratio to topfive in the same round: median; range)\n")  # fmt: skip
    print(table(summarize(report["turns"], comparison.names, options.connections), options.connections))


if __name__ == "__main__":
    main()
