"""`decode` against the textbook: every pixel decoded, then resized by a slow and obviously right resampler."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from topfive import TopfiveError
from topfive.model_spec import Preprocessing
from topfive.preprocessing import (
    FORMATS,
    CorruptImageError,
    Decoded,
    ImageError,
    ImageTooLargeError,
    UnsupportedFormatError,
    decode,
)

# H, W, C: height, width, channels of the source; S: side of the result.
Pixels: TypeAlias = NDArray[Any]

SETTINGS = Preprocessing()
SMALL = Preprocessing(short_side=32, crop=27)


def smooth(width: int, height: int, channels: int = 3) -> Pixels:
    """uint8 [H, W, C]: slow waves, other in each channel and without any symmetry."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [127.5 + 120 * np.sin(3 * x + 2 * c + 1) * np.cos((2 + c) * y + 0.5) for c in range(channels)]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


def axis_weights(size: int, start: float, length: float, outputs: int) -> Pixels:
    """[outputs, size]: the antialiased triangle filter over `length` source pixels from `start`."""
    scale = length / outputs
    support = max(scale, 1.0)
    centers = start + (np.arange(outputs)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(size)[None] + 0.5 - centers) / support)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def textbook(pixels_HWC: Pixels, short_side: int, crop: int) -> Pixels:
    """float64 [S, S, C]: the shorter side to `short_side`, then the central `crop` square, in exact geometry."""
    height, width = pixels_HWC.shape[:2]
    square = min(width, height) * crop / short_side
    rows = axis_weights(height, (height - square) / 2, square, crop)
    columns = axis_weights(width, (width - square) / 2, square, crop)
    squeezed = np.tensordot(rows, pixels_HWC.astype(np.float64), axes=1)
    return np.asarray(columns @ squeezed)


def encoded(image: Image.Image | Pixels, format_: str, **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def difference(decoded: Decoded, expected: Pixels) -> tuple[float, float]:
    """Mean and largest absolute difference, in levels of 255."""
    levels = np.abs(np.asarray(decoded.image).astype(np.float64) - expected)
    return float(levels.mean()), float(levels.max())


SIZES = [
    (500, 375),
    (375, 500),
    (227, 227),
    (256, 256),
    (100, 60),
    (61, 300),
    (1, 1),
    (3, 2),
    (2, 500),
    (1, 3000),
    (3000, 1),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(
    "options",
    [SETTINGS, SMALL, Preprocessing(short_side=300, crop=300), Preprocessing(short_side=224, crop=1)],
)
def test_lossless_images_are_within_a_level_of_the_textbook(
    width: int, height: int, options: Preprocessing
) -> None:
    pixels = smooth(width, height)
    decoded = decode(encoded(pixels, "PNG"), options)
    assert decoded.image.mode == "RGB"
    assert decoded.image.size == (options.crop, options.crop)
    assert (decoded.width, decoded.height, decoded.format) == (width, height, "PNG")
    _, worst = difference(decoded, textbook(pixels, options.short_side, options.crop))
    assert worst <= 1.5


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 400), height=st.integers(1, 400), crop=st.integers(1, 32), seed=st.integers(0, 99)
)
def test_any_size_even_of_noise_is_within_a_level_of_the_textbook(
    width: int, height: int, crop: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    decoded = decode(encoded(pixels, "BMP"), SMALL, crop=crop)
    _, worst = difference(decoded, textbook(pixels, SMALL.short_side, crop))
    assert worst <= 1.5


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (640, 480), (1024, 768), (1537, 1025), (777, 2000), (3264, 2448)]
)
def test_scaled_jpeg_decoding_agrees_with_decoding_everything(width: int, height: int) -> None:
    data = encoded(smooth(width, height), "JPEG", quality=92)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    mean, worst = difference(decode(data, SETTINGS), textbook(whole, 256, 227))
    assert mean <= 1.0
    assert worst <= 4.0


