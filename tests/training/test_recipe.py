"""Recipes: what a command line may say, and what it is told when that makes no sense."""

import dataclasses

import pytest

from topfive_training.recipe import RECIPES, Recipe, RecipeError, field_documentation, make_recipe, recorded


def test_2012_is_the_default() -> None:
    assert make_recipe("2012", {}) == Recipe()


def test_text_is_parsed_by_the_type_of_the_field() -> None:
    recipe = make_recipe("2012", {"batch-size": "64", "rate": "5e-3", "flip": "no", "normalization": "none"})
    assert (recipe.batch_size, recipe.rate, recipe.flip, recipe.normalization) == (64, 0.005, False, "none")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_own_record(name: str) -> None:
    assert make_recipe("2012", RECIPES[name].to_json()) == RECIPES[name]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"bach-size": "3"}, "bach_size is no field of a recipe; did you mean batch_size?"),
        ({"batch_size": "many"}, "batch_size is 'many'; it must be a number"),
        ({"batch_size": "1.5"}, "batch_size is '1.5'; it must be a whole number"),
        ({"rate": "nan"}, "rate is 'nan'; it must be a number"),
        ({"rate": "-1"}, r"rate is -1.0; it must be between 0 and 1,000"),
        ({"flip": "maybe"}, "flip is 'maybe'; it must be true or false"),
        ({"schedule": "linear"}, "schedule is 'linear'; it must be run-145 or cosine or constant"),
        ({"momentum": "1"}, "momentum is 1.0; it must be at least 0 and below 1"),
        ({"crop": "300"}, "crop is 300; it must be between 196 and 227 for alexnet-2012"),
        ({"short-side": "200"}, r"crop is 227; it must be at most short_side \(200\)"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        make_recipe("2012", overrides)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(RecipeError, match="recipe is 'ancient'; it must be 2012 or modern"):
        make_recipe("ancient", {})


def test_2014_brings_its_own_decisions_unless_told() -> None:
    recipe = make_recipe("2012", {"architecture": "alexnet-2014"})
    assert (recipe.normalization, recipe.dropout_scaling, recipe.crop) == ("none", "training", 224)
    assert (
        make_recipe("2012", {"architecture": "alexnet-2014", "normalization": "lrn"}).normalization == "lrn"
    )
    assert make_recipe("modern", {"architecture": "alexnet-2014"}).normalization == "batch"


def test_the_norm_within_maps_is_2012s_and_goes_where_it_can() -> None:
    assert RECIPES["2012"].network(3).within_map_norm
    assert not RECIPES["modern"].network(3).within_map_norm
    for changes in ({"normalization": "none"}, {"architecture": "caffenet"}, {"within-map-norm": "no"}):
        assert not make_recipe("2012", changes).network(3).within_map_norm
    assert make_recipe("modern", {"normalization": "lrn", "within_map_norm": "yes"}).within_map_norm
    with pytest.raises(RecipeError, match=r"within_map_norm is True; .* goes with alexnet-2012 and lrn"):
        make_recipe("modern", {"within_map_norm": "yes"})


def test_a_record_from_before_a_field_is_of_a_run_that_did_what_was_done_then() -> None:
    fields = Recipe().to_json()
    del fields["within_map_norm"], fields["bias_rate_drops"]
    before = make_recipe("2012", recorded(fields))
    assert (before.within_map_norm, before.bias_rate_drops) == (False, True)
    assert make_recipe("2012", recorded(Recipe().to_json())) == Recipe()


def test_modern_raises_its_rate_with_a_larger_batch_and_2012_keeps_what_was_published() -> None:
    assert make_recipe("modern", {"batch-size": "2048"}).rate == pytest.approx(0.16)
    assert make_recipe("modern", {"batch-size": "64"}).rate == 0.02
    assert make_recipe("modern", {"batch-size": "2048", "rate": "0.1"}).rate == 0.1
    assert make_recipe("2012", {"batch-size": "2048"}).rate == 0.01


def test_every_field_says_what_it_does() -> None:
    texts = field_documentation()
    assert texts.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert all(text.endswith(".") for text in texts.values())


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("", {"conv1": 1, "fc8": 1}),
        ("conv=0.1,conv5=0.5,fc8=2", {"conv1": 0.1, "conv5": 0.5, "fc6": 1, "fc8": 2}),
        ("conv=0, fc=0.1", {"conv3": 0, "fc7": 0.1}),
    ],
)
def test_layer_rates(text: str, rates: dict[str, float]) -> None:
    recipe = make_recipe("2012", {"layer_rates": text})
    assert {layer: recipe.layer_rate(layer) for layer in rates} == rates


@pytest.mark.parametrize("text", ["conv9=1", "conv1", "conv1=fast", "conv1=-1", "=1"])
def test_layer_rates_that_make_no_sense(text: str) -> None:
    with pytest.raises(RecipeError, match=r"layer_rates is .* it must be like"):
        make_recipe("2012", {"layer_rates": text})
