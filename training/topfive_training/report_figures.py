"""The pictures of `topfive report`, as PNG bytes.

Shapes: N images, H rows, W columns, C colours, K classes, O filters.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from topfive_training.evaluate import ClassAccuracy
from topfive_training.squares import Pixels

_BLUE, _RED, _GREY, _ORANGE = "#3465a4", "#c0392b", "#b8bec6", "#b35900"
_MANY_CLASSES: Final = 40


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return file.getvalue()


def curves(epochs: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss, errors and rate over the epochs.

    Args:
        epochs: the log's records of kind `epoch`.
        steps: those of kind `step`, for the rate.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    x = [row["epoch"] for row in epochs]
    marker = "." if len(x) < 30 else None
    loss.plot(x, [row["train_loss"] for row in epochs], color=_GREY, marker=marker, label="training")
    loss.plot(x, [row["val_loss"] for row in epochs], color=_BLUE, marker=marker, label="validation")
    loss.set(title="Loss (cross-entropy)", xlabel="epoch")
    for top, style in (("top1", "-"), ("top5", "--")):
        for split, color, name in (("train", _GREY, "training"), ("val", _BLUE, "validation")):
            y = [100 * (1 - row[f"{split}_{top}"]) for row in epochs]
            label = f"top-{top[-1]}, {name}"
            error.plot(x, y, color=color, linestyle=style, marker=marker, label=label)
    error.set(title="Error, %", xlabel="epoch", ylim=(0, None))
    rows = steps or epochs
    rate.plot([row["step"] for row in rows], [row["rate"] for row in rows], color=_BLUE)
    rate.set(title="Learning rate", xlabel="step")
    if any(row["rate"] > 0 for row in rows):
        rate.set_yscale("log")
    for axes in (loss, error, rate):
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    error.legend(frameon=False, fontsize=8)
    return png(figure)


def filters(weights_OCHW: Tensor, towers: int) -> list[bytes]:
    """The first layer's filters as the paper's figure 3 shows them, one picture for each tower.

    Each filter is scaled by its own largest weight; zero is mid-grey.
    """
    pictures = []
    for tower_OCHW in weights_OCHW.detach().float().cpu().chunk(towers):
        scale = tower_OCHW.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        tiles_OHWC = (0.5 + 0.5 * tower_OCHW / scale).permute(0, 2, 3, 1).numpy()
        pictures.append(_tiles(tiles_OHWC, columns=min(16, len(tiles_OHWC)), zoom=4))
    return pictures


def _tiles(tiles_NHWC: NDArray[np.float32], *, columns: int, zoom: int) -> bytes:
    count, height, width, _ = tiles_NHWC.shape
    rows = math.ceil(count / columns)
    sheet = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, 3))
    for index, tile in enumerate(tiles_NHWC):
        top, left = 1 + index // columns * (height + 1), 1 + index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = tile
    image = Image.fromarray((255 * sheet).round().astype(np.uint8))
    file = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def answers(rows: Sequence[tuple[Pixels, str, Sequence[tuple[str, float]]]]) -> bytes:
    """Test images, their true classes, and bars for the five likeliest: the paper's figure 4, left.

    Args:
        rows: pixels, uint8 [H, W, 3]; true class; answers, likeliest first, with their probabilities.
    """
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(11, 4.3 * lines), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[2.1, 1] * lines)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (picture, truth, guesses) in enumerate(rows):
        line, column = divmod(index, columns)
        image, bars = grid[2 * line][column], grid[2 * line + 1][column]
        image.imshow(picture)
        right = guesses[0][0] == truth
        image.set_title(_short(truth), fontsize=11, fontweight="bold", color="black" if right else _ORANGE)
        for place, (label, probability) in enumerate(guesses):
            color = _RED if label == truth else _BLUE
            bars.barh(-place, probability, color=color, alpha=0.55, height=0.85)
            bars.text(0.015, -place, _short(label), va="center", fontsize=9)
        bars.set(xlim=(0, 1), ylim=(-4.6, 0.6))
    return png(figure)


def neighbours(rows: Sequence[Sequence[tuple[Pixels, str]]]) -> bytes:
    """Queries (first column) and their nearest training images: the paper's figure 4, right."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(11, 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row:
            axes.set_axis_off()
        for column, (axes, (picture, label)) in enumerate(zip(axes_row, row, strict=False)):
            axes.imshow(picture)
            same = label == row[0][1]
            axes.set_title(
                _short(label, 18),
                fontsize=8,
                fontweight="bold" if column == 0 else "normal",
                color="black" if same else _ORANGE,
            )
    return png(figure)


def classes(rows: Sequence[ClassAccuracy]) -> bytes:
    """Top-1 accuracy of each class with its interval, best first; of many classes, the ends of the list."""
    ranked = sorted(
        (row for row in rows if row.top1.of), key=lambda row: (-row.top1.share, -row.top5.share, row.label)
    )
    if len(ranked) > _MANY_CLASSES:
        half = _MANY_CLASSES // 2
        ranked = ranked[:half] + ranked[-half:]
    figure = Figure(figsize=(11, 0.9 + 0.24 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(ranked))
    share = np.array([100 * row.top1.share for row in ranked])
    low = share - np.array([100 * row.top1.low for row in ranked])
    high = np.array([100 * row.top1.high for row in ranked]) - share
    axes.barh(
        places, [100 * row.top5.share for row in ranked], color=_GREY, alpha=0.5, height=0.75, label="top-5"
    )
    axes.barh(places, share, color=_BLUE, height=0.75, label="top-1, with its 95 % interval")
    axes.errorbar(share, places, xerr=np.maximum(0, [low, high]), fmt="none", ecolor="black", elinewidth=0.8)
    axes.set_yticks(places, [_short(row.label) for row in ranked], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
    return png(figure)


def _short(label: str, limit: int = 26) -> str:
    """The first name of a class, cut to fit; a dollar sign would start mathematics."""
    name = label.partition(",")[0].strip().replace("$", r"\$")
    return name if len(name) <= limit else name[: limit - 1] + "…"