@pytest.mark.parametrize(("width", "height"), [(1537, 1025), (2057, 1033), (1100, 1031)])
def test_scaled_decoding_keeps_fine_detail_in_its_place(width: int, height: int) -> None:
    """Sizes that a scaled decode rounds up, and detail as fine as the result can show.

    Measured here: mean 1.0, at most 6.5. With half the margin, or without the exact box: mean 4 to 6, up to 33.
    """
    grid = (height * 200 // min(width, height), width * 200 // min(width, height), 3)
    noise = np.random.default_rng(0).integers(40, 216, grid, dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    data = encoded(image, "JPEG", quality=95, subsampling=0)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    mean, worst = difference(decode(data, SETTINGS), textbook(whole, 256, 227))
    assert mean <= 1.5
    assert worst <= 10


def test_the_usual_recipe_in_whole_pixels_agrees_on_smooth_images() -> None:
    """As others write it: `resize` to a rounded size, `crop` at whole pixels. Differs by less than a pixel's shift."""
    pixels = smooth(500, 375)
    image = Image.fromarray(pixels).resize((round(500 * 256 / 375), 256), Image.Resampling.BILINEAR)
    left, top = (image.width - 227) // 2, (256 - 227) // 2
    expected = np.asarray(image.crop((left, top, left + 227, top + 227))).astype(np.float64)
    mean, worst = difference(decode(encoded(pixels, "PNG"), SETTINGS), expected)
    assert mean <= 1.0
    assert worst <= 3.0


PHOTO = smooth(120, 90)
GREY = smooth(120, 90, 1)[:, :, 0]


def cmyk(pixels_HWC: Pixels) -> Image.Image:
    """Complements without black, which is how Pillow and everybody without a color profile reads CMYK."""
    ink = np.concatenate([255 - pixels_HWC, np.zeros_like(pixels_HWC[:, :, :1])], axis=-1)
    return Image.frombytes("CMYK", (ink.shape[1], ink.shape[0]), ink.tobytes())


def check(data: bytes, expected_HWC: Pixels, levels: float = 1.5) -> Decoded:
    """`data` decodes to the textbook's reading of `expected_HWC`."""
    if expected_HWC.ndim == 2:
        expected_HWC = np.repeat(expected_HWC[:, :, None], 3, axis=2)
    decoded = decode(data, SMALL)
    _, worst = difference(decoded, textbook(expected_HWC, SMALL.short_side, SMALL.crop))
    assert worst <= levels, f"{worst} levels off"
    return decoded


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF"])
def test_lossless_formats(format_: str) -> None:
    assert check(encoded(PHOTO, format_), PHOTO).format == format_
    check(encoded(GREY, format_), GREY)


@pytest.mark.parametrize("format_", ["JPEG", "WEBP"])
def test_lossy_formats(format_: str) -> None:
    assert check(encoded(PHOTO, format_, quality=95), PHOTO, levels=6).format == format_
    check(encoded(GREY, format_, quality=95), GREY, levels=4)


def test_lossless_webp_and_compressed_tiff() -> None:
    check(encoded(PHOTO, "WEBP", lossless=True), PHOTO)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        check(encoded(PHOTO, "TIFF", compression=compression), PHOTO)


def test_progressive_and_subsampled_jpeg() -> None:
    check(encoded(PHOTO, "JPEG", quality=95, progressive=True, subsampling=2), PHOTO, levels=6)
    check(encoded(PHOTO, "JPEG", quality=95, subsampling=0, keep_rgb=True), PHOTO, levels=6)


def test_cmyk() -> None:
    check(encoded(cmyk(PHOTO), "TIFF"), PHOTO)
    check(encoded(cmyk(PHOTO), "JPEG", quality=98), PHOTO, levels=6)


def test_bilevel() -> None:
    bits = np.where(GREY > 127, 255, 0).astype(np.uint8)
    image = Image.fromarray(bits).convert("1", dither=Image.Dither.NONE)
    for format_ in ("PNG", "BMP", "TIFF", "GIF"):
        check(encoded(image, format_), bits)


def over_white(pixels_HWC: Pixels, alpha_HW: Pixels) -> Pixels:
    alpha = alpha_HW[:, :, None].astype(np.float64) / 255
    return np.asarray(pixels_HWC * alpha + 255 * (1 - alpha))


def test_alpha_is_over_white() -> None:
    alpha = smooth(120, 90, 2)[:, :, 1]
    rgba = np.concatenate([PHOTO, alpha[:, :, None]], axis=-1)
    for format_, options in (
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True, "exact": True}),
    ):
        check(encoded(rgba, format_, **options), over_white(PHOTO, alpha), levels=2)
    check(encoded(rgba, "BMP"), PHOTO)  # whose fourth byte is padding
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    check(encoded(grey, "PNG"), over_white(GREY[:, :, None].repeat(3, axis=2), alpha), levels=2)


