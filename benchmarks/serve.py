"""How close does the server come to what this machine can decode and infer?

Closed-loop load by `wrk` (compiled; it takes its own small share of the same cores) at several numbers of
connections, and between those, in the same run, two ceilings without HTTP, measured in another process:

* one: one image after the other, decoded and inferred with all cores;
* batched: decoded on all cores and inferred in batches, with the best batch size and the best overlap, found first.

Absolute rates drift while other work runs; the ratios, each taken between neighbours in time, hold.

    python benchmarks/serve.py models/ photographs/ --rounds 5 --seconds 4 --json serve.json
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.process import serving

from topfive.allocator import keep_large_buffers
from topfive.preprocessing import decode
from topfive_server.devices import cores, resolve
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import ModelVersion, Repository
from topfive_server.session import RuntimeOptions
from topfive_server.variants import Wanted, choose

LUA = Path(__file__).with_suffix(".lua")
BATCHES = (8, 16, 32, 64)


class InProcess:
    """Decode and infer without HTTP."""

    def __init__(self, version_: ModelVersion, images: Sequence[bytes], device: str) -> None:
        keep_large_buffers()  # as the server does
        self._engine = OnnxEngine(version_, resolve(device), RuntimeOptions(max_batch=max(BATCHES)))
        self._preprocessing = version_.spec.preprocessing
        self._side = version_.input_side
        self._images = itertools.cycle(images)
        self._threads = ThreadPoolExecutor(cores())

    def _decode(self, data: bytes) -> NDArray[np.uint8]:
        return np.asarray(decode(data, self._preprocessing, crop=self._side).image)

    def one_after_the_other(self, seconds: float) -> float:
        """Images a second."""
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            self._engine.submit([self._decode(next(self._images))]).result()
            count += 1
        return count / elapsed

    def batched(self, seconds: float, batch: int, *, overlap: bool) -> float:
        """Images a second; with `overlap` the next batch is decoded while the engine computes."""
        computing: deque[Future[Any]] = deque()
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            images = list(self._threads.map(self._decode, itertools.islice(self._images, batch)))
            computing.append(self._engine.submit(images))
            count += batch
            while len(computing) > int(overlap):
                computing.popleft().result()
        while computing:
            computing.popleft().result()
        return count / (time.perf_counter() - start if overlap else elapsed)

    def serve(self, pipe: Connection) -> None:
        """Measure what the parent asks for."""
        while (request := pipe.recv()) is not None:
            name, arguments = request
            pipe.send(getattr(self, name)(**arguments))


def _ceiling_process(pipe: Connection, models: Path, folder: Path, device: str, variant: Wanted) -> None:
    InProcess(
        hot_model(models, device, variant), [p.read_bytes() for p in sorted(folder.iterdir())], device
    ).serve(pipe)


class Ceiling:
    """The in-process measurements, in a process of their own so that they share nothing with the load generator."""

    def __init__(self, models: Path, folder: Path, device: str, variant: Wanted) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(
            target=_ceiling_process, args=(theirs, models, folder, device, variant), daemon=True
        ).start()
        self.best: dict[str, Any] = {}

    def measure(self, name: str, **arguments: Any) -> float:
        """Images a second."""
        self._pipe.send((name, arguments))
        rate: float = self._pipe.recv()
        return rate

    def end(self) -> None:
        """Let the process go."""
        self._pipe.send(None)

    def calibrate(self, seconds: float) -> dict[str, float]:
        """Find the best batch size and overlap; three interleaved passes, medians compared."""
        self.measure("one_after_the_other", seconds=seconds)
        rates: dict[tuple[int, bool], list[float]] = {}
        for _ in range(3):
            for batch, overlap in itertools.product(BATCHES, (False, True)):
                rate = self.measure("batched", seconds=seconds, batch=batch, overlap=overlap)
                rates.setdefault((batch, overlap), []).append(rate)
        medians = {key: statistics.median(values) for key, values in rates.items()}
        batch, overlap = max(medians, key=medians.__getitem__)
        self.best = {"batch": batch, "overlap": overlap}
        return {f"{b}{' overlapped' if o else ''}": round(rate, 1) for (b, o), rate in medians.items()}


def hot_model(models: Path, device: str, variant: Wanted) -> ModelVersion:
    """The model that the server answers with by default, in the same graph."""
    choices = choose(Repository(models).read_all()[0], resolve(device), variant).choices
    first = choices[0].version.name
    return [choice.version for choice in choices if choice.version.name == first][-1]


def wrk(
    url: str, folder: Path, connections: int, seconds: int, headers: Sequence[str] = ()
) -> dict[str, Any]:
    """One run of wrk, which POSTs the folder's files in turn; `headers` are `Name: value`."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(LUA)]
    output = subprocess.run(
        [*command, url, "--", str(folder), *headers], check=True, capture_output=True, text=True
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    result["rate"] = result["requests"] / result["seconds"]
    if result["bad_status"] or result["socket_errors"]:
        print(
            f"  {result['bad_status']} bad answers, {result['socket_errors']} socket errors", file=sys.stderr
        )
    return result


def load(url: str, folder: Path, connections: int, seconds: int) -> dict[str, Any]:
    """One run of wrk, with the batches that the server saw."""
    before = batches(url)
    result = wrk(f"{url}/v1/classify", folder, connections, seconds)
    count, images = (after - earlier for after, earlier in zip(batches(url), before, strict=True))
    result["mean_batch"] = images / count if count else 0.0
    return result


def batches(url: str) -> tuple[float, float]:
    """How many batches the server has run, and how many images were in them."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    count, images = (
        sum(float(v) for v in re.findall(rf"^topfive_batch_images_{name}\{{.*\}} (\S+)$", text, re.MULTILINE))
        for name in ("count", "sum")
    )
    return count, images


def hardware() -> dict[str, Any]:
    """What the figures hold for."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("topfive", "onnxruntime-gpu", "pillow", "numpy", "uvicorn", "uvloop", "httptools")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "wrk": subprocess.run(["wrk", "-v"], check=False, capture_output=True, text=True)
        .stdout.split("[")[0]
        .strip(),
        "load_before": os.getloadavg()[0],
        **{name: version(name) for name in packages},
    }


