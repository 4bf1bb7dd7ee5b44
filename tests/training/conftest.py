"""Photographs to train on, made here, and the command line as a user calls it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("blue", "green", "red")


def paint_photographs(folder: Path, images: int, *, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """`images` noisy JPEGs for each class, told apart by their colour."""
    generator = np.random.default_rng(seed)
    for channel, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            pixels = generator.integers(0, 120, (150, 200, 3), np.uint8)
            pixels[..., 2 - channel % 3] += 120
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten photographs."""
    return paint_photographs(tmp_path_factory.mktemp("photographs"), 10)


Command = Callable[..., list[str]]


def train_command(data: Path, out: Path, *options: str) -> list[str]:
    """`topfive train` of a network of the smallest width."""
    program = [sys.executable, "-c", "import sys; from topfive.cli import main; sys.exit(main())"]
    return [*program, "train", str(data), "--out", str(out), "--width", "0.02", "--batch-size", "4", *options]


def run(command: list[str], *, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, on one thread so that results are the same to the bit."""
    return subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
