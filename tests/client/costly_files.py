"""Files that would cost a decoder far more than their pixels; the same ones, small, are seeds of the fuzzer."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import Image


def _file(image: Image.Image, format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def _grey(size: tuple[int, int]) -> Image.Image:
    return Image.linear_gradient("L").resize(size)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_scans(times: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """Progressive, and the last scan again and again."""
    data = _file(_grey(size), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * times + data[-2:]


def jpeg_sequential_scans(times: int) -> bytes:
    """Not progressive, but a scan for each component, and the last again and again."""
    data = _file(_grey((48, 40)).convert("RGB"), "JPEG", subsampling=0)
    start = data.rindex(b"\xff\xda")
    scans = [_segment(0xDA, bytes([1, component, 0, 0, 63, 0])) + b"\x55" for component in (1, 2, 3)]
    return data[:start] + b"".join(scans) + scans[-1] * times + data[-2:]


def jpeg_segments(times: int, marker: int = 0xE1, body: bytes = b"") -> bytes:
    """Before the picture."""
    return b"\xff\xd8" + _segment(marker, body) * times + _file(_grey((48, 40)), "JPEG")[2:]


def jpeg_fill(count: int) -> bytes:
    """Fill bytes, of which there may be any number before a marker (ITU-T T.81, B.1.1.2)."""
    return b"\xff\xd8" + b"\xff" * count + _file(_grey((48, 40)), "JPEG")[2:]


def png_chunks(times: int, kind: bytes = b"tEXt", body: bytes = b"a\0b") -> bytes:
    """Before the pixels."""
    data = _file(_grey((48, 40)), "PNG")
    return data[:33] + _chunk(kind, body) * times + data[33:]


def png_profiles(times: int, inflated: int) -> bytes:
    """Color profiles of so many bytes."""
    return png_chunks(times, b"iCCP", b"a\0\0" + zlib.compress(bytes(inflated), 9))


def gif_blocks(times: int) -> bytes:
    """A comment in blocks of one byte."""
    data = _file(_grey((48, 40)), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + b"!\xfe" + b"\1a" * times + b"\0" + data[start:]


def bmp_run_lengths(size: tuple[int, int], runs: bytes) -> bytes:
    """RLE8 of four colors."""
    palette = bytes(range(16))
    head = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, 1, len(runs), 0, 0, 4, 0)
    offset = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + head + palette + runs


def tiff(
    width: int, height: int, compression: int, strip: bytes, *, strips: int, more_tags: int = 0
) -> bytes:
    """Strips of equal height, all of which are the same bytes of the file."""
    tags = [(256, width), (257, height), (258, 8), (259, compression), (262, 1), (277, 1)]
    tags += [(278, height // strips)] + [(50_000 + number, 0) for number in range(more_tags)]
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    fields = [(tag, 4, 1, value) for tag, value in tags]
    if strips == 1:
        fields += [(273, 4, 1, at), (279, 4, 1, len(strip))]
        arrays = b""
    else:
        fields += [(273, 4, strips, at + len(strip)), (279, 4, strips, at + len(strip) + 4 * strips)]
        arrays = struct.pack("<I", at) * strips + struct.pack("<I", len(strip)) * strips
    directory = b"".join(struct.pack("<HHII", *field) for field in sorted(fields))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4) + strip + arrays


def tiff_of_nothing(idle: int, strips: int) -> bytes:
    """PackBits (TIFF 6.0, section 9): so many bytes that do nothing before each strip's only row."""
    return tiff(16, strips, 32773, b"\x80" * idle + b"\xf1\0", strips=strips)


def bigtiff_tags(count: int) -> bytes:
    """Tags whose values would lie beyond any file."""
    tag = struct.pack("<HHQQ", 50_000, 4, 5, 1 << 63)
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count) + tag * count


def small() -> Iterator[bytes]:
    """One of each, of at most some kilobytes: seeds."""
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: jpeg_scans(30),
        lambda: jpeg_sequential_scans(30),
        lambda: jpeg_segments(100),
        lambda: jpeg_segments(20, 0xDB, bytes([0, *range(1, 65)])),
        lambda: jpeg_segments(20, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        lambda: jpeg_fill(500),
        lambda: png_chunks(100),
        lambda: png_chunks(100, b"IDAT", b""),
        lambda: png_profiles(4, 2**20),
        lambda: gif_blocks(500),
        lambda: bmp_run_lengths((48, 40), b"\1\1\0\0" * 39 + b"\0\2\1\0\0\1"),
        lambda: tiff_of_nothing(500, 10),
        lambda: tiff(48, 40, 7, jpeg_scans(30), strips=1),
        lambda: bigtiff_tags(100),
    )
    for make in makers:
        yield make()
