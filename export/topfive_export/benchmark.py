"""`topfive benchmark`: how fast each variant of a repository is on this machine, and which one to serve here.

Needs ONNX Runtime and numpy alone, so that it runs where the model is served: no torch, no onnx.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
import onnxruntime
from cyclopts import Parameter

from topfive_export.repository import MODEL_FILE, read_report, versions
from topfive_export.timing import machine
from topfive_export.variant import ExportError

Device: TypeAlias = Literal["cpu", "cuda"]
_PRODUCT_SIDE: Final = 1536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model's newest version."""

    name: str
    version: int
    path: Path
    report: dict[str, Any]

    @property
    def side(self) -> int:
        """Height and width of the input, in pixels."""
        return int(self.report["interface"]["input"][0])

    @property
    def answers_one_view(self) -> bool:
        """Whether it does what the others do: ten views are ten times the work, for other answers."""
        return bool(self.report["variant"]["views"] == 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One variant at one batch size."""

    name: str
    version: int
    batch: int
    latency_ms: float
    """Median of one call."""
    best_ms: float
    """Fastest call."""
    images_per_s: float
    """At the fastest call."""
    ceiling_share: float | None
    """Arithmetic done per second, as a share of what an fp32 matrix product does on the same cores; int8 may exceed 1.
    Only on a CPU with all its cores."""


def benchmark(
    models: Path = Path("models"),
    *,
    device: Device = "cpu",
    batch_sizes: tuple[int, ...] = (1, 4, 16),
    rounds: int = 10,
    threads: int = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Time every variant of a model repository on this machine, and say which one to serve here.

    Variants take turns, so that what else the machine does meanwhile hits them alike.

    Args:
        models: the model repository.
        device: where to run.
        batch_sizes: images per call.
        rounds: calls of each variant with each batch size.
        threads: threads of one call; 0 uses all cores, and only then is there a ceiling to compare with.
        as_json: print JSON instead of a table.
    """
    if not batch_sizes or min(batch_sizes) < 1 or max(batch_sizes) > 4096:
        raise ExportError(f"--batch-sizes is {batch_sizes}; each must be between 1 and 4096")
    if rounds < 1 or threads < 0:
        raise ExportError(f"--rounds is {rounds} and --threads {threads}; at least 1 and 0 are needed")
    candidates = find(models, device)
    timings, product = measure(candidates, device, batch_sizes, rounds=rounds, threads=threads)
    best = recommend(timings, candidates)
    if as_json:
        record = {
            "machine": machine(),
            "device": device,
            "threads": threads,
            "rounds": rounds,
            "matrix_product_gflops": None if product is None else round(product / 1e9, 1),
            "timings": [dataclasses.asdict(timing) for timing in timings],
            "serve": best,
        }
        print(json.dumps(record, indent=2))  # noqa: T201
        return
    print(_table(timings, product, best, candidates))  # noqa: T201


def find(models: Path, device: Device) -> list[Candidate]:
    """The newest version of every verified model in `models` that is meant for `device`.

    Raises:
        ExportError: there is none.
    """
    if not models.is_dir():
        raise ExportError(f"{models} is not a folder; `topfive export` makes a model repository")
    found = []
    for folder in sorted(models.iterdir()):
        if folder.name.startswith(".") or not (numbers := versions(folder)):
            continue
        path = folder / str(numbers[-1])
        report = read_report(path)
        variant = report.get("variant", {})
        if report.get("passed") is not True or variant.get("graph") != "hot":
            continue
        # Plain fp32 runs anywhere; the others were written for one device.
        if variant["target"] == device or (variant["precision"] == "fp32" and variant["target"] == "cpu"):
            found.append(Candidate(name=folder.name, version=numbers[-1], path=path, report=report))
    if not found:
        raise ExportError(
            f"{models} holds no verified model for {device}; `topfive export RUN --out {models}` makes one"
        )
    return found


def measure(
    candidates: Sequence[Candidate],
    device: Device,
    batch_sizes: Sequence[int],
    *,
    rounds: int,
    threads: int,
) -> tuple[list[Timing], float | None]:
    """Time all candidates in turns, after warming each up at each batch size.

    Returns:
        The timings, and the FLOP/s of an fp32 matrix product that took its turns with them: the ceiling. `None` where
        it would be another device's or another number of cores'.
    """
    sessions = {candidate.name: _load(candidate, device, threads) for candidate in candidates}
    rng = np.random.default_rng(0)
    feeds = {
        (candidate.name, size): rng.integers(
            0, 256, (size, candidate.side, candidate.side, 3), dtype=np.uint8
        )
        for candidate in candidates
        for size in batch_sizes
    }
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in feeds}
    comparable = device == "cpu" and threads == 0
    product_flops: float | None = None
    for round_ in range(rounds + 1):
        if comparable:
            product_flops = max(product_flops or 0.0, _matrix_product_flops())
        for (name, size), images in feeds.items():
            start = time.perf_counter()
            sessions[name].run(None, {"image": images})
            if round_ > 0:
                seconds[name, size].append(time.perf_counter() - start)
    timings = []
    for candidate in candidates:
        work = 2 * int(candidate.report["multiply_adds"])
        for size in batch_sizes:
            times = seconds[candidate.name, size]
            rate = size / min(times)
            timings.append(
                Timing(
                    name=candidate.name,
                    version=candidate.version,
                    batch=size,
                    latency_ms=round(float(np.median(times)) * 1e3, 3),
                    best_ms=round(min(times) * 1e3, 3),
                    images_per_s=round(rate, 1),
                    ceiling_share=None if product_flops is None else round(rate * work / product_flops, 3),
                )
            )
    return timings, product_flops


