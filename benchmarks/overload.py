"""What becomes of the answers when twice as much comes as the server can take?

In one run against a `topfive serve` of its own:

1. a closed loop of 32 connections finds the best rate, a search the highest open-loop rate that keeps a p99 (by
   default ten times what a lone request takes) without a refusal: the *sustainable* rate;
2. 50 % and 80 % of it give the quiet latencies, against which the rest is judged;
3. 200 % of it for a minute, then 50 % again, on the heels of it: when is everything as before?
4. the same with `X-Timeout-Ms`, one and a half times the p99 at 80 %, as clients send who want an answer in time or not
   at all (`--timeout-ms 0`: without this part). Then the closed loop once more.

The load generator shares the machine with the server; `load_generator.py` says why it takes little of it, the report how
little. Figures on a machine that does something else besides are worth little.

    python benchmarks/overload.py models/ photographs/ --json overload.json --plot overload.png
"""

import argparse
import asyncio
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from matplotlib.figure import Figure

from topfive.loadtest import LoadTestConfig, Point, best_rate, closed_loop, open_loop, search

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.load_generator import REQUEST_TIMEOUT_S, Generator, Phase, Record
from benchmarks.process import MemoryWatch, Served, growth_mib_per_s, serving
from benchmarks.serve import hardware

CONNECTIONS = 32
"""Of the closed loop that finds the best rate."""
ONSET_S = 5.0
"""After which an overload is no burst any more, and its latencies are judged by themselves, too."""
BUCKET_S = 0.5
"""Resolution at which the return to normal is seen."""


# ---------------------------------------------------------------------- the judgement


def seconds_until_normal(after: Phase, before: Phase) -> float:
    """Seconds into `after` until it was like `before`, the same load undisturbed.

    Not normal is half a second in which somebody was refused, or in which the median was above the quiet p90: a single
    slow answer is normal, half of them are not.
    """
    usual_ms = before.accepted_ms(0.9)
    buckets: dict[int, list[Record]] = {}
    for record in after.records:
        buckets.setdefault(int(record.due_s / BUCKET_S), []).append(record)
    disturbed = [
        number
        for number, records in buckets.items()
        if any(r.status != 200 for r in records)
        or statistics.median(1000 * r.latency_s for r in records) > usual_ms
    ]
    return (max(disturbed) + 1) * BUCKET_S if disturbed else 0.0


