"""Seed corpora, made by code: one small file of every format, mode and trait that `decode` has a branch for, and forms."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from PIL import ExifTags, Image
from tests.client import costly_files

_MODES: Final = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
}
_TIFF_CODECS: Final = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
BOUNDARY: Final = b"a-boundary"


def _file(form: str, mode: str, size: tuple[int, int] = (19, 13), **options: Any) -> bytes:
    file = io.BytesIO()
    gradient = Image.linear_gradient("L").resize(size)
    picture = Image.new("I;16", size, 40000) if mode == "I;16" else gradient.convert("RGB").convert(mode)
    picture.save(file, form, **options)
    return file.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def images() -> Iterator[bytes]:
    """Image files of up to a few kilobytes."""
    for form, modes in _MODES.items():
        for mode in modes:
            yield _file(form, mode)
    for codec in _TIFF_CODECS:
        yield _file("TIFF", "RGB", compression=codec)
    yield _file("TIFF", "1", compression="group4")
    yield _file("JPEG", "RGB", (97, 61), progressive=True)
    yield _file("JPEG", "RGB", exif=_turned(6))
    yield _file("PNG", "RGB", exif=_turned(8))
    yield _file("WEBP", "RGB", exif=_turned(3), lossless=True)
    yield _file("TIFF", "RGB", tiffinfo={ExifTags.Base.Orientation: 5})
    yield _file("PNG", "P", transparency=3)
    yield _file("PNG", "L", transparency=128)
    yield _file("GIF", "P", transparency=1, interlace=1)
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        yield file.getvalue()
    yield from costly_files.small()


def form(*parts: bytes) -> bytes:
    """A multipart body."""
    head = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%d.png"\r\nContent-Type: image/png\r\n\r\n'
    return (
        b"".join(head % (BOUNDARY, number) + part + b"\r\n" for number, part in enumerate(parts))
        + b"--%b--\r\n" % BOUNDARY
    )


def request_bodies() -> Iterator[bytes]:
    """Content-Type, a line's end, Content-Encoding, a line's end, body: what `targets.unpack_one` takes apart."""
    kind = b"multipart/form-data; boundary=" + BOUNDARY
    body = form(b"one", b"", b"three\r\n--a-boundar")
    yield kind + b"\n\n" + body
    yield kind + b"\ngzip\n" + gzip.compress(body)
    yield kind + b"\nidentity\n" + body[:-4]
    yield b'multipart/form-data; boundary="a b"\n\n--a b\r\n\r\nx\r\n--a b--\r\n'
    yield (
        kind
        + b"\n\n--a-boundary\r\nContent-Disposition: form-data; filename*=UTF-8''%e2%82%ac\r\n\r\n\r\n--a-boundary--"
    )
    yield b"image/png\ngzip\n" + gzip.compress(bytes(100_000)) + gzip.compress(b"second member")
    yield b"multipart/mixed; boundary=x\n\n--x--"
    yield b"\ndeflate\nx"


def inference_requests() -> Iterator[bytes]:
    """The length of the JSON part (or none), a line's end, body: what `targets.infer_one` takes apart."""
    pixels = [index % 256 for index in range(4 * 4 * 3)]
    tensor: dict[str, Any] = {"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8"}
    outputs = [{"name": "scores", "parameters": {"classification": 2}}, {"name": "classes"}]
    parameters = {"timeout": 5, "priority": 1, "binary_data_output": True}
    plain = {"id": "\U0001f600", "inputs": [tensor | {"data": pixels}], "outputs": outputs}
    yield b"\n" + json.dumps(plain).encode()
    yield b"\n" + json.dumps(plain | {"id": "\ud800"}).encode()
    yield b"\n" + json.dumps({"inputs": [tensor | {"data": pixels}], "parameters": parameters}).encode()
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(pixels)}}]}).encode()
    yield b"%d\n" % len(head) + head + bytes(pixels)
    yield b"0\n" + bytes(pixels)


def write(corpus: Iterator[bytes], folder: Path) -> None:
    """Each seed as a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(corpus):
        (folder / f"seed-{number:03}").write_bytes(data)
