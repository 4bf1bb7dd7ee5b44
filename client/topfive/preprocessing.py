"""The one way from the bytes of a photograph to the pixels that the network sees.

Training's evaluation, export's verification, the server and offline scoring all call `decode`, so there is no skew
between them to test for. Only Pillow is needed.

Per image: format allow-list, structure and pixel count, before anything is decoded; scaled JPEG decode (`draft`);
RGB; **one** antialiased resample of the central crop alone; upright by its EXIF orientation.
"""

import math
import re
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from topfive._file_limits import CostlyFileError, MeteredFile, check_structure, cost_per_pixel
from topfive.errors import TopfiveError
from topfive.model_spec import Preprocessing

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Allowed formats, Pillow's names. Animated files give their first frame. Everything else is refused unread."""
DEFAULT_MAX_PIXELS: Final = 89_000_000
"""Default limit on width x height; just below the count at which Pillow itself starts to warn of bombs."""

_BAND_PIXELS: Final = 2**21
"""Pixels that are converted at a time: what a conversion needs beside its result is a few times as many bytes."""

_MAGIC: Final = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00",
    b"MM\x00+",
)
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the picture upright (EXIF 2.3, tag 0x0112)."""


class ImageError(TopfiveError, ValueError):
    """An image that cannot be classified; the message is a sentence for the person who sent it."""


class UnsupportedFormatError(ImageError):
    """Not one of the allowed formats."""


class ImageTooLargeError(ImageError):
    """More pixels than allowed, by its header; nothing was decoded."""


class CorruptImageError(ImageError):
    """An allowed format, but the data is truncated, broken or of a kind without a defined reading."""


class Decoded(NamedTuple):
    """A decoded image, ready for the network, with what the header said of the original."""

    image: Image.Image
    """RGB, `crop` x `crop`; `numpy.asarray(image)` is uint8 [crop, crop, 3]."""
    width: int
    """Width of the original, upright, in pixels."""
    height: int
    """Height of the original, upright, in pixels."""
    format: str
    """One of `FORMATS`."""


@dataclass(frozen=True, kw_only=True)
class _Box:
    """A centred square of the source, in (fractional) source pixels."""

    left: float
    top: float
    side: float

    @classmethod
    def central(cls, width: float, height: float, fraction: float) -> "_Box":
        side = min(width, height) * fraction
        return cls(left=(width - side) / 2, top=(height - side) / 2, side=side)

    def corners(self) -> tuple[float, float, float, float]:
        return self.left, self.top, self.left + self.side, self.top + self.side

    def seen(self, outputs: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Whole pixels (left, top, right, bottom) that the resize to `outputs` x `outputs` reads of a source of `size`."""
        margin = max(self.side / outputs, 1.0) + 1.0  # the triangle filter's reach, and one for rounding
        left, top, right, bottom = self.corners()
        return (
            max(math.floor(left - margin), 0),
            max(math.floor(top - margin), 0),
            min(math.ceil(right + margin), size[0]),
            min(math.ceil(bottom + margin), size[1]),
        )


