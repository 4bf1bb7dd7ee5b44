"""The gate: an exported graph is published only if its answers agree with the torch network's on the corpus.

Shapes: M images, H rows, W columns, C colours, K classes, T top answers, F features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from topfive_export.graphs import INPUT_NAME, OUTPUT_NAMES, TOP
from topfive_export.variant import ExportError, Limits
from topfive_training.checkpoint import Classifier

BATCH_SIZES: Final = (1, 2, 7, 16)
"""Batch sizes at which every image is answered once each; they must all agree."""
_SMALLEST: Final = 1e-12
"""Probabilities below this count as this: their logarithms would be noise."""
_REFERENCE_BATCH: Final = 32


class Answered(NamedTuple):
    """What a network or a graph says of M images."""

    scores_MK: NDArray[np.float32]
    features_MF: NDArray[np.float32]


class Disagreement(ExportError):  # noqa: N818  it is one, whoever is to blame
    """The graph's answers are not the network's."""


class NotFinite(Disagreement):
    """Some of its answers are no numbers at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a graph's answers compare with the reference's, over all images and batch sizes."""

    images: int
    decided_top1: int
    """Images whose first answer leads by more than the graph may be off."""
    decided_top5: int
    top1_agreement: float
    top5_agreement: float
    top1_agreement_all: float
    """Near-ties counted as well."""
    top5_agreement_all: float
    probability_difference: float
    relative_difference: float
    features_difference: float
    """Largest difference of a feature, as a share of the largest feature."""
    worst_image: str
    """Where the relative difference is largest."""


def answer_torch(classifier: Classifier, images_MHWC: NDArray[np.uint8], *, views: int = 1) -> Answered:
    """The reference: the checkpoint's own network and normalisation, in fp32."""
    scores, features = [], []
    with torch.no_grad():
        for start in range(0, len(images_MHWC), _REFERENCE_BATCH):
            batch = torch.from_numpy(images_MHWC[start : start + _REFERENCE_BATCH])
            if views == 1:
                features_BF = classifier.network.features(classifier.normalize(batch))
                scores_BK = classifier.network.head(features_BF).softmax(dim=1)
            else:
                scores_BK, features_BF = _ten_views(classifier, batch)
            scores.append(scores_BK.numpy())
            features.append(features_BF.numpy())
    return Answered(np.concatenate(scores), np.concatenate(features))


