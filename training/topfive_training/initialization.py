"""Initial weights, as a recipe asks."""

import math
from collections.abc import Collection
from typing import Final

import torch
from torch import nn

from topfive_training.network import LAYERS, AlexNet
from topfive_training.recipe import Recipe

_BIASED: Final = frozenset({"conv2", "conv4", "conv5", "fc6", "fc7"})
"""Layers whose biases start at `Recipe.bias`; the others' start at 0 (paper section 5)."""
_FAN_IN_TOWERS: Final = (363, 1200, 2304, 1728, 1728, 9216, 4096, 4096)
_FAN_IN_2014: Final = (363, 1600, 1728, 3456, 2304, 9216, 4096, 4096)
"""Inputs of one unit in each of `LAYERS`, at width 1."""


@torch.no_grad()
def initialize(network: AlexNet, recipe: Recipe, layers: Collection[str] = LAYERS) -> None:
    """Set the weights and biases of `layers` from `recipe.seed`, the same on every machine and rank."""
    generator = torch.Generator().manual_seed(recipe.seed)
    published = _FAN_IN_2014 if network.architecture.name == "alexnet-2014" else _FAN_IN_TOWERS
    for name, published_fan_in in zip(LAYERS, published, strict=True):
        if name not in layers:
            continue
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        fan_in = layer.weight[0].numel()
        if recipe.initialization == "he":
            std, bias = math.sqrt((1 if name == "fc8" else 2) / fan_in), 0.0
        else:
            std, bias = _fixed_std(recipe, name), recipe.bias if name in _BIASED else 0.0
            if recipe.std_follows_width:
                std *= math.sqrt(published_fan_in / fan_in)
        layer.weight.normal_(0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.fill_(bias)


def _fixed_std(recipe: Recipe, layer: str) -> float:
    if layer.startswith("fc"):
        return recipe.std_fully_connected
    return recipe.std_early if layer in {"conv1", "conv2"} else recipe.std_late
