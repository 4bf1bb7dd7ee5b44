"""Everything there is to know of a GPU behind this server, in one command; `--small` does the same on a CPU in seconds.

    python benchmarks/gpu.py models/ photographs/ --json gpu.json

1. Images a second from decoded squares through the engine (copies to the device and back included), by batch size, for
   each graph the device can run, with and without CUDA graphs (and TensorRT with `--tensorrt`); one batch at a time, and
   two under way, whose quotient is what the overlap of copy and compute gains. On an H200 the design aims at 545,000
   images a second at 1024 and 28 microseconds for a lone image; the last columns are the shares of these.
2. Requests a second from JPEGs over HTTP with 1, 2, 4 ... processes (`wrk`), against what one process makes.

Settings take turns within each round; medians over the rounds. Only ratios within one run compare.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from topfive.errors import TopfiveError
from topfive_server.devices import Device, cores, resolve, resolve_all
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import GraphKind, ModelVersion, Repository
from topfive_server.session import RuntimeOptions

if TYPE_CHECKING:
    from concurrent.futures import Future

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TARGET_AT: Final = 1024
TARGET_RATE: Final = 545_000
"""Images a second at `TARGET_AT` on an H200."""
TARGET_LONE_S: Final = 28e-6
"""Seconds of a lone image."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the network."""

    name: str
    model: ModelVersion
    options: RuntimeOptions


def settings(models: Path, device: Device, batches: Sequence[int], *, tensorrt: bool) -> list[Setting]:
    """The newest version of each graph of squares that was made for the device, in each way that it has to run."""
    newest: dict[str, ModelVersion] = {}
    for found in Repository(models).read_all()[0]:
        if found.kind is GraphKind.HOT and int(found.version) >= int(newest.get(found.name, found).version):
            newest[found.name] = found
    largest = max(batches)
    ways = {"": RuntimeOptions(max_batch=largest)}
    if device.kind == "cuda":
        ways = {
            "graphs": RuntimeOptions(max_batch=largest),
            "no graphs": RuntimeOptions(max_batch=largest, cuda_graphs=False),
        }
        if tensorrt:
            ways["tensorrt"] = RuntimeOptions(max_batch=largest, tensorrt=True)
    unsuited = {"int8"} if device.kind == "cuda" else {"fp16"}
    return [
        Setting(name=f"{model.name} {way}".strip(), model=model, options=options)
        for model in newest.values()
        if model.precision not in unsuited
        for way, options in ways.items()
    ]


def rate(engine: OnnxEngine, images: list[NDArray[np.uint8]], seconds: float, *, under_way: int) -> float:
    """Images a second with so many batches under way."""
    computing: deque[Future[Any]] = deque()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count == 0:
        computing.append(engine.submit(images))
        while len(computing) >= under_way:
            computing.popleft().result()
            count += len(images)
    for future in computing:
        future.result()
        count += len(images)
    return count / (time.perf_counter() - start)


def measure_engine(
    setting: Setting, device: Device, batches: Sequence[int], seconds: float
) -> dict[str, Any]:
    """By batch size, one and two batches under way; opened for this, because graphs and engines take memory."""
    engine = OnnxEngine(setting.model, device, setting.options)
    side = setting.model.input_side
    assert side is not None
    try:
        rows = {}
        for batch in batches:
            images = [*np.random.default_rng(batch).integers(0, 256, (batch, side, side, 3), np.uint8)]
            rate(engine, images, 0.0, under_way=2)  # both lanes: buffers, algorithms, graphs
            one = rate(engine, images, seconds, under_way=1)
            two = rate(engine, images, seconds, under_way=2)
            rows[str(batch)] = {"one": one, "two": two}
        return rows
    finally:
        for ended in engine.stop():
            ended.result()


