"""Which photographs, which classes, which of them for validation: read from folders, before anything is decoded.

Two layouts: `train/<class>/…` beside `val/<class>/…`, or `<class>/…` alone, from which a share of every class is set
aside for validation, the same for the same seed.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from topfive._folders import files_below
from topfive.errors import TopfiveError
from topfive_training.checkpoint import write_atomically
from topfive_training.randomness import order

_VALIDATION_NAMES: Final = ("val", "validation", "valid")
HELD_OUT_FILE: Final = "validation.txt"
"""In a run's folder: its validation images, a relative path on each line."""


class DataError(TopfiveError):
    """Training data that cannot be used; the message names the folder and the way out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageList:
    """Files and their classes, in a fixed order."""

    root: Path
    names: tuple[str, ...]
    """Paths relative to `root`, with forward slashes."""
    classes: tuple[int, ...]
    """Index of each file's class."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where the file is."""
        return self.root / self.names[index]

    def subset(self, indices: Sequence[int]) -> "ImageList":
        """These files only, in this order."""
        return ImageList(
            root=self.root,
            names=tuple(self.names[i] for i in indices),
            classes=tuple(self.classes[i] for i in indices),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Everything that a run trains and validates on."""

    labels: tuple[str, ...]
    training: ImageList
    validation: ImageList
    remarks: tuple[str, ...]
    """What was left out or looks odd, a sentence each, for the summary."""


def scan(folder: Path, *, validation_fraction: float, seed: int) -> Dataset:
    """Find the images of either layout.

    Args:
        folder: holds class folders, or `train/` and `val/` (`validation/`, `valid/`) with class folders.
        validation_fraction: share of each class that is set aside where there is no validation folder.
        seed: fixes which ones.

    Raises:
        DataError: no folder, fewer than two classes with images, or validation classes that training does not have.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; training data is a folder with one subfolder for each class"
        )
    train = folder / "train"
    given = next((folder / name for name in _VALIDATION_NAMES if (folder / name).is_dir()), None)
    source = train if train.is_dir() else folder
    remarks: list[str] = []
    classes = _class_folders(source, remarks)
    labels = tuple(name for name, _ in classes)
    everything = _image_list(source, labels, dict(classes))
    if source is train and given is not None:
        validation = _validation_list(given, labels, remarks)
        return Dataset(labels=labels, training=everything, validation=validation, remarks=tuple(remarks))
    kept, set_aside = _split(everything, len(labels), validation_fraction, seed)
    alone = [labels[c] for c in range(len(labels)) if everything.classes.count(c) == 1]
    if alone:
        remarks.append(
            f"{_list(alone)}: a single image, which is not enough for training and validation both"
        )
    return Dataset(
        labels=labels,
        training=everything.subset(kept),
        validation=everything.subset(set_aside),
        remarks=tuple(remarks),
    )


def scan_known(folder: Path, labels: tuple[str, ...], run: Path) -> tuple[ImageList, tuple[str, ...]]:
    """The images of `folder` by the classes that a model knows, with remarks; for evaluation.

    Where `folder` has a validation folder, that is taken. Where it is the one that `run` set images aside from, only
    those are taken: the others are what it was trained on.

    Raises:
        DataError: no folder, no images, or a class that is not among `labels`.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; evaluation needs a folder with one subfolder for each class"
        )
    remarks: list[str] = []
    given = next((folder / name for name in _VALIDATION_NAMES if (folder / name).is_dir()), None)
    if given is None and (folder / "train").is_dir():
        folder /= "train"
    images = _validation_list(given or folder, labels, remarks)
    # `run` may be the `best/` of a run.
    held_out = next((f / HELD_OUT_FILE for f in (run, run.parent) if (f / HELD_OUT_FILE).is_file()), None)
    if given is None and held_out is not None:
        names = set(held_out.read_text(encoding="utf-8").splitlines())
        indices = [index for index, name in enumerate(images.names) if name in names]
        if indices:
            remarks.append(
                f"{len(indices):,} of the {len(images):,} images, those that {run} did not train on ({HELD_OUT_FILE})"
            )
            images = images.subset(indices)
    return images, tuple(remarks)


def write_held_out(run: Path, images: ImageList) -> None:
    """Note in `run` which images it was not trained on."""
    text = "".join(f"{name}\n" for name in images.names)
    write_atomically(run / HELD_OUT_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def fingerprint(images: ImageList) -> str:
    """SHA-256 over the sorted names and sizes."""
    digest = hashlib.sha256()
    for name in sorted(images.names):
        digest.update(f"{name}\0{(images.root / name).stat().st_size}\n".encode())
    return digest.hexdigest()


def _class_folders(folder: Path, remarks: list[str]) -> list[tuple[str, list[str]]]:
    """Name and files of every class that has any, sorted by name."""
    found = []
    empty = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files = sorted(_files(entry))
        if files:
            found.append((entry.name, files))
        else:
            empty.append(entry.name)
    if empty:
        remarks.append(f"{_list(empty)}: empty, so no class")
    if len(found) < 2:
        what = f"only one class with files ({found[0][0]})" if found else "no class folder with files"
        raise DataError(
            f"{folder} has {what}; training needs at least two subfolders, one for each class, with images in them"
        )
    return found


def _validation_list(folder: Path, labels: tuple[str, ...], remarks: list[str]) -> ImageList:
    present = {
        e.name: sorted(_files(e))
        for e in sorted(folder.iterdir())
        if e.is_dir() and not e.name.startswith(".")
    }
    present = {name: files for name, files in present.items() if files}
    unknown = [name for name in present if name not in labels]
    if unknown:
        raise DataError(
            f"{folder} has classes that the model does not know: {_list(unknown)}; its folders must be named as the "
            f"classes of the training images, {_list(labels)}"
        )
    if not present:
        raise DataError(
            f"{folder} has no class folder with files, so there is nothing to measure accuracy on"
        )
    missing = [label for label in labels if label not in present]
    if missing:
        remarks.append(f"{_list(missing)}: no validation images in {folder}")
    return _image_list(folder, labels, present)


def _image_list(root: Path, labels: tuple[str, ...], files: dict[str, list[str]]) -> ImageList:
    pairs = [
        (f"{label}/{name}", index) for index, label in enumerate(labels) for name in files.get(label, [])
    ]
    return ImageList(root=root, names=tuple(n for n, _ in pairs), classes=tuple(c for _, c in pairs))


def _split(images: ImageList, classes: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for validation: `fraction` of each class, but at least one of two or more."""
    members: list[list[int]] = [[] for _ in range(classes)]
    for index, class_ in enumerate(images.classes):
        members[class_].append(index)
    set_aside: set[int] = set()
    for class_, indices in enumerate(members):
        if len(indices) > 1:
            count = min(len(indices) - 1, max(1, round(fraction * len(indices))))
            shuffled = order(seed, class_, len(indices)).tolist()
            set_aside.update(indices[i] for i in shuffled[:count])
    return [i for i in range(len(images)) if i not in set_aside], sorted(set_aside)


def _files(folder: Path) -> Iterator[str]:
    """Every file below `folder` that is not hidden, relative to it."""
    return (path.relative_to(folder).as_posix() for path in files_below(folder))


def _list(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
