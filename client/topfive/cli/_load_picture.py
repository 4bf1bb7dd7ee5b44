"""The picture of `topfive load-test`: latency against rate."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topfive.loadtest import LoadTestError, Point, best_rate

_PERCENTILES = (("p50", "tab:blue"), ("p90", "tab:orange"), ("p99", "tab:red"))


def see_drawable() -> None:
    """That a picture can be drawn.

    Raises:
        LoadTestError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise LoadTestError(
            "--plot needs matplotlib, which is not installed: pip install 'topfive[plot]'"
        ) from error


def draw(points: Sequence[Point], p99_ms: float | None, path: Path, *, title: str = "") -> None:
    """A picture of latency against the rate reached: open loops as curves, closed loops as single marks.

    What failed, and what says more of the generator than of the server, is not part of the curves and has marks of its
    own. A load without any answer has neither latency nor rate; the legend names it.
    """
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    # In the order of the rates asked for: where the server has reached its limit the curve stands up, or turns back.
    tried = sorted((p for p in points if p.loop == "open" and p.answered), key=lambda point: point.asked)
    _draw_open_loops(axes, tried)
    unanswered = [f"{p.asked:.1f}/s" for p in points if p.loop == "open" and not p.answered]
    if unanswered:
        axes.plot([], [], "x", color="black", label=f"no answer at {', '.join(unanswered)}")
    middle = max((point.rate for point in points), default=0.0) / 2
    _draw_closed_loops(axes, [p for p in points if p.loop == "closed" and p.answered], middle)
    if p99_ms is not None:
        axes.axhline(p99_ms, color="tab:red", linestyle=":", label=f"{p99_ms:g} ms asked for")
        if best := best_rate(points, p99_ms):
            label = f"highest rate: {best.asked:.1f}/s\n({best.rate:.1f}/s reached)"
            axes.axvline(best.rate, color="tab:green", linestyle="--", label=label)
    axes.set(
        title=title,
        yscale="log",
        xlabel="requests classified per second",
        ylabel="latency in ms, from the time the request was due",
    )
    # Not a number at each of a decade's nine lines: they would overlap.
    axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(left=0)
    axes.grid(visible=True, which="both", alpha=0.3)
    # Beside the axes: within them it would hide points, wherever it is.
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_open_loops(axes: Any, tried: Sequence[Point]) -> None:
    """A curve through what is sound; what failed and what the generator bounds as lone marks."""
    sound = [point for point in tried if not point.failed and not point.generator_bound]
    lone = (
        ("x", "errors or overload", [point for point in tried if point.failed]),
        ("o", "the generator's limit", [p for p in tried if p.generator_bound and not p.failed]),
    )
    for name, color in _PERCENTILES:
        latencies = [getattr(point, f"{name}_ms") for point in sound]
        axes.plot([point.rate for point in sound], latencies, "o-", color=color, label=f"{name}, open loop")
        for marker, _, of in lone:
            latencies = [getattr(point, f"{name}_ms") for point in of]
            axes.plot(
                [p.rate for p in of], latencies, marker, color=color, markerfacecolor="none", markersize=8
            )
    for marker, meaning, of in lone:
        if of:
            axes.plot([], [], marker, color="dimgray", markerfacecolor="none", markersize=8, label=meaning)


def _draw_closed_loops(axes: Any, closed: Sequence[Point], middle: float) -> None:
    """A square for each, with its connections on the side of the middle, where no edge cuts them."""
    for point in closed:
        axes.plot(point.rate, point.p99_ms, "x" if point.failed else "s", color="tab:gray")
        left = point.rate < middle
        axes.annotate(
            f"{point.asked:.0f} connection{'' if point.asked == 1 else 's'}",
            (point.rate, point.p99_ms),
            xytext=(7 if left else -7, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
            fontsize=8,
            color="dimgray",
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            zorder=1.5,  # hides the grid, but no curve
        )
    if closed:
        axes.plot([], [], "s", color="tab:gray", label="p99, closed loop")
