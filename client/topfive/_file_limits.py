"""What an image file may cost beside its pixels: bounds that are seen before it is decoded.

A decode runs in a thread that nothing can stop, and the limit on pixels does not bound it: a JPEG may go over its pixels
again in scan after scan, a PNG may bring profiles to inflate, a TIFF may have a hundred thousand strips read the
same megabyte, and Pillow reads what comes before the pixels in Python, a byte or a tag at a time. The bounds are
far above what cameras and editors write; docs/lab-notes.md has what each of these files cost without them.
"""

import io
import re
import struct
from typing import Final

from PIL import Image

MAX_READS: Final = 250_000
"""Reads of one file by Pillow's parsers: one to four for a chunk, a segment, a tag, a run or a fill byte (0.3 s)."""
MAX_PIECES: Final = 100_000
"""Segments of a JPEG, chunks of a PNG, strips or tiles of a TIFF."""
MAX_SCANS: Final = 500
"""Scans of a JPEG of any size. libjpeg's own script for progressive files has ten, and no encoder more than some dozens."""
FULL_SIZE_SCANS: Final = 20
"""Scans of a JPEG of as many pixels as are allowed; smaller ones may have more in proportion, up to `MAX_SCANS`."""
MAX_RARE_SEGMENTS: Final = 64
"""EXIF and quantization tables in a JPEG, one or two of each as a rule: Pillow copies all EXIF so far for each."""
MAX_INFLATED_CHUNKS: Final = 256
"""Chunks of a PNG with compressed texts or profiles, each of which Pillow inflates to up to a megabyte."""
MAX_TAGS: Final = 4096
"""Tags in the first directory of a TIFF."""
MAX_STRIP_BYTES: Final = 2**28
"""Bytes of all strips or tiles of a TIFF, beyond the file's own size: they may share, but not multiply it."""

_MARKER: Final = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""Neither a stuffed zero, nor fill, nor one of those without a segment amid the data (ITU-T T.81, table B.1)."""
_DQT, _SOS, _EOI, _EXIF = 0xDB, 0xDA, 0xD9, 0xE1
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_INFLATED: Final = frozenset({b"iCCP", b"iTXt", b"zTXt"})
_STRIPS: Final = frozenset({273, 324})
_STRIP_BYTES: Final = frozenset({279, 325})
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 6: "B", 8: "H", 9: "I", 13: "I", 16: "Q", 17: "Q", 18: "Q"}
"""TIFF's types of integers -> `struct`'s; a negative size is refused as an enormous one."""


class CostlyFileError(Exception):
    """More work than any usual file of as many pixels; the message is a sentence for the person who sent it."""


class MeteredFile(io.BytesIO):
    """A file in memory that may be read `MAX_READS` times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.BytesIO.read`.

        Raises:
            CostlyFileError: once more than may be.
        """
        self._reads += 1
        if self._reads > MAX_READS:
            raise _too_many("pieces", MAX_READS)
        return super().read(size)


def check_structure(data: bytes, max_pixels: int) -> None:
    """Look at how the file is built, without decoding anything; what is truncated or broken is left to the decoder.

    Raises:
        CostlyFileError: more scans, segments, chunks, tags or strips than any usual file has.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            _check_jpeg(data, max_pixels)
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            _check_png(data)
        elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            _check_tiff(data)
    except (struct.error, IndexError):
        return  # it ends where something was announced


def cost_per_pixel(image: Image.Image) -> int:
    """How many times as much time or memory as usual each pixel takes, by the header of an opened image."""
    compression = image.info.get("compression")
    if image.format == "WEBP":
        return 2  # libwebp keeps two canvases and Pillow two copies, before anything is converted
    if image.format == "TIFF" and compression in {"jpeg", "tiff_jpeg"}:
        return 4  # where libtiff allows 99 scans
    if image.format == "BMP" and compression in {1, 2}:
        return 16  # run lengths, which Pillow expands in Python
    return max(16 // min(image.size), 1)  # for each row there is a pointer, however short the row is


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    """From marker to marker, as libjpeg goes; through the scans only where there may be several."""
    position, rare, scans = 2, 0, 0
    pixels, components, progressive = 1, 0, False
    for _ in range(MAX_PIECES):
        found = _MARKER.search(data, position)
        if found is None or data[found.end() - 1] == _EOI:
            return  # after the end there may be other pictures, or a film
        start = found.end()
        marker = data[start - 1]
        position = start + (data[start] << 8 | data[start + 1])
        if marker in _FRAMES:
            _, height, width, components = struct.unpack_from(">BHHB", data, start + 2)
            pixels, progressive = width * height, marker in _PROGRESSIVE
        elif marker == _SOS:
            scans += 1
            if not progressive and data[start + 2] >= components:
                return  # one scan has it all, and libjpeg takes no other
            allowed = min(MAX_SCANS, FULL_SIZE_SCANS * max_pixels // max(pixels, 1))
            if scans > allowed and pixels <= max_pixels:
                raise _too_many("scans", allowed)
        elif marker == _DQT or (marker == _EXIF and data.startswith(b"Exif\0\0", start + 2)):
            rare += not scans
            if rare > MAX_RARE_SEGMENTS:
                raise _too_many("EXIF segments or tables", MAX_RARE_SEGMENTS)
    raise _too_many("segments", MAX_PIECES)


def _check_png(data: bytes) -> None:
    position, inflated = 8, 0
    for _ in range(MAX_PIECES):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        position += 12 + length  # with the length itself, the kind and the checksum
        inflated += kind in _INFLATED
        if inflated > MAX_INFLATED_CHUNKS:
            raise _too_many("compressed texts or profiles", MAX_INFLATED_CHUNKS)
    raise _too_many("chunks", MAX_PIECES)


def _check_tiff(data: bytes) -> None:
    """The first directory (TIFF 6.0, section 2; BigTIFF has wider fields), which is the one that is decoded."""
    order = "<" if data.startswith(b"II") else ">"
    big = b"+" in data[:4]
    (directory,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (tags,) = struct.unpack_from(order + ("Q" if big else "H"), data, directory)
    if tags > MAX_TAGS:
        raise _too_many("tags", MAX_TAGS)
    first, step, inline = (8, 20, 8) if big else (2, 12, 4)
    for entry in range(directory + first, directory + first + step * tags, step):
        tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, entry)
        if tag not in _STRIPS | _STRIP_BYTES:
            continue
        if count > MAX_PIECES:
            raise _too_many("strips or tiles", MAX_PIECES)
        if tag in _STRIP_BYTES and kind in _INTEGERS:
            values = f"{order}{count}{_INTEGERS[kind]}"
            place = entry + step - inline
            if struct.calcsize(values) > inline:
                (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, place)
            if sum(struct.unpack_from(values, data, place)) > len(data) + MAX_STRIP_BYTES:
                raise CostlyFileError(
                    "the strips or tiles of the image overlap, and all of them together are many times the file; "
                    "save it again as JPEG or PNG"
                )


def _too_many(what: str, limit: int) -> CostlyFileError:
    return CostlyFileError(
        f"the image file has more than {limit:,} {what}, which no camera or editor writes for as many pixels; "
        "save it again as JPEG or PNG"
    )