def decode(
    source: bytes | bytearray | memoryview | BinaryIO,
    preprocessing: Preprocessing,
    *,
    crop: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Decoded:
    """Decode one image file to the square of pixels that the network sees.

    Holds the file, at most 8 bytes for each pixel of the source (4 where nothing is converted; a WebP takes 16, and may
    have half as many pixels), and 40 MB.

    Args:
        source: the file's bytes, or a seekable binary file, which is read into memory.
        preprocessing: gives `short_side` and `crop`.
        crop: cut this central square instead, in pixels of the resized image; `short_side` gives the whole central
            square that training crops from and that ten-view evaluation needs.
        max_pixels: limit on width x height, checked on the header. A WebP may have half as many, a TIFF of JPEGs a
            quarter, a BMP of run lengths or an image of one column a sixteenth: so much more their pixels cost.

    Raises:
        UnsupportedFormatError: none of `FORMATS`.
        ImageTooLargeError: more than `max_pixels`.
        CorruptImageError: empty, truncated, corrupt, samples that have no defined range, or far more scans, chunks,
            tags or other pieces than usual files have (`topfive._file_limits`).
        ValueError: `crop` is not within the resized image.
    """
    side = preprocessing.crop if crop is None else crop
    if not 1 <= side <= preprocessing.short_side:
        raise ValueError(
            f"crop is {side}; it must be between 1 and short_side ({preprocessing.short_side}) pixels"
        )
    try:
        with _open(_contents(source), max_pixels) as image:
            format_ = "JPEG" if image.format == "MPO" else str(image.format)
            full_width, full_height = image.size
            # At least twice the resized shorter side: less margin changes answers (design.md section 3).
            drafted = image.draft("RGB", (2 * preprocessing.short_side, 2 * preprocessing.short_side))
            image.load()
            # Only now: loading a TIFF turns it upright and drops the tag, and a PNG may have its EXIF at the end.
            orientation = _orientation(image)
            # A scaled decode rounds the size up; draft's box is the exact extent within it.
            width, height = drafted[1][2:] if drafted else image.size
            box = _Box.central(width, height, side / preprocessing.short_side)
            plain = _as_rgb_or_grey(image, box.seen(side, image.size))
            square = plain.resize((side, side), Image.Resampling.BILINEAR, box=box.corners()).convert("RGB")
    except (ImageError, MemoryError):
        raise
    except CostlyFileError as error:
        raise CorruptImageError(str(error)) from error
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, struct.error, IndexError and more on broken files.
        raise CorruptImageError(_sentence(error)) from error
    if orientation in _UPRIGHT:
        # A centred crop may be turned after the resize: that is the same picture, and 227x227 instead of megapixels.
        square = square.transpose(_UPRIGHT[orientation])
        if orientation >= 5:
            full_width, full_height = full_height, full_width
    return Decoded(square, full_width, full_height, format_)


def _contents(source: bytes | bytearray | memoryview | BinaryIO) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    source.seek(0)
    return source.read()


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header only."""
    if not data:
        raise CorruptImageError("the image is empty (0 bytes)")
    check_structure(data, max_pixels)
    try:
        image = Image.open(MeteredFile(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            raise CorruptImageError(
                "the image's header is truncated or corrupt; send the whole file, or save it again as JPEG or PNG"
            ) from error
        allowed = "JPEG, PNG, WebP, GIF, BMP, TIFF"
        raise UnsupportedFormatError(
            f"the data is not an image of an allowed format ({allowed}); save it as JPEG or PNG"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow says how many, and keeps the image to itself.
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        count = re.search(r"\d+", str(error))
        pixels = f"{int(count[0]):,}" if count else "too many"
        raise ImageTooLargeError(
            f"the image has {pixels} pixels; the limit is {limit:,}; send a smaller copy"
        ) from error
    width, height = image.size
    cost = cost_per_pixel(image)
    if width * height * cost > max_pixels:
        image.close()
        which = f" for this kind of {image.format}" if cost > 1 else ""
        raise ImageTooLargeError(
            f"the image is {width} x {height} = {width * height:,} pixels; the limit{which} is "
            f"{max_pixels // cost:,}; send a smaller copy"
        )
    if image.format in {"JPEG", "MPO"}:
        # In one piece: libjpeg starts what it could not finish again with each further piece.
        image.decodermaxblock = len(data)
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  broken metadata raises anything at all, and the picture is none the worse for it
        return 1
    return value if isinstance(value, int) else 1


def _as_rgb_or_grey(image: Image.Image, seen: tuple[int, int, int, int]) -> Image.Image:
    """8-bit RGB or greyscale: alpha over white, 16-bit scaled (not clipped), CMYK and palettes converted.

    Greyscale stays one channel until after the resample, which gives the same pixels for a third of the work. What
    has to be converted is so within `seen` alone, a band of rows at a time: converted at once it would be in memory
    up to five times. The rest of the result is zeros that nobody has written, and takes no memory either.
    """
    if image.mode in {"L", "RGB"} and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise CorruptImageError(
            "the image has floating-point samples, which have no defined range; save it as 8 or 16 bit"
        )
    top_bytes = _top_bytes(image) if image.mode.startswith("I") else None
    grey = top_bytes is not None or (image.mode == "1" and not image.has_transparency_data)
    plain = Image.new("L" if grey else "RGB", image.size, None)
    left, top, right, bottom = seen
    rows = max(_BAND_PIXELS // (right - left), 1)
    for start in range(top, bottom, rows):
        band = image.crop((left, start, right, min(start + rows, bottom)))
        if top_bytes is not None:
            band = band.convert("I").point(top_bytes, "L")
        elif band.has_transparency_data:
            rgba = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        plain.paste(band.convert(plain.mode), (left, start))
    return plain


def _top_bytes(image: Image.Image) -> list[int]:
    """16-bit sample -> 8-bit; `convert("L")` alone would clip everything above 255 to white."""
    if image.mode == "I":
        low, high = image.getextrema()
        if not (
            isinstance(low, int | float) and isinstance(high, int | float) and low >= 0 and high <= 65535
        ):
            raise CorruptImageError(
                "the image has 32-bit samples, which have no defined range; save it as 8 or 16 bit"
            )
    top_bytes = [value >> 8 for value in range(65536)]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and 0 <= transparent <= 65535:
        top_bytes[transparent] = 255  # over white, as alpha is
    return top_bytes


def _sentence(error: Exception) -> str:
    """What a person can do about it; Pillow's own words, which name its parts, stay with the cause."""
    words = str(error).lower()
    if "text" in words and "max_text" in words:
        return "the image's texts or color profile are too large (1 MB each, inflated); save it without them"
    if "truncated" in words or "not enough" in words:
        return "the image is truncated; send the whole file"
    return "the image is corrupt, or of a kind that cannot be decoded; save it again as JPEG or PNG"