def untruthful_retry_after(during: Phase, after: Phase) -> int:
    """Refusals whose Retry-After is missing, no whole number above 0, too long, or (the load gone) too short.

    Too long is more than a second above twice the longest wait of anybody accepted; too short when somebody who came
    later than that after the overload's end was refused all the same.
    """
    accepted_s = during.accepted_ms(1.0) / 1000
    longest = math.ceil(2 * accepted_s) + 1
    refused = [r for r in during.records if r.status == 429]
    values = [int(r.retry_after) if r.retry_after and r.retry_after.isdigit() else 0 for r in refused]
    announced = max(values, default=0)
    too_short = sum(r.status == 429 and r.due_s > announced for r in after.records)
    return sum(not 1 <= value <= longest for value in values) + too_short


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A figure and the bound that it has to keep."""

    name: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether it holds; not a number does not."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def line(self) -> str:
        """For people."""
        sign = ">=" if self.at_least else "<="
        return f"{'PASS' if self.kept else 'FAIL'}  {self.name}: {self.measured:.3g} (limit {sign} {self.bound:g})"


def judge(phases: Sequence[Phase], best: float, memory: Sequence[tuple[float, float]]) -> list[Limit]:
    """All limits; phases at 50 %, 80 %, 200 % and 50 % again, and the memory during the overload."""
    half, eighty, double, after = phases
    counts = double.statuses
    growth = growth_mib_per_s(memory) * 60 / statistics.median(mib for _, mib in memory)
    other = sum(count for status, count in counts.items() if status not in {200, 429, 504})
    return [
        Limit(
            name="accepted p99 at 200 % / p99 at 80 %",
            measured=double.accepted_ms(0.99) / eighty.accepted_ms(0.99),
            bound=2.0,
        ),
        Limit(
            name=f"the same, without the first {ONSET_S:g} s",
            measured=double.later(ONSET_S).accepted_ms(0.99) / eighty.accepted_ms(0.99),
            bound=2.0,
        ),
        Limit(name="goodput at 200 % / best", measured=double.goodput / best, bound=0.9, at_least=True),
        Limit(name="memory growth per minute at 200 %, share", measured=growth, bound=0.03),
        Limit(name="answers other than 200, 429 and 504", measured=other, bound=0),
        Limit(
            name="accepted and then too late (504), share",
            measured=counts.get(504, 0) / max(1, len(double.records) - counts.get(429, 0)),
            bound=0.05,
        ),
        Limit(name="untruthful Retry-After", measured=untruthful_retry_after(double, after), bound=0),
        Limit(name="seconds until normal", measured=seconds_until_normal(after, half), bound=2.0),
    ]


# ---------------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class Overload:
    """Too much for a while, and then half of what can be sustained."""

    during: Phase
    after: Phase
    memory: Sequence[tuple[float, float]]
    """(monotonic seconds, MiB)"""
    cpu: float
    """Cores that the server used."""


async def overload(
    served: Served, generator: Generator, rate: float, seconds: float, timeout_ms: int
) -> Overload:
    """Twice the sustainable rate, and half of it at once after that."""
    suffix = f", {timeout_ms} ms" if timeout_ms else ""
    cpu_s = served.cpu_s()
    with MemoryWatch(served, 0.5) as memory:
        during = asyncio.create_task(generator.phase(f"200 %{suffix}", 2 * rate, seconds, timeout_ms))
        await asyncio.sleep(seconds)
    cpu_s = served.cpu_s() - cpu_s
    # Not after the last answer: what the overload has left behind is what is to be seen.
    after = await generator.phase(f"50 % again{suffix}", 0.5 * rate, seconds / 6, timeout_ms)
    return Overload(during=await during, after=after, memory=memory.samples, cpu=cpu_s / seconds)


async def measure(served: Served, images: Sequence[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """All steps; the report."""
    generator = Generator(served.url, images)
    step = LoadTestConfig(duration_s=options.step_seconds, timeout_s=REQUEST_TIMEOUT_S)
    await closed_loop(generator.ask, 4, 2.0)  # warm
    lone = await closed_loop(generator.ask, 1, options.step_seconds)
    best = await closed_loop(generator.ask, CONNECTIONS, options.step_seconds)
    p99_ms = options.p99_ms or 10 * lone.p50_ms
    print(f"a lone request {lone.p50_ms:.1f} ms; {CONNECTIONS} connections {best.rate:.1f} requests/s")
    points: list[Point] = []

    async def try_rate(rate: float) -> Point:
        point = await open_loop(generator.ask, rate, step)
        if not point.keeps(p99_ms):  # once more: what else the machine does is no limit of the server's
            point = min(point, await open_loop(generator.ask, rate, step), key=lambda p: p.p99_ms)
        points.append(point)
        print(f"  {rate:7.1f}/s: p99 {point.p99_ms:7.1f} ms {point.errors or ''}", flush=True)
        return point

    await search(try_rate, best.rate, p99_ms)
    found = best_rate(points, p99_ms)
    if found is None:
        raise SystemExit(f"no rate keeps a p99 of {p99_ms:.0f} ms; give a longer one with --p99-ms")
    rate = found.asked
    print(f"sustainable: {rate:.1f}/s with p99 within {p99_ms:.0f} ms")
    half = await generator.phase("50 %", 0.5 * rate, options.seconds / 6)
    eighty = await generator.phase("80 %", 0.8 * rate, options.seconds / 3)
    timeout_ms = options.timeout_ms
    if timeout_ms is None:
        timeout_ms = math.ceil(1.5 * eighty.accepted_ms(0.99))
    overloads = [await overload(served, generator, rate, options.seconds, 0)]
    if timeout_ms:
        overloads.append(await overload(served, generator, rate, options.seconds, timeout_ms))
    again = await closed_loop(generator.ask, CONNECTIONS, options.step_seconds)
    generator.close()
    # A machine's speed drifts: the best is the mean of before and after.
    best_of_both = (best.rate + again.rate) / 2
    limits = [
        {**asdict(limit), "kept": limit.kept, "phase": o.during.name}
        for o in overloads
        for limit in judge([half, eighty, o.during, o.after], best_of_both, o.memory)
    ]
    phases = [half, eighty, *(phase for o in overloads for phase in (o.during, o.after))]
    if 2 * rate < best.rate:
        print("the search was disturbed: twice the sustainable rate is below the best, which is no overload")
    return {
        "lone_p50_ms": lone.p50_ms,
        "best": [best.rate, again.rate],
        "p99_bound_ms": p99_ms,
        "sustainable": rate,
        "search": [asdict(point) for point in points],
        "phases": [phase.row() for phase in phases],
        "server_cpu_at_200": {o.during.name: o.cpu for o in overloads},
        "memory_mib": {
            o.during.name: [(round(at - o.memory[0][0], 1), round(mib, 1)) for at, mib in o.memory]
            for o in overloads
        },
        "limits": limits,
        "timeline": {p.name: [(r.due_s, r.latency_s, r.status) for r in p.records] for p in phases},
    }


def print_report(report: dict[str, Any]) -> None:
    """For people."""
    h = report["hardware"]
    print(f"\n{h['cpu']}, {h['cores']} cores; load before {h['load_before']:.2f}; Python {h['python']}, ONNX Runtime "
          f"{h['onnxruntime-gpu']}, uvicorn {h['uvicorn']}, topfive {h['topfive']}; n = 1 run, {report['images']} images")  # fmt: skip
    print(f"closed loop of {CONNECTIONS} before and after: {report['best'][0]:.1f} and {report['best'][1]:.1f} requests/s; "
          f"sustainable {report['sustainable']:.1f}")  # fmt: skip
    print(
        f"{'phase':<19}{'rate/s':>8}{'good/s':>8}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}{'lag ms':>8}{'gen. cores':>12}  n, statuses, Retry-After"
    )
    for row in report["phases"]:
        print(f"{row['phase']:<19}{row['rate']:>8}{row['goodput']:>8}{row['p50_ms']:>8}{row['p99_ms']:>8}{row['max_ms']:>8}"
              f"{row['lag_p99_ms']:>8}{row['generator_cpu']:>12}  {sum(row['statuses'].values())}, {row['statuses']}, {row['retry_after'] or '-'}")  # fmt: skip
    for name, cpu in report["server_cpu_at_200"].items():
        print(f"at {name} the server used {cpu:.2f} cores")


def draw(report: dict[str, Any], path: Path) -> None:
    """A picture of the whole: latencies, what became of the requests, memory."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    start, eighty = 0.0, report["phases"][1]["p99_ms"]
    for number, row in enumerate(report["phases"]):
        timeline = report["timeline"][row["phase"]]
        good = [(start + due, 1000 * wait) for due, wait, status in timeline if status == 200]
        late = [(start + due, 1000 * wait) for due, wait, status in timeline if status not in {200, 429}]
        top.plot(*zip(*good, strict=True), ".", markersize=2, color="tab:blue")
        if late:
            top.plot(*zip(*late, strict=True), "x", markersize=4, color="tab:red")
        for status, color in ((200, "tab:blue"), (429, "tab:orange")):
            counts = Counter(int(due) for due, _, each in timeline if each == status)
            seconds = range(int(row["seconds"]))
            middle.step([start + s for s in seconds], [counts[s] for s in seconds], where="post", color=color)
        height = 0.98 - 0.06 * (number % 2)  # the names of short phases are wider than they
        top.annotate(row["phase"], (start, height), xycoords=("data", "axes fraction"), va="top", fontsize=8)
        if memory := report["memory_mib"].get(row["phase"]):
            bottom.plot([start + at for at, _ in memory], [mib for _, mib in memory], color="tab:blue")
        start += row["seconds"]
        for axes in (top, middle, bottom):
            axes.axvline(start, color="lightgray", linewidth=0.8)
    top.axhline(2 * eighty, color="tab:red", linestyle=":", label="2 x p99 at 80 %")
    top.set(ylabel="latency of the accepted, ms", ylim=(0, 1.2 * top.get_ylim()[1]))
    top.legend(loc="lower right", bbox_to_anchor=(1, 1))
    middle.plot([], [], color="tab:blue", label="classified")
    middle.plot([], [], color="tab:orange", label="refused (429)")
    middle.legend(loc="upper right")
    middle.set(ylabel="requests per second", ylim=(0, 1.2 * middle.get_ylim()[1]))
    bottom.set(ylabel="server's memory, MiB", xlabel="seconds", ylim=(0, 1.2 * bottom.get_ylim()[1]))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write; status 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of the overload; 80 %% takes a third, 50 %% a sixth"
    )
    parser.add_argument("--step-seconds", type=float, default=5, help="of each step of the search")
    parser.add_argument("--p99-ms", type=float, help="bound of the sustainable rate (10 lone requests)")
    parser.add_argument("--timeout-ms", type=int, help="X-Timeout-Ms at 200 %% (1.5 x p99 at 80 %%); 0: none")
    parser.add_argument("--serve-flags", default="", help="more flags of `topfive serve`")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="write a picture here (PNG)")
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(options.images.iterdir()) if path.is_file()]
    report: dict[str, Any] = {"hardware": hardware(), "images": len(images), "flags": options.serve_flags}
    with serving(options.models, options.serve_flags.split()) as served:
        report |= uvloop.run(measure(served, images, options))
    print_report(report)
    for limit in report["limits"]:
        print(f"{limit['phase']:<17}", end="")
        print(Limit(**{name: limit[name] for name in ("name", "measured", "bound", "at_least")}).line())
    if options.plot:
        draw(report, options.plot)
    if options.json:
        options.json.write_text(json.dumps(report) + "\n")
    sys.exit(0 if all(limit["kept"] for limit in report["limits"]) else 1)


if __name__ == "__main__":
    main()
