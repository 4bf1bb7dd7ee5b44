"""`topfive demo-images`: photographs to try everything on, drawn instead of downloaded.

Ten kinds of figure, each with random colours, size, place, angle, background, clutter, blur and noise, so that no mean
colour gives a class away: a network has to learn shape and texture. The folders are what `topfive train` reads:
`DEST/train/<class>/*.jpg` and `DEST/val/<class>/*.jpg`. The same seed draws the same pictures on any number of cores.
"""

import io
import math
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from rich.progress import track

VAL_SHARE: Final = 5
"""One validation picture for so many training pictures (at least one)."""
_SIDE_MIN, _SIDE_MAX = 250, 400
_IMAGES_PER_TASK: Final = 25

Point: TypeAlias = tuple[float, float]
Color: TypeAlias = tuple[int, int, int]


class Stage(NamedTuple):
    """Where one figure is drawn: a mask of the picture's size, and the figure's random placement on it."""

    mask: Image.Image
    """L, 0 outside the figure and 255 on it."""
    rng: random.Random
    center: Point
    """Pixels."""
    radius: float
    """Pixels; the figure stays within about this distance of `center`."""
    angle: float
    """Radians."""

    def draw(self) -> ImageDraw.ImageDraw:
        """A pen on the mask."""
        return ImageDraw.Draw(self.mask)

    def at(self, distance: float, angle: float) -> Point:
        """The point at `distance` radii from the centre, `angle` radians on from the figure's own angle."""
        x, y = self.center
        turn = self.angle + angle
        return x + self.radius * distance * math.cos(turn), y + self.radius * distance * math.sin(turn)


def _disc(stage: Stage) -> None:
    stage.draw().circle(stage.center, stage.radius * 0.85, fill=255)


def _ring(stage: Stage) -> None:
    width = stage.radius * stage.rng.uniform(0.2, 0.35)
    stage.draw().circle(stage.center, stage.radius * 0.95, outline=255, width=round(width))


def _triangle(stage: Stage) -> None:
    stage.draw().polygon([stage.at(1.05, i * math.tau / 3) for i in range(3)], fill=255)


def _square(stage: Stage) -> None:
    stage.draw().polygon([stage.at(1.05, i * math.tau / 4) for i in range(4)], fill=255)


def _star(stage: Stage) -> None:
    corners = [stage.at(0.42 if i % 2 else 1.1, i * math.tau / 10) for i in range(10)]
    stage.draw().polygon(corners, fill=255)


def _cross(stage: Stage) -> None:
    arm = stage.rng.uniform(0.2, 0.3)
    pen, length, corner = stage.draw(), math.hypot(1, arm), math.atan2(arm, 1)
    for quarter in (0.0, math.tau / 4):
        turns = (corner, math.pi - corner, math.pi + corner, -corner)
        pen.polygon([stage.at(length, quarter + turn) for turn in turns], fill=255)


def _stripes(stage: Stage) -> None:
    pen, count = stage.draw(), stage.rng.randint(3, 6)
    for i in range(count):
        across = (2 * i + 1) / count - 1
        half = 0.5 / count
        corners = ((-1.0, across - half), (1.0, across - half), (1.0, across + half), (-1.0, across + half))
        pen.polygon([stage.at(math.hypot(x, y), math.atan2(y, x)) for x, y in corners], fill=255)


def _checkerboard(stage: Stage) -> None:
    pen, count = stage.draw(), stage.rng.randint(4, 6)
    cell = 2 / count
    for row in range(count):
        for column in range(row % 2, count, 2):
            left, top = column * cell - 1, row * cell - 1
            square = ((left, top), (left + cell, top), (left + cell, top + cell), (left, top + cell))
            pen.polygon([stage.at(math.hypot(x, y), math.atan2(y, x)) for x, y in square], fill=255)


def _waves(stage: Stage) -> None:
    pen, count = stage.draw(), stage.rng.randint(2, 4)
    width = round(stage.radius * stage.rng.uniform(0.12, 0.2))
    periods = stage.rng.uniform(2, 3)
    for i in range(count):
        across = (2 * i + 1) / count - 1
        line = []
        for step in range(49):
            x = step / 24 - 1
            y = across + 0.5 / count * math.sin(periods * math.pi * x)
            line.append(stage.at(math.hypot(x, y), math.atan2(y, x)))
        pen.line(line, fill=255, width=width, joint="curve")


def _spiral(stage: Stage) -> None:
    turns = stage.rng.uniform(2.2, 3.2)
    sense = stage.rng.choice((-1, 1))
    line = [stage.at(step / 120, sense * turns * math.tau * step / 120) for step in range(5, 121)]
    stage.draw().line(line, fill=255, width=round(stage.radius * 0.15), joint="curve")


FIGURES: Final[dict[str, Callable[[Stage], None]]] = {
    "checkerboard": _checkerboard,
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "spiral": _spiral,
    "square": _square,
    "star": _star,
    "stripes": _stripes,
    "triangle": _triangle,
    "waves": _waves,
}
"""Class name -> what draws it, in the order of the classes."""


