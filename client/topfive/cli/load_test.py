"""`topfive load-test`: the command, its table and JSON around `topfive.loadtest`."""

import asyncio
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from rich.console import Console
from rich.table import Table

from topfive._folders import files_below, has_image_name
from topfive._settings import API_KEY_VARIABLE
from topfive._version import __version__
from topfive.cli._load_picture import draw, see_drawable
from topfive.cli._load_plan import Measured, run
from topfive.errors import TopfiveError
from topfive.loadtest import (
    ANSWERS_FOR_P99,
    LoadTestConfig,
    LoadTestError,
    Point,
    best_rate,
    limit_is_the_generators,
    lowest_miss,
)


def load_test(
    url: str,
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    config: LoadTestConfig | None = None,
    json_path: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Annotated[Path | None, Parameter(validator=validators.Path(ext=("png", "svg", "pdf")))] = None,
    api_key: Annotated[str | None, Parameter(env_var=API_KEY_VARIABLE)] = None,
) -> int:
    """Load a server in bounded steps; print its throughput and latencies, and the highest rate that keeps a p99.

    First closed loops (`--connections`), then open loops (`--rates`, or a search with `--p99-ms`). Latencies count from
    the time a request was due, so that stalls are not hidden. Images that the server refuses are named and left out. Run
    it from another machine, or mind the generator's own share of the cores: the table marks where it was late or busy.
    Ctrl-C, or a server that has gone, ends it with what was measured until then.

    Exit status: 0 done, 1 no rate kept the p99, or requests failed (or were too many) in a load that was asked for,
    3 no server, or it has gone. The rates of the search and those tried by default may fail: they look for the limit.

    Args:
        url: address of the server.
        images: files to send in turn, or folders of them.
        config: what to try.
        json_path: write all numbers here.
        plot: write a picture of latency against rate here (.png, .svg or .pdf; needs matplotlib: pip install 'topfive[plot]').
        api_key: key that the server asks for; better given as `TOPFIVE_API_KEY`.
    """
    config = config or LoadTestConfig()
    # Fail before the load, not after it.
    if plot is not None:
        see_drawable()
    for output in filter(None, (json_path, plot)):
        _see_writable(output)
    # No markup and no wrapping: names of files are printed.
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    bodies, left_out = read_images(images, config.max_image_bytes, config.max_images)
    if left_out:
        console.print(
            f"{left_out} of {left_out + len(bodies)} images left out, for --max-images or --max-image-bytes"
        )
    measured = Measured()
    try:
        asyncio.run(run(url, bodies, config, measured=measured, api_key=api_key, say=console.print))
    except (KeyboardInterrupt, TopfiveError):
        if measured.points:
            console.print("interrupted; what was measured until then:")
            _report(measured, url, bodies, config, json_path=json_path, plot=plot)
        raise
    best = _report(measured, url, bodies, config, json_path=json_path, plot=plot)
    missed = config.p99_ms is not None and best is None
    return 1 if missed or any(point.failed and not point.probe for point in measured.points) else 0


