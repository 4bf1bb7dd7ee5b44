"""Where photographs to prepare come from: class folders, or the three archives of ILSVRC-2012, unpacked by nobody.

Either way the result is a list of entries, each a stretch of bytes in some file, with its class.
"""

import dataclasses
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from topfive.errors import TopfiveError
from topfive_training.dataset import ImageList, scan

TRAIN_ARCHIVE: Final = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE: Final = "ILSVRC2012_img_val.tar"
DEVKIT: Final = "ILSVRC2012_devkit_t12"
"""The archive is DEVKIT.tar.gz; it may have been unpacked beside the others."""


class SourceError(TopfiveError):
    """Photographs that cannot be prepared; the message names the file and the way out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One image file."""

    path: str
    """The file that holds its bytes: itself, or an archive."""
    offset: int
    size: int
    """In bytes."""
    name: str
    """What it is called, for people: relative to the source."""
    label: int

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: the file is gone or shorter than it was.
        """
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.path} has become shorter")
        return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Everything there is to prepare."""

    kind: str
    """`class folders` or `ILSVRC-2012 archives`."""
    labels: tuple[str, ...]
    """For people, in the order of the classes."""
    splits: dict[str, list[Entry]]
    """`train` and `val`."""
    remarks: tuple[str, ...] = ()


def find_source(folder: Path, *, validation_fraction: float, seed: int) -> Source:
    """See what `folder` holds and list it.

    Raises:
        SourceError: archives that are incomplete or do not fit each other.
        topfive_training.dataset.DataError: neither archives nor class folders.
    """
    if (folder / TRAIN_ARCHIVE).is_file() or (folder / VAL_ARCHIVE).is_file():
        return ilsvrc_archives(folder)
    dataset = scan(folder, validation_fraction=validation_fraction, seed=seed)
    return Source(
        kind="class folders",
        labels=dataset.labels,
        splits={"train": list(_files(dataset.training)), "val": list(_files(dataset.validation))},
        remarks=dataset.remarks,
    )


def _files(images: ImageList) -> Iterator[Entry]:
    for index, (name, label) in enumerate(zip(images.names, images.classes, strict=True)):
        path = images.path(index)
        yield Entry(str(path), 0, path.stat().st_size, name, label)


def ilsvrc_archives(folder: Path) -> Source:
    """The entries of the three archives as they are downloaded, nothing unpacked.

    Classes are numbered in the order of their WordNet ids, as everywhere but in the devkit: its ground truth holds
    ILSVRC ids, which `meta.mat` maps.

    Raises:
        SourceError: one is missing, damaged, or has not the images that the devkit counts.
    """
    for name in (TRAIN_ARCHIVE, VAL_ARCHIVE):
        if not (folder / name).is_file():
            raise SourceError(f"{folder} has no {name}; ILSVRC-2012 needs it beside the other two archives")
    synsets, truth = read_devkit(folder)
    wnids = sorted(synset.wnid for synset in synsets)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    words_of = {synset.wnid: synset.words for synset in synsets}
    train = list(_training_entries(folder / TRAIN_ARCHIVE, label_of))
    _check_counts(folder / TRAIN_ARCHIVE, train, {label_of[s.wnid]: s.images for s in synsets}, wnids)
    wnid_of_id = {synset.ilsvrc_id: synset.wnid for synset in synsets}
    try:
        val_labels = [label_of[wnid_of_id[number]] for number in truth]
    except KeyError as error:
        raise SourceError(
            f"the devkit's ground truth has the ILSVRC id {error}, which meta.mat does not know"
        ) from error
    val = list(_validation_entries(folder / VAL_ARCHIVE, val_labels))
    return Source(
        kind="ILSVRC-2012 archives",
        labels=tuple(words_of[wnid] for wnid in wnids),
        splits={"train": train, "val": val},
    )


@dataclasses.dataclass(frozen=True)
class Synset:
    """One leaf of the devkit's tree: a class."""

    ilsvrc_id: int
    wnid: str
    words: str
    images: int


