"""Prepared squares in WebDataset shards: how they are laid out, written one by one, and read at random.

    DEST/manifest.json            what is in here; written last, so where it is, everything is
    DEST/train-000000.tar ...     for each image `<number>.jpg` (or `.npy`, uint8 [S, S, 3]) and `<number>.cls`
    DEST/train.index.safetensors  where in which shard each image lies, and its class
    DEST/train.names.txt          what each image was called in the source, a line each
    DEST/statistics.safetensors   mean image and colours of the training images, as exact sums

The tars are read by any WebDataset reader. `ShardSquares` reads them in any order, from a folder or, through fsspec,
from wherever else they lie.

Shapes: N images, S side of the square.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from topfive.errors import TopfiveError
from topfive.model_spec import Preprocessing
from topfive.preprocessing import ImageError, decode
from topfive_training.dataset import Dataset, ImageList
from topfive_training.sources import Entry
from topfive_training.squares import Opened, Pixels, Squares, statistics_of

MANIFEST: Final = "manifest.json"
STATISTICS: Final = "statistics.safetensors"
LAYOUT: Final = 1
"""Version of this layout."""
Format: TypeAlias = Literal["jpeg", "raw"]
FORMATS: Final = get_args(Format)


class ShardError(TopfiveError):
    """Shards that are missing, damaged or of a newer layout; the message names the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What one shard is to hold, and how; the same plan always gives the same bytes."""

    name: str
    """E.g. `train-000042`."""
    entries: tuple[Entry, ...]
    first_number: int
    """Number of the first image within its split, for the keys."""
    format: Format
    quality: int
    side: int

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the contents."""
        digest = hashlib.sha256(
            f"{LAYOUT} {self.first_number} {self.format} {self.quality} {self.side}\n".encode()
        )
        for entry in self.entries:
            digest.update(f"{entry.path}\0{entry.offset} {entry.size} {entry.name}\0{entry.label}\n".encode())
        return digest.hexdigest()


@dataclasses.dataclass(kw_only=True)
class ShardRecord:
    """What one shard holds, once it is written."""

    fingerprint: str
    sha256: str
    """Of the tar."""
    bytes: int
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    """Where in the tar each image's bytes begin, and how many they are."""
    labels: list[int]
    unreadable: dict[str, str]
    """Name of each image that was left out, and why."""


def write_shard(plan: ShardPlan, path: Path, add: Callable[[Pixels], None]) -> ShardRecord:
    """Write the tar to `path` and read it back; `add` is told every square.

    Raises:
        OSError: it cannot be written.
        ShardError: what was read back is not what was written.
    """
    record = ShardRecord(
        fingerprint=plan.fingerprint(), sha256="", bytes=0,
        names=[], offsets=[], sizes=[], labels=[], unreadable={},
    )  # fmt: skip
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, entry in enumerate(plan.entries, plan.first_number):
            try:
                square = _square(entry.read(), plan.side)
            except (ImageError, OSError) as error:
                record.unreadable[entry.name] = str(error)
                continue
            data = encode(square, plan)
            suffix = "jpg" if plan.format == "jpeg" else "npy"
            _add_file(tar, f"{number:08d}.{suffix}", data)
            record.offsets.append(file.tell() - _padded(len(data)))
            record.sizes.append(len(data))
            record.labels.append(entry.label)
            record.names.append(entry.name)
            _add_file(tar, f"{number:08d}.cls", str(entry.label).encode())
            add(np.asarray(square))
    _verify(path, record)
    return record


def _square(contents: bytes, side: int) -> Image.Image:
    preprocessing = Preprocessing(short_side=side, crop=side)
    return decode(contents, preprocessing).image


def encode(square: Image.Image, plan: ShardPlan) -> bytes:
    """The bytes that are stored of a square."""
    file = io.BytesIO()
    if plan.format == "jpeg":
        # Full colour resolution: these squares are small, and are resampled no more.
        square.save(file, "JPEG", quality=plan.quality, subsampling=0)
    else:
        np.save(file, np.asarray(square), allow_pickle=False)
    return file.getvalue()


