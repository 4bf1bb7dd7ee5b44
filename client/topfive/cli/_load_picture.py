"""The picture of `topfive load-test`: latency against rate."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topfive.loadtest import LoadTestError, Point


def pyplot() -> Any:
    """matplotlib.pyplot, without a screen.

    Raises:
        LoadTestError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise LoadTestError(
            "--plot needs matplotlib, which is not installed: pip install 'topfive[plot]'"
        ) from error


def draw(points: Sequence[Point], p99_ms: float | None, path: Path) -> None:
    """A picture of latency against rate: open loops as curves, closed loops as single marks."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    tried = sorted((p for p in points if p.loop == "open" and p.answered), key=lambda point: point.asked)
    for name, color in (("p50", "tab:blue"), ("p90", "tab:orange"), ("p99", "tab:red")):
        values = [getattr(point, f"{name}_ms") for point in tried]
        axes.plot([point.asked for point in tried], values, "o-", color=color, label=f"{name}, open loop")
    for point in points:
        if point.loop == "closed" and point.answered:
            axes.plot(point.rate, point.p99_ms, "s", color="tab:gray")
            style = {"fontsize": 8, "color": "dimgray", "ha": "center", "textcoords": "offset points"}
            text = f"{point.asked:.0f} connection{'' if point.asked == 1 else 's'}"
            axes.annotate(text, (point.rate, point.p99_ms), xytext=(0, 7), **style)
    axes.plot([], [], "s", color="tab:gray", label="p99, closed loop")
    if p99_ms is not None:
        axes.axhline(p99_ms, color="tab:red", linestyle=":", label=f"{p99_ms:g} ms asked for")
    axes.set(
        yscale="log", xlabel="requests per second", ylabel="latency in ms, from the time the request was due"
    )
    # Not a number at each of a decade's nine lines: they would overlap.
    axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(left=0)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
