"""Files that would keep a decoder for seconds or fill the memory: refused by how they are built, and soon."""

import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.client import costly_files

from topfive import _file_limits
from topfive.model_spec import Preprocessing
from topfive.preprocessing import CorruptImageError, ImageTooLargeError, UnsupportedFormatError, decode

SMALL = Preprocessing(short_side=32, crop=27)


def refused(data: bytes, **options: int) -> str:
    with pytest.raises(CorruptImageError) as caught:
        decode(data, SMALL, **options)
    return str(caught.value)


@pytest.mark.parametrize("scans", [costly_files.jpeg_scans, costly_files.jpeg_sequential_scans])
def test_a_jpeg_of_hundreds_of_scans(scans: Callable[[int], bytes]) -> None:
    assert decode(scans(480), SMALL).width == 48
    assert "more than 500 scans" in refused(scans(500))


def test_a_jpeg_may_have_fewer_scans_the_larger_it_is() -> None:
    data = costly_files.jpeg_scans(30)
    pixels = 48 * 40
    assert decode(data, SMALL, max_pixels=2 * pixels).width == 48
    assert "more than 20 scans" in refused(data, max_pixels=pixels)
    with pytest.raises(ImageTooLargeError):
        decode(data, SMALL, max_pixels=pixels - 1)


def test_what_encoders_write_at_the_full_size_is_decoded() -> None:
    for mode, pixels in (("L", 1_920), ("RGB", 1_920), ("CMYK", 1_920)):
        file = io.BytesIO()
        Image.new(mode, (48, 40)).save(file, "JPEG", progressive=True, subsampling=0)
        assert decode(file.getvalue(), SMALL, max_pixels=pixels).width == 48


def test_scans_after_the_picture_are_not_counted() -> None:
    """Motion photos have a film there, and multi-picture files further pictures."""
    photo = costly_files.jpeg_scans(0)
    assert decode(photo + b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 1000, SMALL).format == "JPEG"
    assert decode(photo + photo * 200, SMALL).format == "JPEG"


def test_scans_in_a_segment_are_not_counted_and_do_not_end_the_count() -> None:
    photo = costly_files.jpeg_scans(0)
    thumbnail = b"\xff\xe2\x03\xea" + b"\xff\xda" * 500
    assert decode(photo[:2] + thumbnail * 3 + photo[2:], SMALL).format == "JPEG"
    last = photo.rindex(b"\xff\xda")
    hidden = photo[:last] + b"\xff\xe1\x00\x04\xff\xd9" + photo[last:-2] * 600 + photo[-2:]
    assert "more than 500 scans" in refused(hidden)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (costly_files.jpeg_segments(100_001), "100,000 segments"),
        (costly_files.jpeg_segments(65, 0xE1, b"Exif\0\0" + bytes(9)), "64 EXIF segments or tables"),
        (costly_files.jpeg_segments(65, 0xDB, bytes(65)), "64 EXIF segments or tables"),
        (costly_files.jpeg_fill(250_001), "250,000 pieces"),
        (costly_files.png_chunks(100_001), "100,000 chunks"),
        (costly_files.png_chunks(100_001, b"IDAT", b""), "100,000 chunks"),
        (costly_files.png_profiles(257, 10), "256 compressed texts or profiles"),
        (costly_files.gif_blocks(130_000), "250,000 pieces"),
        (costly_files.bmp_run_lengths((48, 40), b"\0\2\0\0" * 90_000), "250,000 pieces"),
        (costly_files.tiff(16, 16, 1, bytes(256), strips=1, more_tags=5000), "4,096 tags"),
        (costly_files.bigtiff_tags(5000), "4,096 tags"),
        (costly_files.tiff(1, 100_001, 1, bytes(1), strips=100_001), "100,000 strips"),
        (costly_files.tiff_of_nothing(900_000, 300), "overlap"),
    ],
    ids=str.split(
        "app-segments exif-segments tables fill-bytes chunks empty-idat profiles gif-blocks bmp-deltas"
        " tags bigtiff-tags strips overlapping-strips"
    ),
)
def test_more_pieces_than_any_usual_file_has(data: bytes, words: str) -> None:
    message = refused(data)
    assert words in message
    assert "save it again as JPEG or PNG" in message


def test_as_many_pieces_as_large_files_have() -> None:
    profile = b"ICC_PROFILE\0" + bytes(100)
    for data in (
        costly_files.jpeg_segments(255 + 500, 0xE2, profile),
        costly_files.png_chunks(10_000),
        costly_files.png_profiles(200, 1000),
        costly_files.gif_blocks(50_000),
        costly_files.tiff(16, 20_000, 1, bytes(16), strips=20_000),
        costly_files.tiff_of_nothing(100, 20_000),
    ):
        assert decode(data, SMALL).image.size == (27, 27)


