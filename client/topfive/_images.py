"""From whatever a caller holds to the bytes that are sent.

Files and bytes go as they are: the server's one preprocessing sees the original. Pixels in memory (PIL, numpy) are
written losslessly. Nothing is shrunk here; that would resample twice and change answers.
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from topfive.errors import TopfiveError

if TYPE_CHECKING:
    from PIL.Image import Image


@runtime_checkable
class ReadableFile(Protocol):
    """A binary file, open for reading."""

    def read(self) -> bytes:
        """Everything from the current position on."""


@runtime_checkable
class PixelArray(Protocol):
    """A numpy array or its like: uint8 or uint16 [height, width], or uint8 [height, width, 1, 3 or 4]."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The array interface of numpy, version 3."""


ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | ReadableFile | Image | PixelArray"
)
"""What `classify` takes: a path, a file's bytes, a binary file, a PIL image, or an array of pixels."""

_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
_ORIENTATION = 0x0112


class ImageSourceError(TopfiveError, TypeError):
    """Something that is no image was passed as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """One image file, ready to be sent."""

    data: bytes
    filename: str | None
    """For the caller; a server is told the last part only."""

    @property
    def basename(self) -> str:
        """A name that every server can read: the last part, with undecodable bytes of the file system replaced."""
        name = Path(self.filename).name if self.filename else "image"
        return name.encode("utf-8", "replace").decode()


def load(image: ImageSource) -> Upload:
    """The bytes of `image` as an image file.

    Raises:
        OSError: the file cannot be read.
        ImageSourceError: not one of the kinds of `ImageSource`.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return Upload(data=bytes(image), filename=None)
    if isinstance(image, str | os.PathLike):
        return Upload(data=Path(image).read_bytes(), filename=os.fspath(image))
    pil = sys.modules.get("PIL.Image")  # who has no PIL image has not imported it, and need not now
    if pil is not None and isinstance(image, pil.Image):
        return Upload(data=_encode(image), filename=getattr(image, "filename", None) or None)
    if isinstance(image, PixelArray):
        return Upload(data=_encode(_from_array(image)), filename=None)
    if isinstance(image, ReadableFile):
        data = image.read()
        if not isinstance(data, bytes):
            raise ImageSourceError('the file is open in text mode; open it in binary mode: open(path, "rb")')
        name = getattr(image, "name", None)
        return Upload(data=data, filename=name if isinstance(name, str) else None)
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    allowed = "a path, bytes, a binary file, a PIL image or a numpy array"
    raise ImageSourceError(f"a {kind} is not an image; pass {allowed}")


def name_of(image: ImageSource) -> str | None:
    """The name that `load` would give, for an image that could not be loaded."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    name = getattr(image, "filename", None) or getattr(image, "name", None)
    return name if isinstance(name, str) else None


def _encode(image: "Image") -> bytes:
    from PIL import Image as pil  # noqa: N813, PLC0415  the base package's import stays light

    buffer = io.BytesIO()
    orientation = image.getexif().get(_ORIENTATION)
    # Only the orientation: the rest of the metadata (place, camera) is nobody's business.
    exif = pil.Exif()
    if orientation is not None:
        exif[_ORIENTATION] = orientation
    if image.mode in _PNG_MODES:
        image.save(buffer, "PNG", compress_level=1, exif=exif)
    else:
        # CMYK, 32-bit and floating-point samples as they are: how to read them is for the server to say.
        image.save(buffer, "TIFF", exif=exif)
    return buffer.getvalue()


def _from_array(array: PixelArray) -> "Image":
    from PIL import Image as pil  # noqa: N813, PLC0415

    interface = array.__array_interface__
    shape, kind = tuple(interface["shape"]), str(interface["typestr"])
    if len(shape) == 3 and shape[2] == 1:
        return _from_array(array[:, :, 0])  # type: ignore[index]
    is_picture = len(shape) == 2 or (len(shape) == 3 and shape[2] in {3, 4})
    is_bytes = kind[1:] == "u1"
    is_wide = len(shape) == 2 and kind[1:] == "u2"
    if not (is_picture and (is_bytes or is_wide)) or 0 in shape:
        raise ImageSourceError(
            f"the array is {kind} {list(shape)}; it must be uint8 [height, width], [height, width, 3] (RGB) or "
            "[height, width, 4] (RGBA), or uint16 [height, width]"
        )
    return pil.fromarray(array)
