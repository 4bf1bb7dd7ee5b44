"""The one way from the bytes of a photograph to the pixels that the network sees.

Training's evaluation, export's verification, the server and offline scoring all call `decode`, so there is no skew
between them to test for. Only Pillow is needed.

Per image: format allow-list and pixel count from the header, before anything is decoded; scaled JPEG decode
(`draft`); RGB; **one** antialiased resample of the central crop alone; upright by its EXIF orientation.
"""

import io
import re
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from topfive.errors import TopfiveError
from topfive.model_spec import Preprocessing

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Allowed formats, Pillow's names. Animated files give their first frame. Everything else is refused unread."""
DEFAULT_MAX_PIXELS: Final = 89_000_000
"""Default limit on width x height; just below the count at which Pillow itself starts to warn of bombs."""

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


def decode(
    source: bytes | bytearray | memoryview | BinaryIO,
    preprocessing: Preprocessing,
    *,
    crop: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Decoded:
    """Decode one image file to the square of pixels that the network sees.

    Args:
        source: the file's bytes, or a seekable binary file.
        preprocessing: gives `short_side` and `crop`.
        crop: cut this central square instead, in pixels of the resized image; `short_side` gives the whole central
            square that training crops from and that ten-view evaluation needs.
        max_pixels: limit on width x height, checked on the header.

    Raises:
        UnsupportedFormatError: none of `FORMATS`.
        ImageTooLargeError: more than `max_pixels`.
        CorruptImageError: empty, truncated, corrupt, or samples that have no defined range.
        ValueError: `crop` is not within the resized image.
    """
    side = preprocessing.crop if crop is None else crop
    if not 1 <= side <= preprocessing.short_side:
        raise ValueError(
            f"crop is {side}; it must be between 1 and short_side ({preprocessing.short_side}) pixels"
        )
    file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
    try:
        with _open(file, max_pixels) as image:
            format_ = "JPEG" if image.format == "MPO" else str(image.format)
            full_width, full_height = image.size
            # At least twice the resized shorter side: less margin changes answers (design.md section 3).
            drafted = image.draft("RGB", (2 * preprocessing.short_side, 2 * preprocessing.short_side))
            image.load()
            # Only now: loading a TIFF turns it upright and drops the tag, and a PNG may have its EXIF at the end.
            orientation = _orientation(image)
            # A scaled decode rounds the size up; draft's box is the exact extent within it.
            width, height = drafted[1][2:] if drafted else image.size
            box = _Box.central(width, height, side / preprocessing.short_side).corners()
            square = (
                _as_rgb_or_grey(image).resize((side, side), Image.Resampling.BILINEAR, box=box).convert("RGB")
            )
    except ImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, struct.error, IndexError and more on broken files.
        raise CorruptImageError(f"the image could not be decoded: {_reason(error)}") from error
    if orientation in _UPRIGHT:
        # A centred crop may be turned after the resize: that is the same picture, and 227x227 instead of megapixels.
        square = square.transpose(_UPRIGHT[orientation])
        if orientation >= 5:
            full_width, full_height = full_height, full_width
    return Decoded(square, full_width, full_height, format_)


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Read the header only."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise CorruptImageError("the image is empty (0 bytes)")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        if head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
            raise CorruptImageError("the image's header is truncated or corrupt") from error
        allowed = "JPEG, PNG, WebP, GIF, BMP, TIFF"
        raise UnsupportedFormatError(f"the data is not an image of an allowed format ({allowed})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow says how many, and keeps the image to itself.
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        count = re.search(r"\d+", str(error))
        pixels = f"{int(count[0]):,}" if count else "too many"
        raise ImageTooLargeError(f"the image has {pixels} pixels; the limit is {limit:,}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageTooLargeError(
            f"the image is {width} x {height} = {width * height:,} pixels; the limit is {max_pixels:,}"
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  broken metadata raises anything at all, and the picture is none the worse for it
        return 1
    return value if isinstance(value, int) else 1


def _as_rgb_or_grey(image: Image.Image) -> Image.Image:
    """8-bit RGB or greyscale: alpha over white, 16-bit scaled (not clipped), CMYK and palettes converted.

    Greyscale stays one channel until after the resample, which gives the same pixels for a third of the work.
    """
    if image.mode.startswith("I"):
        return _sixteen_bit_to_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode in {"L", "RGB"}:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "F":
        raise CorruptImageError(
            "the image has floating-point samples, which have no defined range; save it as 8 or 16 bit"
        )
    return image.convert("RGB")


def _sixteen_bit_to_grey(image: Image.Image) -> Image.Image:
    wide = image.convert("I")
    low, high = wide.getextrema()
    if not (isinstance(low, int | float) and isinstance(high, int | float) and low >= 0 and high <= 65535):
        raise CorruptImageError(
            "the image has 32-bit samples, which have no defined range; save it as 8 or 16 bit"
        )
    # The top byte; `convert("L")` alone would clip everything above 255 to white.
    top_bytes = [value >> 8 for value in range(65536)]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and 0 <= transparent <= 65535:
        top_bytes[transparent] = 255  # over white, as alpha is
    return wide.point(top_bytes, "L")


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text or type(error).__name__
