"""Accuracy: every image counted exactly once, on however many ranks.

Shapes: B images, K classes, C crop.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from topfive_training.checkpoint import Classifier
from topfive_training.ranks import Ranks
from topfive_training.squares import Squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Means over the images."""

    images: int
    loss: float
    top1: float
    top5: float
    """Fractions of the images whose class is the first, or among the first five, of the answers."""


def image_batches(
    squares: Squares, indices: Sequence[int], size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """These images in this order, uint8 [B, C, C, 3], and their classes [B], decoded one batch ahead."""
    chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
    with (
        concurrent.futures.ThreadPoolExecutor(1, "batches") as maker,
        concurrent.futures.ThreadPoolExecutor(workers, "decode") as readers,
    ):

        def make(chunk: Sequence[int]) -> tuple[Tensor, Tensor]:
            read = map if squares.cached else readers.map
            images_BCCC = np.stack(list(read(squares.__getitem__, chunk)))
            return torch.from_numpy(images_BCCC), squares.classes_N[list(chunk)]

        upcoming = maker.submit(make, chunks[0]) if chunks else None
        for chunk in [*chunks[1:], None]:
            if upcoming is None:
                return
            current = upcoming.result()
            upcoming = maker.submit(make, chunk) if chunk is not None else None
            yield current


@torch.no_grad()
def validate(
    classifier: Classifier,
    squares: Squares,
    ranks: Ranks,
    *,
    batch_size: int,
    workers: int,
    after_batch: Callable[[int, int], bool],
) -> Accuracy | None:
    """Accuracy on the central crops, in evaluation mode; the ranks share the images, each taken by one.

    Args:
        classifier: on `ranks.device`; left in training mode.
        squares: central crops, as `Squares` of side `preprocessing.crop`.
        ranks: who shares the work.
        batch_size: images of one rank at a time.
        workers: threads that decode.
        after_batch: told batches done and in all, the same number on every rank; True stops, the result is None.
    """
    classifier.eval()
    mine = range(ranks.rank, len(squares), ranks.size)
    batches = image_batches(squares, mine, batch_size, workers)
    rounds = -(-len(squares) // (batch_size * ranks.size))
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    try:
        for round_ in range(rounds):
            batch = next(batches, None)
            if batch is not None:
                images_BHWC, classes_B = (tensor.to(ranks.device, non_blocking=True) for tensor in batch)
                sums += batch_sums(classifier(images_BHWC), classes_B)
            if after_batch(round_ + 1, rounds):
                return None
    finally:
        classifier.train()
    images, loss, top1, top5 = ranks.total(sums).tolist()
    return Accuracy(images=int(images), loss=loss / images, top1=top1 / images, top5=top5 / images)


def batch_sums(logits_BK: Tensor, classes_B: Tensor) -> Tensor:
    """Images, summed loss, right first answers and right among five, float64 [4] on the logits' device."""
    loss = F.cross_entropy(logits_BK.float(), classes_B, reduction="sum")
    best_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices
    hits_B5 = best_B5 == classes_B[:, None]
    # Filled on the device: a number that is copied there would make the host wait.
    count = torch.full((), len(classes_B), dtype=torch.float64, device=logits_BK.device)
    return torch.stack([count, loss.double(), hits_B5[:, 0].sum().double(), hits_B5.any(1).sum().double()])