def _report(
    measured: Measured,
    url: str,
    bodies: Mapping[str, bytes],
    config: LoadTestConfig,
    *,
    json_path: Path | None,
    plot: Path | None,
) -> Point | None:
    """Print it, and write what was asked for; the highest rate that kept the p99, if one was given."""
    best = None if config.p99_ms is None else best_rate(measured.points, config.p99_ms)
    print_report(measured.points, config)
    if json_path is not None:
        sizes = [len(body) for name, body in bodies.items() if name not in measured.refused]
        report = {
            "url": url,
            "models": [asdict(model) for model in measured.models],
            "images": {
                "count": len(sizes),
                "mean_bytes": sum(sizes) / len(sizes),
                "refused": measured.refused,
            },
            "generator": generator(),
            "config": asdict(config),
            "points": [
                {**asdict(point), "generator_bound": point.generator_bound} for point in measured.points
            ],
            "highest_rate": best.asked if best else None,
            "highest_rate_is_the_generators": config.p99_ms is not None
            and limit_is_the_generators(measured.points, config.p99_ms),
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(measured.points, config.p99_ms, plot, title=f"topfive load-test {url}")
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


def read_images(paths: Sequence[Path], max_bytes: int, max_images: int) -> tuple[dict[str, bytes], int]:
    """The files, and the images in the folders, by name, as far as they fit; and how many were left out.

    Raises:
        LoadTestError: there is no image.
    """
    files = list(dict.fromkeys(_files(paths)))
    # From first to last, for folders are sorted by class: the first so many would be pictures of one thing.
    count = min(len(files), max_images)
    bodies: dict[str, bytes] = {}
    total = 0
    for path in (files[number * len(files) // count] for number in range(count)):
        if total + path.stat().st_size <= max_bytes:
            bodies[str(path)] = path.read_bytes()
            total += len(bodies[str(path)])
    if not bodies:
        names = ", ".join(map(str, paths))
        raise LoadTestError(
            f"no image of at most {max_bytes:,} bytes in {names}; give files or folders with some"
        )
    return bodies, len(files) - len(bodies)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (f for f in files_below(path) if has_image_name(f.name) and f.is_file())
        else:
            yield path


def print_report(points: Sequence[Point], config: LoadTestConfig) -> None:
    """The table, and what is to be said about it; within 80 columns."""
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("load", "answers", "rate/s", "p50", "p90", "p99", "max", "lag", "cores"):
        table.add_column(column, justify="left" if column == "load" else "right", no_wrap=True)
    table.add_column("remarks")
    for point in points:
        p99 = _short(point.p99_ms)
        table.add_row(
            f"closed {point.asked:.0f}" if point.loop == "closed" else f"open {_short(point.asked)}/s",
            str(point.answered),
            _short(point.rate),
            _short(point.p50_ms),
            _short(point.p90_ms),
            p99 if point.answered >= ANSWERS_FOR_P99 else f"({p99})",
            _short(point.max_ms),
            _short(point.lag_p99_ms) if point.loop == "open" else "-",
            f"{point.generator_cpu:.2f}",
            _remarks(point),
        )
    console.print("latencies and lag in ms")
    console.print(table)
    for line in _conclusions(points, config):
        console.print(line)


def _short(value: float) -> str:
    """With a decimal where it tells something: the table has room for five figures."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _remarks(point: Point) -> str:
    remarks = [f"{count} x {reason}" for reason, count in point.errors.items()]
    if point.overloaded:
        remarks.append("overloaded")
    if point.generator_bound:
        remarks.append("generator late" if point.generator_late else "generator busy")
    return "\n".join(remarks)


def _conclusions(points: Sequence[Point], config: LoadTestConfig) -> Iterator[str]:
    """What the table means, a sentence each."""
    if any(0 < point.answered < ANSWERS_FOR_P99 for point in points):
        yield f"(in brackets): the slowest of fewer than {ANSWERS_FOR_P99} answers; --duration-s makes more"
    if config.p99_ms is not None:
        yield _found(points, config.p99_ms)
    if any(point.generator_bound for point in points):
        yield "generator late or busy: the numbers are its limit as much as the server's"
    if any(point.failed and not point.probe for point in points):
        yield "requests failed in loads that were asked for"
    elif any(point.failed for point in points):
        yield "requests failed only at rates that were tried to find the limit"


def _found(points: Sequence[Point], p99_ms: float) -> str:
    """The outcome of the search; it claims no more than was seen."""
    best, miss = best_rate(points, p99_ms), lowest_miss(points, p99_ms)
    generators = limit_is_the_generators(points, p99_ms)
    if best:
        few = "" if best.answered >= ANSWERS_FOR_P99 else f", of only {best.answered} answers"
        least = "at least " if generators else ""
        found = f"{least}{best.asked:.1f} requests/s (p99 {best.p99_ms:.1f} ms{few})"
    else:
        found = "none of those tried" + (f", down to {miss.asked:.1f} requests/s" if miss else "")
    end = miss or best
    if end and generators:
        found += f"; at {end.asked:.1f}/s the generator was at its own limit, the server's may be higher"
    return f"highest rate with p99 within {p99_ms:g} ms: {found}"


def generator() -> dict[str, Any]:
    """What made the load."""
    return {
        "topfive": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
