"""What a run needs to go on exactly where it stopped: one file, `resume/state.safetensors`.

Weights, velocities and running sums as tensors; position, recipe and fingerprints as text in its header. One file,
because a rename can make only one file appear at a time.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from topfive.model_spec import ModelSpec
from topfive_training.checkpoint import (
    COLOR_COMPONENTS,
    MEAN_IMAGE,
    CheckpointError,
    Classifier,
    check_fit,
    load_tensors,
    save_tensors,
)
from topfive_training.recipe import Recipe, recorded

if TYPE_CHECKING:
    from topfive_training.trainer import Trainer

STATE_FILE: Final = "resume/state.safetensors"
_NETWORK, _VELOCITY, _SUMS = "network.", "velocity.", "position.sums"


def save(folder: Path, trainer: "Trainer", velocities: dict[str, Tensor]) -> None:
    """Write the state of `trainer` atomically, in the layout of one process, whatever the ranks hold of it.

    Raises:
        OSError: it cannot be written; the previous state stays.
    """
    network, position = trainer.classifier.network, trainer.position
    tensors = {_NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    tensors |= {_VELOCITY + name: velocity for name, velocity in velocities.items()}
    tensors[_SUMS] = position.sums
    classifier = trainer.classifier
    for name, tensor in (
        (MEAN_IMAGE, classifier.mean_image),
        (COLOR_COMPONENTS, classifier.color_components),
    ):
        if tensor is not None:
            tensors[name] = tensor
    text = {
        "step": position.step,
        "validated": position.validated,
        "best_top1": position.best_top1,
        "recipe": trainer.recipe.to_json(),
        "training_images": len(trainer.training),
    }
    save_tensors(folder / STATE_FILE, tensors, {"state": json.dumps(text), "spec": classifier.spec.to_json()})


def saved_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of the run in `folder`, field by field.

    Raises:
        CheckpointError: the state is damaged.
    """
    return recorded(_header(folder / STATE_FILE)["recipe"])


def load_classifier(folder: Path, *, data_fingerprint: str) -> Classifier:
    """The classifier of the run in `folder`, its preprocessing included; `load` puts in the weights.

    Raises:
        CheckpointError: the state is damaged, or of other images.
    """
    path = folder / STATE_FILE
    tensors, metadata = load_tensors(path)
    spec = ModelSpec.from_json(metadata.get("spec", ""), source=str(path))
    if data_fingerprint != spec.data_fingerprint:
        raise CheckpointError(
            f"{path} is of a run with other training images: some have been added, removed or changed since, or are "
            "split another way; restore them, or start another run in another folder"
        )
    return Classifier(
        spec, mean_image=tensors.get(MEAN_IMAGE), color_components=tensors.get(COLOR_COMPONENTS)
    )


def load(folder: Path, trainer: "Trainer") -> None:
    """Put `trainer` where the run in `folder` stopped; on every rank.

    Raises:
        CheckpointError: the state is damaged, or of another recipe or other images.
    """
    path = folder / STATE_FILE
    state = _header(path)
    _check_same(path, state, trainer)
    tensors, _ = load_tensors(path)
    network = trainer.classifier.network
    weights = {name.removeprefix(_NETWORK): t for name, t in tensors.items() if name.startswith(_NETWORK)}
    check_fit(network, weights, source=str(path))
    network.load_state_dict(weights)
    parallelism = trainer.parallelism
    parallelism.distribute()
    for name, parameter in parallelism.part.named_parameters():
        trainer.optimizer.velocity(parameter).copy_(parallelism.slice(name, tensors[_VELOCITY + name]))
    position = trainer.position
    position.step, position.validated = int(state["step"]), int(state["validated"])
    position.best_top1 = float(state["best_top1"])
    if parallelism.share[0] == 0:
        position.sums.copy_(tensors[_SUMS])
    else:
        position.sums = torch.zeros_like(position.sums)


def _header(path: Path) -> dict[str, Any]:
    _, metadata = load_tensors(path, only_metadata=True)
    try:
        state = json.loads(metadata["state"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no state of a training run; start again without --resume"
        ) from error
    assert isinstance(state, dict)
    return state


def _check_same(path: Path, state: dict[str, Any], trainer: "Trainer") -> None:
    saved = recorded(state["recipe"])
    for field in dataclasses.fields(Recipe):
        before, value = saved.get(field.name, field.default), getattr(trainer.recipe, field.name)
        if before != value:
            raise CheckpointError(
                f"{path} is of a run with {field.name} {before!r}, not {value!r}; leave the option out to go on with "
                "it, or start another run in another folder"
            )
    images = len(trainer.training)
    if state["training_images"] != images:
        raise CheckpointError(
            f"{path} is of a run with {state['training_images']} readable training images, and now there are "
            f"{images}; restore them, or start another run in another folder"
        )