def _ten_views(classifier: Classifier, images_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One view after the other, as the paper words it; slow and plain on purpose."""
    crop = classifier.spec.preprocessing.crop
    mean = classifier.mean if classifier.mean_image is None else classifier.mean_image
    images_BCHW = (images_BHWC.permute(0, 3, 1, 2).float() - mean) / classifier.std
    last = images_BCHW.shape[2] - crop
    scores, features = [], []
    for top, left in ((0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)):
        view = images_BCHW[:, :, top : top + crop, left : left + crop]
        for mirrored in (view, torch.flip(view, dims=(3,))):
            features.append(classifier.network.features(mirrored))
            scores.append(classifier.network.head(features[-1]).softmax(dim=1))
    return torch.stack(scores).mean(dim=0), torch.stack(features).mean(dim=0)


def answer_onnx(
    session: onnxruntime.InferenceSession, images_MHWC: NDArray[np.uint8], batch_size: int
) -> Answered:
    """The graph's answers, in batches; its outputs are checked against each other on the way.

    Raises:
        Disagreement: an output of another type or shape, or top answers that are not the highest scores.
        NotFinite: an infinite score or feature, or one that is not a number.
    """
    scores, features = [], []
    for start in range(0, len(images_MHWC), batch_size):
        batch = images_MHWC[start : start + batch_size]
        outputs = session.run(OUTPUT_NAMES, {INPUT_NAME: batch})
        _see_consistent(outputs, len(batch))
        scores.append(outputs[2])
        features.append(outputs[3])
    return Answered(np.concatenate(scores), np.concatenate(features))


def _see_consistent(outputs: Sequence[NDArray[Any]], count: int) -> None:
    probabilities_BT, classes_BT, scores_BK, features_BF = outputs
    kinds = [output.dtype.name for output in outputs]
    if kinds != ["float32", "int64", "float32", "float32"]:
        raise Disagreement(f"the outputs are of type {kinds}; they must be float32, int64, float32, float32")
    top = min(TOP, scores_BK.shape[1])
    if (
        probabilities_BT.shape != (count, top)
        or classes_BT.shape != (count, top)
        or len(features_BF) != count
    ):
        raise Disagreement(f"{count} images gave outputs of shapes {[output.shape for output in outputs]}")
    if not (np.isfinite(scores_BK).all() and np.isfinite(features_BF).all()):
        raise NotFinite("some scores or features of the exported graph are not finite numbers")
    if not np.allclose(scores_BK.sum(axis=1), 1, atol=1e-3):
        raise Disagreement("the scores are not probabilities that add up to one")
    highest_BT = -np.sort(-scores_BK, axis=1)[:, :top]
    told_BT = np.take_along_axis(scores_BK, classes_BT, axis=1)
    if not (np.array_equal(probabilities_BT, highest_BT) and np.array_equal(told_BT, highest_BT)):
        raise Disagreement("the top answers are not the classes with the highest scores, in descending order")


def compare(
    reference: Answered, answers: Sequence[Answered], names: Sequence[str], limits: Limits
) -> Comparison:
    """Compare each of `answers` (one for each batch size) with the reference; the worst counts.

    Raises:
        Disagreement: the reference says the same of every image, so that nothing can be told from its answers.
    """
    expected_MK = _logarithms(reference.scores_MK)
    spread = float(np.sqrt(np.mean(expected_MK.var(axis=0))))
    if spread < 1e-6:
        raise Disagreement(
            f"the network gives the same answer to all {len(names)} images, so its export cannot be verified; "
            "has it been trained?"
        )
    allowed = 2 * limits.relative_difference * spread
    decided = {top: _margins(expected_MK, top) > allowed for top in (1, TOP)}
    everything = np.ones(len(names), dtype=bool)
    same = {top: everything.copy() for top in (1, TOP)}
    difference = features_difference = 0.0
    relative_M = np.zeros(len(names))
    scale = float(np.abs(reference.features_MF).max()) or 1.0
    for answer in answers:
        for what, given, wanted in zip(("scores", "features"), answer, reference, strict=True):
            if given.shape != wanted.shape:
                raise Disagreement(f"the {what} are {given.shape}; the network's are {wanted.shape}")
        difference = _larger(difference, answer.scores_MK - reference.scores_MK)
        features_difference = _larger(
            features_difference, (answer.features_MF - reference.features_MF) / scale
        )
        actual_MK = _logarithms(answer.scores_MK)
        off_M = np.sqrt(np.mean((actual_MK - expected_MK) ** 2, axis=1)) / spread
        relative_M = np.maximum(relative_M, off_M)
        for top in same:
            same[top] &= _same_top(expected_MK, actual_MK, top)
    return Comparison(
        images=len(names),
        decided_top1=int(decided[1].sum()),
        decided_top5=int(decided[TOP].sum()),
        top1_agreement=_share(same[1], decided[1]),
        top5_agreement=_share(same[TOP], decided[TOP]),
        top1_agreement_all=_share(same[1], everything),
        top5_agreement_all=_share(same[TOP], everything),
        probability_difference=difference,
        relative_difference=float(relative_M.max()),
        features_difference=features_difference,
        worst_image=names[int(relative_M.argmax())],
    )


def enforce(comparison: Comparison, limits: Limits, what: str) -> None:
    """Refuse a graph that is beyond its limits.

    Raises:
        Disagreement: it is; the sentence names every measure that failed, its limit and the worst image.
    """
    if limits.near_ties_excused:
        top1, top1_images = comparison.top1_agreement, comparison.decided_top1
        top5, top5_images = comparison.top5_agreement, comparison.decided_top5
    else:
        top1, top1_images = comparison.top1_agreement_all, comparison.images
        top5, top5_images = comparison.top5_agreement_all, comparison.images
    wrong = []
    # Written so that NaN is beyond every limit.
    limit = limits.probability_difference
    if limit is not None and not comparison.probability_difference <= limit:
        wrong.append(f"a probability differs by {comparison.probability_difference:.2g} (limit {limit:g})")
    if not comparison.features_difference <= limits.features_difference:
        wrong.append(
            f"a feature differs by {comparison.features_difference:.2g} of the largest "
            f"(limit {limits.features_difference:g})"
        )
    if not comparison.relative_difference <= limits.relative_difference:
        wrong.append(
            f"the answers differ by {comparison.relative_difference:.2g} of what they vary by between images "
            f"(limit {limits.relative_difference:g})"
        )
    for name, share, images, limit in (
        ("top-1", top1, top1_images, limits.top1_agreement),
        ("top-5", top5, top5_images, limits.top5_agreement),
    ):
        # As with accuracy, one image is no finding, however few there are; but exactness allows for none.
        allowed = 1 if limit < 1 else 0
        if share < limit and round((1 - share) * images) > allowed:
            wrong.append(
                f"the {name} answers agree on {share:.1%} of the {images} images (limit {limit:.1%})"
            )
    if wrong:
        raise Disagreement(
            f"{what} does not answer as the trained network does: {'; '.join(wrong)}; "
            f"worst on {comparison.worst_image!r}"
        )


class Accuracy(NamedTuple):
    """Shares of labelled images answered rightly."""

    images: int
    top1: float
    top5: float


def accuracy(scores_MK: NDArray[np.float32], labels: Sequence[int | None]) -> Accuracy | None:
    """Of the labelled images; `None` if none is."""
    known = [(row, label) for row, label in enumerate(labels) if label is not None]
    if not known:
        return None
    order_MK = np.argsort(-scores_MK, axis=1, kind="stable")
    ranks = np.array([int(np.flatnonzero(order_MK[row] == label)[0]) for row, label in known])
    return Accuracy(len(known), float(np.mean(ranks < 1)), float(np.mean(ranks < TOP)))


def enforce_accuracy(reference: Accuracy | None, actual: Accuracy | None, limits: Limits, what: str) -> None:
    """Refuse a graph that answers labelled images worse than its limits allow.

    Raises:
        Disagreement: it does.
    """
    if reference is None or actual is None:
        return
    for name, before, after in (
        ("top-1", reference.top1, actual.top1),
        ("top-5", reference.top5, actual.top5),
    ):
        # One image more or less is no finding, however few there are.
        if before - after > max(limits.accuracy_drop, 1.5 / reference.images):
            raise Disagreement(
                f"{what} is right ({name}) on {after:.1%} of {actual.images} labelled images, the trained network on "
                f"{before:.1%}; it may lose {limits.accuracy_drop:.1%}"
            )


def _larger(so_far: float, differences: NDArray[np.float32]) -> float:
    """The largest of them all; NaN where one is (Python's `max` would pass over it)."""
    return float(np.maximum(so_far, np.abs(differences).max()))


def _logarithms(scores_MK: NDArray[np.float32]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(np.maximum(scores_MK.astype(np.float64), _SMALLEST))
    return result


def _margins(values_MK: NDArray[np.float64], top: int) -> NDArray[np.float64]:
    """By how much place `top` leads the next; infinite where there is no next."""
    if values_MK.shape[1] <= top:
        return np.full(len(values_MK), np.inf)
    ordered_MK = -np.sort(-values_MK, axis=1)
    margins: NDArray[np.float64] = ordered_MK[:, top - 1] - ordered_MK[:, top]
    return margins


def _same_top(one_MK: NDArray[np.float64], other_MK: NDArray[np.float64], top: int) -> NDArray[np.bool_]:
    first, second = (
        np.sort(np.argsort(-values, axis=1, kind="stable")[:, :top], axis=1) for values in (one_MK, other_MK)
    )
    same: NDArray[np.bool_] = (first == second).all(axis=1)
    return same


def _share(true_M: NDArray[np.bool_], among_M: NDArray[np.bool_]) -> float:
    return float(true_M[among_M].mean()) if among_M.any() else 1.0
