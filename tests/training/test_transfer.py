"""Starting from another run's weights."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.training.train_runs import paint_photographs, run, train_command

from topfive.model_spec import ModelSpec, Preprocessing
from topfive_training.checkpoint import Classifier, load_model, save_model
from topfive_training.initialization import initialize
from topfive_training.network import LAYERS, AlexNet
from topfive_training.recipe import Recipe, RecipeError
from topfive_training.transfer import CAUTIOUS, classifier_from, recipe_from

SOURCE = Recipe(width=0.02, dropout=0.3, seed=5)


def source(labels: tuple[str, ...]) -> Classifier:
    spec = ModelSpec(
        architecture=SOURCE.network(len(labels)),
        preprocessing=Preprocessing(mean=(100, 110, 120), mean_image=True),
        labels=labels,
    )
    network = AlexNet(spec.architecture)
    initialize(network, SOURCE)
    return Classifier(spec, network=network, mean_image=torch.rand(3, 256, 256) * 255)


def target(recipe: Recipe, labels: tuple[str, ...]) -> ModelSpec:
    return ModelSpec(architecture=recipe.network(len(labels)), preprocessing=Preprocessing(), labels=labels)


def test_other_classes_get_a_new_last_layer_and_the_old_eyes() -> None:
    old = source(("a", "b", "c", "d"))
    recipe = recipe_from("2012", {}, old.spec)
    new = classifier_from(old, target(recipe, ("x", "y")), recipe, torch.eye(3))
    for name in LAYERS[:-1]:
        assert torch.equal(
            new.network.get_parameter(f"{name}.weight"), old.network.get_parameter(f"{name}.weight")
        )
    assert new.network.fc8.out_features == 2
    assert new.spec.preprocessing == old.spec.preprocessing
    assert new.mean_image is not None
    assert old.mean_image is not None
    assert torch.equal(new.mean_image, old.mean_image)
    fresh = AlexNet(recipe.network(2))
    initialize(fresh, recipe)
    assert new.network.fc8.weight.std().item() == pytest.approx(fresh.fc8.weight.std().item(), rel=0.5)


def test_the_same_classes_keep_the_last_layer() -> None:
    old = source(("a", "b"))
    recipe = recipe_from("2012", {}, old.spec)
    new = classifier_from(old, target(recipe, ("a", "b")), recipe, torch.eye(3))
    assert torch.equal(new.network.fc8.weight, old.network.fc8.weight)


def test_the_recipe_follows_the_weights() -> None:
    recipe = recipe_from("modern", {"rate": "0.5"}, source(("a", "b")).spec)
    assert (recipe.width, recipe.normalization, recipe.mean, recipe.std) == (0.02, "lrn", "image", "none")
    assert (recipe.dropout, recipe.dropout_scaling, recipe.layer_rates) == (0.3, "evaluation", CAUTIOUS)
    assert (recipe.rate, recipe.schedule) == (0.5, "cosine")


def test_what_the_weights_do_not_allow_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"width is '0.5', but the weights of --from were trained with 0.02"
    ):
        recipe_from("2012", {"width": "0.5"}, source(("a", "b")).spec)


def test_frozen_layers_stand_still_and_a_resumed_run_keeps_its_eyes(tmp_path: Path) -> None:
    old = source(("a", "b", "c", "d"))
    save_model(tmp_path / "old", old)
    photographs = paint_photographs(tmp_path / "photographs", 6)
    command = train_command(photographs, tmp_path / "new", "--from", str(tmp_path / "old"), "--epochs", "1")
    done = run([*command, "--layer-rates", "conv=0,fc6=0.5", "--rate", "0.001"])
    assert done.returncode == 0, done.stderr
    new = load_model(tmp_path / "new")
    same = {
        name: torch.equal(
            new.network.get_parameter(f"{name}.weight"), old.network.get_parameter(f"{name}.weight")
        )
        for name in LAYERS[:-1]
    }
    assert same == {name: name.startswith("conv") for name in LAYERS[:-1]}
    assert new.spec.preprocessing == old.spec.preprocessing
    again = run(train_command(photographs, tmp_path / "new", "--resume"))
    assert again.returncode == 0, again.stderr
    assert load_model(tmp_path / "new").spec == dataclasses.replace(new.spec)
