"""Bytes exchanged per step by each way of sharing a network: counted by the program, calculated, and on the wire.

    python benchmarks/parallel.py [--width 0.25] [--batch 32] [--ranks 2 4] [--steps 5]

`counted` is what `topfive_training.collectives.Traffic` adds up while training, `calculated` what follows from the
architecture alone; they must be equal. `ring` is what each rank then sends with the algorithm that needs the fewest bytes,
and `loopback` what the machine's loopback interface carried per rank and step, with the protocol around it: other
traffic counts too, so close other programs. The last table is calculated for the published network.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from topfive.model_spec import Architecture
from topfive_training.collectives import Traffic
from topfive_training.initialization import initialize
from topfive_training.network import AlexNet, published_architecture
from topfive_training.optimizer import make_optimizer, set_rates
from topfive_training.parallel import Mode, Parallelism, expected_traffic
from topfive_training.ranks import Ranks, launch
from topfive_training.recipe import Recipe
from topfive_training.schedule import Phase

CLASSES = 1000


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried since boot."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    return 0


class Setup(NamedTuple):
    """What one measurement is of."""

    mode: Mode
    width: float
    batch: int
    steps: int
    out: Path


def measure(ranks: Ranks, setup: Setup) -> int:
    """Train some steps on noise; the first rank writes what it counted."""
    mode, width, batch, steps, out = setup
    recipe = Recipe(width=width)
    network = AlexNet(Architecture(width=width, classes=CLASSES)).train()
    initialize(network, recipe)
    parallelism = Parallelism(mode, network, rank=ranks.rank, ranks=ranks.size)
    optimizer = make_optimizer(parallelism.part, recipe)
    share, shares = parallelism.share
    own = batch * (share + 1) // shares - batch * share // shares
    images_BCHW = 60 * torch.randn(own, 3, recipe.crop, recipe.crop)
    classes_B = torch.randint(0, CLASSES, (own,))
    keys_B = torch.arange(own)

    def step() -> None:
        loss = F.cross_entropy(parallelism.model(images_BCHW, keys_B), classes_B, reduction="sum") / batch
        loss.backward()  # type: ignore[no-untyped-call]
        set_rates(optimizer, Phase(rate=0.0001, first_rate=0.0001, color_noise=0.0))
        optimizer.step()
        optimizer.zero_grad()

    step()  # buffers are made and buckets arranged in the first
    parallelism.links.traffic.reset()
    ranks.wait()
    bytes_before, started = loopback_bytes(), time.perf_counter()
    for _ in range(steps):
        step()
    ranks.wait()
    seconds, carried = time.perf_counter() - started, loopback_bytes() - bytes_before
    if ranks.first:
        counted = {kind: size // steps for kind, size in parallelism.links.traffic.payload.items()}
        found = {"counted": counted, "seconds": seconds / steps, "loopback": carried / steps / ranks.size}
        out.write_text(json.dumps(found), encoding="utf-8")
    return 0


def main() -> None:
    """Measure every way with every number of ranks, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=32, help="images of all ranks together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    console = Console(width=120)
    console.print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, gloo; n = {options.steps} steps"
    )
    title = (
        f"alexnet-2012, width {options.width:g}, {CLASSES} classes, batch {options.batch}, fp32; MB per step"
    )
    table = Table(
        "ranks", "way", "exchange", "counted", "calculated", "ring", "loopback", "ms/step", title=title
    )
    modes: tuple[Mode, ...] = get_args(Mode)
    for size in options.ranks:
        for mode in modes:
            if mode == "towers" and size != 2:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "found.json"
                launch(size, measure, Setup(mode, options.width, options.batch, options.steps, out))
                found = json.loads(out.read_text(encoding="utf-8"))
            architecture = Architecture(width=options.width, classes=CLASSES)
            expected = expected_traffic(mode, architecture, batch=options.batch)
            traffic = Traffic(ranks=size, payload=found["counted"])
            for row, kind in enumerate(sorted(expected)):
                last = row == len(expected) - 1
                table.add_row(
                    str(size) if row == 0 else "",
                    mode if row == 0 else "",
                    kind,
                    f"{found['counted'].get(kind, 0) / 1e6:.3f}",
                    f"{expected[kind] / 1e6:.3f}",
                    f"{traffic.sent_by_each / 1e6:.3f}" if last else "",
                    f"{found['loopback'] / 1e6:.3f}" if last else "",
                    f"{1000 * found['seconds']:.0f}" if last else "",
                    end_section=last,
                )
            if found["counted"] != expected:
                raise SystemExit(
                    f"{mode} with {size} ranks: counted {found['counted']}, calculated {expected}"
                )
    console.print(table)
    console.print(published())


def published() -> Table:
    """Calculated for the network at width 1."""
    table = Table(
        "ranks", "batch", "way", "exchanged", "ring, each rank", title="alexnet-2012, calculated; MB per step"
    )
    architecture = published_architecture("alexnet-2012")
    setups: list[tuple[Mode, int, int]] = [
        ("data", 8, 1024),
        ("hybrid", 8, 1024),
        ("data", 2, 128),
        ("hybrid", 2, 128),
        ("towers", 2, 128),
    ]
    for mode, size, batch in setups:
        for value_bytes, name in ((4, "fp32"), (2, "bf16 activations")):
            payload = expected_traffic(mode, architecture, batch=batch, value_bytes=value_bytes)
            if value_bytes == 2:  # weights, and so their gradients, stay fp32
                if mode == "data":
                    continue
                if mode == "hybrid":
                    payload["all-reduce"] *= 2
            traffic = Traffic(ranks=size, payload=payload)
            parts = ", ".join(f"{kind} {size_ / 1e6:.1f}" for kind, size_ in sorted(payload.items()))
            table.add_row(
                str(size), str(batch), f"{mode}, {name}", parts, f"{traffic.sent_by_each / 1e6:.1f}"
            )
    return table


if __name__ == "__main__":
    main()
