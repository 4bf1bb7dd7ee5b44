"""Which way of computing serves AlexNet best on this CPU? Latency of one image, and images a second in batches.

"As served" computes pieces of a batch (`topfive_server.network`); all others are ONNX Runtime's settings for the whole graph.

Every setting is measured in every round, one after the other, so that a slow minute hits all alike; medians over the
rounds. The last column decodes photographs on all cores at the same time, as a server does: threads that spin while
nothing computes take cores from the decoders there, which a measurement of the network alone does not show.

    python benchmarks/engine.py models/ photographs/ --rounds 7
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from topfive.preprocessing import decode
from topfive_server.devices import Device, cores
from topfive_server.lanes import INPUT, OUTPUTS
from topfive_server.network import open_network
from topfive_server.repository import GraphKind, ModelVersion, Repository
from topfive_server.session import RuntimeOptions, session_options

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DECODED_WITH = 16
"""Batch size of the column with decoding."""

Run = Callable[[NDArray[np.uint8]], Any]


def settings(model: ModelVersion) -> dict[str, Run]:
    """The ways to run a batch that are compared."""

    def opened(options: onnxruntime.SessionOptions) -> Run:
        session = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(OUTPUTS, {INPUT: images})

    def plain(*, spin: str, stop: str) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)
        options.add_session_config_entry("session.force_spinning_stop", stop)
        return options

    cpu = Device(kind="cpu", reason="")
    without_arena = session_options(cpu, RuntimeOptions())
    without_arena.enable_cpu_mem_arena = False
    single = opened(session_options(cpu, RuntimeOptions(threads=1)))
    pool = ThreadPoolExecutor(cores())

    def split(images: NDArray[np.uint8]) -> None:
        parts = np.array_split(images, min(cores(), len(images)))
        list(pool.map(single, parts))

    return {
        "as served": open_network(model, cpu, RuntimeOptions(max_batch=BATCHES[-1])),
        "every layer shared": opened(session_options(cpu, RuntimeOptions())),
        "spinning on": opened(plain(spin="1", stop="0")),
        "no spinning": opened(plain(spin="0", stop="0")),
        "no arena": opened(without_arena),
        "one thread": single,
        "batch split by core": split,
    }


def per_image_ms(run: Run, images: NDArray[np.uint8]) -> float:
    """Milliseconds an image, over about 16 images."""
    repeats = max(1, 16 // len(images))
    start = time.perf_counter()
    for _ in range(repeats):
        run(images)
    return (time.perf_counter() - start) / repeats / len(images) * 1000


def with_decoding(run: Run, model: ModelVersion, files: Sequence[bytes], images: int = 192) -> float:
    """Images a second when all cores decode while batches compute."""
    preprocessing = model.spec.preprocessing
    pending: deque[Future[NDArray[np.uint8]]] = deque()
    source = itertools.islice(itertools.cycle(files), images)

    def pixels(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(decode(data, preprocessing).image)

    with ThreadPoolExecutor(cores()) as decoders:

        def decode_next() -> None:
            if (data := next(source, None)) is not None:
                pending.append(decoders.submit(pixels, data))

        start = time.perf_counter()
        for _ in range(3 * DECODED_WITH):
            decode_next()
        for _ in range(images // DECODED_WITH):
            batch = []
            for _ in range(DECODED_WITH):
                batch.append(pending.popleft().result())
                decode_next()
            run(np.stack(batch))
        return images / (time.perf_counter() - start)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--model", help="folder of the graph; the first by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    good, _ = Repository(options.models).read_all()
    model = next(m for m in good if m.kind is GraphKind.HOT and options.model in {None, m.name})
    files = [path.read_bytes() for path in sorted(options.images.iterdir()) if path.is_file()]
    side = model.spec.preprocessing.crop
    batches = {b: np.random.default_rng(b).integers(0, 256, (b, side, side, 3), np.uint8) for b in BATCHES}
    ways = settings(model)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for number in range(options.rounds + 1):
        for name, run in ways.items():
            row = {str(b): per_image_ms(run, images) for b, images in batches.items()}
            row["decoding"] = with_decoding(run, model, files)
            for column, value in row.items() if number else ():  # the first round warms up
                times[name].setdefault(column, []).append(value)
    load = os.getloadavg()[0]
    print(f"{model.name} version {model.version}; {cores()} cores of {platform.machine()}, ONNX Runtime "
          f"{version('onnxruntime-gpu')}, load {load:.1f}; n = {options.rounds} rounds, medians")  # fmt: skip
    print("ms an image, by batch".ljust(22), *(f"{b:>6}" for b in BATCHES), "  images/s with decoding")
    for name, columns in times.items():
        medians = [statistics.median(values) for values in columns.values()]
        print(name.ljust(22), *(f"{ms:6.2f}" for ms in medians[:-1]), f"{medians[-1]:10.1f}")
    if options.json:
        options.json.write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
