"""A training run as a whole: what `topfive train` does on each rank."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from topfive import __version__
from topfive.model_spec import ModelSpec, Preprocessing
from topfive_training import resume
from topfive_training.checkpoint import Classifier, load_model
from topfive_training.dataset import DataError, Dataset, ImageList, fingerprint, scan, write_held_out
from topfive_training.initialization import initialize
from topfive_training.journal import Journal
from topfive_training.network import AlexNet
from topfive_training.parallel import Mode
from topfive_training.ranks import Interruption, Ranks
from topfive_training.recipe import Recipe
from topfive_training.shards import is_shards, open_shards, read_manifest
from topfive_training.squares import Opened, Statistics, open_squares
from topfive_training.trainer import Trainer
from topfive_training.transfer import classifier_from

_SHOWN: Final = 5
"""Unreadable files that are named; the rest are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run's data is and which machine does it; nothing here changes the result."""

    data: str
    """Class folders, `train/` and `val/` with class folders, or prepared shards (these at any fsspec URL too)."""
    out: Path
    """Folder of the run."""
    initial: Path | None = None
    """Checkpoint whose weights the run starts from."""
    resume: bool = False
    """Go on with the run in `out`."""
    validation_fraction: float = 0.2
    """Share of each class that is set aside where there is no validation folder."""
    split_seed: int = 0
    """Fixes which images are set aside; the same for runs of different recipes and seeds, so that they compare."""
    workers: int = 1
    """Threads of each rank that decode."""
    parallel: Mode = "data"
    """How the ranks share the network; `topfive_training.parallel` explains."""
    compiled: bool = False
    """Let `torch.compile` translate the network; with `parallel` data alone."""
    cache_folder: Path | None = None
    """Where decoded squares are kept; by default within `out`, and removed when the run is complete."""
    cache_gib: float = 16.0
    """Larger sets of squares are not kept but decoded again in every epoch, GiB."""
    save_every_minutes: float = 10.0
    """Longest time whose work a killed machine can lose."""
    command: str = ""
    """How the run was started, for telling how to resume it."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        for name, ok, allowed in (
            ("validation_fraction", 0 < self.validation_fraction < 1, "above 0 and below 1"),
            ("workers", self.workers >= 1, "at least 1"),
            ("cache_gib", self.cache_gib >= 0, "at least 0 GiB"),
            (
                "compiled",
                not self.compiled or self.parallel == "data",
                "left out with parallel hybrid or towers",
            ),
            ("save_every_minutes", self.save_every_minutes > 0, "above 0 minutes"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {allowed}")


def train(ranks: Ranks, recipe: Recipe, options: Options) -> int:
    """Train on one rank, in step with the others; returns the exit status.

    0 when the run is complete; 128 plus the signal's number when it has been interrupted and saved.

    Raises:
        topfive.errors.TopfiveError: data, checkpoint or loss with which there is no going on.
    """
    with Interruption() as interruption, Journal(options.out, enabled=ranks.first) as journal:
        try:
            dataset, training, validation = _open_data(ranks, recipe, options, journal, interruption)
        except _InterruptedError:
            journal.say("interrupted before the first step; nothing to save")
            return 128 + interruption.signal
        assert training.statistics is not None
        resumed = options.resume and (options.out / resume.STATE_FILE).is_file()
        data_fingerprint = fingerprint_of(options.data, dataset)
        if resumed:
            classifier = resume.load_classifier(options.out, data_fingerprint=data_fingerprint)
        else:
            classifier = make_classifier(
                recipe, dataset, training.statistics, data_fingerprint, options.initial
            )
        trainer = Trainer(
            classifier=classifier,
            recipe=recipe,
            training=training.squares,
            validation=validation.squares,
            ranks=ranks,
            journal=journal,
            interruption=interruption,
            out=options.out,
            workers=options.workers,
            save_every_s=options.save_every_minutes * 60,
            parallel=options.parallel,
            compiled=options.compiled,
        )
        if resumed:
            resume.load(options.out, trainer)
        if ranks.first and not _is_shards(options.data):
            write_held_out(options.out, validation.squares.images)
        journal.open_logs(trainer.position.step)
        _announce(journal, trainer, dataset)
        complete = trainer.run()
        if not complete:
            number = ranks.highest(interruption.signal)
            journal.say(
                f"saved at step {trainer.position.step} of {trainer.steps}; to go on: {options.command}"
            )
            return 128 + number
        journal.say(f"done: {options.out}, and the best epoch in {options.out / 'best'}")
    if ranks.first and options.cache_folder is None:
        shutil.rmtree(_cache_folder(options), ignore_errors=True)
    return 0


def make_classifier(
    recipe: Recipe,
    dataset: Dataset,
    statistics: Statistics,
    data_fingerprint: str,
    initial: Path | None = None,
) -> Classifier:
    """A network with its first weights, and the preprocessing that these images, or the weights of `initial`, ask for."""
    preprocessing = Preprocessing(
        short_side=recipe.short_side,
        crop=recipe.crop,
        mean=statistics.mean if recipe.mean != "none" else (0.0, 0.0, 0.0),
        std=statistics.std if recipe.std == "channel" else (1.0, 1.0, 1.0),
        mean_image=recipe.mean == "image",
    )
    spec = ModelSpec(
        architecture=recipe.network(len(dataset.labels)),
        preprocessing=preprocessing,
        labels=dataset.labels,
        recipe=recipe.to_json(),
        data_fingerprint=data_fingerprint,
        code_fingerprint=f"topfive {__version__}",
    )
    if initial is not None:
        return classifier_from(load_model(initial), spec, recipe, statistics.color_components)
    network = AlexNet(spec.architecture)
    initialize(network, recipe)
    return Classifier(
        spec,
        network=network,
        mean_image=statistics.mean_image if preprocessing.mean_image else None,
        color_components=statistics.color_components,
    )


class _InterruptedError(Exception):
    """A signal arrived in the first pass over the images."""


def _open_data(
    ranks: Ranks, recipe: Recipe, options: Options, journal: Journal, interruption: Interruption
) -> tuple[Dataset, Opened, Opened]:

    def watch(done: int, total: int) -> None:
        if interruption.signal:
            raise _InterruptedError
        if done % 16 == 0 or done == total:
            journal.show("decoding", done, total)

    if _is_shards(options.data):
        dataset, training, validation = open_shards(options.data, side=recipe.short_side, crop=recipe.crop)
    else:
        dataset = scan(
            Path(options.data), validation_fraction=options.validation_fraction, seed=options.split_seed
        )
        training, validation = (
            _decode(
                images, recipe, options, ranks, side=side, statistics=images is dataset.training, watch=watch
            )
            for images, side in ((dataset.training, recipe.short_side), (dataset.validation, recipe.crop))
        )
    for remark in dataset.remarks:
        journal.say(f"note: {remark}")
    _report_unreadable(journal, training.unreadable | validation.unreadable)
    _check_enough(dataset, training, validation, ranks, recipe)
    return dataset, training, validation


def _is_shards(data: str) -> bool:
    return "://" in data or is_shards(Path(data))


def fingerprint_of(data: str, dataset: Dataset) -> str:
    """SHA-256 over the names and sizes of the training files; of shards, over their manifest."""
    if _is_shards(data):
        return hashlib.sha256(json.dumps(read_manifest(data), sort_keys=True).encode()).hexdigest()
    return fingerprint(dataset.training)


def _decode(
    images: ImageList,
    recipe: Recipe,
    options: Options,
    ranks: Ranks,
    *,
    side: int,
    statistics: bool,
    watch: Callable[[int, int], None],
) -> Opened:
    """The squares of `images`; the first process of each machine decodes, or caches, for all."""
    with ranks.one_by_machine():
        return open_squares(
            images,
            Preprocessing(short_side=recipe.short_side, crop=recipe.crop),
            side,
            folder=_cache_folder(options),
            limit_bytes=int(options.cache_gib * 2**30),
            workers=len(os.sched_getaffinity(0)),
            with_statistics=statistics,
            progress=watch,
        )


def _cache_folder(options: Options) -> Path:
    return options.cache_folder or options.out / "cache"


def _report_unreadable(journal: Journal, unreadable: dict[str, str]) -> None:
    if not unreadable:
        return
    files = "1 file" if len(unreadable) == 1 else f"{len(unreadable)} files"
    journal.say(f"note: {files} skipped, which cannot be read as images:")
    for name, reason in list(unreadable.items())[:_SHOWN]:
        journal.say(f"  {name}: {reason}")
    if len(unreadable) > _SHOWN:
        journal.say(f"  and {len(unreadable) - _SHOWN} more")


def _check_enough(
    dataset: Dataset, training: Opened, validation: Opened, ranks: Ranks, recipe: Recipe
) -> None:
    present = set(training.squares.images.classes)
    lost = [label for index, label in enumerate(dataset.labels) if index not in present]
    if lost:
        raise DataError(
            f"no file of {', '.join(lost[:8])} can be read as an image; remove the folder, or put images in it"
        )
    if len(validation.squares) == 0:
        raise DataError(
            "there is no readable validation image; each class needs at least two images, or a val folder"
        )
    if min(recipe.batch_size, len(training.squares)) < ranks.size:
        raise DataError(
            f"batch_size {recipe.batch_size} and {len(training.squares)} images are too few for {ranks.size} "
            "processes; each needs at least one image in every step"
        )


def _announce(journal: Journal, trainer: Trainer, dataset: Dataset) -> None:
    network = trainer.classifier.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    where = "1 process" if trainer.ranks.size == 1 else f"{trainer.ranks.size} processes"
    journal.say(
        f"{network.architecture.name}, width {network.architecture.width:g}, {parameters:,} parameters; "
        f"{len(dataset.labels)} classes, {len(trainer.training):,} training and {len(trainer.validation):,} validation "
        f"images; {trainer.steps:,} steps of {trainer.batch} images in {trainer.recipe.epochs} epochs; "
        f"{where} on {trainer.ranks.device.type}"
    )
    if trainer.position.step:
        journal.say(f"resuming at step {trainer.position.step:,}")
