"""How long a session takes, without torch: shared by the export's report and `topfive benchmark`."""

import platform
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnxruntime

from topfive._processor import cpuinfo, int8_dot_products

LATENCY_BATCHES: Final = (1, 4, 16)
"""Batch sizes that every report times."""


def latency_ms(session: onnxruntime.InferenceSession, side: int, batch_size: int, *, runs: int = 5) -> float:
    """Milliseconds of one call with `batch_size` random squares: the best of `runs`, after one to warm up.

    The best, because whatever else the machine does only ever adds to it.
    """
    images = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8)
    session.run(None, {"image": images})
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(None, {"image": images})
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def latencies_ms(
    session: onnxruntime.InferenceSession, side: int, batch_sizes: Sequence[int] = LATENCY_BATCHES
) -> dict[str, float]:
    """`latency_ms` by batch size, as JSON has it."""
    return {str(size): round(latency_ms(session, side, size), 3) for size in batch_sizes}


def machine() -> dict[str, Any]:
    """What was timed on: no names or paths of it, only its kind."""
    return {
        "processor": cpuinfo("model name") or platform.processor(),
        "architecture": platform.machine(),
        "int8_dot_products": int8_dot_products(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
