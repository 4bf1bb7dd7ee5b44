"""The corpus holds what it promises."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from topfive.model_spec import Preprocessing
from topfive.preprocessing import FORMATS
from topfive_export.corpus import decoded, drawn_pictures, given_pictures, raw_pixels
from topfive_export.variant import ExportError


def _save(path: Path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)


def test_drawn_pictures_cover_every_format_and_kind_of_pixel() -> None:
    pictures = drawn_pictures()
    images = [Image.open(io.BytesIO(picture.data)) for picture in pictures]
    assert {image.format for image in images} == set(FORMATS)
    assert {"L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "1"} <= {image.mode for image in images}
    orientations = {image.getexif().get(0x0112) for image in images}
    assert set(range(2, 9)) <= orientations
    sizes = {image.size for image in images}
    assert {(1, 300), (300, 1), (1, 1)} <= sizes
    assert len({picture.name for picture in pictures}) == len(pictures) >= 40
    assert all(picture.drawn and picture.label is None for picture in pictures)


def test_drawn_pictures_are_the_same_every_time_and_differ_after_decoding() -> None:
    first, second = drawn_pictures(), drawn_pictures()
    assert [picture.sha256 for picture in first] == [picture.sha256 for picture in second]
    squares = decoded(first, Preprocessing(), 227)
    assert squares.shape == (len(first), 227, 227, 3)
    assert squares.dtype == np.uint8
    assert len({square.tobytes() for square in squares}) > 0.8 * len(first)


def test_raw_pixels_are_those_of_the_lossless_file() -> None:
    pairs = raw_pixels(drawn_pictures(), max_pixels=200_000)
    assert all(pixels.shape[0] * pixels.shape[1] <= 200_000 for _, pixels in pairs)
    for picture, pixels in pairs:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.data))), pixels)


def test_given_pictures_are_labelled_by_folder_and_spread_evenly(tmp_path: Path) -> None:
    for index in range(6):
        _save(tmp_path / "val" / "cat" / f"{index}.png", "red")
        _save(tmp_path / "val" / "dog" / f"{index}.jpg", "blue")
    _save(tmp_path / "elsewhere.png", "green")
    (tmp_path / "val" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    (tmp_path / "notes.txt").write_text("no image")
    _save(tmp_path.parent / f"{tmp_path.name}-far" / "linked.png", "white")
    (tmp_path / "val" / "bird").symlink_to(tmp_path.parent / f"{tmp_path.name}-far")
    said: list[str] = []
    pictures = given_pictures(tmp_path, ["dog", "cat"], limit=100, say=said.append)
    assert said == [
        f"of 15 images in --images {tmp_path} 1 cannot be decoded and will be left out: val/cat/broken.jpg"
    ]
    labels = {picture.name: picture.label for picture in pictures}
    assert labels["val/cat/0.png"] == 1
    assert labels["val/dog/5.jpg"] == 0
    assert labels["elsewhere.png"] is None
    assert "val/cat/broken.jpg" not in labels
    assert "val/bird/linked.png" in labels
    assert len(pictures) == 14
    few = given_pictures(tmp_path, ["dog", "cat"], limit=4)
    assert {picture.label for picture in few} >= {0, 1}


def test_a_folder_without_usable_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a folder"):
        given_pictures(tmp_path / "nowhere", [], limit=5)
    with pytest.raises(ExportError, match="holds no images"):
        given_pictures(tmp_path, [], limit=5)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ExportError, match="can be decoded"):
        given_pictures(tmp_path, [], limit=5)
