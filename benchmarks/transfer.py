"""What features learned on some classes are worth on others, of which there are only a few images.

    python benchmarks/transfer.py DATA --out DIR [--width 0.25] [--images 15] [--seeds 3] [--jobs 2]

DATA holds class folders. They are divided, by `--split-seed`, into classes to pre-train on and target classes. One
network is pre-trained; then, for each seed, `--images` images are drawn of each target class, and two networks train on
the same images with the same recipe and number of epochs: one `--from` the pre-trained weights, one from scratch. Both
are judged on all remaining images of the target classes but one each, which training shows as its validation and nothing
is chosen by. Errors have 95 % Wilson intervals. Runs are kept in DIR: the same command goes on where it stopped,
`--report` only prints.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from topfive_training.dataset import scan

LEFT_OUT: Final = ("BACKGROUND_Google", "Faces_easy")
"""Of Caltech-101: no class of its own, and the photographs of Faces once more, cropped."""
REPORT: Final = "evaluation.json"


class Arm(NamedTuple):
    """One of the two ways to start."""

    name: str
    pretrained: bool


ARMS: Final = (Arm("pre-trained", True), Arm("from scratch", False))


def class_files(data: Path) -> dict[str, list[Path]]:
    """The images of every class, in the order of their names."""
    dataset = scan(data, validation_fraction=0.5, seed=0)
    files: dict[str, list[Path]] = {label: [] for label in dataset.labels}
    for images in (dataset.training, dataset.validation):
        for index, label in enumerate(images.classes):
            files[dataset.labels[label]].append(images.path(index))
    return {label: sorted(paths) for label, paths in files.items() if label not in LEFT_OUT}


def split(labels: list[str], targets: int, seed: int) -> tuple[list[str], list[str]]:
    """Classes to pre-train on, and target classes."""
    if not 2 <= targets <= len(labels) - 2:
        sys.exit(
            f"--targets is {targets}; of {len(labels)} classes, it must be between 2 and {len(labels) - 2}"
        )
    chosen = set(random.Random(seed).sample(sorted(labels), targets))
    return [label for label in labels if label not in chosen], sorted(chosen)


def link(folder: Path, files: dict[str, list[Path]]) -> None:
    """Class folders of links to these files."""
    for label, paths in files.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for path in paths:
            place = folder / label / path.name
            if not place.is_symlink():
                place.symlink_to(path.resolve())


def lay_out(arguments: argparse.Namespace) -> None:
    """Folders of links: what to pre-train on; for each seed what to train on, and the rest."""
    files = class_files(arguments.data)
    pretraining, targets = split(sorted(files), arguments.targets, arguments.split_seed)
    link(arguments.out / "pretraining-images", {label: files[label] for label in pretraining})
    for seed in range(arguments.seeds):
        parts: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}, "rest": {}}
        for label in targets:
            if len(files[label]) < arguments.images + 2:
                sys.exit(
                    f"{label} has {len(files[label])} images; --images {arguments.images} needs two more than that"
                )
            drawn = random.Random(f"{seed} {label}").sample(files[label], len(files[label]))
            parts["train"][label] = drawn[: arguments.images]
            parts["val"][label] = drawn[arguments.images : arguments.images + 1]
            parts["rest"][label] = drawn[arguments.images + 1 :]
        for part, drawn_files in parts.items():
            link(arguments.out / ("rest" if part == "rest" else "few") / str(seed) / part, drawn_files)


def train(arguments: argparse.Namespace, data: Path, out: Path, threads: int, *options: str) -> None:
    """Train one network, or go on with it; nothing to do where it is finished."""
    command = [
        "topfive", "train", str(data), "--out", str(out), "--recipe", arguments.recipe,
        "--batch-size", str(arguments.batch_size), "--rate", str(arguments.rate), *options,
    ]  # fmt: skip
    if (out / "resume").is_dir():
        command.append("--resume")
    run(command, out, threads)


def run(command: list[str], out: Path, threads: int) -> str:
    """Run to the end; what it prints is kept in the run's folder."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (out / "output.txt").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, check=False, text=True
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}; see {out / 'output.txt'}")
    return done.stdout


def pretrain(arguments: argparse.Namespace) -> Path:
    """The network that the pre-trained ones start from."""
    out: Path = arguments.out / "pretraining"
    shape = (
        "--width",
        str(arguments.width),
        "--short-side",
        str(arguments.short_side),
        "--crop",
        str(arguments.crop),
    )
    epochs = ("--epochs", str(arguments.pretraining_epochs))
    processes = ("--processes", str(arguments.jobs))
    train(
        arguments,
        arguments.out / "pretraining-images",
        out,
        threads_of(arguments),
        *shape,
        *epochs,
        *processes,
    )
    return out


