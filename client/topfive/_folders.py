"""Files below a folder, and which of them are images by their name: the same for training, export, scoring and load tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

IMAGE_SUFFIXES: Final = (
    ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""How the names of images end, whatever their case."""


def has_image_name(name: str) -> bool:
    """Whether a file of this name (or path) counts as an image where nothing else is known of it."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth that are not hidden, folder by folder in the order of their names.

    Links are followed, for class folders are often links to where the photographs lie; but not to a folder that the
    walk is already inside of.

    Raises:
        OSError: a folder cannot be listed.
    """
    return _walk(folder, frozenset())


def _walk(folder: Path, inside: frozenset[tuple[int, int]]) -> Iterator[Path]:
    about = folder.stat()
    identity = (about.st_dev, about.st_ino)
    if identity in inside:
        return
    with os.scandir(folder) as scan:
        names = sorted(entry.name for entry in scan if not entry.name.startswith("."))
    for name in names:
        path = folder / name
        if path.is_dir():
            yield from _walk(path, inside | {identity})
        else:
            yield path
