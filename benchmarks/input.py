"""How fast images come out of each kind of storage, and how long a training step waits for them.

    python benchmarks/input.py PHOTOS [--images 400] [--workers 1 2] [--width 0.25] [--batch 32]

PHOTOS holds class folders. They are read as they are, from JPEG shards and from raw shards (`topfive prepare`), through
the very batches that training takes: decode, crop, mirror. Then some steps are trained on each, and the share of their
time that went by waiting for the next batch is printed. Files are in the page cache after the first pass.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from topfive.allocator import keep_large_buffers
from topfive.model_spec import Preprocessing
from topfive_training.batches import Batch, training_batches
from topfive_training.dataset import scan
from topfive_training.initialization import initialize
from topfive_training.network import AlexNet
from topfive_training.optimizer import make_optimizer, set_rates
from topfive_training.prepare import prepare
from topfive_training.recipe import Recipe
from topfive_training.schedule import Phase
from topfive_training.shards import ShardSquares
from topfive_training.squares import Squares


def first_images(photos: Path, count: int, folder: Path) -> Path:
    """A folder of links to every so-manieth photo, so that all classes are among them."""
    training = scan(photos, validation_fraction=0.2, seed=0).training
    for index in range(0, len(training), max(1, len(training) // count)):
        link = folder / training.names[index]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(training.path(index).resolve())
    return folder


def batches(squares: Squares, recipe: Recipe, workers: int) -> Iterator[Batch]:
    """One epoch, as a single rank gets it."""
    return training_batches(squares, recipe, epoch=0, first_step=0, rank=0, ranks=1, workers=workers)


def images_per_second(squares: Squares, recipe: Recipe, workers: int, passes: int = 3) -> float:
    """The best of some passes, each over all images."""
    best = 0.0
    for _ in range(passes):
        started = time.perf_counter()
        images = sum(len(batch.classes_B) for batch in batches(squares, recipe, workers))
        best = max(best, images / (time.perf_counter() - started))
    return best


def share_waiting(squares: Squares, recipe: Recipe, workers: int, classes: int) -> tuple[float, float]:
    """Share of one epoch's time spent waiting for batches, and images per second."""
    network = AlexNet(recipe.network(classes)).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialize(network, recipe)
    optimizer = make_optimizer(network, recipe)
    waited, images = 0.0, 0
    source = batches(squares, recipe, workers)
    batch = next(source)  # the first wait is for the pipeline to fill
    started = time.perf_counter()
    while True:
        images_BCHW = (batch.images_BHWC.permute(0, 3, 1, 2).float() - 120).contiguous(
            memory_format=torch.channels_last
        )
        loss = F.cross_entropy(network(images_BCHW, batch.keys_B), batch.classes_B)
        loss.backward()  # type: ignore[no-untyped-call]
        set_rates(optimizer, Phase(rate=0.001, first_rate=0.001, color_noise=0.0))
        optimizer.step()
        optimizer.zero_grad()
        images += len(batch.classes_B)
        before = time.perf_counter()
        following = next(source, None)
        waited += time.perf_counter() - before
        if following is None:
            seconds = time.perf_counter() - started
            return waited / seconds, images / seconds
        batch = following


def main() -> None:
    """Measure every kind of storage with every number of workers, and print."""
    keep_large_buffers()  # as topfive train does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    recipe = Recipe(width=options.width, batch_size=options.batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        links = first_images(options.photos, options.images, folder / "photos")
        prepare(links, folder / "jpeg", format="jpeg", validation_fraction=0.02)
        prepare(links, folder / "raw", format="raw", validation_fraction=0.02)
        found = scan(links, validation_fraction=0.02, seed=0)
        preprocessing = Preprocessing(short_side=recipe.short_side, crop=recipe.crop)
        sources = {
            "photos": Squares(found.training, preprocessing, recipe.short_side, None, []),
            "JPEG shards": ShardSquares(str(folder / "jpeg"), "train"),
            "raw shards": ShardSquares(str(folder / "raw"), "train"),
        }
        count = len(found.training)
        console = Console(width=110)
        console.print(
            f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {count} images"
        )
        table = Table(
            "storage", "workers", "images/s", f"training at width {options.width:g}, images/s", "waiting"
        )
        for kind, squares in sources.items():
            for workers in options.workers:
                speed = images_per_second(squares, recipe, workers)
                waiting, trained = share_waiting(squares, recipe, workers, len(found.labels))
                table.add_row(kind, str(workers), f"{speed:,.0f}", f"{trained:,.0f}", f"{waiting:.1%}")
        console.print(table)


if __name__ == "__main__":
    main()
