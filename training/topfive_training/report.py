"""`topfive report`: one page about a training run, with everything in it, to look at and to send to someone.

The pictures are those of the paper: first-layer filters by tower (figure 3), answers to test images and nearest
training images in the features before the last layer (figure 4).
Shapes: N images, B of them at a time, F features, K classes.
"""

import base64
import dataclasses
import datetime as dt
import importlib.resources
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from topfive.errors import TopfiveError
from topfive.preprocessing import ImageError
from topfive_training import report_figures as figures
from topfive_training.checkpoint import Classifier, load_model, write_atomically
from topfive_training.dataset import ImageList, scan, scan_known
from topfive_training.evaluate import Evaluation, summarize
from topfive_training.journal import LOG_FILE
from topfive_training.randomness import order
from topfive_training.shards import ShardError, ShardSquares, is_shards
from topfive_training.squares import Pixels, Squares

REPORT_FILE: Final = "report.html"
_TEST_IMAGES: Final = 8
_QUERIES: Final = 5
_NEIGHBOURS: Final = 6
_WORST: Final = 15
_BATCH: Final = 32


class ReportError(TopfiveError, ValueError):
    """A report that cannot be made as asked."""


def report(
    run: Path,
    data: str | None = None,
    *,
    out: Path | None = None,
    neighbours_among: int = 5000,
    seed: int = 0,
) -> None:
    """Write one self-contained HTML page about a training run.

    It shows the curves of loss and error and the first layer's filters; with DATA also answers to test images, the
    training images nearest to some of them, and the accuracy of every class.

    Args:
        run: folder of a run or of a checkpoint.
        data: what it was trained on, as `topfive train` took it: class folders or prepared shards.
        out: the page; by default report.html in RUN.
        neighbours_among: training images, drawn at random, among which the nearest are looked for.
        seed: draws other test images.

    Raises:
        TopfiveError: a run or data that cannot be read.
    """
    if neighbours_among < 1:
        raise ReportError(f"neighbours_among is {neighbours_among}; it must be at least 1")
    classifier = load_model(run)
    classifier.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    epochs, steps = read_log(run)
    towers = classifier.network.shape.towers
    page: dict[str, Any] = {
        "name": run.resolve().name,
        "spec": classifier.spec,
        "parameters": sum(parameter.numel() for parameter in classifier.network.parameters()),
        "written": dt.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "curves": _embed(figures.curves(epochs, steps)) if epochs else None,
        "filters": [_embed(data) for data in figures.filters(classifier.network.conv1.weight, towers)],
    }
    if data is not None:
        page |= _about_data(classifier, data, run, neighbours_among=neighbours_among, seed=seed)
    file = run / REPORT_FILE if out is None else out
    text = _template().render(page)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    Console(stderr=True, highlight=False).print(
        f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB", markup=False
    )


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The log's records of epochs and of steps; none of a checkpoint that was not trained here.

    Raises:
        ReportError: the log is damaged.
    """
    # `run` may be the `best/` of a run.
    file = next((f / LOG_FILE for f in (run, run.resolve().parent) if (f / LOG_FILE).is_file()), None)
    if file is None:
        return [], []
    records: dict[str, list[dict[str, Any]]] = {"epoch": [], "step": []}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{file}, line {number} is no record of a run: {error}") from error
    return records["epoch"], records["step"]


def _embed(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _template() -> jinja2.Template:
    source = (
        importlib.resources.files("topfive_training").joinpath("templates/report.html").read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.from_string(source)


def _about_data(
    classifier: Classifier, data: str, run: Path, *, neighbours_among: int, seed: int
) -> dict[str, Any]:
    """The parts of the page that need images."""
    training, validation = _open(classifier, data, run)
    tested = _Seen.of(classifier, validation, range(len(validation)), "Test images")
    among = order(seed, 0, len(training))[:neighbours_among].tolist()
    known = _Seen.of(classifier, training, among, "Training images")
    if not tested.indices or not known.indices:
        raise ReportError(f"no image of {data} can be read")
    labels = classifier.spec.labels
    shown = order(seed, 1, len(tested.indices)).tolist()
    evaluation = summarize(
        tested.probabilities_NK,
        validation.classes_N[tested.indices],
        labels,
        views=1,
        models=1,
        worst=_WORST,
        unreadable={},
    )
    return {
        "data": data,
        "evaluation": evaluation,
        "chance": _chance(evaluation),
        "answers": _embed(_draw_answers(tested, labels, shown[:_TEST_IMAGES])),
        "queries": _QUERIES,
        "among": len(known.indices),
        "features": known.features_NF.shape[1],
        "neighbours": _embed(_draw_neighbours(tested, known, labels, shown)),
        "classes": _embed(figures.classes(evaluation.classes)),
        "skipped": len(validation) + len(among) - len(tested.indices) - len(known.indices),
    }


def _chance(evaluation: Evaluation) -> dict[str, float]:
    """Errors of guessing at random."""
    classes = len(evaluation.classes)
    return {"top1": 1 - 1 / classes, "top5": 1 - min(5, classes) / classes}


def _open(classifier: Classifier, data: str, run: Path) -> tuple[Squares, Squares]:
    """Central crops of what was trained on, and of what was not."""
    preprocessing, labels = classifier.spec.preprocessing, classifier.spec.labels
    side = preprocessing.crop
    if "://" in data or is_shards(Path(data)):
        training, validation = (ShardSquares(data, split, side=side) for split in ("train", "val"))
        classes = max(training.images.classes, default=0) + 1
        if classes != len(labels):
            raise ShardError(f"{data} has {classes} classes and the model of {run} {len(labels)}")
        return training, validation
    found = scan(Path(data), validation_fraction=0.5, seed=0)
    held_out, _ = scan_known(Path(data), labels, run)
    kept = found.training
    if found.training.root == found.validation.root:
        # One folder for both: what the run did not set aside, it was trained on.
        everything = sorted(
            itertools.chain(
                *(zip(part.names, part.classes, strict=True) for part in (found.training, found.validation))
            )
        )
        aside = set(held_out.names)
        pairs = [pair for pair in everything if pair[0] not in aside] or everything
        names, indices = zip(*pairs, strict=True)
        kept = ImageList(root=kept.root, names=names, classes=indices)
    return (
        Squares(kept, preprocessing, side, None, []),
        Squares(held_out, preprocessing, side, None, []),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the network makes of some images."""

    squares: Squares
    indices: list[int]
    """Those of them that could be read."""
    probabilities_NK: Tensor
    features_NF: Tensor
    """What fc8 sees: 4096 numbers at width 1."""

    @classmethod
    @torch.no_grad()
    def of(cls, classifier: Classifier, squares: Squares, indices: Sequence[int], what: str) -> "_Seen":
        """Look at all of `indices`, with a progress bar called `what`."""
        kept: list[int] = []
        probabilities, features = [], []
        batches = _batches(squares, indices)
        count = math.ceil(len(indices) / _BATCH)
        for chunk, images in track(batches, what, total=count, transient=True, console=Console(stderr=True)):
            if chunk:
                images_BHWC = torch.from_numpy(np.stack(images)).to(classifier.mean.device)
                features_BF = classifier.network.features(classifier.normalize(images_BHWC))
                probabilities.append(classifier.network.head(features_BF).softmax(1).cpu())
                features.append(features_BF.cpu())
                kept += chunk
        empty = torch.empty(0, 1)
        return cls(
            squares=squares,
            indices=kept,
            probabilities_NK=torch.cat(probabilities or [empty]),
            features_NF=torch.cat(features or [empty]),
        )

    def picture(self, place: int, labels: Sequence[str]) -> tuple[Pixels, str]:
        """The pixels and the true class of the image at `place` of `indices`."""
        index = self.indices[place]
        return self.squares[index], labels[self.squares.images.classes[index]]


