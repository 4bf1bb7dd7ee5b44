"""The pictures on which an exported graph must agree: the ones given, and drawn ones of every awkward kind.

Shapes: M images, H rows, W columns, C colours.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from topfive._folders import IMAGE_SUFFIXES, files_below, has_image_name
from topfive.model_spec import Preprocessing
from topfive.preprocessing import ImageError, decode
from topfive_export.variant import ExportError

_NAMED: Final = 5
"""Most files that a message names."""

_S = TypeVar("_S")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image file of the corpus."""

    name: str
    """Path within the folder that was given, or what was drawn."""
    data: bytes
    label: int | None = None
    """Its class, where the folder's name says so."""
    drawn: bool = False

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.data).hexdigest()


def given_pictures(
    folder: Path, labels: Sequence[str], *, limit: int, say: Callable[[str], None] = lambda _: None
) -> list[Picture]:
    """Images below `folder`, at most `limit`, spread evenly over them in the order of their names.

    A picture is labelled where one of the folders that it lies in is named as a class is. `say` gets a line about those
    that do not decode.

    Raises:
        ExportError: no such folder, or no image that decodes in it.
    """
    if not folder.is_dir():
        raise ExportError(f"--images {folder} is not a folder")
    paths = sorted(path for path in files_below(folder) if has_image_name(path.name))
    if not paths:
        raise ExportError(f"--images {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if len(paths) > limit:
        paths = [paths[index * len(paths) // limit] for index in range(limit)]
    classes = {label: index for index, label in enumerate(labels)}
    pictures = []
    for path in paths:
        name = path.relative_to(folder)
        folders = [folder.name, *name.parts[:-1]]
        label = next((classes[part] for part in reversed(folders) if part in classes), None)
        pictures.append(Picture(name=name.as_posix(), data=path.read_bytes(), label=label))
    decodes = {picture.name: _decodes(picture.data) for picture in pictures}
    readable = [picture for picture in pictures if decodes[picture.name]]
    if not readable:
        raise ExportError(f"none of the {len(pictures)} images in --images {folder} can be decoded")
    if broken := [name for name, good in decodes.items() if not good]:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        say(
            f"of {len(pictures)} images in --images {folder} {len(broken)} cannot be decoded and will be left out: "
            f"{', '.join(broken[:_NAMED])}{more}"
        )
    return readable


def _decodes(data: bytes) -> bool:
    try:
        decode(data, Preprocessing())
    except ImageError:
        return False
    return True


def drawn_pictures() -> list[Picture]:
    """About forty files: every format, kind of pixel, orientation and extreme of size; the same ones every time."""
    return [Picture(name=f"drawn: {name}", data=data, drawn=True) for name, data in _draw()]


def _draw() -> Iterator[tuple[str, bytes]]:
    scene = _scene(500, 375, seed=0)
    for width, height, seed in ((227, 227, 1), (256, 256, 2), (333, 500, 3), (91, 68, 4), (640, 320, 5)):
        yield f"colour JPEG {width}x{height}", _file(_scene(width, height, seed=seed), "JPEG", quality=92)
    yield "large JPEG, decoded at reduced scale", _file(_scene(1600, 1200, seed=6), "JPEG", quality=85)
    yield "progressive JPEG", _file(scene, "JPEG", progressive=True)
    yield "JPEG without colour subsampling", _file(scene, "JPEG", subsampling=0)
    yield "PNG", _file(scene, "PNG")
    yield "lossless WebP", _file(scene, "WEBP", lossless=True)
    yield "BMP", _file(scene, "BMP")
    yield "TIFF", _file(scene, "TIFF")
    yield "GIF", _file(scene.quantize(64), "GIF")
    yield "grey JPEG", _file(scene.convert("L"), "JPEG")
    yield "grey PNG", _file(scene.convert("L"), "PNG")
    yield "grey PNG with alpha", _file(_with_alpha(scene).convert("LA"), "PNG")
    yield "CMYK JPEG", _file(scene.convert("CMYK"), "JPEG")
    yield "CMYK TIFF", _file(scene.convert("CMYK"), "TIFF")
    yield "PNG with alpha", _file(_with_alpha(scene), "PNG")
    yield "palette PNG", _file(scene.quantize(256), "PNG")
    yield "palette PNG with transparency", _file(scene.quantize(16), "PNG", transparency=3)
    yield "PNG with one transparent colour", _file(scene, "PNG", transparency=scene.getpixel((3, 3)))
    wide = np.asarray(scene.convert("L"), dtype=np.uint16) * 257
    yield "16-bit grey PNG", _file(Image.fromarray(wide), "PNG")
    yield "16-bit grey TIFF", _file(Image.fromarray(wide[::2, ::2].copy()), "TIFF")
    yield "1-bit PNG", _file(scene.convert("1"), "PNG")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        yield f"JPEG with EXIF orientation {orientation}", _file(scene, "JPEG", exif=exif)
    for width, height in ((1, 300), (300, 1), (1, 1), (2, 2), (1500, 4)):
        yield f"PNG of {width}x{height} pixels", _file(_noise(width, height, seed=width), "PNG")
    # Flat and saturated ones tell channels apart, noise tells pixels apart.
    for name in ("black", "white", "red", "lime", "blue", "grey"):
        yield f"flat {name} PNG", _file(Image.new("RGB", (300, 240), name), "PNG")
    yield "noise PNG", _file(_noise(280, 310, seed=7), "PNG")
    yield (
        "coarse noise PNG",
        _file(_noise(40, 30, seed=8).resize((400, 300), Image.Resampling.NEAREST), "PNG"),
    )


def _file(image: Image.Image, format_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def _noise(width: int, height: int, *, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _scene(width: int, height: int, *, seed: int) -> Image.Image:
    """Something with the smooth areas, edges and texture of a photograph."""
    rng = np.random.default_rng(1000 + seed)
    image = _noise(7, 5, seed=seed).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        r = int(rng.integers(2, max(3, min(width, height) // 4)))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x - r, y - r // 2, x + r, y + r), fill=color)
    texture = _noise(width, height, seed=seed + 50).filter(ImageFilter.GaussianBlur(0.7))
    return Image.blend(image, texture, 0.2)


def _with_alpha(image: Image.Image) -> Image.Image:
    result = image.convert("RGBA")
    result.putalpha(Image.linear_gradient("L").resize(image.size))
    return result


def decoded(pictures: Sequence[Picture], preprocessing: Preprocessing, side: int) -> NDArray[np.uint8]:
    """What evaluation feeds the network, uint8 [M, side, side, C]: each picture through the one preprocessing."""

    def one(picture: Picture) -> NDArray[np.uint8]:
        return np.asarray(decode(picture.data, preprocessing, crop=side).image)

    return np.stack(_threaded(one, pictures))


def raw_pixels(
    pictures: Sequence[Picture], *, max_pixels: int = 4_000_000
) -> list[tuple[Picture, NDArray[np.uint8]]]:
    """Pixels [H, W, C] at full size for the whole graph, each with the lossless file that holds just them.

    Both ways begin from the same RGB pixels: what is compared is resize and crop, not colour conversion or JPEG.
    """

    def one(picture: Picture) -> tuple[Picture, NDArray[np.uint8]] | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "palette images with transparency", as if it mattered here
            image = Image.open(io.BytesIO(picture.data)).convert("RGB")
        if image.width * image.height > max_pixels:
            return None
        return Picture(
            name=picture.name, data=_file(image, "BMP"), label=picture.label, drawn=picture.drawn
        ), np.asarray(image)

    return [pair for pair in _threaded(one, pictures) if pair is not None]


def _threaded(function: Callable[[_S], _T], items: Sequence[_S]) -> list[_T]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(function, items))
