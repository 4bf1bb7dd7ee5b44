"""Decoded photographs: one pass over the files finds the unreadable ones, the statistics, and fills a cache.

Where the squares fit, they are kept as raw uint8 in one memory-mapped file, which all ranks of a machine share; where
they do not, they are decoded whenever they are asked for, on threads (Pillow lets go of the interpreter's lock).

Shapes: N images, S side of the square, C the three colours.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topfive.model_spec import Preprocessing
from topfive.preprocessing import ImageError, decode
from topfive_training.checkpoint import CheckpointError, load_tensors, save_tensors, write_atomically
from topfive_training.dataset import ImageList

Pixels = npt.NDArray[np.uint8]
_LAYOUT: Final = 1
"""Part of every cache's name; another number where its contents change."""
_WINDOW: Final = 4
"""Images in flight for each worker of the pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one pass over the training squares finds; exact sums, so the order of the pass leaves no trace."""

    mean_image: Tensor
    """float32 [3, S, S], 0-255."""
    mean: tuple[float, float, float]
    """Of each channel over all pixels."""
    std: tuple[float, float, float]
    """Of each channel over all pixels."""
    color_components: Tensor
    """float32 [3, 3]: column i is the i-th principal component of the pixels' colours, as a unit vector times its
    standard deviation (paper section 4.1, over all pixels of all training images)."""