def draw_picture(figure: str, key: str) -> bytes:
    """Draw one picture of `figure` as JPEG bytes; the same `key` gives the same bytes.

    Args:
        figure: one of `FIGURES`.
        key: seeds every random choice.
    """
    rng = random.Random(key)  # noqa: S311  pictures, not secrets
    width, height = rng.randint(_SIDE_MIN, _SIDE_MAX), rng.randint(_SIDE_MIN, _SIDE_MAX)
    short = min(width, height)
    radius = short * rng.uniform(0.24, 0.4)
    # The network sees the central square only.
    slack = max(0.0, short * 0.47 - radius)
    center = (width / 2 + rng.uniform(-slack, slack), height / 2 + rng.uniform(-slack, slack))
    mask = Image.new("L", (width, height), 0)
    FIGURES[figure](Stage(mask, rng, center, radius, rng.uniform(0, math.tau)))
    ground, ink = _contrasting_colors(rng)
    picture = _background(rng, (width, height), ground, ink)
    picture.paste(_shaded(rng, (width, height), ink), mask=mask)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 1.5)))
    picture = _with_noise(rng, picture)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=rng.randint(80, 95))
    return file.getvalue()


def _contrasting_colors(rng: random.Random) -> tuple[Color, Color]:
    """Two random colours far enough apart for a figure to be seen; either may be the lighter."""
    while True:
        first, second = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if math.dist(first, second) > 120:
            return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def _shaded(rng: random.Random, size: tuple[int, int], color: Color) -> Image.Image:
    """A surface that runs smoothly between shades of one colour: four random corners, interpolated."""
    corners = Image.new("RGB", (2, 2))
    for place in ((0, 0), (1, 0), (0, 1), (1, 1)):
        shade = rng.randint(-30, 30)
        corners.putpixel(place, tuple(min(255, max(0, channel + shade)) for channel in color))
    return corners.resize(size, Image.Resampling.BILINEAR)


def _background(rng: random.Random, size: tuple[int, int], ground: Color, ink: Color) -> Image.Image:
    """A shaded ground with clutter, some of it in the figure's own colour, so that neither colour nor edges suffice."""
    picture = _shaded(rng, size, ground)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(0, 8)):
        share = rng.uniform(0.25, 0.6)
        color = tuple(round(g + share * (i - g)) for g, i in zip(ground, ink, strict=True))
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        dx, dy = (rng.uniform(-0.15, 0.15) * side for side in size)
        if rng.random() < 0.5:
            pen.line((x, y, x + dx, y + dy), fill=color, width=rng.randint(2, 6))
        else:
            pen.polygon([(x, y), (x + dx, y), (x, y + dy)], fill=color)
    return picture


def _with_noise(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Grey grain of a random strength, from one tile of normal noise that is shifted and mirrored."""
    strength = rng.uniform(0, 14)
    tile = np.random.default_rng(rng.getrandbits(64)).standard_normal((128, 128), dtype=np.float32)
    grain = np.clip(128 + strength * tile, 0, 255).astype(np.uint8)
    across = math.ceil(picture.width / 128)
    down = math.ceil(picture.height / 128)
    sheet = Image.fromarray(np.tile(grain, (down, across))[: picture.height, : picture.width])
    return ImageChops.add(picture, Image.merge("RGB", (sheet, sheet, sheet)), 1, -128)


class _Task(NamedTuple):
    folder: Path
    figure: str
    key: str
    """Shared by every picture of the split; the class and the number complete it."""
    numbers: range


def _draw_task(task: _Task) -> int:
    for number in task.numbers:
        path = task.folder / f"{task.figure}_{number:05d}.jpg"
        path.write_bytes(draw_picture(task.figure, f"{task.key}/{task.figure}/{number}"))
    return len(task.numbers)


def _tasks(root: Path, names: list[str], per_class: int, seed: int) -> Iterator[_Task]:
    for split, count in (("train", per_class), ("val", max(1, per_class // VAL_SHARE))):
        for figure in names:
            folder = root / split / figure
            folder.mkdir(parents=True)
            for start in range(0, count, _IMAGES_PER_TASK):
                numbers = range(start, min(count, start + _IMAGES_PER_TASK))
                yield _Task(folder, figure, f"{seed}/{split}", numbers)


def demo_images(dest: Path, *, classes: int = 10, per_class: int = 100, seed: int = 0) -> None:
    """Draw a set of labelled pictures to try everything on.

    Writes DEST/train/CLASS/ and DEST/val/CLASS/ with JPEG files, one validation picture for every five to train on.
    The folder appears complete or not at all.

    Args:
        dest: Folder to make; it must not exist yet, or be empty.
        classes: Number of classes, 2 to 10.
        per_class: Training pictures of each class.
        seed: Another seed draws other pictures.

    Raises:
        ValueError: a number out of range.
        FileExistsError: `dest` is not empty.
    """
    if not 2 <= classes <= len(FIGURES):
        raise ValueError(f"classes is {classes}; it must be between 2 and {len(FIGURES)}")
    if not 1 <= per_class <= 99_999:
        raise ValueError(f"per_class is {per_class}; it must be between 1 and 99,999")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise FileExistsError(
            f"{dest} already exists and is not an empty folder; name another, or remove it first"
        )
    partial = dest.with_name(f".{dest.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        tasks = list(_tasks(partial, list(FIGURES)[:classes], per_class, seed))
        total = _draw_all(tasks)
        partial.replace(dest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{total:,} pictures of {classes} classes are in {dest}")  # noqa: T201  the command's answer


def _draw_all(tasks: list[_Task]) -> int:
    workers = min(os.cpu_count() or 1, len(tasks))
    total = sum(len(task.numbers) for task in tasks)

    def with_progress(counts: Iterable[int]) -> int:
        return sum(track(counts, f"Drawing {total:,} pictures", total=len(tasks), transient=True))

    if workers == 1 or total < 200:  # starting processes takes longer
        return with_progress(map(_draw_task, tasks))
    context = multiprocessing.get_context("spawn")
    # Ctrl-C is this process's to handle: it cancels what is pending and removes what was drawn.
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return with_progress(pool.map(_draw_task, tasks))
