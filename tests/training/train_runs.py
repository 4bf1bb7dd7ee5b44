"""Photographs to train on, made here, and the command line as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")
_PROGRAM = "import sys; from topfive.cli import main; sys.exit(main())"


def paint_photographs(folder: Path, images: int, *, classes: tuple[str, ...] = CLASSES) -> Path:
    """`images` noisy JPEGs for each class, told apart by their colour."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            pixels = generator.integers(0, 120, (150, 200, 3), np.uint8)
            pixels[..., 2 - channel % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.jpg", quality=90)
    return folder


def train_command(data: Path, out: Path, *options: str) -> list[str]:
    """`topfive train` of a very narrow network."""
    return [sys.executable, "-c", _PROGRAM, *train_words(data, out, *options)]


def train_words(data: Path, out: Path, *options: str) -> list[str]:
    """The same without the program, for `topfive.cli.main`."""
    return ["train", str(data), "--out", str(out), "--width", "0.02", "--batch-size", "4", *options]


def environment() -> dict[str, str]:
    """One thread for each process, so that sums are made in one order and results are the same to the bit."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