def test_pixels_that_cost_more_count_as_more() -> None:
    run_lengths = costly_files.bmp_run_lengths((40, 40), b"\x28\1\0\0" * 40 + b"\0\1")
    jpeg_in_tiff = costly_files.tiff(40, 40, 7, costly_files.jpeg_scans(30, (40, 40)), strips=1)
    webp = io.BytesIO()
    Image.new("RGB", (40, 40)).save(webp, "WEBP")
    for data, cost in ((run_lengths, 16), (jpeg_in_tiff, 4), (webp.getvalue(), 2)):
        assert decode(data, SMALL, max_pixels=40 * 40 * cost).width == 40
        with pytest.raises(ImageTooLargeError, match=rf"the limit for this kind of \w+ is {1600 - 1:,}"):
            decode(data, SMALL, max_pixels=40 * 40 * cost - 1)


def test_a_row_of_a_few_pixels_costs_as_much_as_one_of_sixteen() -> None:
    """Pillow has a pointer for each row, which was a gigabyte at 1 x 88,000,000."""
    file = io.BytesIO()
    Image.new("L", (1, 1000)).save(file, "PNG")
    assert decode(file.getvalue(), SMALL, max_pixels=16_000).height == 1000
    with pytest.raises(
        ImageTooLargeError, match="1 x 1000 = 1,000 pixels; the limit for this kind of PNG is 999"
    ):
        decode(file.getvalue(), SMALL, max_pixels=15_999)


def test_the_bounds_are_in_force_while_pillow_reads() -> None:
    file = _file_limits.MeteredFile(b"abc")
    assert file.read(2) == b"ab"
    assert file.read() == b"c"
    for _ in range(_file_limits.MAX_READS - 2):
        file.read(1)
    with pytest.raises(_file_limits.CostlyFileError):
        file.read(1)


def test_libjpeg_has_the_whole_file_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a piece at a time it starts the block that it could not finish again with each: the square of their number."""
    file = io.BytesIO()
    Image.effect_noise((48, 40), 50).save(file, "JPEG")
    data = file.getvalue()
    monkeypatch.setattr(_file_limits, "MAX_READS", 60)
    # The last blocks are missing, and what should be theirs is fill.
    assert decode(data[:-9] + b"\xff" * 8_000_000 + data[-2:], SMALL).width == 48


PEAK = """
import resource, sys
from topfive.model_spec import Preprocessing
from topfive.preprocessing import decode
peaks = []
for path in sys.argv[1:]:
    decode(open(path, "rb").read(), Preprocessing())
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_the_peak_is_eight_bytes_a_pixel(mode: str, tmp_path: Path) -> None:
    """Above what the same process had after a small image, so that what is loaded once does not count."""
    side = 3000
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    for path, size in zip(paths, (64, side), strict=True):
        image = Image.new(mode, (size, size))
        if mode == "P":
            image.info["transparency"] = 0
        image.save(path, compress_level=1)
    # By way of a shell that stays: ru_maxrss begins, across an exec, with that of the process that forked.
    run = subprocess.run(
        ["sh", "-c", '"$@"; exit "$?"', "sh", sys.executable, "-c", PEAK, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) * 1024 < 8 * side * side + 40_000_000


@pytest.mark.parametrize("size", [(1900, 1301), (1301, 1900), (3, 2000), (2000, 3), (40, 30)])
@pytest.mark.parametrize("crop", [227, 256, 1])
def test_bands_give_the_same_bytes_as_the_whole_at_once(size: tuple[int, int], crop: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    file = io.BytesIO()
    rgba.save(file, "PNG", compress_level=0)
    white = Image.new("RGBA", size, (255, 255, 255, 255))
    side = min(size) * crop / 256
    box = (
        (size[0] - side) / 2,
        (size[1] - side) / 2,
        (size[0] - side) / 2 + side,
        (size[1] - side) / 2 + side,
    )
    whole = Image.alpha_composite(white, rgba).convert("RGB")
    expected = whole.resize((crop, crop), Image.Resampling.BILINEAR, box=box)
    assert decode(file.getvalue(), Preprocessing(), crop=crop).image.tobytes() == expected.tobytes()


def test_messages_say_what_to_do_and_name_no_part_of_the_decoder() -> None:
    text = costly_files.png_chunks(1, b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))
    assert refused(text) == (
        "the image's texts or color profile are too large (1 MB each, inflated); save it without them"
    )
    png = costly_files.png_chunks(0)
    assert refused(png[: len(png) // 2]) == "the image is truncated; send the whole file"
    damaged = png.replace(b"IDAT", b"IDAT" + b"\0" * 20, 1)
    assert refused(damaged) == (
        "the image is corrupt, or of a kind that cannot be decoded; save it again as JPEG or PNG"
    )
    with pytest.raises(UnsupportedFormatError, match="save it as JPEG or PNG"):
        decode(b"GIMP", SMALL)
    with pytest.raises(ImageTooLargeError, match="send a smaller copy"):
        decode(png, SMALL, max_pixels=10)