def _batches(squares: Squares, indices: Sequence[int]) -> Iterator[tuple[list[int], list[Pixels]]]:
    """The readable ones of `indices`, some at a time, with their pixels."""

    def read(index: int) -> Pixels | None:
        try:
            return squares[index]
        except (ImageError, OSError):
            return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(indices), _BATCH):
            chunk = list(indices[start : start + _BATCH])
            found = [
                (i, square)
                for i, square in zip(chunk, pool.map(read, chunk), strict=True)
                if square is not None
            ]
            yield [i for i, _ in found], [square for _, square in found]


def _draw_answers(tested: _Seen, labels: Sequence[str], places: Sequence[int]) -> bytes:
    rows = []
    for place in places:
        best = tested.probabilities_NK[place].topk(min(5, len(labels)))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        rows.append((*tested.picture(place, labels), [(labels[k], p) for k, p in guesses]))
    return figures.answers(rows)


def _draw_neighbours(tested: _Seen, known: _Seen, labels: Sequence[str], shown: Sequence[int]) -> bytes:
    # Others than those that are shown with their answers, as long as there are any.
    places = [*shown[_TEST_IMAGES:], *shown[:_TEST_IMAGES]][:_QUERIES]
    nearest = nearest_rows(tested.features_NF[places], known.features_NF)
    rows = [
        [tested.picture(place, labels), *(known.picture(found, labels) for found in row)]
        for place, row in zip(places, nearest, strict=True)
    ]
    return figures.neighbours(rows)


def nearest_rows(queries_NF: Tensor, known_NF: Tensor) -> list[list[int]]:
    """For each query the six nearest rows of `known_NF` by Euclidean distance, nearest first (paper section 6.1)."""
    distances = torch.cdist(queries_NF.double(), known_NF.double())
    count = min(_NEIGHBOURS, known_NF.shape[0])
    found: list[list[int]] = distances.topk(count, largest=False).indices.tolist()
    return found
