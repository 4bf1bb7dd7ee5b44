"""Batches of the training images: order, crop and flip, ahead of the device.

Everything random is a function of (seed, epoch, image or position), so a batch is the same whoever makes it.
Shapes: B images of this rank, S side of the stored square, H and W side of the crop.
"""

import concurrent.futures
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from topfive_training.randomness import normal, order, sample_keys, uniform
from topfive_training.recipe import Recipe
from topfive_training.squares import Squares

_CROP: Final = torch.tensor([0, 1, 2])
"""Counters of the numbers for row, column and mirror."""
_COLOR: Final = 8
"""First of the counters of the numbers for the three colour components."""
_GROUPS: Final = 2**40
"""Keys of groups of images that share a crop are drawn apart from those of images."""
_AHEAD: Final = 3
"""Batches made ahead of the step that needs them."""


class Batch(NamedTuple):
    """One rank's share of one step."""

    images_BHWC: Tensor
    """uint8, cropped and mirrored."""
    classes_B: Tensor
    keys_B: Tensor
    """int64, from which colour noise and dropout are drawn."""


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder, other images in every epoch, is left out."""
    return max(1, images // batch_size)


def share(batch: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last + 1 of this rank's positions within a global batch."""
    return batch * rank // ranks, batch * (rank + 1) // ranks


def training_batches(
    squares: Squares, recipe: Recipe, *, epoch: int, first_step: int, rank: int, ranks: int, workers: int
) -> Iterator[Batch]:
    """This rank's share of every step of `epoch`, from `first_step` on."""
    images = len(squares)
    batch = min(recipe.batch_size, images)
    low, high = share(batch, rank, ranks)
    order_N = order(recipe.seed, epoch, images)

    with (
        concurrent.futures.ThreadPoolExecutor(1, "batches") as maker,
        concurrent.futures.ThreadPoolExecutor(workers, "decode") as readers,
    ):

        def make(step: int) -> Batch:
            positions_B = torch.arange(step * batch + low, step * batch + high)
            indices_B = order_N[positions_B]
            return _make(squares, recipe, positions_B, epoch=epoch, indices_B=indices_B, readers=readers)

        ahead: deque[concurrent.futures.Future[Batch]] = deque()
        try:
            for step in range(first_step, steps_per_epoch(images, recipe.batch_size)):
                ahead.append(maker.submit(make, step))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _make(
    squares: Squares,
    recipe: Recipe,
    positions_B: Tensor,
    *,
    epoch: int,
    indices_B: Tensor,
    readers: concurrent.futures.Executor,
) -> Batch:
    groups_B = sample_keys(recipe.seed, epoch, positions_B // recipe.images_per_crop + _GROUPS)
    numbers_B3 = uniform(groups_B, _CROP)
    corners_B2 = (numbers_B3[:, :2] * (recipe.short_side - recipe.crop + 1)).long().tolist()
    mirrored_B = (numbers_B3[:, 2] < 0.5).tolist() if recipe.flip else [False] * len(indices_B)
    crop = recipe.crop
    # From pinned memory, the copy to a GPU runs beside the step before.
    pin = torch.cuda.is_available()
    images_BHWC = torch.empty(len(indices_B), crop, crop, 3, dtype=torch.uint8, pin_memory=pin)
    pixels_BHWC = images_BHWC.numpy()

    def fill(place: int, index: int) -> None:
        (top, left), square_SSC = corners_B2[place], squares[index]
        cut = square_SSC[top : top + crop, left : left + crop]
        pixels_BHWC[place] = cut[:, ::-1] if mirrored_B[place] else cut

    if squares.cached:
        for place, index in enumerate(indices_B.tolist()):
            fill(place, index)
    else:
        list(readers.map(fill, range(len(indices_B)), indices_B.tolist()))
    batch = Batch(images_BHWC, squares.classes_N[indices_B], sample_keys(recipe.seed, epoch, indices_B))
    return Batch(*(tensor.pin_memory() for tensor in batch)) if pin else batch


def color_noise(keys_B: Tensor, components_CC: Tensor, std: float) -> Tensor:
    """What is added to every pixel of each image, float32 [B, 3, 1, 1], on the 0-255 scale (paper section 4.1)."""
    amounts_B3 = normal(keys_B, torch.arange(_COLOR, _COLOR + 3, device=keys_B.device)) * std
    return (amounts_B3 @ components_CC.T)[:, :, None, None]
