"""Does the server's memory stay flat over 200,000 requests of all kinds? And how soon is it ready after its start?

`wrk` sends a mix that moves memory about: mostly small pictures of several formats, photographs, a few large ones, and
a quarter that is refused (not an image, truncated, too many pixels, no body), with 4, 32 and 96 connections in turn. The
server's resident memory is sampled each second. After a fifth of the requests it counts: its growth (Theil-Sen slope)
over the rest must stay below 5 % of it, and its peak below 1.25 times its median.

    python benchmarks/memory.py models/ photographs/ --start other_models/ --json memory.json --plot memory.png
"""

import argparse
import io
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.process import MemoryWatch, Served, growth_mib_per_s, serving
from benchmarks.serve import LUA, hardware

CONNECTIONS = (4, 32, 96)
CHUNK_S = 10
"""Seconds for which wrk runs with one number of connections (it cannot count requests, only time)."""
WARM_UP_SHARE = 0.2
"""Share of the requests after which memory counts: allocators have grown to their working size."""
GROWTH_LIMIT = 0.05
"""Most growth over all counted requests, as a share of the median."""
PEAK_LIMIT = 1.25
"""Highest sample after the warm-up, as a multiple of the median."""
START_RUNS = 5
EXPECTED = ("200", "400", "413", "415", "422", "499")
"""Statuses that the mix calls for; 499 are the requests that wrk walks out on when its time is over."""


def small_picture(draw: random.Random, kind: str) -> bytes:
    """A noisy picture of 16 to 300 pixels a side."""
    return _picture(draw, draw.randint(16, 300), draw.randint(16, 300), kind)


