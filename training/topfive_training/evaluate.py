"""What `topfive evaluate` measures: errors with their intervals, classes, confusions; one view or ten, one model or more.

Shapes: N images, B of them at a time, S side of the square, V views, K classes.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from topfive_training.checkpoint import CheckpointError, Classifier
from topfive_training.dataset import DataError, ImageList
from topfive_training.squares import decode_in_order

_Z_95: Final = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """So many of so many, with the interval in which the true share lies with 95 % confidence."""

    count: int
    of: int
    share: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """One class's images."""

    label: str
    top1: Share
    top5: Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """Images of one class that were taken for another."""

    label: str
    taken_for: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was measured."""

    images: int
    views: int
    models: int
    top1_error: Share
    top5_error: Share
    classes: tuple[ClassAccuracy, ...]
    confusions: tuple[Confusion, ...]
    """The most frequent, descending."""
    unreadable: dict[str, str]


def wilson(count: int, of: int) -> Share:
    """The share with its 95 % score interval (Wilson 1927), which stays within 0 and 1 and is right for few images."""
    share, z2 = count / of, _Z_95**2
    center = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z_95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return Share(count=count, of=of, share=share, low=max(0.0, center - half), high=min(1.0, center + half))


def ten_views(squares_BSSC: Tensor, crop: int) -> Tensor:
    """The four corners and the centre, then their mirror images, [B, 10, crop, crop, C] (paper section 4.1)."""
    side = squares_BSSC.shape[1]
    far, middle = side - crop, (side - crop) // 2
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    five = torch.stack([squares_BSSC[:, y : y + crop, x : x + crop] for y, x in corners], dim=1)
    return torch.cat([five, five.flip(3)], dim=1)


@torch.no_grad()
def probabilities(classifier: Classifier, images_BHWC: Tensor, views: Literal[1, 10]) -> Tensor:
    """Softmax [B, K]; of ten views, the mean of their softmax outputs (paper section 4.1).

    Args:
        classifier: in evaluation mode.
        images_BHWC: uint8; central crops for one view, squares of the shorter side for ten.
        views: how many.
    """
    if views == 1:
        softmax_BK: Tensor = classifier(images_BHWC).float().softmax(1)
        return softmax_BK
    views_BVHWC = ten_views(images_BHWC, classifier.spec.preprocessing.crop)
    softmax_XK: Tensor = classifier(views_BVHWC.flatten(0, 1)).float().softmax(1)
    mean_BK: Tensor = softmax_XK.reshape(-1, views, softmax_XK.shape[1]).mean(1)
    return mean_BK


def evaluate(
    classifiers: Sequence[Classifier],
    images: ImageList,
    *,
    views: Literal[1, 10],
    batch_size: int,
    workers: int,
    worst: int,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """Measure one model, or the mean of the probabilities of several (the paper's ensembles).

    Args:
        classifiers: on one device, in evaluation mode, all of the same classes.
        images: which, and their classes.
        views: 1 is the central crop as it is served; 10 as in the paper.
        batch_size: images at a time.
        workers: threads that decode.
        worst: confusions to list.
        progress: told images done and in all.

    Raises:
        CheckpointError: models of different classes.
        DataError: no readable image.
    """
    labels = classifiers[0].spec.labels
    if any(classifier.spec.labels != labels for classifier in classifiers):
        raise CheckpointError(
            "the models have different classes, or in another order; an ensemble needs the same"
        )
    total_NK = torch.zeros(len(images), len(labels))
    unreadable: dict[str, str] = {}
    done = 0
    for classifier in classifiers:
        preprocessing = classifier.spec.preprocessing
        side = preprocessing.crop if views == 1 else preprocessing.short_side
        squares = decode_in_order(images, preprocessing, side, workers)
        while chunk := list(itertools.islice(enumerate(squares, start=done % len(images)), batch_size)):
            good = [(index, square) for index, square in chunk if not isinstance(square, str)]
            unreadable |= {images.names[index]: reason for index, reason in chunk if isinstance(reason, str)}
            if good:
                images_BHWC = torch.from_numpy(np.stack([square for _, square in good]))
                answer_BK = probabilities(classifier, images_BHWC.to(classifier.mean.device), views)
                total_NK[[index for index, _ in good]] += answer_BK.cpu()
            done += len(chunk)
            progress(done, len(images) * len(classifiers))
    kept = [i for i, name in enumerate(images.names) if name not in unreadable]
    if not kept:
        raise DataError(f"no file in {images.root} can be read as an image")
    return summarize(
        total_NK[kept] / len(classifiers),
        torch.tensor(images.classes)[kept],
        labels,
        views=views,
        models=len(classifiers),
        worst=worst,
        unreadable=unreadable,
    )


def summarize(
    probabilities_NK: Tensor,
    classes_N: Tensor,
    labels: tuple[str, ...],
    *,
    views: int,
    models: int,
    worst: int,
    unreadable: dict[str, str],
) -> Evaluation:
    """Count the answers."""
    answers_N5 = probabilities_NK.topk(min(5, len(labels))).indices
    hits_N5 = answers_N5 == classes_N[:, None]
    top1_N, top5_N = hits_N5[:, 0], hits_N5.any(1)
    count = len(classes_N)
    wrong = collections.Counter(
        zip(classes_N[~top1_N].tolist(), answers_N5[~top1_N, 0].tolist(), strict=True)
    ).most_common(worst)
    return Evaluation(
        images=count,
        views=views,
        models=models,
        top1_error=wilson(count - int(top1_N.sum()), count),
        top5_error=wilson(count - int(top5_N.sum()), count),
        classes=tuple(
            ClassAccuracy(
                label=label,
                top1=wilson(int(top1_N[mine_N].sum()), int(mine_N.sum())),
                top5=wilson(int(top5_N[mine_N].sum()), int(mine_N.sum())),
            )
            for index, label in enumerate(labels)
            if bool((mine_N := classes_N == index).any())
        ),
        confusions=tuple(
            Confusion(label=labels[true], taken_for=labels[answer], count=times)
            for (true, answer), times in wrong
        ),
        unreadable=unreadable,
    )
