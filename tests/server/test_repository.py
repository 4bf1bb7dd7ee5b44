import builtins
import contextlib
import dataclasses
import os
import pathlib
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.onnx_models import make_spec, write_model

from topfive_server.onnx_header import OnnxHeaderError, read_header
from topfive_server.repository import (
    BrokenModelError,
    GraphKind,
    Repository,
    RepositoryError,
    UnknownModelError,
)

HOSTILE = [
    "..",
    ".",
    "",
    "../tiny",
    "tiny/1",
    "/etc/passwd",
    "tiny\0",
    "\0",
    "a" * 10_000,
    "tiny\n",
    "%2e%2e",
    "-rf",
    "..\\tiny",
    "\uff34\uff29\uff2e\uff39",
]


def test_describes_a_model_from_its_file_alone(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny", "3", report={"top1_agreement": 1.0})
    model = Repository(tmp_path).read("tiny")
    assert (model.name, model.version, model.kind) == ("tiny", "3", GraphKind.HOT)
    assert model.spec == make_spec()
    assert model.features == 3
    assert model.input_side == 12
    assert model.report == {"top1_agreement": 1.0}


def test_the_newest_version_is_the_highest_number_not_the_last_in_the_alphabet(tmp_path: Path) -> None:
    for version in ("9", "10", "2"):
        write_model(tmp_path, "tiny", version)
    for other in ("11-draft", "latest", "007", "0", "-1", "1e3", "٣"):
        write_model(tmp_path, "tiny", other)
    (tmp_path / "tiny" / "12").mkdir()  # no model in it yet
    (tmp_path / "tiny" / "13").write_text("a file, not a folder")
    repository = Repository(tmp_path)
    assert repository.versions("tiny") == ["2", "9", "10"]
    assert repository.read("tiny").version == "10"
    assert repository.read("tiny", "2").version == "2"


def test_names_are_the_folders_that_hold_a_version(tmp_path: Path) -> None:
    write_model(tmp_path, "b")
    write_model(tmp_path, "a")
    write_model(tmp_path, ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("not a model")
    assert Repository(tmp_path).names() == ["a", "b"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_unknown_and_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    write_model(tmp_path)
    repository = Repository(tmp_path)

    def touched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the disk was touched: {args}")

    with monkeypatch.context() as patch:
        for owner, name in (
            (pathlib.Path, "iterdir"),
            (pathlib.Path, "open"),
            (os, "stat"),
            (builtins, "open"),
        ):
            patch.setattr(owner, name, touched)
        with pytest.raises(UnknownModelError) as caught:
            repository.read(text)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [*HOSTILE, "2", "01", "1 ", "one"])
def test_hostile_versions_are_unknown(tmp_path: Path, text: str) -> None:
    write_model(tmp_path)
    with pytest.raises(UnknownModelError, match="has no version") as caught:
        Repository(tmp_path).read("tiny", text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("side", "kind", "input_side"),
    [(12, GraphKind.HOT, 12), (16, GraphKind.VIEWS, 16), ("image", GraphKind.WHOLE, None)],
)
def test_the_kind_of_graph_is_told_from_its_input(
    tmp_path: Path, side: int | str, kind: GraphKind, input_side: int | None
) -> None:
    write_model(tmp_path, side=side)
    model = Repository(tmp_path).read("tiny")
    assert (model.kind, model.input_side) == (kind, input_side)


def test_a_half_copied_model_is_named_at_every_length(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenModelError, match=r"^tiny/1/model.onnx "):
            Repository(tmp_path).read("tiny")


def test_a_model_without_or_with_a_bad_description_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "none", metadata=None)
    write_model(tmp_path, "bad", metadata='{"schema_version": 99}')
    with pytest.raises(BrokenModelError, match="no 'topfive' metadata"):
        Repository(tmp_path).read("none")
    with pytest.raises(BrokenModelError, match=r"bad/1/model.onnx metadata: schema_version is 99"):
        Repository(tmp_path).read("bad")


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "side", side=13)
    write_model(tmp_path, "output", drop_output="classes")
    spec = make_spec(classes=9)
    write_model(tmp_path, "classes", metadata=spec.to_json())
    repository = Repository(tmp_path)
    with pytest.raises(
        BrokenModelError, match=r"takes `image` uint8 \[N, 13, 13, 3\]; it must take .* 12, 12"
    ):
        repository.read("side")
    with pytest.raises(BrokenModelError, match="it must give probabilities"):
        repository.read("output")
    with pytest.raises(BrokenModelError, match="scores for 7 classes, but its own description names 9"):
        repository.read("classes")


