"""How close does `topfive score --model` come to what this machine can decode and infer?

Each round, in one process and one after the other, over the same files:

* decode: read and decode on all cores, nothing else;
* infer: the same squares through the engine in its largest batches, nothing else;
* plain loop: decode a batch on all cores, then infer it, in turn; no rows, no files;
* score: the whole job, with its listing, saved parts and published results.

The ceiling is what decode and infer allow together: on a CPU they share the cores, so the seconds of one image add up;
on a GPU they run side by side, so the slower one counts. Other work on the machine moves all four; the ratios are
taken within a round, and their median is the result.

    python benchmarks/score.py models/ photographs/ --rounds 5 --repeat 2 --json score.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from topfive.preprocessing import decode
from topfive.scoring import LocalScorer, run_job
from topfive.scoring._sources import open_source
from topfive_server.local import LocalClassifier


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes: on the clock, and of the processors (which other work on the machine leaves alone)."""
    start, processors = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - processors


class Bench:
    """The four measurements over one list of files."""

    def __init__(self, classifier: LocalClassifier, folder: str, threads: int) -> None:
        self._classifier = classifier
        self._folder = folder
        self._paths = [
            Path(folder, path) for path in open_source(folder, max_bytes=10**9).list(all_files=False)
        ]
        self._pool = ThreadPoolExecutor(threads)
        self._squares = list(self._pool.map(self._decode, self._paths))
        self.count = len(self._paths)

    def _decode(self, path: Path) -> Image.Image:
        return decode(path.read_bytes(), self._classifier.spec.preprocessing).image

    def decode(self) -> None:
        """Read and decode, only."""
        for _ in self._pool.map(self._decode, self._paths):
            pass

    def infer(self) -> None:
        """Infer, only."""
        for start in range(0, self.count, self._classifier.max_batch):
            self._classifier.classify_batch(self._squares[start : start + self._classifier.max_batch])

    def plain_loop(self) -> None:
        """Decode a batch, infer it."""
        for start in range(0, self.count, self._classifier.max_batch):
            batch = self._paths[start : start + self._classifier.max_batch]
            self._classifier.classify_batch(list(self._pool.map(self._decode, batch)))

    def score(self) -> None:
        """The whole job, as the command runs it."""
        with tempfile.TemporaryDirectory() as scratch:
            summary = run_job(
                self._folder,
                Path(scratch) / "results.jsonl",
                lambda source: _KeptOpen(self._classifier, source, top_k=5, max_pixels=89_000_000),
            )
            assert (summary.files, summary.failed) == (self.count, 0), summary

    def round(self) -> dict[str, float]:
        """Images a second, and processor milliseconds an image, of each."""
        works = {
            "decode": self.decode,
            "infer": self.infer,
            "plain_loop": self.plain_loop,
            "score": self.score,
        }
        result: dict[str, float] = {}
        for name, work in works.items():
            seconds, processors = timed(work)
            result |= {name: self.count / seconds, f"{name}_cpu_ms": processors / self.count * 1000}
        return result


class _KeptOpen(LocalScorer):
    """Leaves the engine open for the next round."""

    def close(self) -> None:
        pass


def ceiling(rates: dict[str, float], device: str) -> float:
    """Images a second that decoding and inference allow together."""
    if device == "cpu":
        return 1 / (1 / rates["decode"] + 1 / rates["infer"])
    return min(rates["decode"], rates["infer"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--repeat", type=int, default=1, help="score every file so many times (links in a folder)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    classifier = LocalClassifier(options.models, device=options.device)
    with tempfile.TemporaryDirectory() as scratch:
        for copy in range(options.repeat):
            (Path(scratch) / f"{copy:04}").symlink_to(options.folder.resolve())
        bench = Bench(classifier, scratch, len(os.sched_getaffinity(0)))
        bench.round()  # warm: page cache, thread pools, the engine's memory
        rounds = [bench.round() for _ in range(options.rounds)]

    for each in rounds:
        each["ceiling"] = ceiling(each, classifier.device)
        each["score_of_ceiling"] = each["score"] / each["ceiling"]
        each["score_of_plain_loop"] = each["score"] / each["plain_loop"]
        each["cpu_of_plain_loop"] = each["score_cpu_ms"] / each["plain_loop_cpu_ms"]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("topfive", "pillow", "numpy", "onnxruntime-gpu")},
        "python": platform.python_version(),
        "model": f"{classifier.name} version {classifier.version} on {classifier.device}",
        "batch": classifier.max_batch,
        "files": bench.count,
        "rounds": options.rounds,
        "median": {name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
        "all": rounds,
    }
    classifier.close()
    print(json.dumps({name: value for name, value in result.items() if name != "all"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