def read_devkit(folder: Path) -> tuple[list[Synset], list[int]]:
    """The classes, and the ILSVRC id of every validation image in turn.

    Raises:
        SourceError: no devkit, a damaged one, or scipy is missing.
    """
    archive = folder / f"{DEVKIT}.tar.gz"
    members = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    if (folder / DEVKIT).is_dir():
        meta, truth = (_read_file(folder / DEVKIT / member) for member in members)
    elif archive.is_file():
        try:
            with tarfile.open(archive) as tar:
                meta, truth = (_read_member(tar, f"{DEVKIT}/{member}") for member in members)
        except (tarfile.TarError, OSError, EOFError, KeyError) as error:
            raise SourceError(f"{archive} is damaged or not the devkit of ILSVRC-2012: {error}") from error
    else:
        raise SourceError(f"{folder} has no {DEVKIT}.tar.gz, which maps the ids of ILSVRC-2012 to classes")
    try:
        numbers = [int(line) for line in truth.decode().split()]
    except ValueError as error:
        raise SourceError(f"the devkit's {members[1]} is not a list of numbers: {error}") from error
    return _read_meta(meta), numbers


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def _read_meta(contents: bytes) -> list[Synset]:
    try:
        from scipy.io import (  # type: ignore[import-untyped]  # noqa: PLC0415  only this source needs it
            loadmat,
        )
    except ImportError as error:
        raise SourceError(
            "reading the devkit's meta.mat needs scipy, which is not installed: pip install 'topfive[imagenet]'"
        ) from error
    try:
        rows: Any = loadmat(io.BytesIO(contents), squeeze_me=True)["synsets"]
        return [
            Synset(
                int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]), int(row["num_train_images"])
            )
            for row in rows
            if int(row["num_children"]) == 0
        ]
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise SourceError(f"the devkit's data/meta.mat is not as ILSVRC-2012 has it: {error}") from error


def _training_entries(archive: Path, label_of: dict[str, int]) -> Iterator[Entry]:
    """The images in the archives (one for each class) in the archive."""
    for inner in _members(archive):
        wnid = Path(inner.name).stem
        if wnid not in label_of:
            raise SourceError(f"{archive} holds {inner.name}, which is no class of the devkit")
        with archive.open("rb") as file:
            window = io.BufferedReader(_Window(file, inner.offset_data, inner.size))
            for member in _members(archive, window, inner.name):
                yield Entry(
                    str(archive),
                    inner.offset_data + member.offset_data,
                    member.size,
                    f"{wnid}/{Path(member.name).name}",
                    label_of[wnid],
                )


def _validation_entries(archive: Path, labels: list[int]) -> Iterator[Entry]:
    members = sorted(_members(archive), key=lambda member: member.name)
    if len(members) != len(labels):
        raise SourceError(
            f"{archive} holds {len(members):,} images and the devkit's ground truth {len(labels):,} ids; one of the two "
            "is incomplete: fetch it again"
        )
    for member, label in zip(members, labels, strict=True):
        yield Entry(str(archive), member.offset_data, member.size, member.name, label)


def _members(archive: Path, window: BinaryIO | None = None, inner: str = "") -> Iterator[tarfile.TarInfo]:
    """The files of a tar, which is all of `archive` or what `window` shows of it."""
    try:
        with (
            tarfile.open(archive, "r:") if window is None else tarfile.open(fileobj=window, mode="r:") as tar
        ):
            for member in tar:
                if member.isfile():
                    if window is None and member.offset_data + member.size > archive.stat().st_size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield member
    except (tarfile.TarError, EOFError) as error:
        where = f"{inner} in {archive}" if inner else str(archive)
        raise SourceError(f"{where} is damaged or incomplete ({error}); fetch the archive again") from error


def _check_counts(archive: Path, entries: list[Entry], expected: dict[int, int], wnids: list[str]) -> None:
    found = Counter(entry.label for entry in entries)
    for label, count in expected.items():
        if found[label] != count:
            raise SourceError(
                f"{archive} holds {found[label]:,} images of {wnids[label]} and the devkit counts {count:,}; the archive "
                "is incomplete: fetch it again"
            )


class _Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
