import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from topfive_training.demo_images import FIGURES, demo_images, draw_picture


def contents(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.jpg"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_makes_class_folders_of_assorted_jpegs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_images(tmp_path / "set", classes=10, per_class=5)

    assert sorted(p.name for p in (tmp_path / "set" / "train").iterdir()) == sorted(FIGURES)
    assert sorted(p.name for p in (tmp_path / "set" / "val").iterdir()) == sorted(FIGURES)
    files = contents(tmp_path / "set")
    assert len(files) == 10 * (5 + 1)
    assert len(set(files.values())) == len(files), "two pictures are the same"
    sizes = set()
    for name in files:
        with Image.open(tmp_path / "set" / name) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            assert all(250 <= side <= 400 for side in image.size)
            sizes.add(image.size)
    assert len(sizes) > 20
    assert "60 pictures of 10 classes" in capsys.readouterr().out


def test_the_same_seed_draws_the_same_set_whether_on_one_process_or_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 240 pictures take the pool's path; os.cpu_count of 1 the other.
    demo_images(tmp_path / "many", classes=2, per_class=100, seed=3)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    demo_images(tmp_path / "one", classes=2, per_class=100, seed=3)
    demo_images(tmp_path / "other", classes=2, per_class=5, seed=4)

    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert not set(contents(tmp_path / "one").values()) & set(contents(tmp_path / "other").values())


def test_mean_color_does_not_give_the_class_away(tmp_path: Path) -> None:
    def mean_colors(split: str) -> tuple[Any, Any]:
        points, labels = [], []
        for label, figure in enumerate(FIGURES):
            for number in range(20):
                path = tmp_path / "picture.jpg"
                path.write_bytes(draw_picture(figure, f"{split}/{figure}/{number}"))
                with Image.open(path) as image:
                    points.append(np.asarray(image, dtype=np.float64).mean(axis=(0, 1)))
                labels.append(label)
        return np.array(points), np.array(labels)

    train, labels = mean_colors("train")
    test, truth = mean_colors("val")
    nearest = labels[((test[:, None] - train[None]) ** 2).sum(-1).argmin(1)]
    assert (nearest == truth).mean() < 0.25  # chance is 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"classes": 1}, "classes is 1; it must be between 2 and 10"),
        ({"classes": 11}, "classes is 11; it must be between 2 and 10"),
        ({"per_class": 0}, "per_class is 0; it must be between 1 and 99,999"),
    ],
)
def test_refuses_numbers_out_of_range(tmp_path: Path, arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        demo_images(tmp_path / "set", **arguments)
    assert not list(tmp_path.iterdir())


def test_never_touches_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        demo_images(tmp_path / "set", classes=2, per_class=1)
    assert (tmp_path / "set" / "mine.txt").read_text() == "keep"


def test_leaves_nothing_behind_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(figure: str, key: str) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("topfive_training.demo_images.draw_picture", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_images(tmp_path / "set", classes=2, per_class=1)
    assert not list(tmp_path.iterdir())
