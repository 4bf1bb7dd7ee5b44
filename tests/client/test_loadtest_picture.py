"""The load test's picture."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from tests.client.test_loadtest import point_at

from topfive.cli._load_picture import draw


def test_the_pictures_latencies_are_marked_so_that_they_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: saved.append(figure))
    draw([point_at(10, 5.0), point_at(20, 900.0)], None, tmp_path / "x.png")
    [figure] = saved
    figure.draw_without_rendering()
    [axes] = figure.axes
    shown = [text for text in axes.get_yticklabels(which="both") if text.get_text()]
    boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: box.y0)
    assert len(boxes) >= 4
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))


def test_a_picture_of_nothing_but_errors_can_be_drawn(tmp_path: Path) -> None:
    draw([point_at(10, 0.0, answered=0, errors={"503": 9})], 50.0, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