def test_a_broken_report_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, report={})
    path.with_name("report.json").write_text('{"top1":')
    with pytest.raises(BrokenModelError, match=r"tiny/1/report.json cannot be read"):
        Repository(tmp_path).read("tiny")


def test_read_all_keeps_the_good_beside_the_broken(tmp_path: Path) -> None:
    write_model(tmp_path, "a")
    write_model(tmp_path, "a", "2").write_bytes(b"\x08\x0a:\xff")
    write_model(tmp_path, "b")
    good, broken = Repository(tmp_path).read_all()
    assert [(m.name, m.version) for m in good] == [("a", "1"), ("b", "1")]
    assert len(broken) == 1
    assert str(broken[0]).startswith("a/2/model.onnx is cut off")


def test_a_missing_or_empty_repository_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RepositoryError, match=r"cannot be read \(No such file or directory\); give the folder"
    ):
        Repository(tmp_path / "nowhere").read_all()
    with pytest.raises(RepositoryError, match="holds no model"):
        Repository(tmp_path).read_all()


def test_a_model_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "tiny" / "2").mkdir()
    (tmp_path / "tiny" / "2" / "model.onnx").symlink_to("model.onnx")  # nothing, not an error
    (tmp_path / "circle").symlink_to("circle")
    assert Repository(tmp_path).names() == ["tiny"]
    assert Repository(tmp_path).versions("tiny") == ["1"]
    with pytest.raises(RepositoryError, match=r"circle cannot be read \(Too many levels of symbolic links\)"):
        Repository(tmp_path).versions("circle")


def test_the_fingerprint_follows_weights_and_preprocessing_not_the_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, **changes: Any) -> str:
        write_model(tmp_path / folder, **changes)
        return Repository(tmp_path / folder).read("tiny").fingerprint()

    base = fingerprint("a")
    spec = make_spec()
    other = dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, short_side=17))
    assert fingerprint("b") == base
    assert fingerprint("c", report={"note": "verified"}) == base
    assert fingerprint("d", seed=1) != base
    assert fingerprint("e", spec=other) != base


def test_the_header_agrees_with_the_onnx_package(tmp_path: Path) -> None:
    path = write_model(tmp_path, side="image")
    model = onnx.load(path)
    header = read_header(path)
    assert header.metadata == {p.key: p.value for p in model.metadata_props}
    for ours, theirs in zip(
        header.inputs + header.outputs, [*model.graph.input, *model.graph.output], strict=True
    ):
        tensor = theirs.type.tensor_type
        assert (ours.name, ours.element_type) == (theirs.name, tensor.elem_type)
        assert ours.shape == tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_arbitrary_damage_is_an_error_or_a_header_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged" / "1" / "model.onnx"
    whole = path.read_bytes() if path.exists() else write_model(tmp_path, "damaged").read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at + 1 :])
    with contextlib.suppress(OnnxHeaderError):
        read_header(damaged)


def test_a_graph_that_is_not_the_one_that_was_verified_is_broken(tmp_path: Path) -> None:
    path = write_model(tmp_path, "tiny", report={"passed": True})
    model = Repository(tmp_path).read("tiny")
    assert model.verified
    model.fingerprint()
    shutil.copy(write_model(tmp_path / "other", "tiny", seed=1), path)
    with pytest.raises(BrokenModelError, match=r"is not the file that its report\.json is about"):
        model.fingerprint()
    path.with_name("report.json").unlink()
    unverified = Repository(tmp_path).read("tiny")
    assert not unverified.verified
    unverified.fingerprint()


@pytest.mark.parametrize("file", [None, "text", {}, {"sha256": None}])
def test_a_report_that_names_no_file_vouches_for_none(file: object, tmp_path: Path) -> None:
    write_model(tmp_path, "tiny", report={"passed": True, "file": file})
    model = Repository(tmp_path).read("tiny")
    assert not model.verified
    model.fingerprint()
