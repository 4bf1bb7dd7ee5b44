"""`ModelSpec`: written, read back, and every wrong field named."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topfive import TopfiveError
from topfive.model_spec import (
    SCHEMA_VERSION,
    Architecture,
    ArchitectureName,
    ModelSpec,
    ModelSpecError,
    Preprocessing,
)

SPEC = ModelSpec(
    architecture=Architecture(name="alexnet-2014", classes=3, width=0.25, normalization="none"),
    preprocessing=Preprocessing(short_side=64, crop=57, mean=(123.5, 117.0, 104.25), std=(58.0, 57.0, 57.5)),
    labels=("tench", 'ünïcødé, "quoted"', "tabby cat"),
    recipe={"epochs": 90, "rate": 0.01, "schedule": [30, 60], "nested": {"on": True, "none": None}},
    metrics={"top1": 0.625, "loss": 1.5},
    data_fingerprint="ab12",
    code_fingerprint="0.1.0",
)
GOOD: dict[str, Any] = json.loads(SPEC.to_json())


def changed(path: str, value: Any) -> str:
    """GOOD as JSON text, with one field replaced."""
    data = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[name]
    place[last] = value
    return json.dumps(data)


def without(path: str) -> str:
    data = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[name]
    del place[last]
    return json.dumps(data)


def test_it_survives_writing_and_reading() -> None:
    assert ModelSpec.from_json(SPEC.to_json()) == SPEC


def test_it_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(SPEC.to_json(), encoding="utf-8")
    assert ModelSpec.read(tmp_path) == ModelSpec.read(tmp_path / "model.json") == SPEC
    with pytest.raises(FileNotFoundError):
        ModelSpec.read(tmp_path / "absent.json")


def test_the_text_is_for_people_too() -> None:
    text = SPEC.to_json()
    assert text.endswith("}\n")
    assert "ünïcødé" in text
    assert text.splitlines()[1].startswith("  ")


def test_fields_with_defaults_may_be_left_out() -> None:
    minimal = {
        "architecture": {"classes": 2},
        "preprocessing": {},
        "labels": ["a", "b"],
    }
    spec = ModelSpec.from_json(json.dumps(minimal))
    assert spec.architecture == Architecture(classes=2)
    assert spec.preprocessing == Preprocessing()
    assert spec.schema_version == SCHEMA_VERSION


WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("schema_version", 0, "schema_version is 0"),
    ("schema_version", SCHEMA_VERSION + 1, "update topfive"),
    ("schema_version", True, "schema_version is True"),
    ("schema_version", "1", "schema_version is '1'"),
    ("architecture", [], "architecture is list"),
    ("architecture.name", "resnet", "architecture.name is 'resnet'"),
    ("architecture.classes", 0, "architecture.classes is 0"),
    ("architecture.classes", 2.0, "architecture.classes is 2.0"),
    ("architecture.classes", 4, "labels is '3 names'"),
    ("architecture.width", 0, "architecture.width is 0"),
    ("architecture.width", "wide", "architecture.width is 'wide'"),
    ("architecture.width", True, "architecture.width is True"),
    ("architecture.dropout", 1, "architecture.dropout is 1"),
    ("architecture.dropout_scaling", "never", "architecture.dropout_scaling is 'never'"),
    ("architecture.normalization", None, "architecture.normalization is None"),
    ("architecture.overlapping_pooling", 1, "architecture.overlapping_pooling is 1"),
    ("architecture.clases", 3, "did you mean architecture.classes?"),
    ("preprocessing.crop", 0, "preprocessing.crop is 0"),
    ("preprocessing.crop", 65, "preprocessing.short_side is 64"),
    ("preprocessing.short_side", 1e3, "preprocessing.short_side is 1000.0"),
    ("preprocessing.resample", "bicubic", "preprocessing.resample is 'bicubic'"),
    ("preprocessing.color_order", "BGR", "preprocessing.color_order is 'BGR'"),
    ("preprocessing.mean", [1.0, 2.0], "preprocessing.mean is"),
    ("preprocessing.mean", 1.0, "preprocessing.mean is 1.0; it must be a list"),
    ("preprocessing.mean", [1.0, 2.0, 256.0], "preprocessing.mean is"),
    ("preprocessing.mean", [1.0, "x", 3.0], "preprocessing.mean[1] is 'x'"),
    ("preprocessing.std", [1.0, 0.0, 1.0], "preprocessing.std is"),
    ("preprocessing.mean_image", "no", "preprocessing.mean_image is 'no'"),
    ("labels", ["a", "b"], "labels is '2 names'"),
    ("labels", ["a", "b", ""], "labels[2] is ''"),
    ("labels", ["a", "two\nlines", "c"], "labels[1]"),
    ("labels", ["a", 2, "c"], "labels[1] is 2"),
    ("labels", "abc", "labels is 'abc'; it must be a list"),
    ("recipe", [1], "recipe is [1]; it must be an object"),
    ("metrics", {"top1": "high"}, "metrics.top1 is 'high'"),
    ("labels", ["a", "two\u2028lines", "c"], "labels[1]"),
    ("labels", ["a", "half a \udc80 pair", "c"], "labels[1]"),
    ("recipe", {"rate": float("nan")}, "recipe.rate is nan"),
    ("recipe", {"steps": [1, {"x": float("inf")}]}, "recipe.steps[1].x is inf"),
    ("recipe", {"note": "\udc80"}, "recipe.note is"),
    ("recipe", {"\udc80": 1}, "recipe is"),
    ("metrics", {"top1": 10**400}, "metrics.top1 is 1000"),
    ("data_fingerprint", 7, "data_fingerprint is 7"),
    ("label", [], "did you mean labels?"),
    ("zzz", 1, "zzz is not a known field"),
]


@pytest.mark.parametrize(("path", "value", "says"), WRONG_VALUES)
def test_a_wrong_field_is_named_with_its_value(path: str, value: Any, says: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        ModelSpec.from_json(changed(path, value), source="run/model.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("run/model.json: ")


@pytest.mark.parametrize("path", ["architecture", "preprocessing", "labels"])
def test_a_missing_field_is_named(path: str) -> None:
    with pytest.raises(ModelSpecError, match=f"{path} is missing"):
        ModelSpec.from_json(without(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "17", "NaN", "\x00", "[" * 100_000])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ModelSpecError, match=r"^model\.json"):
        ModelSpec.from_json(text)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(constant: str) -> None:
    text = SPEC.to_json().replace("117.0", constant)
    with pytest.raises(ModelSpecError, match=r"preprocessing\.mean\[1\]"):
        ModelSpec.from_json(text)


def test_a_newer_file_is_refused_before_its_new_fields_are_judged() -> None:
    data = {**GOOD, "schema_version": SCHEMA_VERSION + 1, "something_new": 1}
    with pytest.raises(ModelSpecError, match="update topfive"):
        ModelSpec.from_json(json.dumps(data))


def test_a_record_that_json_cannot_hold_is_not_written() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        dataclasses.replace(SPEC, metrics={"loss": float("nan")}).to_json()


def test_its_errors_are_for_people_and_for_programs() -> None:
    assert issubclass(ModelSpecError, TopfiveError)
    assert issubclass(ModelSpecError, ValueError)


@pytest.mark.parametrize("name", get_args(ArchitectureName))
def test_every_architecture_name_is_allowed(name: ArchitectureName) -> None:
    assert Architecture(name=name).name == name


numbers = st.floats(0, 255, allow_nan=False)
specs = st.builds(
    ModelSpec,
    architecture=st.builds(
        Architecture,
        name=st.sampled_from(get_args(ArchitectureName)),
        classes=st.just(2),
        width=st.floats(0.01, 16),
        dropout=st.floats(0, 1, exclude_max=True),
        overlapping_pooling=st.booleans(),
    ),
    preprocessing=st.builds(
        Preprocessing,
        short_side=st.integers(256, 4096),
        crop=st.integers(1, 256),
        mean=st.tuples(numbers, numbers, numbers),
        mean_image=st.booleans(),
    ),
    labels=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip),
        min_size=2,
        max_size=2,
    ).map(tuple),
    metrics=st.dictionaries(st.text(), numbers, max_size=3),
)


@given(specs)
def test_any_record_survives_writing_and_reading(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
paths = st.sampled_from(
    [*GOOD, *(f"{part}.{name}" for part in ("architecture", "preprocessing") for name in GOOD[part])]
)


@given(paths, json_values)
def test_any_value_in_any_field_is_read_or_refused_in_a_sentence(path: str, value: Any) -> None:
    try:
        spec = ModelSpec.from_json(changed(path, value))
    except ModelSpecError:
        return
    assert ModelSpec.from_json(spec.to_json()) == spec
