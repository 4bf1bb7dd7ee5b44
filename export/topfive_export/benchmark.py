"""`topfive benchmark`: how fast each variant of a repository is on this machine, and which one to serve here.

Needs ONNX Runtime and numpy alone, so that it runs where the model is served: no torch, no onnx.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import numpy as np
import onnxruntime
from cyclopts import Parameter

from topfive._processor import int8_saturates
from topfive_export.repository import MODEL_FILE, REPORT_FILE, read_report, sha256, versions
from topfive_export.timing import machine
from topfive_export.variant import ExportError, OptionError

Device: TypeAlias = Literal["cpu", "cuda"]
_PRODUCT_SIDE: Final = 1536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model's newest version, as far as its report describes it."""

    name: str
    version: int
    path: Path
    side: int = 0
    """Height and width of the input, in pixels."""
    views: int = 1
    """1 for what the others do: ten views are ten times the work, for other answers."""
    multiply_adds: float | None = None
    agreement: float | None = None
    """Share of the images of its verification on which the first answer is the trained network's."""
    saturates: bool = False
    """Whether this processor computes it otherwise than it was verified: int8 without int8 dot products."""


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
    batch_sizes: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (1, 4, 16),
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
        raise OptionError(f"--batch-sizes is {batch_sizes}; each must be between 1 and 4096")
    if rounds < 1 or threads < 0:
        raise OptionError(f"--rounds is {rounds} and --threads {threads}; at least 1 and 0 are needed")
    sessions = open_all(find(models, device), device, threads)
    if not sessions:
        raise ExportError(
            f"{models} holds no verified model for {device} that runs; `topfive export RUN --out {models}` makes one"
        )
    candidates = list(sessions)
    timings, product = measure(sessions, device, batch_sizes, rounds=rounds, threads=threads)
    best = recommend(timings, candidates)
    for candidate in candidates:
        if candidate.saturates:
            _say(
                f"{candidate.name} saturates on this processor, which has no int8 dot products: its answers here are not "
                "those that were verified; serve fp32, or export int8 again on such a processor"
            )
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
    """The newest version of every verified model in `models` that is meant for `device`; says which are left out.

    Raises:
        ExportError: no such folder.
    """
    if not models.is_dir():
        raise ExportError(f"{models} is not a folder; `topfive export` makes a model repository")
    found = []
    for folder in sorted(models.iterdir()):
        if folder.name.startswith(".") or not (numbers := versions(folder)):
            continue
        try:
            candidate = _read(folder, numbers[-1], device)
        except ExportError as error:
            _say(f"{folder / str(numbers[-1])} is left out: {error}")
            continue
        if candidate is not None:
            found.append(candidate)
    return found


