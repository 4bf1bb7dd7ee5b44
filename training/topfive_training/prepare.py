"""`topfive prepare`: photographs -> shards of squares, once, so that every epoch reads a fraction of the bytes.

The paper does it too (section 2): the shorter side to 256 pixels, the central 256 x 256 square. Decoding a 500-pixel
photograph and shrinking it costs several times what decoding the stored square does; a raw square costs a copy.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import Progress

from topfive.allocator import keep_large_buffers
from topfive.errors import TopfiveError
from topfive_training.checkpoint import CheckpointError, load_tensors, save_tensors, write_atomically
from topfive_training.randomness import order
from topfive_training.shards import (
    FORMATS,
    LAYOUT,
    MANIFEST,
    STATISTICS,
    Format,
    ShardPlan,
    ShardRecord,
    combine_index,
    write_shard,
)
from topfive_training.sources import Entry, Source, find_source
from topfive_training.squares import Totals

_PARTS: Final = ".parts"
"""Subfolder of DEST with the records of finished shards, until all are."""
_SHOWN: Final = 5


class PrepareError(TopfiveError, ValueError):
    """A preparation that cannot be done as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    format: Format
    quality: int
    side: int
    shard_images: int
    seed: int

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("format", self.format in FORMATS, " or ".join(FORMATS)),
            ("quality", 1 <= self.quality <= 100, "between 1 and 100"),
            ("short_side", 32 <= self.side <= 4096, "between 32 and 4096 pixels"),
            ("shard_images", 1 <= self.shard_images <= 1_000_000, "between 1 and 1,000,000"),
        ):
            if not ok:
                value = self.side if name == "short_side" else getattr(self, name)
                raise PrepareError(f"{name} is {value!r}; it must be {allowed}")


def prepare(
    source: Path,
    dest: Path,
    *,
    format: Format = "jpeg",  # noqa: A002  the option's name
    quality: int = 90,
    short_side: int = 256,
    shard_images: int = 4096,
    validation_fraction: float = 0.2,
    processes: int | None = None,
    seed: int = 0,
) -> None:
    """Turn photographs into shards that train fast.

    SOURCE holds class folders as `topfive train` takes them, or the three archives of ILSVRC-2012 as they are
    downloaded (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz). DEST gets WebDataset
    tars of central squares and a manifest with their hashes; `topfive train DEST` reads them. The same command goes on
    where an earlier one was stopped. Files that cannot be read as images are left out and listed.

    Args:
        source: Folder of photographs or archives.
        dest: Folder of shards to make, or to complete.
        format: jpeg, about 26 kB an image at quality 90; or raw, 197 kB, which need no decoding.
        quality: Of the JPEG files, 1-100. At 90, with full colour resolution, a square differs from the original by
            38 dB (measured on 100 ImageNet photographs).
        short_side: Pixels of the photographs' shorter side, and of the squares.
        shard_images: Images in each tar.
        validation_fraction: Share of each class that is set aside where SOURCE has no validation images.
        processes: How many at once; by default one for each core.
        seed: Fixes the order of the training images in the shards, and the images set aside.

    Raises:
        TopfiveError: what is wrong with SOURCE or DEST, and the way out.
    """
    settings = _Settings(
        format=format, quality=quality, side=short_side, shard_images=shard_images, seed=seed
    )
    if not 0 < validation_fraction < 1:
        raise PrepareError(f"validation_fraction is {validation_fraction}; it must be above 0 and below 1")
    workers = processes if processes is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise PrepareError(f"processes is {workers}; it must be at least 1")
    console = Console(stderr=True, highlight=False)
    found = find_source(source, validation_fraction=validation_fraction, seed=seed)
    for remark in found.remarks:
        console.print(f"note: {remark}", markup=False)
    plans = {split: list(_plans(split, entries, settings)) for split, entries in found.splits.items()}
    _claim(dest, settings, found)
    records = _write_all(plans, dest, workers, console)
    _finish(dest, settings, found, plans, records)
    _report(dest, records, console)


def _plans(split: str, entries: list[Entry], settings: _Settings) -> Iterator[ShardPlan]:
    if split == "train":
        # A reader that goes from front to back, as WebDataset's do, must not meet one class after the other.
        entries = [entries[i] for i in order(settings.seed, 0, len(entries)).tolist()]
    for number, start in enumerate(range(0, len(entries), settings.shard_images)):
        yield ShardPlan(
            name=f"{split}-{number:06d}",
            entries=tuple(entries[start : start + settings.shard_images]),
            first_number=start,
            format=settings.format,
            quality=settings.quality,
            side=settings.side,
        )


def _claim(dest: Path, settings: _Settings, source: Source) -> None:
    """See that DEST is free, or an earlier try at the same."""
    wanted = {
        "layout": LAYOUT, "settings": dataclasses.asdict(settings), "source": source.kind,
        "images": {split: len(entries) for split, entries in source.splits.items()},
    }  # fmt: skip
    if (dest / MANIFEST).exists():
        raise PrepareError(f"{dest} is complete already; name another folder, or remove it first")
    claim = dest / _PARTS / "claim.json"
    if claim.is_file():
        if json.loads(claim.read_text(encoding="utf-8")) != wanted:
            raise PrepareError(
                f"{dest} holds the beginning of another preparation (other options or other images); give the same "
                "options to go on with it, or remove the folder"
            )
        return
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise PrepareError(
            f"{dest} already exists and is not an empty folder; name another, or remove it first"
        )
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps(wanted), encoding="utf-8")