def run_one(arguments: argparse.Namespace, pretrained: Path, arm: Arm, seed: int) -> None:
    """Train on the few images and evaluate on the rest; a finished run is left alone."""
    out = folder(arguments.out, arm, seed)
    if (out / REPORT).is_file():
        return
    threads = threads_of(arguments)
    options = ["--epochs", str(arguments.epochs), "--seed", str(seed), "--workers", "1"]
    if arm.pretrained:
        options += ["--from", str(pretrained)]
    else:
        options += ["--width", str(arguments.width), "--short-side", str(arguments.short_side)]
        options += ["--crop", str(arguments.crop)]
    train(arguments, arguments.out / "few" / str(seed), out, threads, *options)
    rest = arguments.out / "rest" / str(seed) / "rest"
    said = run(["topfive", "evaluate", str(out), str(rest), "--json", "--workers", "1"], out, threads)
    partial = out / (REPORT + ".partial")
    partial.write_text(said, encoding="utf-8")
    partial.replace(out / REPORT)


def threads_of(arguments: argparse.Namespace) -> int:
    """So that all jobs together have one for each core."""
    return max(1, len(os.sched_getaffinity(0)) // int(arguments.jobs))


def folder(out: Path, arm: Arm, seed: int) -> Path:
    """Where a run is kept."""
    return out / f"{arm.name.replace(' ', '-')}-{seed}"


def last_epoch(out: Path) -> dict[str, Any]:
    """What training recorded after its last epoch."""
    lines = (out / "train.jsonl").read_text(encoding="utf-8").splitlines()
    record: dict[str, Any] = [r for r in map(json.loads, lines) if r["kind"] == "epoch"][-1]
    return record


def shown(share: dict[str, float]) -> str:
    """In percent, with the interval."""
    return f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def print_table(arguments: argparse.Namespace) -> None:
    """Every finished run, and the mean over seeds."""
    title = (
        f"{arguments.targets} target classes, {arguments.images} images each; width {arguments.width:g}, "
        f"{arguments.epochs} epochs, batch {arguments.batch_size}, rate {arguments.rate:g}, recipe {arguments.recipe}"
    )
    columns = ("start", "seed", "images", "top-1 error [95 %]", "top-5 error [95 %]", "mean over classes", "top-1 error in training")  # fmt: skip
    table = Table(*columns, title=title)
    for arm in ARMS:
        found = []
        for seed in range(arguments.seeds):
            out = folder(arguments.out, arm, seed)
            if not (out / REPORT).is_file():
                continue
            result = json.loads((out / REPORT).read_text(encoding="utf-8"))
            by_class = 1 - statistics.mean(row["top1"]["share"] for row in result["classes"])
            fitted = 1 - last_epoch(out)["train_top1"]
            top1, top5 = result["top1_error"], result["top5_error"]
            found.append((top1["share"], top5["share"], by_class, fitted))
            cells = (shown(top1), shown(top5), f"{by_class:.1%}", f"{fitted:.1%}")
            table.add_row(arm.name, str(seed), str(result["images"]), *cells)
        if found:
            means = [f"{statistics.mean(column):.1%}" for column in zip(*found, strict=True)]
            table.add_row(arm.name, f"mean of {len(found)}", "", *means, end_section=True)
    console = Console(width=150)
    console.print(table)
    if (arguments.out / "pretraining" / "train.jsonl").is_file():
        record = last_epoch(arguments.out / "pretraining")
        console.print(
            f"pre-training: epoch {record['epoch']} of {arguments.pretraining_epochs}, top-1 error "
            f"{1 - record['val_top1']:.1%} on {record['val_images']} held-out images of its own classes"
        )
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )


def keep_settings(arguments: argparse.Namespace) -> None:
    """Refuse to mix runs of other settings in one folder."""
    settings = {k: str(v) for k, v in vars(arguments).items() if k not in {"report", "jobs", "seeds", "out"}}
    file = arguments.out / "settings.json"
    if file.is_file() and (before := json.loads(file.read_text(encoding="utf-8"))) != settings:
        other = ", ".join(f"{k} {before.get(k)}" for k in settings if before.get(k) != settings[k])
        sys.exit(f"{arguments.out} holds runs with {other}; give the same, or another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=40, help="how many classes are not pre-trained on")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=15, help="of each target class, to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default="modern")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--crop", type=int, default=227)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--pretraining-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes: of the pre-training, then one for each network"
    )
    parser.add_argument("--report", action="store_true", help="print what is there, train nothing")
    return parser.parse_args()


def main() -> None:
    """Train what is missing, seed by seed so that an early end leaves whole pairs, and print."""
    arguments = parse()
    keep_settings(arguments)
    if not arguments.report:
        lay_out(arguments)
        pretrained = pretrain(arguments)
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            waiting = [
                pool.submit(run_one, arguments, pretrained, arm, seed)
                for seed in range(arguments.seeds)
                for arm in ARMS
            ]
            for future in waiting:
                future.result()
    print_table(arguments)


if __name__ == "__main__":
    main()
