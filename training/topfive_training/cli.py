"""`topfive train` and `topfive evaluate`: plain functions whose arguments are the commands' options."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from topfive.allocator import keep_large_buffers
from topfive.errors import TopfiveError
from topfive_training import resume as resume_
from topfive_training.checkpoint import load_model
from topfive_training.dataset import scan_known
from topfive_training.evaluate import Evaluation, Share
from topfive_training.evaluate import evaluate as evaluate_models
from topfive_training.journal import Journal
from topfive_training.parallel import Mode
from topfive_training.ranks import (
    check_processes,
    default_processes,
    launch,
    started_by_torchrun,
    under_torchrun,
)
from topfive_training.recipe import Recipe, field_documentation, make_recipe
from topfive_training.run import Options
from topfive_training.run import train as train_on_rank
from topfive_training.transfer import recipe_from


class RunExistsError(TopfiveError):
    """The folder holds a run already, or none that could be resumed."""


def train(
    data: str,
    *,
    out: Path,
    recipe: str = "2012",
    initial: Annotated[Path | None, Parameter(name="--from")] = None,
    resume: bool = False,
    processes: int | None = None,
    parallel: Mode = "data",
    compiled: Annotated[bool, Parameter(name="--compile")] = False,
    validation_fraction: float = 0.2,
    split_seed: int = 0,
    workers: int | None = None,
    cache: Path | None = None,
    cache_gib: float = 16.0,
    save_every_minutes: float = 10.0,
    show_recipe: bool = False,
    **fields: str,
) -> int:
    """Train AlexNet on folders of images.

    Ctrl-C, SIGTERM and SIGUSR1 save within a step and say how to go on; the exit status is then 128 plus the signal's
    number. Under `torchrun` the processes are torchrun's; with its `--max-restarts`, a run in OUT is gone on with.

    Args:
        data: a folder with one subfolder of images for each class, or with `train/` and `val/` that hold such; or
            shards that `topfive prepare` has written, in a folder or at an fsspec URL.
        out: folder of the run; gets the checkpoint (model.safetensors, model.json), best/, resume/ and logs.
        recipe: `2012` (what the original code did) or `modern`.
        initial: start from this checkpoint's weights, with a new last layer unless the classes are the same. What is
            already learned moves a tenth as fast (--layer-rates conv=0.1,fc6=0.1,fc7=0.1; a factor of 0 freezes).
        resume: go on with the run in OUT, exactly where it stopped.
        processes: how many train together; by default one for each GPU, or one.
        parallel: how they share the network: `data` (each takes some of the images), `hybrid` (besides, they divide the
            fully-connected layers: Krizhevsky 2014), or `towers` (two processes, one tower each: the paper's way).
        compiled: translate the network with torch.compile first (minutes; needs a C++ compiler, with `data` alone). Meant
            for GPUs; compare with benchmarks/train.py --compile before relying on it.
        validation_fraction: share of each class that is set aside where DATA has no val folder.
        split_seed: fixes which images are set aside; runs that are to be compared need the same.
        workers: threads of each process that decode; by default all cores, shared.
        cache: folder for decoded images, kept for other runs; by default within OUT, removed at the end.
        cache_gib: images that would take more than this are decoded again in every epoch.
        save_every_minutes: save in the midst of long epochs too, this often.
        show_recipe: print every field of the recipe, its value and its meaning, and do nothing else.
        fields: any field of the recipe, as --batch-size 256 or --rate 0.005; --show-recipe lists them.
    """
    torchrun = started_by_torchrun()
    if torchrun and processes is not None:
        raise ValueError("--processes does not go with torchrun, which has started its own; leave it out")
    # Whoever allows restarts wants to go on. The count of them says nothing: it stays 0 on a node that is started again
    # only because another's workers failed.
    restarted = torchrun and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    chosen = _recipe_for(out, recipe, fields, initial, resume=resume or restarted)
    if show_recipe:
        _print_recipe(chosen)
        return 0
    count = default_processes() if processes is None else processes
    if not torchrun:
        check_processes(count)
    options = Options(
        data=data,
        out=out,
        initial=initial,
        resume=resume or restarted,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        workers=workers or max(1, len(os.sched_getaffinity(0)) // count),
        parallel=parallel,
        compiled=compiled,
        cache_folder=cache,
        cache_gib=cache_gib,
        save_every_minutes=save_every_minutes,
        command=_resume_command(),
    )
    if torchrun:
        return under_torchrun(lambda ranks: train_on_rank(ranks, chosen, options))
    return launch(count, train_on_rank, chosen, options)


def evaluate(
    run: Path,
    data: Path,
    *,
    ensemble: list[Path] | None = None,
    views: Literal[1, 10] = 1,
    batch_size: int = 64,
    workers: int | None = None,
    worst: int = 10,
    json: bool = False,
) -> int:
    """Measure a checkpoint's top-1 and top-5 error, with 95 % intervals, by class, and what it confuses.

    Args:
        run: folder of a run or of a checkpoint.
        data: class folders; where it has a val folder, that. Of the folder that RUN was trained on without one, only
            the images that RUN set aside are taken.
        ensemble: further checkpoints, whose probabilities are averaged with RUN's.
        views: 1 is the central crop, as it is served; 10 averages corners, centre and their mirror images.
        batch_size: images at a time.
        workers: threads that decode; by default all cores.
        worst: how many of the most frequent confusions to list.
        json: print JSON instead of tables.
    """
    for name, value in (("--batch-size", batch_size), ("--workers", workers or 1), ("--worst", worst + 1)):
        if value < 1:
            raise ValueError(f"{name} is too small; it must be at least {0 if name == '--worst' else 1}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifiers = [load_model(folder).to(device) for folder in (run, *(ensemble or ()))]
    images, remarks = scan_known(data, classifiers[0].spec.labels, run)
    keep_large_buffers()
    journal = Journal(run, enabled=True)
    for remark in remarks:
        journal.say(f"note: {remark}")
    with journal:
        result = evaluate_models(
            classifiers,
            images,
            views=views,
            batch_size=batch_size,
            workers=workers or len(os.sched_getaffinity(0)),
            worst=worst,
            progress=lambda done, total: journal.show("evaluating", done, total),
        )
    if json:
        Console(soft_wrap=True).print_json(data=dataclasses.asdict(result), indent=2)
    else:
        _print_tables(result)
    return 0


def _print_tables(result: Evaluation) -> None:
    console = Console(highlight=False)
    views = "central crop" if result.views == 1 else f"{result.views} views"
    models = "" if result.models == 1 else f", {result.models} models"
    console.print(f"{result.images:,} images, {views}{models}; errors with 95 % intervals")
    console.print(f"top-1 error {_percent(result.top1_error)}")
    console.print(f"top-5 error {_percent(result.top5_error)}")
    table = Table("class", "images", "top-1 accuracy", "top-5 accuracy")
    for row in result.classes:
        table.add_row(escape(row.label), f"{row.top1.of:,}", _briefly(row.top1), _briefly(row.top5))
    console.print(table)
    if result.confusions:
        table = Table("class", "taken for", "images")
        for confusion in result.confusions:
            table.add_row(escape(confusion.label), escape(confusion.taken_for), f"{confusion.count:,}")
        console.print(table)
    for name, reason in result.unreadable.items():
        console.print(f"skipped {name}: {reason}", markup=False)


def _percent(share: Share) -> str:
    return f"{share.share:.2%} ({share.low:.2%} to {share.high:.2%})"


def _briefly(share: Share) -> str:
    """So that a class has one line in a terminal of 80 columns."""
    return f"{share.share:.1%} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _print_recipe(recipe: Recipe) -> None:
    table = Table("option", "value", "meaning")
    for name, text in field_documentation().items():
        table.add_row(f"--{name.replace('_', '-')}", escape(str(getattr(recipe, name))), escape(text))
    Console(highlight=False).print(table)


def _recipe_for(
    out: Path, name: str, fields: dict[str, str], initial: Path | None, *, resume: bool
) -> Recipe:
    """The recipe asked for; of a run that is resumed, its own, which fields given again must not change."""
    state = out / resume_.STATE_FILE
    if initial is not None and not state.is_file():
        return recipe_from(name, fields, load_model(initial).spec)
    asked = make_recipe(name, fields)
    if not state.is_file():
        return asked
    if not resume:
        raise RunExistsError(
            f"{out} already holds a run; add --resume to go on with it, or choose another folder"
        )
    saved = make_recipe("2012", resume_.saved_recipe(out))
    for field in (given.replace("-", "_") for given in fields):
        before, value = getattr(saved, field), getattr(asked, field)
        if value != before:
            raise RunExistsError(
                f"{out} holds a run with {field} {before!r}, not {value!r}; leave the option out to go on with it, "
                "or start another run in another folder"
            )
    return saved


def _resume_command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
