"""The learning rate over a run, as a function of the step alone: nothing to save, nothing to drift."""

import dataclasses
import math
from typing import Final

from topfive_training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """What holds at one step."""

    rate: float
    """Learning rate of the weights of all layers but conv1."""
    first_rate: float
    """Learning rate of conv1's weights; at 0 conv1 is frozen."""
    color_noise: float
    """Standard deviation of the colour noise, as `Recipe.color_noise`."""
    bias_rate: float | None = None
    """Learning rate of the biases of layers that are not frozen, before `Recipe.bias_rate_factor`; None: their weights'."""


_RUN_145: Final = (
    # from epoch (of 91), factor on the rate, factor on conv1's, colour noise on
    (79, 1e-3, 0.0, False),
    (72, 1e-2, 0.0, False),
    (67, 1e-2, 1e-3, False),
    (51, 1e-2, 1e-2, True),
    (25, 1e-1, 1e-1, True),
    (0, 1.0, 1.0, True),
)
"""cuda-convnet's run 145, the notes in `layer-params-145.cfg`: epsW .01, .001, 1e-4 (conv1: 1e-5, then 0), 1e-5."""
_RUN_145_EPOCHS: Final = 91


def phase(recipe: Recipe, step: int, steps: int) -> Phase:
    """What holds at `step` of `steps`, counted from 0."""
    rate, first, noisy = recipe.rate, recipe.rate, True
    if recipe.schedule == "run-145":
        # Integers, so that a boundary falls on the same step in every run of 91 epochs.
        _, factor, first_factor, noisy = next(
            row for row in _RUN_145 if step * _RUN_145_EPOCHS >= row[0] * steps
        )
        rate, first = recipe.rate * factor, recipe.rate * first_factor
    elif recipe.schedule == "cosine":
        rate = first = recipe.rate * (1 + math.cos(math.pi * step / steps)) / 2
    warmup_steps = recipe.warmup_epochs / recipe.epochs * steps
    warmth = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    held = recipe.schedule == "run-145" and not recipe.bias_rate_drops
    return Phase(
        rate=rate * warmth,
        first_rate=first * warmth,
        color_noise=recipe.color_noise if noisy else 0.0,
        bias_rate=recipe.rate * warmth if held else None,
    )
