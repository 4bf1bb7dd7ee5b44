"""The load test's picture."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.client.test_loadtest import point_at

from topfive.cli._load_picture import draw
from topfive.loadtest import Point


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Draws points; the axes, laid out."""
    saved: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: saved.append(figure))

    def axes_of(points: list[Point], p99_ms: float | None = None) -> Any:
        draw(points, p99_ms, tmp_path / "x.png")
        saved[-1].draw_without_rendering()
        [axes] = saved[-1].axes
        return axes

    return axes_of


def marks(axes: Any, **properties: str) -> set[tuple[float, float]]:
    """Where there are marks of this kind."""
    lines = [
        line for line in axes.lines if all(getattr(line, f"get_{n}")() == p for n, p in properties.items())
    ]
    return {(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def test_the_pictures_latencies_are_marked_so_that_they_can_be_read(drawn: Callable[..., Any]) -> None:
    axes = drawn([point_at(10, 5.0), point_at(20, 900.0)])
    shown = [text for text in axes.get_yticklabels(which="both") if text.get_text()]
    boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: box.y0)
    assert len(boxes) >= 4
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))


def test_a_picture_of_nothing_but_errors_can_be_drawn(tmp_path: Path) -> None:
    draw([point_at(10, 0.0, answered=0, errors={"503": 9})], 50.0, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_what_failed_and_what_is_the_generators_is_told_from_what_is_sound(drawn: Callable[..., Any]) -> None:
    sound = [point_at(10, 5.0), point_at(20, 6.0)]
    failed = [point_at(30, 7.0, errors={"429": 3}), point_at(40, 8.0, overloaded=True)]
    late = point_at(50, 90.0, lag_p99_ms=80.0)
    silent = point_at(60, 0.0, answered=0, errors={"503": 9})
    axes = drawn([*sound, *failed, late, silent])
    assert marks(axes, linestyle="-") == {(10, 5), (20, 6)}
    assert marks(axes, marker="x", linestyle="None") == {(30, 7), (40, 8)}
    assert "no answer at 60.0/s" in [line.get_label() for line in axes.lines]
    assert marks(axes, marker="o", linestyle="None") == {(50, 90)}


def test_the_rate_reached_is_what_counts_and_the_one_found_is_marked(drawn: Callable[..., Any]) -> None:
    found, missed = replace(point_at(20, 6.0), rate=19.0), replace(point_at(40, 900.0), rate=25.0)
    axes = drawn([found, missed], 100.0)
    assert marks(axes, marker="o", linestyle="-") == {(19, 6), (25, 900)}
    assert marks(axes, linestyle="--") == {(19, 0), (19, 1)}


def test_no_label_is_cut_by_an_edge(drawn: Callable[..., Any]) -> None:
    one, many = (replace(point_at(n, 5.0), loop="closed", rate=rate) for n, rate in ((1, 1.0), (64, 500.0)))
    for text in [*drawn([one, many]).texts, *(axes := drawn([one, point_at(500, 6.0)])).texts]:
        box = text.get_window_extent()
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1