def main() -> None:
    """Calibrate, run the rounds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement (whole: wrk)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", default="fp32", choices=["auto", "fp32", "fp16", "int8"])
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--serve-flags", default="", help="more flags of `topfive serve`")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("this needs wrk: apt-get install wrk")
    report: dict[str, Any] = {
        "hardware": hardware(),
        "variant": options.variant,
        "images": len(list(options.images.iterdir())),
    }
    ceiling = Ceiling(options.models, options.images, options.device, options.variant)
    report["calibration"] = ceiling.calibrate(options.seconds / 2)
    report["best"] = ceiling.best
    print(f"in process, images/s by batch size: {report['calibration']}")
    rounds: list[dict[str, Any]] = []
    flags = ["--device", options.device, "--variant", options.variant, *options.serve_flags.split()]
    with serving(options.models, flags, log_requests=True) as served:  # as it is without any flag
        url = served.url
        for connections in options.connections:
            load(url, options.images, connections, 1)  # warm
        for number in range(options.rounds):
            rounds.append(one_round(ceiling, url, options))
            print(f"round {number + 1}: {json.dumps(rounds[-1]['ratio'])}", flush=True)
    ceiling.end()
    report["rounds"] = rounds
    report["summary"] = summarize(rounds, options.connections)
    print_table(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def one_round(ceiling: Ceiling, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Each load between two measurements of its ceiling."""
    result: dict[str, Any] = {"ratio": {}}
    for connections in options.connections:
        name, arguments = ("one_after_the_other", {}) if connections == 1 else ("batched", ceiling.best)
        before = ceiling.measure(name, seconds=options.seconds / 2, **arguments)
        measured = load(url, options.images, connections, options.seconds)
        after = ceiling.measure(name, seconds=options.seconds / 2, **arguments)
        measured["ceiling"] = [before, after]
        result[str(connections)] = measured
        result["ratio"][str(connections)] = round(measured["rate"] / ((before + after) / 2), 3)
    return result


def summarize(rounds: Sequence[dict[str, Any]], connections: Sequence[int]) -> dict[str, Any]:
    """Medians over the rounds."""
    summary = {}
    for c in map(str, connections):
        columns = ("rate", "p50_ms", "p99_ms", "mean_batch")
        row = {name: statistics.median(r[c][name] for r in rounds) for name in columns}
        row["ceiling"] = statistics.median(statistics.mean(r[c]["ceiling"]) for r in rounds)
        ratios = [r["ratio"][c] for r in rounds]
        row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        row["p99_over_p50"] = statistics.median(r[c]["p99_ms"] / r[c]["p50_ms"] for r in rounds)
        summary[c] = row
    return summary


def print_table(report: dict[str, Any]) -> None:
    """For people."""
    h = report["hardware"]
    print(f"\n{h['cpu']}, {h['cores']} cores; load before {h['load_before']:.2f}; Python {h['python']}, "
          f"ONNX Runtime {h['onnxruntime-gpu']}, uvicorn {h['uvicorn']}; n = {len(report['rounds'])} rounds, medians")  # fmt: skip
    print("connections  requests/s  in process  ratio (low-high)     p50 ms   p99 ms  p99/p50  batch")
    for connections, row in report["summary"].items():
        print(
            f"{connections:>11}  {row['rate']:10.1f}  {row['ceiling']:10.1f}  {row['ratio']:.3f} "
            f"({row['ratio_low']:.3f}-{row['ratio_high']:.3f})  {row['p50_ms']:7.1f}  {row['p99_ms']:7.1f}  "
            f"{row['p99_over_p50']:7.2f}  {row['mean_batch']:5.1f}"
        )


if __name__ == "__main__":
    main()
