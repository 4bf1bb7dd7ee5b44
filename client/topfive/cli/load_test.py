"""`topfive load-test`: the command, its table, JSON and picture around `topfive.loadtest`."""

import asyncio
import importlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from topfive._folders import files_below, has_image_name
from topfive._settings import API_KEY_VARIABLE
from topfive._version import __version__
from topfive.loadtest import LoadTestConfig, LoadTestError, Measured, Point, best_rate, run


def load_test(
    url: str,
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    config: LoadTestConfig | None = None,
    json_path: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
    api_key: Annotated[str | None, Parameter(env_var=API_KEY_VARIABLE)] = None,
) -> int:
    """Load a server in bounded steps; print its throughput and latencies, and the highest rate that keeps a p99.

    First closed loops (`--connections`), then open loops (`--rates`, or a search with `--p99-ms`). Latencies count from
    the time a request was due, so that stalls are not hidden. Run it from another machine, or mind the generator's own
    share of the cores in the table. Ctrl-C ends it with what was measured until then. Exit status: 0 done, 1 no rate kept the
    p99 or some requests failed, 3 no server.

    Args:
        url: address of the server.
        images: files to send in turn, or folders of them.
        config: what to try.
        json_path: write all numbers here.
        plot: write a picture of latency against rate here (PNG; needs matplotlib: pip install 'topfive[plot]').
        api_key: key that the server asks for; better given as `TOPFIVE_API_KEY`.
    """
    config = config or LoadTestConfig()
    # Fail before the load, not after it.
    if plot is not None:
        _pyplot()
    for output in filter(None, (json_path, plot)):
        _see_writable(output)
    bodies = read_images(images, config.max_image_bytes)
    console = Console(stderr=True, highlight=False)
    measured = Measured()
    try:
        asyncio.run(run(url, bodies, config, measured=measured, api_key=api_key, say=console.print))
    except KeyboardInterrupt:
        if measured.points:
            console.print("interrupted; what was measured until then:")
            _report(measured, url, bodies, config, json_path=json_path, plot=plot)
        raise
    best = _report(measured, url, bodies, config, json_path=json_path, plot=plot)
    missed = config.p99_ms is not None and best is None
    return 1 if missed or any(point.errors for point in measured.points if point.loop == "closed") else 0


def _report(
    measured: Measured,
    url: str,
    bodies: Sequence[bytes],
    config: LoadTestConfig,
    *,
    json_path: Path | None,
    plot: Path | None,
) -> Point | None:
    """Print it, and write what was asked for; the highest rate that kept the p99, if one was given."""
    best = None if config.p99_ms is None else best_rate(measured.points, config.p99_ms)
    _print_report(measured.points, config, best)
    if json_path is not None:
        report = {
            "url": url,
            "models": [asdict(model) for model in measured.models],
            "images": {"count": len(bodies), "mean_bytes": sum(map(len, bodies)) / len(bodies)},
            "generator": generator(),
            "config": asdict(config),
            "points": [asdict(point) for point in measured.points],
            "highest_rate": best.asked if best else None,
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(measured.points, config.p99_ms, plot)
    return best


def _see_writable(path: Path) -> None:
    """That a file can be written there; an existing one stays as it is.

    Raises:
        OSError: it cannot.
    """
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        path.unlink()


def read_images(paths: Sequence[Path], max_bytes: int) -> list[bytes]:
    """The files, and the images in the folders, as far as they fit.

    Raises:
        LoadTestError: there is no image.
    """
    bodies: list[bytes] = []
    total = 0
    for path in _files(paths):
        body = path.read_bytes()
        total += len(body)
        if total > max_bytes:
            break
        bodies.append(body)
    if not bodies:
        names = ", ".join(map(str, paths))
        raise LoadTestError(
            f"no image of at most {max_bytes:,} bytes in {names}; give files or folders with some"
        )
    return bodies


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (f for f in files_below(path) if has_image_name(f.name) and f.is_file())
        else:
            yield path


def _print_report(points: Sequence[Point], config: LoadTestConfig, best: Point | None) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in (
        "load",
        "rate/s",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "max ms",
        "errors",
        "lag ms",
        "cores",
    ):
        table.add_column(column, justify="left" if column == "load" else "right", no_wrap=column == "load")
    for point in points:
        load = f"closed {point.asked:.0f}" if point.loop == "closed" else f"open {point.asked:.1f}/s"
        errors = ", ".join(f"{count} x {reason}" for reason, count in point.errors.items())
        table.add_row(
            load,
            f"{point.rate:.1f}",
            *(f"{value:.1f}" for value in (point.p50_ms, point.p90_ms, point.p99_ms, point.max_ms)),
            " ".join(filter(None, [errors, "overloaded" if point.overloaded else ""])) or "-",
            f"{point.lag_p99_ms:.1f}" if point.loop == "open" else "-",
            f"{point.generator_cpu:.2f}",
        )
    console.print(table)
    if config.p99_ms is not None:
        found = f"{best.asked:.1f} requests/s (p99 {best.p99_ms:.1f} ms)" if best else "none of those tried"
        console.print(f"highest rate with p99 within {config.p99_ms:g} ms: {found}")
    if any(point.generator_cpu > 0.8 for point in points):
        console.print("the generator itself was busy: these numbers are its limit as much as the server's")


def generator() -> dict[str, Any]:
    """What made the load."""
    return {
        "topfive": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def _pyplot() -> Any:
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
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
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
    pyplot.close(figure)