def measure_http(
    models: Path, images: Path, device: str, processes: Sequence[int], options: argparse.Namespace
) -> list[dict[str, float]]:
    """Requests a second by number of processes, in each round."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.process import serving  # noqa: PLC0415  with the next
    from benchmarks.serve import load  # noqa: PLC0415  only here is wrk needed

    flags = ["--device", device, "--max-queue-images", "16384"]
    rounds = []
    for _ in range(options.rounds):
        row = {}
        for count in processes:
            # One server at a time: they would share the GPU's memory and the cores.
            with serving(models, [*flags, "--processes", str(count)]) as served:
                load(served.url, images, options.connections, 1)
                row[str(count)] = load(served.url, images, options.connections, options.seconds)["rate"]
        rounds.append(row)
    return rounds


def doublings(limit: int) -> Iterator[int]:
    """1, 2, 4 ... up to the limit."""
    return itertools.takewhile(lambda count: count <= limit, (2**n for n in itertools.count()))


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each leaf over the rounds."""
    first = rounds[0]
    return {
        key: medians([row[key] for row in rounds])
        if isinstance(first[key], dict)
        else statistics.median(row[key] for row in rounds)
        for key in first
    }


def engine_table(summary: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = ["setting                     batch   images/s  two under way  overlap  share of target"]
    for name, rows in summary.items():
        for batch, row in rows.items():
            share = ""
            if int(batch) == TARGET_AT:
                share = f"{row['two'] / TARGET_RATE:.3f} of {TARGET_RATE:,}/s"
            elif int(batch) == 1:
                share = f"{TARGET_LONE_S * row['one']:.3f} of {TARGET_LONE_S * 1e6:.0f} us"
            lines.append(
                f"{name:<26} {batch:>6} {row['one']:10.1f} {row['two']:14.1f} {row['two'] / row['one']:8.2f}  {share}"
            )
    return lines


def http_table(summary: dict[str, float]) -> list[str]:
    """Lines for people."""
    one = summary["1"]
    return ["processes  requests/s  against one"] + [
        f"{count:>9}  {made:10.1f}  {made / one:11.2f}" for count, made in summary.items()
    ]


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (all GPUs over HTTP) or cuda:N")
    parser.add_argument(
        "--small", action="store_true", help="a few small batches, briefly: to see that it works"
    )
    parser.add_argument(
        "--tensorrt", action="store_true", help="measure TensorRT, too (compiles for minutes)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (whole: wrk)")
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument(
        "--processes", type=int, default=0, help="the most; 0: two for each GPU, or each core"
    )
    parser.add_argument("--no-http", action="store_true", help="the engine alone (needs no wrk)")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    batches: Sequence[int] = BATCHES
    seconds: float = options.seconds
    if options.small:
        batches, seconds = (1, 4), 0.1
        options.rounds, options.seconds, options.connections = 1, 1, 4
    try:
        device, devices = resolve(options.device), resolve_all(options.device)
        ways = settings(options.models, device, batches, tensorrt=options.tensorrt)
        if not ways:
            sys.exit(f"{options.models} holds no graph of squares for {device}")
        rounds = [
            {way.name: measure_engine(way, device, batches, seconds) for way in ways}
            for _ in range(options.rounds)
        ]
    except TopfiveError as error:
        sys.exit(str(error))
    report: dict[str, Any] = {
        "devices": [*map(str, devices)],
        "cores": cores(),
        "onnxruntime-gpu": version("onnxruntime-gpu"),
        "load": os.getloadavg()[0],
        "engine": rounds,
    }
    print(f"{', '.join(report['devices'])}, {cores()} cores, ONNX Runtime {report['onnxruntime-gpu']}; "
          f"n = {options.rounds} rounds, medians")  # fmt: skip
    print("\n".join(engine_table(medians(rounds))), flush=True)
    if not options.no_http:
        most = options.processes or (2 * len(devices) if device.kind == "cuda" else cores())
        report["http"] = measure_http(
            options.models, options.images, options.device, [*doublings(most)], options
        )
        print("\n".join(http_table(medians(report["http"]))))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