def recommend(timings: Sequence[Timing], candidates: Sequence[Candidate]) -> str:
    """The one-view variant with the highest rate at any batch size."""
    eligible = {candidate.name for candidate in candidates if candidate.answers_one_view}
    rates = [timing for timing in timings if timing.name in eligible] or list(timings)
    return max(rates, key=lambda timing: timing.images_per_s).name


def _matrix_product_flops() -> float:
    """FLOP/s of one fp32 matrix product on all cores, by numpy's BLAS."""
    left = np.ones((_PRODUCT_SIDE, _PRODUCT_SIDE), dtype=np.float32)
    start = time.perf_counter()
    left @ left
    return 2 * _PRODUCT_SIDE**3 / (time.perf_counter() - start)


def _load(candidate: Candidate, device: Device, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    providers = (
        ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    try:
        session = onnxruntime.InferenceSession(candidate.path / MODEL_FILE, options, providers=providers)
    except Exception as error:
        # ONNX Runtime raises classes of its own that derive from nothing closer.
        raise ExportError(f"{candidate.path / MODEL_FILE} does not load: {error}") from error
    if session.get_providers()[0] != providers[0]:
        raise ExportError("ONNX Runtime cannot use CUDA here; `topfive doctor` says what is missing")
    return session


def _table(
    timings: Sequence[Timing], product_flops: float | None, best: str, candidates: Sequence[Candidate]
) -> str:
    width = max(len(timing.name) for timing in timings)
    lines = [f"{'model':<{width}}  batch  median ms    best ms   images/s  of fp32 ceiling"]
    for timing in timings:
        share = "" if timing.ceiling_share is None else f"{timing.ceiling_share:.0%}"
        lines.append(
            f"{timing.name:<{width}}  {timing.batch:>5}  {timing.latency_ms:>9.2f}  {timing.best_ms:>9.2f}  "
            f"{timing.images_per_s:>9.1f}  {share:>15}"
        )
    if product_flops is not None:
        lines.append(f"fp32 ceiling: a matrix product at {product_flops / 1e9:.0f} GFLOP/s on the same cores")
    chosen = next(candidate for candidate in candidates if candidate.name == best)
    agreement = chosen.report["agreement"]["top1_agreement_all"]
    lines.append(
        f"serve {best} here: the fastest; its first answer is the trained network's on {agreement:.1%} of the images "
        "that it was verified on"
    )
    return "\n".join(lines)
