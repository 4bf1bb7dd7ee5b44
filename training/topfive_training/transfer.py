"""Starting from another run's weights: `topfive train --from CHECKPOINT`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from topfive.model_spec import ModelSpec
from topfive_training.checkpoint import Classifier
from topfive_training.initialization import initialize
from topfive_training.network import AlexNet
from topfive_training.recipe import Recipe, RecipeError, make_recipe

CAUTIOUS: Final = "conv=0.1,fc6=0.1,fc7=0.1"
"""Layer rates where none are given: what is already learned moves a tenth as fast as the new last layer, as in Caffe's
fine-tuning example."""


def recipe_from(name: str, given: Mapping[str, object], spec: ModelSpec) -> Recipe:
    """The named recipe, as far as it leaves alone what the weights of `spec` were trained with.

    Raises:
        RecipeError: a field is given that the weights do not allow.
    """
    architecture, preprocessing = spec.architecture, spec.preprocessing
    fixed: dict[str, Any] = {
        "architecture": architecture.name,
        "width": architecture.width,
        "dropout_scaling": architecture.dropout_scaling,
        "normalization": architecture.normalization,
        "within_map_norm": architecture.within_map_norm,
        "overlapping_pooling": architecture.overlapping_pooling,
        "short_side": preprocessing.short_side,
        "crop": preprocessing.crop,
        "mean": "image" if preprocessing.mean_image else "channel" if any(preprocessing.mean) else "none",
        "std": "none" if set(preprocessing.std) == {1.0} else "channel",
    }
    changes = {key.replace("-", "_"): value for key, value in given.items()}
    asked = dataclasses.asdict(make_recipe(name, fixed | changes))
    for field, value in fixed.items():
        if field in changes and asked[field] != value:
            raise RecipeError(
                f"{field} is {changes[field]!r}, but the weights of --from were trained with {value!r}; leave it out"
            )
    defaults = {"dropout": architecture.dropout, "layer_rates": CAUTIOUS}
    return make_recipe(name, defaults | fixed | changes)


def classifier_from(
    source: Classifier, spec: ModelSpec, recipe: Recipe, color_components: Tensor
) -> Classifier:
    """A network with the weights of `source` and the classes of `spec`.

    The preprocessing is that of `source`, whose weights expect it. The last layer starts anew unless the classes are
    the same.
    """
    spec = dataclasses.replace(spec, preprocessing=source.spec.preprocessing)
    network = AlexNet(spec.architecture)
    same = source.spec.labels == spec.labels
    state = source.network.state_dict()
    network.load_state_dict(
        {name: t for name, t in state.items() if same or not name.startswith("fc8.")}, strict=False
    )
    if not same:
        initialize(network, recipe, layers=("fc8",))
    return Classifier(spec, network=network, mean_image=source.mean_image, color_components=color_components)
