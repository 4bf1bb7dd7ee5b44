"""How fast training is, which share of what the machine can multiply that is, and where the rest goes.

    python benchmarks/train.py [DATA] [--batch 128 512 2048] [--width 1] [--recipe 2012] [--compile] [--json FILE]

Every step is `Trainer.step`, as `topfive train` makes it: pixels to float, noise, forward, backward, optimiser. `synthetic`
repeats one batch that lies on the device; `input` reads squares out of memory, crops, mirrors and copies them, as a run
with a cache does (photographs of the class folders in DATA, or noise, which costs the same). The two alternate, and the
median of the rounds is printed with the lowest and the highest.

The arithmetic is counted from the layers' shapes: two operations for each product in convolutions and fully-connected
layers, once forward and twice backward (conv1 needs no gradient of its input); response norm, pooling and all else count
as nothing. Its share is taken of two ceilings measured before and after: a large square matrix product, and conv3's
forward convolution at this batch size, which is what a library gets out of such a shape.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from topfive.allocator import keep_large_buffers
from topfive.model_spec import ModelSpec, Preprocessing
from topfive_training.batches import Batch, training_batches
from topfive_training.checkpoint import Classifier
from topfive_training.dataset import ImageList, scan
from topfive_training.device import on_device
from topfive_training.initialization import initialize
from topfive_training.journal import Journal
from topfive_training.network import AlexNet
from topfive_training.ranks import Interruption, Ranks
from topfive_training.recipe import Recipe, make_recipe
from topfive_training.schedule import Phase
from topfive_training.squares import Squares, decode_in_order
from topfive_training.trainer import Trainer

CATEGORIES: Final = (
    # What it is, and words in the name of an operation or of one that called it; the first that fits counts.
    ("response norm", ("_normalize",)),
    ("optimiser", ("optimizer.step",)),
    ("convolutions", ("convolution", "conv2d")),
    ("matrix products", ("addmm", "linear", "aten::mm", "matmul")),
    ("pooling", ("pool",)),
    ("batch norm", ("batch_norm", "batchnorm")),
    ("ReLU", ("relu", "threshold")),
    ("loss and accuracy", ("cross_entropy", "nll_loss", "log_softmax", "logsoftmax", "topk")),
    ("random numbers", ("rshift", "xor", "bitwise")),
    ("copies and casts", ("copy_", "_to_copy", "contiguous", "zero_", "fill_")),
)


@torch.no_grad()
def operations(network: AlexNet, crop: int) -> int:
    """Floating-point operations of one training step on one image, from the shapes of the layers."""
    total = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        products = output.numel() * layer.weight[0].numel()
        total += 2 * products * (2 if layer is network.conv1 else 3)

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network(torch.zeros(1, 3, crop, crop))
    for hook in hooks:
        hook.remove()
    return total


def seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """The shortest time of some repeats, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def ceilings(recipe: Recipe, batch: int, device: torch.device) -> dict[str, float]:
    """Operations per second of a matrix product, and of conv3's convolution at this batch and width."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" and device.type == "cuda" else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = 2 * side**3 / seconds(lambda: a @ b, device)
    layer = AlexNet(recipe.network(1000)).conv3.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    maps = torch.randn(batch, layer.in_channels, 13, 13, device=device, dtype=dtype)
    maps = maps.contiguous(memory_format=torch.channels_last)
    work = 2 * batch * layer.out_channels * 13 * 13 * layer.weight[0].numel()
    convolution = work / seconds(lambda: F.conv2d(maps, layer.weight, padding=1), device)
    return {"product": product, "convolution": convolution}


def make_squares(recipe: Recipe, data: Path | None, count: int) -> Squares:
    """Squares in memory, as a cache holds them."""
    side = recipe.short_side
    preprocessing = Preprocessing(short_side=side, crop=recipe.crop)
    if data is None:
        pixels_NSSC = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
        names = tuple(map(str, range(count)))
        images = ImageList(root=Path(), names=names, classes=tuple(i % 1000 for i in range(count)))
    else:
        found = scan(data, validation_fraction=0.01, seed=0).training
        images = found.subset(sorted(np.random.default_rng(0).permutation(len(found))[:count].tolist()))
        squares = list(decode_in_order(images, preprocessing, side, len(os.sched_getaffinity(0))))
        good = [index for index, square in enumerate(squares) if not isinstance(square, str)]
        images, pixels_NSSC = images.subset(good), np.stack([cast("Any", squares[index]) for index in good])
    return Squares(images, preprocessing, side, pixels_NSSC, list(range(len(images))))


def make_trainer(
    recipe: Recipe, squares: Squares, device: torch.device, out: Path, *, compiled: bool
) -> Trainer:
    """A trainer as `topfive train` makes it, of 1000 classes."""
    preprocessing = Preprocessing(short_side=recipe.short_side, crop=recipe.crop, mean=(122.0, 117.0, 104.0))
    labels = tuple(map(str, range(1000)))
    spec = ModelSpec(architecture=recipe.network(1000), preprocessing=preprocessing, labels=labels)
    network = AlexNet(spec.architecture)
    initialize(network, recipe)
    return Trainer(
        classifier=Classifier(spec, network=network, color_components=20 * torch.eye(3)),
        recipe=recipe,
        training=squares,
        validation=squares,
        ranks=Ranks(device=device),
        journal=Journal(out, enabled=False),
        interruption=Interruption(),
        out=out,
        workers=len(os.sched_getaffinity(0)),
        save_every_s=3600,
        compiled=compiled,
    )


def one_step(trainer: Trainer, batch: Batch) -> None:
    """A step at a rate so low that noise is no reason to diverge."""
    trainer.step(batch, Phase(rate=1e-6, first_rate=1e-6, color_noise=trainer.recipe.color_noise))


def input_batches(trainer: Trainer) -> Iterator[Batch]:
    """Epoch after epoch, on the device."""
    for epoch in itertools.count():
        batches = training_batches(
            trainer.training, trainer.recipe, epoch=epoch, first_step=0, rank=0, ranks=1, workers=trainer.workers
        )  # fmt: skip
        yield from on_device(batches, trainer.ranks.device)


def measure(
    arguments: argparse.Namespace, architecture: str, batch: int, device: torch.device
) -> dict[str, Any]:
    """Everything about one architecture at one batch size."""
    overrides = {"architecture": architecture, "width": arguments.width, "batch_size": batch}
    if arguments.precision:
        overrides["precision"] = arguments.precision
    recipe = make_recipe(arguments.recipe, overrides)
    per_image = operations(AlexNet(recipe.network(1000)).eval(), recipe.crop)
    squares = make_squares(recipe, arguments.data, max(arguments.images, batch))
    if len(squares) < batch:
        raise SystemExit(f"DATA has {len(squares)} readable images; --batch {batch} needs as many")
    before = ceilings(recipe, batch, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(recipe, squares, device, Path(folder), compiled=arguments.compile)
        rates = pace(trainer, arguments)
        shares = profiled(trainer, next(input_batches(trainer)), arguments.profiled_steps)
    after = ceilings(recipe, batch, device)
    found: dict[str, Any] = {"architecture": architecture, "batch": batch, "flop_per_image": per_image}
    found |= {"images_per_s": rates, "where": shares}
    for name in before:
        found[f"{name}_flop_per_s"] = max(before[name], after[name])
    return found


def pace(trainer: Trainer, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of every round, with the batch on the device and with batches from memory."""
    device, rates = trainer.ranks.device, defaultdict(list)
    real = input_batches(trainer)
    synthetic = itertools.repeat(next(real))
    for _ in range(arguments.warm_up):
        one_step(trainer, next(real))
    for _ in range(arguments.rounds):
        for name, batches in (("synthetic", synthetic), ("input", real)):
            wait(device)
            start = time.perf_counter()
            for batch in itertools.islice(batches, arguments.steps):
                one_step(trainer, batch)
            wait(device)
            rates[name].append(arguments.steps * trainer.batch / (time.perf_counter() - start))
    return dict(rates)