class Squares:
    """The readable ones of a list of images, as squares of pixels."""

    def __init__(
        self,
        images: ImageList,
        preprocessing: Preprocessing,
        side: int,
        cached_NSSC: Pixels | None,
        rows: list[int],
    ) -> None:
        self.images = images
        self.classes_N = torch.tensor(images.classes, dtype=torch.int64)
        self._preprocessing = preprocessing
        self.side = side
        self._cached_NSSC = cached_NSSC
        self._rows = rows

    def __len__(self) -> int:
        return len(self.images)

    @property
    def cached(self) -> bool:
        """Whether reading one costs a copy rather than a decode."""
        return self._cached_NSSC is not None

    def __getitem__(self, index: int) -> Pixels:
        """uint8 [S, S, 3].

        Raises:
            ImageError: the file has become unreadable since the first pass.
            OSError: it is gone.
        """
        if self._cached_NSSC is not None:
            square: Pixels = self._cached_NSSC[self._rows[index]]
            return square
        return _decode(self.images.path(index), self._preprocessing, self.side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """What `open_squares` found."""

    squares: Squares
    unreadable: dict[str, str]
    """Name of each file that was skipped, and why."""
    statistics: Statistics | None


def open_squares(
    images: ImageList,
    preprocessing: Preprocessing,
    side: int,
    *,
    folder: Path,
    limit_bytes: int,
    workers: int,
    with_statistics: bool,
    progress: Callable[[int, int], None],
) -> Opened:
    """Decode every image once, or find in `folder` that this was done before.

    Args:
        images: what to decode.
        preprocessing: gives the shorter side.
        side: of the central square to keep, in pixels.
        folder: where the cache and the record of the pass are kept.
        limit_bytes: larger sets are not cached, but decoded again whenever they are needed.
        workers: threads that decode.
        with_statistics: whether the mean image and the colours' components are wanted.
        progress: told images done and images in all.

    Raises:
        OSError: the cache cannot be written.
    """
    name = f"squares-{_key(images, preprocessing, side)}"
    record, pixels, sums = (folder / f"{name}.{suffix}" for suffix in ("json", "u8", "safetensors"))
    caches = len(images) * side * side * 3 <= limit_bytes
    known = _read_record(record, pixels if caches else None, sums if with_statistics else None)
    if known is None:
        folder.mkdir(parents=True, exist_ok=True)
        totals = Totals(side) if with_statistics else None
        unreadable = _decode_all(
            images,
            preprocessing,
            side,
            cache=pixels if caches else None,
            workers=workers,
            totals=totals,
            progress=progress,
        )
        if totals is not None:
            save_tensors(sums, totals.tensors())
        text = json.dumps(unreadable, indent=1)
        write_atomically(record, lambda path: path.write_text(text, encoding="utf-8"))
    else:
        unreadable = known
    rows = [index for index, image in enumerate(images.names) if image not in unreadable]
    cached = np.memmap(pixels, np.uint8, "r", shape=(len(images), side, side, 3)) if caches and rows else None
    return Opened(
        squares=Squares(images.subset(rows), preprocessing, side, cached, rows),
        unreadable=unreadable,
        statistics=statistics_of(load_tensors(sums)[0]) if with_statistics and rows else None,
    )


def _key(images: ImageList, preprocessing: Preprocessing, side: int) -> str:
    digest = hashlib.sha256(f"{_LAYOUT} {preprocessing.short_side} {side} {images.root.resolve()}\n".encode())
    for name in images.names:
        status = (images.root / name).stat()
        digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def _read_record(record: Path, *needed: Path | None) -> dict[str, str] | None:
    """Unreadable files of an earlier pass, if it left everything that is needed."""
    if not all(path is None or path.is_file() for path in needed):
        return None
    try:
        unreadable = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return unreadable if isinstance(unreadable, dict) else None


def _decode(path: Path, preprocessing: Preprocessing, side: int) -> Pixels:
    with path.open("rb") as file:
        return np.asarray(decode(file, preprocessing, crop=side).image)


def _decode_all(
    images: ImageList,
    preprocessing: Preprocessing,
    side: int,
    *,
    cache: Path | None,
    workers: int,
    totals: "Totals | None",
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """The pass itself; returns the unreadable ones."""
    unreadable: dict[str, str] = {}

    def fill(beside: Path | None) -> None:
        pixels_NSSC = _allocate(beside, (len(images), side, side, 3)) if beside is not None else None
        for index, square in enumerate(decode_in_order(images, preprocessing, side, workers)):
            if isinstance(square, str):
                unreadable[images.names[index]] = square
            else:
                if pixels_NSSC is not None:
                    pixels_NSSC[index] = square
                if totals is not None:
                    totals.add(square)
            progress(index + 1, len(images))
        if pixels_NSSC is not None:
            pixels_NSSC.flush()

    if cache is None:
        fill(None)
    else:
        write_atomically(cache, fill)
    return unreadable


def _allocate(path: Path, shape: tuple[int, ...]) -> "np.memmap[Any, np.dtype[np.uint8]]":
    """A writable map of the file; its blocks are reserved first, since a full disk would end the process later."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
    return np.memmap(path, np.uint8, "r+", shape=shape)


def decode_in_order(
    images: ImageList, preprocessing: Preprocessing, side: int, workers: int
) -> Iterator[Pixels | str]:
    """Every square [S, S, 3], or the reason why there is none, in the order of the list, a bounded number ahead."""

    def one(index: int) -> Pixels | str:
        try:
            return _decode(images.path(index), preprocessing, side)
        except (ImageError, OSError) as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        indices = iter(range(len(images)))
        window = [pool.submit(one, index) for index in itertools.islice(indices, _WINDOW * workers)]
        try:
            while window:
                yield window.pop(0).result()
                window.extend(pool.submit(one, index) for index in itertools.islice(indices, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Totals:
    """Exact integer sums over squares."""

    def __init__(self, side: int) -> None:
        self.images = 0
        self.sum_SSC = np.zeros((side, side, 3), np.int64)
        self.products_CC = np.zeros((3, 3), np.int64)

    def add(self, square_SSC: Pixels) -> None:
        """Count one square, uint8 [S, S, 3]."""
        """Count one square in."""
        self.images += 1
        self.sum_SSC += square_SSC
        colors = square_SSC.reshape(-1, 3).astype(np.float64)
        self.products_CC += (colors.T @ colors).astype(np.int64)  # whole numbers below 2^53: exact

    def tensors(self) -> dict[str, Tensor]:
        """The sums, to be stored."""
        """The sums by name; those of several sets, added, are the sums of all."""
        return {
            "images": torch.tensor(self.images),
            "sum_SSC": torch.from_numpy(self.sum_SSC),
            "products_CC": torch.from_numpy(self.products_CC),
        }


def statistics_of(sums: dict[str, Tensor]) -> Statistics:
    """The statistics that follow from `Totals.tensors`.

    Raises:
        CheckpointError: sums are missing.
    """
    """What `Totals.tensors` come to.

    Raises:
        CheckpointError: one is missing.
    """
    try:
        images = int(sums["images"])
        sum_SSC, products_CC = sums["sum_SSC"].double(), sums["products_CC"].double()
    except KeyError as error:
        raise CheckpointError(f"the cache's statistics lack {error}; delete the cache folder") from error
    pixels = images * sum_SSC.shape[0] * sum_SSC.shape[1]
    mean_C = sum_SSC.sum((0, 1)) / pixels
    covariance_CC = products_CC / pixels - torch.outer(mean_C, mean_C)
    variances_C, vectors_CC = torch.linalg.eigh(covariance_CC)
    # A channel that never varies would be divided by zero.
    std_C = covariance_CC.diagonal().clamp(min=1).sqrt()
    r, g, b = mean_C.tolist()
    std_r, std_g, std_b = std_C.tolist()
    return Statistics(
        mean_image=(sum_SSC / images).permute(2, 0, 1).float().contiguous(),
        mean=(r, g, b),
        std=(std_r, std_g, std_b),
        color_components=(vectors_CC * variances_C.clamp(min=0).sqrt()).float(),
    )
