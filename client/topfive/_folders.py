"""Every file below a folder, the same for training, export and load tests."""

import os
from collections.abc import Iterator
from pathlib import Path


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