def profiled(trainer: Trainer, batch: Batch, steps: int) -> dict[str, float]:
    """The share of time of each category of operations, on the device."""
    cuda = trainer.ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            one_step(trainer, batch)
        wait(trainer.ranks.device)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type.name == "CPU":  # kernels are counted with what launched them
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[category(event)] += spent
    total = sum(times.values())
    return {name: spent / total for name, spent in sorted(times.items(), key=lambda item: -item[1])}


def category(event: Any) -> str:
    """What an operation belongs to, by its own name and its callers'."""
    chain = []
    while event is not None:
        chain.append(event.name.lower())
        event = event.cpu_parent
    for name, words in CATEGORIES:
        if any(word in link for link in chain for word in words):
            return name
    return "other"


def spread(rates: list[float]) -> str:
    """The median, the lowest and the highest."""
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"


def tables(found: list[dict[str, Any]]) -> tuple[Table, Table]:
    """Speed and shares; where the time goes."""
    columns = ("architecture", "batch", "synthetic, images/s", "input, images/s", "GFLOP/image", "GFLOP/s", "of product", "of convolution")  # fmt: skip
    speed = Table(*columns, title="training; median (lowest-highest) of the rounds")
    where = Table("architecture", "batch", "time by operation", title="where a step's time goes (synthetic)")
    for row in found:
        achieved = statistics.median(row["images_per_s"]["synthetic"]) * row["flop_per_image"]
        speed.add_row(
            row["architecture"],
            str(row["batch"]),
            spread(row["images_per_s"]["synthetic"]),
            spread(row["images_per_s"]["input"]),
            f"{row['flop_per_image'] / 1e9:.2f}",
            f"{achieved / 1e9:,.0f}",
            f"{achieved / row['product_flop_per_s']:.0%} of {row['product_flop_per_s'] / 1e9:,.0f}",
            f"{achieved / row['convolution_flop_per_s']:.0%} of {row['convolution_flop_per_s'] / 1e9:,.0f}",
        )
        parts = ", ".join(f"{name} {share:.0%}" for name, share in row["where"].items() if share >= 0.005)
        where.add_row(row["architecture"], str(row["batch"]), parts)
    return speed, where


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())  # fmt: skip
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", help="class folders; noise if not given")
    parser.add_argument("--architectures", nargs="+", default=["alexnet-2012", "alexnet-2014"])
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--recipe", default="2012")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the layers on a GPU; the recipe's")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as topfive train --compile")
    parser.add_argument("--images", type=int, default=512, help="squares in memory")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before anything is measured")
    parser.add_argument("--steps", type=int, default=3, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profiled-steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write what was measured here")
    return parser.parse_args()


def main() -> None:
    """Measure all that was asked for, and print."""
    keep_large_buffers()  # as topfive train does
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device)
    found = [
        measure(arguments, architecture, batch, device)
        for architecture in arguments.architectures
        for batch in arguments.batch
    ]
    console = Console(width=150)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    console.print(
        f"recipe {arguments.recipe}, width {arguments.width:g}, {'compiled' if arguments.compile else 'eager'}; "
        f"n = {arguments.rounds} rounds of {arguments.steps} steps each, after {arguments.warm_up} steps"
    )
    for table in tables(found):
        console.print(table)
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        text = json.dumps({"machine": about, "settings": settings, "results": found}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