def test_color_under_full_transparency_does_not_bleed() -> None:
    """Green under alpha 0, beside opaque red: blending after the resize would leave a green seam."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :32] = (255, 0, 0, 255)
    rgba[:, 32:] = (0, 255, 0, 0)
    out = np.asarray(decode(encoded(rgba, "PNG"), SMALL).image).astype(int)
    assert (out[:, :, 0] >= 254).all()
    assert (np.abs(out[:, :, 1] - out[:, :, 2]) <= 1).all()


def test_palette_with_and_without_transparency() -> None:
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = (GREY // 16).astype(np.uint8)
    image = Image.frombytes("P", (120, 90), indices.tobytes())
    image.putpalette(colors.tobytes())
    for format_ in ("PNG", "GIF", "BMP", "TIFF"):
        check(encoded(image, format_), colors[indices])
    key = np.where(indices == 5, 0, 255).astype(np.uint8)
    check(encoded(image, "PNG", transparency=5), over_white(colors[indices], key), levels=2)
    check(encoded(image, "GIF", transparency=5), over_white(colors[indices], key), levels=2)
    alphas = rng.integers(0, 256, 16, dtype=np.uint8)
    check(
        encoded(image, "PNG", transparency=alphas.tobytes()),
        over_white(colors[indices], alphas[indices]),
        levels=2,
    )


def test_a_transparent_color_key() -> None:
    flat = PHOTO.copy()
    flat[20:60, 30:90] = (10, 20, 30)
    key = np.where((flat == (10, 20, 30)).all(axis=2), 0, 255).astype(np.uint8)
    check(encoded(flat, "PNG", transparency=(10, 20, 30)), over_white(flat, key), levels=2)


@pytest.mark.parametrize(("format_", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits_are_scaled_and_not_clipped(format_: str, order: str) -> None:
    wide = (smooth(120, 90, 1)[:, :, 0].astype(np.float64) * 257).astype(np.uint16)
    image = Image.fromarray(wide.astype(order))
    check(encoded(image, format_), wide / 257, levels=2)


def test_sixteen_bits_with_a_transparent_level() -> None:
    wide = (smooth(120, 90, 1)[:, :, 0].astype(np.float64) * 257).astype(np.uint16)
    wide[20:60, 30:90] = 5000
    expected = np.where(wide == 5000, 255.0, wide / 257)
    check(encoded(Image.fromarray(wide), "PNG", transparency=5000), expected, levels=2)


def test_samples_without_a_defined_range_are_refused() -> None:
    for samples in (
        np.full((9, 9), 70_000, np.int32),
        np.full((9, 9), -1, np.int32),
        np.full((9, 9), 0.5, np.float32),
    ):
        with pytest.raises(CorruptImageError, match="no defined range"):
            decode(encoded(samples, "TIFF"), SMALL)


def test_the_first_frame_of_an_animation() -> None:
    frames = [
        Image.fromarray(PHOTO),
        Image.new("RGB", (120, 90), "blue"),
        Image.new("RGB", (120, 90), "lime"),
    ]
    more = {"save_all": True, "append_images": frames[1:]}
    check(encoded(frames[0], "PNG", **more), PHOTO)
    check(encoded(frames[0], "WEBP", lossless=True, **more), PHOTO)
    check(encoded(frames[0], "TIFF", **more), PHOTO)
    assert check(encoded(frames[0], "MPO", quality=95, **more), PHOTO, levels=6).format == "JPEG"
    red = Image.new("RGB", (120, 90), "red")
    out = decode(encoded(red, "GIF", save_all=True, append_images=frames[1:]), SMALL)
    assert out.image.getpixel((13, 13)) == (255, 0, 0)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_made_upright(format_: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    data = encoded(Image.fromarray(smooth(130, 90)), format_, exif=exif, **options.get(format_, {}))
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    decoded = decode(data, SMALL)
    assert (
        (decoded.width, decoded.height)
        == upright.size
        == ((90, 130) if orientation in {5, 6, 7, 8} else (130, 90))
    )
    _, worst = difference(decoded, textbook(np.asarray(upright), SMALL.short_side, SMALL.crop))
    assert worst <= 1.5


def test_broken_metadata_does_no_harm() -> None:
    data = encoded(PHOTO, "PNG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    check(data, PHOTO)


def test_bytes_views_and_files_are_the_same(tmp_path: Path) -> None:
    data = encoded(PHOTO, "PNG")
    (tmp_path / "x.png").write_bytes(data)
    expected = decode(data, SMALL).image.tobytes()
    with (tmp_path / "x.png").open("rb") as file:
        for source in (bytearray(data), memoryview(data), io.BytesIO(data), file):
            assert decode(source, SMALL).image.tobytes() == expected
        assert not file.closed


def test_the_whole_central_square_for_training_and_ten_views() -> None:
    pixels = smooth(200, 150)
    decoded = decode(encoded(pixels, "PNG"), SMALL, crop=SMALL.short_side)
    assert decoded.image.size == (32, 32)
    _, worst = difference(decoded, textbook(pixels, 32, 32))
    assert worst <= 1.5


@pytest.mark.parametrize("crop", [0, -1, 33])
def test_a_crop_outside_the_resized_image_is_the_callers_fault(crop: int) -> None:
    with pytest.raises(ValueError, match=f"crop is {crop}") as caught:
        decode(encoded(PHOTO, "PNG"), SMALL, crop=crop)
    assert not isinstance(caught.value, ImageError)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1), (2, 10_000)])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_extreme_shapes(width: int, height: int, format_: str) -> None:
    decoded = decode(encoded(Image.new("RGB", (width, height), (200, 100, 50)), format_), SETTINGS)
    assert (decoded.width, decoded.height) == (width, height)
    low, high = np.asarray(decoded.image).min(axis=(0, 1)), np.asarray(decoded.image).max(axis=(0, 1))
    assert (np.abs(low.astype(int) - (200, 100, 50)) <= 12).all()
    assert (high - low <= 4).all()


@pytest.mark.parametrize("format_", FORMATS)
def test_truncated_anywhere_is_corrupt(format_: str) -> None:
    rng = np.random.default_rng(0)
    data = encoded(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), format_)
    with pytest.raises(CorruptImageError, match="empty"):
        decode(b"", SMALL)
    for part in (0.2, 0.5, 0.9):
        with pytest.raises(CorruptImageError):
            decode(data[: int(len(data) * part)], SMALL)


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\x00",
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF",
        encoded(PHOTO, "PPM"),
        encoded(PHOTO, "ICO"),
        encoded(PHOTO, "TGA"),
        encoded(PHOTO, "PDF"),
        encoded(PHOTO, "JPEG2000"),
        encoded(PHOTO, "AVIF"),
    ],
)
def test_other_formats_are_refused_by_their_first_bytes(data: bytes) -> None:
    with pytest.raises(UnsupportedFormatError, match="JPEG, PNG, WebP, GIF, BMP, TIFF"):
        decode(data, SMALL)


@pytest.mark.parametrize(
    "head", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\x00\x00\x00\x00WEBP", b"II*\x00"]
)
def test_a_header_alone_is_corrupt(head: bytes) -> None:
    with pytest.raises(CorruptImageError):
        decode(head, SMALL)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTO, "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTO, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_claiming(width: int, height: int) -> bytes:
    entries = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, 9),
    ]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)


def webp_claiming(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("bomb", [png_claiming, jpeg_claiming, gif_claiming, bmp_claiming, tiff_claiming])
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused_by_their_header(bomb: Any, side: int) -> None:
    data = bomb(side, side)
    assert len(data) < 40_000
    # Also where Pillow refuses first, which it does at twice its own limit.
    with pytest.raises(ImageTooLargeError, match=f"{side * side:,} pixels; the limit is 89,000,000"):
        decode(data, SMALL)


def test_a_webp_that_claims_too_much_is_refused() -> None:
    with pytest.raises(ImageError):
        decode(webp_claiming(16_383, 16_383), SMALL)


def test_the_limit_of_pixels_is_exact_and_named() -> None:
    data = encoded(PHOTO, "PNG")
    assert decode(data, SMALL, max_pixels=120 * 90).width == 120
    with pytest.raises(ImageTooLargeError, match=r"120 x 90 = 10,800 pixels; the limit is 10,799"):
        decode(data, SMALL, max_pixels=120 * 90 - 1)


def test_errors_are_for_people_and_for_programs() -> None:
    for kind in (UnsupportedFormatError, ImageTooLargeError, CorruptImageError):
        assert issubclass(kind, ImageError)
    assert issubclass(ImageError, TopfiveError)


SEEDS = [encoded(smooth(24, 18), format_) for format_ in FORMATS] + [
    encoded(cmyk(smooth(24, 18)), "JPEG"),
    encoded(smooth(24, 18), "JPEG", progressive=True),
    encoded(smooth(24, 18, 4), "PNG"),
    encoded(smooth(24, 18, 4), "WEBP"),
    encoded(Image.fromarray(smooth(24, 18)).quantize(16), "PNG", transparency=3),
    encoded((smooth(24, 18, 1)[:, :, 0].astype(np.uint16) * 257), "PNG"),
    encoded(smooth(24, 18), "TIFF", compression="tiff_lzw"),
    encoded(smooth(24, 18), "TIFF", compression="jpeg"),
]


def survives(data: bytes) -> None:
    """Either a picture or a sentence, whatever the bytes."""
    try:
        decoded = decode(data, SMALL, max_pixels=1_000_000)
    except ImageError as error:
        message = str(error)
    else:
        assert decoded.image.size == (27, 27)
        assert decoded.image.mode == "RGB"
        return
    assert message


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 10_000),
    tail=st.binary(max_size=8),
)
def test_damaged_files_give_a_picture_or_a_sentence(
    seed: bytes, edits: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(seed)
    for position, value in edits:
        data[position % len(data)] = value
    survives(
        bytes(data[: max(1, len(data) - cut % len(data))]) + tail if cut % 3 == 0 else bytes(data) + tail
    )


@settings(max_examples=100, deadline=None)
@given(head=st.sampled_from([seed[:n] for seed in SEEDS for n in (4, 16, 40)]), body=st.binary(max_size=200))
@example(head=b"", body=b"\x00")
def test_made_up_files_give_a_picture_or_a_sentence(head: bytes, body: bytes) -> None:
    survives(head + body)
