"""A folder of pictures and a classifier for the tests of scoring; run as a script, it is a job that can be killed.

The classifier's answer is a function of the pixels, so a row that got another file's answer shows.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from topfive.model_spec import Architecture, ModelSpec, Preprocessing
from topfive.scoring import JobConfig, LocalScorer, Source, run_job

CLASSES = 8
FILES = 203
REPOSITORY = Path(__file__).parents[2]


def color_of(index: int) -> tuple[int, int, int]:
    """A color of its own for each of 4096 files; 16 levels apart, so that JPEG cannot confuse two."""
    return (index % 16 * 16, index // 16 % 16 * 16, index // 256 % 16 * 16)


def draw_folder(folder: Path, count: int) -> Path:
    """`count` one-colored PNGs in ten sub-folders."""
    for index in range(count):
        path = folder / f"batch{index % 10}" / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + index % 7, 30), color_of(index)).save(path)
    return folder


class FakeClassifier:
    """Class and probability from the color of the middle pixel."""

    def __init__(
        self, *, version: str = "1", delay_s: float = 0.0, quick_images: int = 0, max_batch: int = 8
    ) -> None:
        self.spec = ModelSpec(
            architecture=Architecture(classes=CLASSES),
            preprocessing=Preprocessing(),
            labels=tuple(f"color, {i}" for i in range(CLASSES)),
        )
        self.name = "fake"
        self.version = version
        self.fingerprint = f"fingerprint of {version}"
        self.max_batch = max_batch
        self.delay_s = delay_s
        self.quick_images = quick_images
        self.batches: list[int] = []
        self.closed = False

    def classify_batch(
        self, squares: Sequence[Image.Image], top_k: int = 5
    ) -> list[list[tuple[str, int, float]]]:
        """See the class."""
        self.batches.append(len(squares))
        assert {square.size for square in squares} == {(227, 227)}
        if sum(self.batches) > self.quick_images:
            time.sleep(self.delay_s)
        return [self.answer(square.getpixel((100, 100)), top_k) for square in squares]

    def answer(self, pixel: object, top_k: int) -> list[tuple[str, int, float]]:
        """What a picture of this color is."""
        assert isinstance(pixel, tuple)
        red, green, blue = pixel
        code = (red // 16) + 16 * (green // 16) + 256 * (blue // 16)
        first = code % CLASSES
        return [
            (self.spec.labels[(first + rank) % CLASSES], (first + rank) % CLASSES, code / 4096 / 3**rank)
            for rank in range(top_k)
        ]

    def close(self) -> None:
        """See the class."""
        self.closed = True


def score_with(
    classifier: FakeClassifier,
    folder: Path | str,
    output: Path,
    config: JobConfig | None = None,
    **more: object,
) -> object:
    """`run_job` with the engine in process."""
    config = config or JobConfig()

    def open_scorer(source: Source) -> LocalScorer:
        return LocalScorer(
            classifier, source, top_k=config.top_k, max_pixels=config.max_pixels, decode_threads=2
        )

    return run_job(str(folder), output, open_scorer, config=config, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("photos"), FILES)


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")

    def results(suffix: str) -> bytes:
        output = folder / f"results{suffix}"
        if not output.exists():
            score_with(FakeClassifier(), photos, output)
        return output.read_bytes()

    return results


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def saved_rows(output: Path) -> int:
    parts = output.with_name(output.name + ".parts").glob("*-*.jsonl")
    return max((int(part.stem.split("-")[1]) for part in parts), default=0)


def copy_of(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


if __name__ == "__main__":
    # The folder, the output, and after how many images to hang (so that a test can kill it in mid-job, however slow
    # the machine that watches it is); and "dedupe", or nothing.
    score_with(
        FakeClassifier(delay_s=300, quick_images=int(sys.argv[3])),
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        JobConfig(save_every_s=0, dedupe="dedupe" in sys.argv),
    )