def _picture(draw: random.Random, width: int, height: int, kind: str) -> bytes:
    coarse = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def bad_bodies(photograph: bytes) -> list[bytes]:
    """What is no image that could be classified: one for each reason."""
    bomb = bytearray(_picture(random.Random(0), 16, 16, "BMP"))
    bomb[18:26] = (50_000).to_bytes(4, "little") * 2  # width and height, as its header declares them
    return [b"", b"This is no image. " * 40, photograph[: len(photograph) // 2], bytes(bomb)]


def mix(photographs: Sequence[bytes], seed: int = 0) -> list[bytes]:
    """The bodies of 400 requests in random order: 236 small, 56 photographs, 8 large, 100 bad."""
    draw = random.Random(seed)
    kinds = ("JPEG", "JPEG", "PNG", "WEBP", "GIF", "BMP")
    bodies = [small_picture(draw, draw.choice(kinds)) for _ in range(236)]
    bodies += [draw.choice(photographs) for _ in range(56)]
    bodies += [_picture(draw, draw.randint(2000, 4000), draw.randint(1500, 3000), "JPEG") for _ in range(6)]
    bodies += [_picture(draw, 2000, 1500, "PNG"), _picture(draw, 1500, 2000, "WEBP")]
    bodies += list(itertools.islice(itertools.cycle(bad_bodies(photographs[0])), 100))
    draw.shuffle(bodies)
    return bodies


def answered(url: str) -> Counter[str]:
    """Classify requests that the server has answered so far, by status, as its metrics count them."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    counts: Counter[str] = Counter()
    for labels, value in re.findall(r"^topfive_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        if 'route="/v1/classify"' in labels:
            status = re.search(r'status="(\d+)"', labels)
            counts[status[1] if status else "?"] += int(float(value))
    return counts


def bombard(served: Served, folder: Path, requests: int) -> Iterator[tuple[float, int]]:
    """Run wrk until so many requests are answered; yields (monotonic seconds, answered so far)."""
    for connections in itertools.cycle(CONNECTIONS):
        command = ["wrk", "-t1", f"-c{connections}", f"-d{CHUNK_S}s", "--timeout", "60s", "-s", str(LUA)]
        output = subprocess.run(
            [*command, f"{served.url}/v1/classify", "--", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        result = json.loads(output.splitlines()[-1])
        if result["socket_errors"]:
            sys.exit(f"wrk had {result['socket_errors']} socket errors; the server has dropped connections")
        done = sum(answered(served.url).values())
        print(f"  {done:>7} requests, {served.rss_mib():6.0f} MiB ({connections} connections)", flush=True)
        yield time.monotonic(), done
        if done >= requests:
            return


def judge(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Growth and peak of (seconds, MiB) after the warm-up, against their limits."""
    median = statistics.median(mib for _, mib in samples)
    growth = growth_mib_per_s(samples) * (samples[-1][0] - samples[0][0]) / median
    peak = max(mib for _, mib in samples) / median
    return {
        "median_mib": median,
        "growth": growth,
        "growth_kept": growth <= GROWTH_LIMIT,
        "peak": peak,
        "peak_kept": peak <= PEAK_LIMIT,
    }


def start_seconds(models: Path, flags: Sequence[str]) -> list[float]:
    """From the start of the process until it is ready, several times."""
    seconds = []
    for _ in range(START_RUNS):
        with serving(models, flags) as served:
            seconds.append(served.ready_s)
    return seconds


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The load; its report."""
    photographs = [path.read_bytes() for path in sorted(options.images.iterdir()) if path.is_file()]
    flags = options.serve_flags.split()
    with tempfile.TemporaryDirectory() as name, serving(options.models, flags) as served:
        for number, body in enumerate(mix(photographs)):
            (Path(name) / f"{number:04}").write_bytes(body)
        with MemoryWatch(served) as memory:
            started, cpu_s = time.monotonic(), served.cpu_s()
            progress = [(started, 0), *bombard(served, Path(name), options.requests)]
            seconds = progress[-1][0] - started
            cpu_s = served.cpu_s() - cpu_s
        statuses = answered(served.url)
    warm_at = next(at for at, done in progress if done >= WARM_UP_SHARE * options.requests)
    return {
        "requests": progress[-1][1],
        "statuses": dict(sorted(statuses.items())),
        "seconds": seconds,
        "server_cores": cpu_s / seconds,
        "warm_after_s": warm_at - started,
        "progress": [(round(at - started, 1), done) for at, done in progress],
        "memory_mib": [(round(at - started, 1), round(mib, 1)) for at, mib in memory.samples],
        **judge([sample for sample in memory.samples if sample[0] >= warm_at]),
    }


def print_report(report: dict[str, Any]) -> bool:
    """For people; whether all limits were kept."""
    h = report["hardware"]
    print(f"\n{h['cpu']}, {h['cores']} cores; load before {h['load_before']:.2f}; Python {h['python']}, ONNX Runtime "
          f"{h['onnxruntime-gpu']}, topfive {h['topfive']}, {h['wrk']}")  # fmt: skip
    print(f"n = {report['requests']} requests in {report['seconds']:.0f} s, by status {report['statuses']}; "
          f"the server used {report['server_cores']:.2f} cores; memory counts after {report['warm_after_s']:.0f} s, "
          f"median {report['median_mib']:.0f} MiB")  # fmt: skip
    for models, seconds in report["start_s"].items():
        print(f"start to ready, {models}: median {statistics.median(seconds):.2f} s "
              f"({min(seconds):.2f} to {max(seconds):.2f}, n = {len(seconds)})")  # fmt: skip
    unexpected = sum(count for status, count in report["statuses"].items() if status not in EXPECTED)
    lines = (
        ("growth over the counted requests, share", report["growth"], GROWTH_LIMIT, report["growth_kept"]),
        ("peak / median", report["peak"], PEAK_LIMIT, report["peak_kept"]),
        (f"answers other than {', '.join(EXPECTED)}", unexpected, 0, unexpected == 0),
    )
    for name, value, limit, kept in lines:
        print(f"{'PASS' if kept else 'FAIL'}  {name}: {value:.3g} (limit <= {limit:g})")
    return all(kept for *_, kept in lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Memory and requests over time."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*report["memory_mib"], strict=True), color="tab:blue")
    axes.axvline(report["warm_after_s"], color="gray", linestyle=":", label="counted from here")
    axes.set(xlabel="seconds", ylabel="resident memory of the server, MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    requests = axes.twinx()
    requests.plot(*zip(*report["progress"], strict=True), color="tab:orange", linewidth=1)
    requests.set_ylabel("requests answered", color="tab:orange")
    requests.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write; status 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository; a small model makes the requests quick")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument(
        "--start", type=Path, action="append", default=[], help="time the start of these models, too"
    )
    parser.add_argument(
        "--serve-flags",
        default="--max-wait-ms 60000",
        help="more flags of `topfive serve`; by default wrk, which asks again at once when refused, is not",
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="write a picture here (PNG)")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("this needs wrk: apt-get install wrk")
    report: dict[str, Any] = {"hardware": hardware()}
    report["start_s"] = {
        models.name: start_seconds(models, options.serve_flags.split())
        for models in (options.models, *options.start)
    }
    report |= run(options)
    kept = print_report(report)
    if options.plot:
        draw(report, options.plot)
    if options.json:
        options.json.write_text(json.dumps(report) + "\n")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