def _read(folder: Path, version: int, device: Device) -> Candidate | None:
    """A version by its report; None for what is meant for something else.

    Raises:
        ExportError: nothing says that it was verified, or what it is.
    """
    path = folder / str(version)
    report = read_report(path)
    if report.get("passed") is not True:
        raise ExportError(f"it has no {REPORT_FILE} that says that it passed its limits")
    try:
        graph, precision, target = (report["variant"][key] for key in ("graph", "precision", "target"))
        candidate = Candidate(
            name=folder.name,
            version=version,
            path=path,
            side=int(report["interface"]["input"][0]),
            views=int(report["variant"]["views"]),
            multiply_adds=_number(report.get("multiply_adds")),
            agreement=_number(report.get("agreement", {}).get("top1_agreement_all")),
            saturates=precision == "int8" and int8_saturates(report),
        )
        verified = report["file"]["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ExportError(f"its {REPORT_FILE} is not one that `topfive export` wrote") from error
    # Plain fp32 runs anywhere; the others were written for one device.
    if graph != "hot" or (target != device and (precision, target) != ("fp32", "cpu")):
        return None
    if not (path / MODEL_FILE).is_file() or sha256(path / MODEL_FILE) != verified:
        raise ExportError(f"{MODEL_FILE} is not the file that its {REPORT_FILE} is about (another SHA-256)")
    return candidate


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def open_all(
    candidates: Sequence[Candidate], device: Device, threads: int
) -> dict[Candidate, onnxruntime.InferenceSession]:
    """A session of each that runs; says which do not.

    Raises:
        ExportError: the device cannot be used.
    """
    # The library's own red lines; what they are about is told in a sentence.
    onnxruntime.set_default_logger_severity(4)
    sessions = {}
    for candidate in candidates:
        try:
            session = _open(candidate, device, threads)
        except Exception as error:  # noqa: BLE001  ONNX Runtime raises classes of its own that derive from nothing closer
            _say(f"{candidate.path} is left out: {' '.join(str(error).split())}")
            continue
        if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise ExportError("ONNX Runtime cannot use CUDA here; `topfive doctor` says what is missing")
        sessions[candidate] = session
    return sessions


def _open(candidate: Candidate, device: Device, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(candidate.path / MODEL_FILE, options, providers=providers)
    session.run(None, {"image": np.zeros((1, candidate.side, candidate.side, 3), dtype=np.uint8)})
    return session


def measure(
    sessions: Mapping[Candidate, onnxruntime.InferenceSession],
    device: Device,
    batch_sizes: Sequence[int],
    *,
    rounds: int,
    threads: int,
) -> tuple[list[Timing], float | None]:
    """Time all of them in turns, after warming each up at each batch size.

    Returns:
        The timings, and the FLOP/s of an fp32 matrix product that took its turns with them: the ceiling. `None` where
        it would be another device's or another number of cores'.
    """
    rng = np.random.default_rng(0)
    feeds = {
        (candidate, size): rng.integers(0, 256, (size, candidate.side, candidate.side, 3), dtype=np.uint8)
        for candidate in sessions
        for size in batch_sizes
    }
    seconds: dict[tuple[Candidate, int], list[float]] = {key: [] for key in feeds}
    comparable = device == "cpu" and threads == 0
    product_flops: float | None = None
    for round_ in range(rounds + 1):
        if comparable:
            product_flops = max(product_flops or 0.0, _matrix_product_flops())
        for (candidate, size), images in feeds.items():
            start = time.perf_counter()
            sessions[candidate].run(None, {"image": images})
            if round_ > 0:
                seconds[candidate, size].append(time.perf_counter() - start)
    timings = []
    for candidate in sessions:
        # A multiply-add is two operations.
        share = None
        if product_flops is not None and candidate.multiply_adds is not None:
            share = 2 * candidate.multiply_adds / product_flops
        for size in batch_sizes:
            times = seconds[candidate, size]
            rate = size / min(times)
            timings.append(
                Timing(
                    name=candidate.name,
                    version=candidate.version,
                    batch=size,
                    latency_ms=round(float(np.median(times)) * 1e3, 3),
                    best_ms=round(min(times) * 1e3, 3),
                    images_per_s=round(rate, 1),
                    ceiling_share=None if share is None else round(rate * share, 3),
                )
            )
    return timings, product_flops


def recommend(timings: Sequence[Timing], candidates: Sequence[Candidate]) -> str:
    """The variant with the highest rate at any batch size among those of one view whose answers hold here, if any."""
    last = {candidate.name: (candidate.views != 1, candidate.saturates) for candidate in candidates}
    return min(timings, key=lambda timing: (last[timing.name], -timing.images_per_s)).name


def _matrix_product_flops() -> float:
    """FLOP/s of one fp32 matrix product on all cores, by numpy's BLAS."""
    left = np.ones((_PRODUCT_SIDE, _PRODUCT_SIDE), dtype=np.float32)
    start = time.perf_counter()
    left @ left
    return 2 * _PRODUCT_SIDE**3 / (time.perf_counter() - start)


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
    sentence = f"serve {best} here: the fastest"
    if any(candidate.saturates for candidate in candidates) and not chosen.saturates:
        sentence += " of those that do not saturate"
    if chosen.agreement is not None:
        sentence += f"; its first answer is the trained network's on {chosen.agreement:.1%} of the images that it was verified on"
    return "\n".join([*lines, sentence])


def _say(line: str) -> None:
    print(f"topfive: {line}", file=sys.stderr, flush=True)  # noqa: T201  not part of the answer