def _write_all(
    plans: dict[str, list[ShardPlan]], dest: Path, workers: int, console: Console
) -> dict[str, list[ShardRecord]]:
    everything = [plan for split in plans.values() for plan in split]
    images = sum(len(plan.entries) for plan in everything)
    done: dict[str, ShardRecord] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"Preparing {images:,} images", total=images)
        for plan, record in _written(everything, dest, min(workers, len(everything))):
            done[plan.name] = record
            progress.advance(task, len(plan.entries))
    return {split: [done[plan.name] for plan in members] for split, members in plans.items()}


def _written(plans: list[ShardPlan], dest: Path, workers: int) -> Iterator[tuple[ShardPlan, ShardRecord]]:
    """Write every shard, in whatever order they are finished."""
    if workers == 1:
        for plan in plans:
            yield plan, _write_one(plan, dest)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
        futures = {pool.submit(_write_one, plan, dest): plan for plan in plans}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker() -> None:
    # Ctrl-C is the first process's to handle: what is finished stays, and the same command goes on from there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_large_buffers()


def _write_one(plan: ShardPlan, dest: Path) -> ShardRecord:
    """Write a shard, or find that an earlier try has; its record is written last."""
    tar = dest / f"{plan.name}.tar"
    record_path = dest / _PARTS / f"{plan.name}.json"
    sums_path = dest / _PARTS / f"{plan.name}.safetensors"
    known = _finished(plan, tar, record_path, sums_path)
    if known is not None:
        return known
    totals = Totals(plan.side)
    record: ShardRecord | None = None

    def write(beside: Path) -> None:
        nonlocal record
        record = write_shard(plan, beside, totals.add)

    write_atomically(tar, write)
    assert record is not None
    save_tensors(sums_path, totals.tensors())
    text = json.dumps(dataclasses.asdict(record))
    write_atomically(record_path, lambda path: path.write_text(text, encoding="utf-8"))
    return record


def _finished(plan: ShardPlan, tar: Path, record_path: Path, sums_path: Path) -> ShardRecord | None:
    """The record of a shard that is already there, whole and of the same plan."""
    try:
        record = ShardRecord(**json.loads(record_path.read_text(encoding="utf-8")))
        same = record.fingerprint == plan.fingerprint() and tar.stat().st_size == record.bytes
    except (OSError, ValueError, TypeError):
        return None
    return record if same and sums_path.is_file() else None


def _finish(
    dest: Path,
    settings: _Settings,
    source: Source,
    plans: dict[str, list[ShardPlan]],
    records: dict[str, list[ShardRecord]],
) -> None:
    """Put the shards' records together; the manifest comes last."""
    splits: dict[str, Any] = {}
    for split, members in records.items():
        save_tensors(dest / f"{split}.index.safetensors", combine_index(members))
        names = "".join(f"{name}\n" for record in members for name in record.names)
        write_atomically(dest / f"{split}.names.txt", lambda path, text=names: path.write_text(text))  # type: ignore[misc]
        splits[split] = {
            "images": sum(len(record.names) for record in members),
            "shards": [
                {"name": plan.name, "images": len(r.names), "bytes": r.bytes, "sha256": r.sha256}
                for plan, r in zip(plans[split], members, strict=True)
            ],
            "unreadable": {name: why for record in members for name, why in record.unreadable.items()},
        }
    for split, contents in splits.items():
        if not contents["images"]:
            raise PrepareError(f"no {split} image could be read; the first reasons are in {dest / _PARTS}")
    save_tensors(dest / STATISTICS, _total_sums(dest, plans["train"]))
    manifest = {
        "layout": LAYOUT,
        "format": settings.format,
        "quality": settings.quality if settings.format == "jpeg" else None,
        "side": settings.side,
        "source": source.kind,
        "order_seed": settings.seed,
        "labels": list(source.labels),
        "splits": splits,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomically(dest / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
    shutil.rmtree(dest / _PARTS)


def _total_sums(dest: Path, plans: list[ShardPlan]) -> dict[str, torch.Tensor]:
    totals: dict[str, torch.Tensor] = {}
    for plan in plans:
        path = dest / _PARTS / f"{plan.name}.safetensors"
        try:
            sums, _ = load_tensors(path)
        except CheckpointError as error:
            raise PrepareError(f"{error}; remove {path} and run the same command again") from error
        totals = {name: totals[name] + value if totals else value for name, value in sums.items()}
    return totals


def _report(dest: Path, records: dict[str, list[ShardRecord]], console: Console) -> None:
    counts: list[str] = []
    unreadable: dict[str, str] = {}
    size = 0
    for split, members in records.items():
        counts.append(f"{sum(len(record.names) for record in members):,} {split}")
        size += sum(record.bytes for record in members)
        unreadable |= {name: why for record in members for name, why in record.unreadable.items()}
    console.print(f"{dest} holds {' and '.join(counts)} images, {size / 1e6:,.1f} MB", markup=False)
    if unreadable:
        console.print(
            f"note: {len(unreadable)} left out, which cannot be read as images; all are listed in {dest / MANIFEST}:",
            markup=False,
        )
        for name, why in list(unreadable.items())[:_SHOWN]:
            console.print(f"  {name}: {why}", markup=False)