def decode_stored(data: bytes, side: int) -> Pixels:
    """The square in stored bytes of either format, uint8 [S, S, 3].

    Raises:
        ShardError: they are damaged.
    """
    try:
        if data.startswith(b"\x93NUMPY"):
            pixels: Pixels = np.frombuffer(data, np.uint8, side * side * 3, len(data) - side * side * 3)
            return pixels.reshape(side, side, 3)
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            square = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ShardError(f"a stored image is damaged: {error}") from error
    if square.shape != (side, side, 3):
        raise ShardError(f"a stored image is {square.shape[1]} x {square.shape[0]}, and not {side} x {side}")
    return square


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no times, no owners: the same bytes on every machine
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _verify(path: Path, record: ShardRecord) -> None:
    """Read the shard back: its hash, its count, and every place in the index."""
    with path.open("rb") as file:
        record.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        record.bytes = file.tell()
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found = [(m.offset_data, m.size) for m in tar if not m.name.endswith(".cls")]
    if found != list(zip(record.offsets, record.sizes, strict=True)):
        raise ShardError(f"{path} was not written as it should be: {len(found)} images read back")


def is_shards(folder: Path) -> bool:
    """Whether `folder` holds prepared shards."""
    return (folder / MANIFEST).is_file()


def read_manifest(where: str) -> dict[str, Any]:
    """The manifest of the shards in a folder or at an fsspec URL.

    Raises:
        ShardError: there is none, or it is of a newer layout.
    """
    try:
        manifest = json.loads(_read(where, MANIFEST))
    except ValueError as error:
        raise ShardError(f"{where}/{MANIFEST} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("layout"), int):
        raise ShardError(
            f"{where}/{MANIFEST} is not the manifest of shards that `topfive prepare` has written"
        )
    if manifest["layout"] > LAYOUT:
        raise ShardError(
            f"{where} has layout {manifest['layout']} and this program reads up to {LAYOUT}; update topfive"
        )
    return manifest


def _filesystem(where: str) -> tuple[Any, str]:
    try:
        import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415  only remote shards need it
    except ImportError as error:
        raise ShardError(
            f"{where} is not a local folder, and other places need fsspec: pip install 'topfive[scoring]'"
        ) from error
    try:
        filesystem, root = fsspec.core.url_to_fs(where)
    except (ValueError, ImportError) as error:
        raise ShardError(f"{where} cannot be opened: {error}") from error
    return filesystem, root


def _read(where: str, name: str) -> bytes:
    try:
        if "://" not in where:
            return (Path(where) / name).read_bytes()
        filesystem, root = _filesystem(where)
        contents: bytes = filesystem.cat_file(f"{root}/{name}")
    except OSError as error:
        raise ShardError(f"{where}/{name} cannot be read: {error}") from error
    return contents


def _tensors(where: str, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(_read(where, name))
    except safetensors.SafetensorError as error:
        raise ShardError(f"{where}/{name} is damaged: {error}") from error


class ShardSquares(Squares):
    """One split of prepared shards, an image at a time, in any order.

    Opens files when first asked, so that an instance can be sent to another process.
    """

    def __init__(self, where: str, split: Literal["train", "val"], *, side: int | None = None) -> None:
        """Read the index.

        Args:
            where: the folder, or an fsspec URL such as `s3://bucket/imagenet`.
            split: which images.
            side: give this central square of each, in pixels, instead of the whole.

        Raises:
            ShardError: missing, damaged, or smaller than `side`.
        """
        manifest = read_manifest(where)
        self._stored_side = int(manifest["side"])
        side = self._stored_side if side is None else side
        if side > self._stored_side:
            raise ShardError(
                f"{where} holds squares of {self._stored_side} pixels, and {side} are needed; prepare them anew with "
                f"--short-side {side} or more"
            )
        index = _tensors(where, f"{split}.index.safetensors")
        names = _read(where, f"{split}.names.txt").decode().splitlines()
        images = ImageList(root=Path(where), names=tuple(names), classes=tuple(index["label"].tolist()))
        super().__init__(images, Preprocessing(short_side=side, crop=side), side, None, [])
        self._where = where
        self._raw = manifest["format"] == "raw"
        self._shards: list[str] = [shard["name"] for shard in manifest["splits"][split]["shards"]]
        self._places_N3 = torch.stack([index[name].long() for name in ("shard", "offset", "size")], 1).numpy()
        self._open: dict[int, Any] = {}
        self._remote: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return {**self.__dict__, "_open": {}, "_remote": None}

    @property
    def cached(self) -> bool:
        """Whether reading one costs a copy rather than a decode or a request."""
        return self._raw and "://" not in self._where

    def __getitem__(self, index: int) -> Pixels:
        """uint8 [side, side, 3].

        Raises:
            ShardError: a shard is gone or damaged.
        """
        shard, offset, size = self._places_N3[index].tolist()
        square = decode_stored(self._bytes(shard, offset, size), self._stored_side)
        margin = (self._stored_side - self.side) // 2
        return square[margin : margin + self.side, margin : margin + self.side]

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        name = f"{self._shards[shard]}.tar"
        try:
            if "://" in self._where:
                if self._remote is None:
                    self._remote = _filesystem(self._where)
                filesystem, root = self._remote
                data: bytes = filesystem.cat_file(f"{root}/{name}", start=offset, end=offset + size)
            else:
                if shard not in self._open:
                    self._open[shard] = np.memmap(Path(self._where) / name, np.uint8, "r")
                data = self._open[shard][offset : offset + size].tobytes()
        except (OSError, ValueError) as error:
            raise ShardError(f"{self._where}/{name} cannot be read: {error}") from error
        if len(data) != size:
            raise ShardError(f"{self._where}/{name} is shorter than its index says; copy it again")
        return data


def open_shards(where: str, *, side: int, crop: int) -> tuple[Dataset, Opened, Opened]:
    """Prepared shards as a run takes them: whole training squares with statistics, central validation crops.

    Args:
        where: the folder, or an fsspec URL.
        side: of the squares that the recipe wants, in pixels; must be that of the shards.
        crop: side of the validation crops.

    Raises:
        ShardError: missing, damaged, or of another side.
    """
    manifest = read_manifest(where)
    if manifest["side"] != side:
        raise ShardError(
            f"{where} holds squares of {manifest['side']} pixels and the recipe's short_side is {side}; give --short-side "
            f"{manifest['side']}, or prepare them anew"
        )
    training, validation = ShardSquares(where, "train"), ShardSquares(where, "val", side=crop)
    left_out = sum(len(split["unreadable"]) for split in manifest["splits"].values())
    dataset = Dataset(
        labels=tuple(manifest["labels"]),
        training=training.images,
        validation=validation.images,
        remarks=(f"{left_out:,} unreadable files were left out when {where} was prepared",)
        if left_out
        else (),
    )
    statistics = statistics_of(_tensors(where, STATISTICS))
    return (
        dataset,
        Opened(squares=training, unreadable={}, statistics=statistics),
        Opened(squares=validation, unreadable={}, statistics=None),
    )


def combine_index(records: Iterable[ShardRecord]) -> dict[str, Tensor]:
    """The index of a split from the records of its shards, in order."""
    columns: dict[str, list[int]] = {"shard": [], "offset": [], "size": [], "label": []}
    for number, record in enumerate(records):
        columns["shard"] += [number] * len(record.offsets)
        columns["offset"] += record.offsets
        columns["size"] += record.sizes
        columns["label"] += record.labels
    types = {"shard": torch.int32, "offset": torch.int64, "size": torch.int32, "label": torch.int32}
    return {name: torch.tensor(column, dtype=types[name]) for name, column in columns.items()}
