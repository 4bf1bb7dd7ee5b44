"""The repository on disk: names, versions, one step to appear, nothing overwritten, nothing left behind."""

import json
import os
from pathlib import Path

import pytest

from topfive_export.repository import (
    Interface,
    all_variants,
    check_compatible,
    check_name,
    choose_version,
    config_text,
    staged,
    versions,
)
from topfive_export.variant import ExportError, Variant

HOT, INT8 = Variant(), Variant(precision="int8")
INTERFACE = Interface(input=(227, 227, 3), top=5, classes=7, features=64)


def _publish(out: Path, variant: Variant, number: int, sha256: str, family: str = "net") -> None:
    with staged(out) as staging:
        folder = staging.version(variant.model_name(family), number)
        report = {"checkpoint": {"sha256": sha256}, "interface": INTERFACE.as_json()}
        (folder / "report.json").write_text(json.dumps(report))
        (folder.parent / "config.pbtxt").write_text("")
        (folder.parent / "labels.txt").write_text("one\ntwo\n")
        staging.publish()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "naïve", "a b", "x" * 101, "-x"])
def test_names_that_are_no_folder_or_address_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match="--name is"):
        check_name(name)


def test_every_variant_has_a_name_of_its_own() -> None:
    names = [variant.model_name("net") for variant in all_variants()]
    assert len(set(names)) == len(names)
    assert {"net", "net_image", "net_int8", "net_fp16", "net_cuda", "net_views10"} <= set(names)


def test_versions_are_numbers_without_leading_zeros(tmp_path: Path) -> None:
    for name in ("1", "12", "007", "latest", ".3", "3.tmp"):
        (tmp_path / name).mkdir()
    assert versions(tmp_path) == [1, 12]
    assert versions(tmp_path / "nowhere") == []


def test_one_number_is_one_set_of_weights(tmp_path: Path) -> None:
    assert choose_version(tmp_path, "net", [HOT], "aa", None) == 1
    _publish(tmp_path, HOT, 1, "aa")
    assert choose_version(tmp_path, "net", [INT8], "aa", None) == 1  # joins its weights
    assert choose_version(tmp_path, "net", [INT8], "bb", None) == 2  # other weights, next free number of all
    with pytest.raises(
        ExportError, match=rf"as version 1: to make it anew, remove {tmp_path / 'net'} first; .* --version 2"
    ):
        choose_version(tmp_path, "net", [HOT], "aa", None)  # exported again
    _publish(tmp_path, INT8, 2, "bb")
    assert choose_version(tmp_path, "net", [HOT], "cc", None) == 3
    assert choose_version(tmp_path, "other", [HOT], "cc", None) == 1
    with pytest.raises(ExportError, match="never overwritten"):
        choose_version(tmp_path, "net", [HOT], "aa", 1)
    with pytest.raises(ExportError, match="another checkpoint"):
        choose_version(tmp_path, "net", [HOT], "cc", 2)
    assert choose_version(tmp_path, "net", [HOT], "cc", 40) == 40
    # Published once more under a new number, as was said: its other variants join it there.
    _publish(tmp_path, HOT, 3, "aa")
    _publish(tmp_path, INT8, 1, "aa")
    assert choose_version(tmp_path, "net", [INT8], "aa", None) == 3
    _publish(tmp_path, INT8, 3, "aa")
    with pytest.raises(
        ExportError, match=rf"as version 3: .* remove {tmp_path / 'net_int8' / '3'} first; .* --version 4"
    ):
        choose_version(tmp_path, "net", [INT8], "aa", None)


def test_all_versions_of_a_model_share_labels_and_shapes(tmp_path: Path) -> None:
    check_compatible(tmp_path / "net", ["one", "two"], INTERFACE)
    _publish(tmp_path, HOT, 1, "aa")
    check_compatible(tmp_path / "net", ["one", "two"], INTERFACE)
    with pytest.raises(ExportError, match="other classes"):
        check_compatible(tmp_path / "net", ["one", "three"], INTERFACE)
    wider = Interface(input=(227, 227, 3), top=5, classes=7, features=128)
    with pytest.raises(ExportError, match="choose another --name"):
        check_compatible(tmp_path / "net", ["one", "two"], wider)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ExportError, match="is not a model that topfive exported"):
        check_compatible(tmp_path / "mine", ["one", "two"], INTERFACE)


def test_nothing_appears_before_all_of_it_does(tmp_path: Path) -> None:
    out = tmp_path / "models"
    with staged(out) as staging:
        (staging.version("net_image", 1) / "model.onnx").write_text("whole")
        (staging.version("net", 1) / "model.onnx").write_text("hot")
        assert list(out.iterdir()) == []
        staging.publish()
        assert sorted(path.name for path in out.iterdir()) == ["net", "net_image"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    assert (out / "net" / "1" / "model.onnx").read_text() == "hot"


def test_a_failure_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "models"

    def fail() -> None:
        with staged(out) as staging:
            (staging.version("net", 1) / "model.onnx").write_text("hot")
            raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        fail()
    assert not out.exists()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_version_that_appeared_meanwhile_is_kept_and_the_rest_taken_back(tmp_path: Path) -> None:
    with staged(tmp_path / "models") as staging:
        staging.version("net_image", 1)
        (staging.version("net", 1) / "model.onnx").write_text("second")
        _publish(tmp_path / "models", HOT, 1, "aa")
        before = (tmp_path / "models" / "net" / "1" / "report.json").read_text()
        with pytest.raises(ExportError, match="has appeared meanwhile"):
            staging.publish()
    assert (tmp_path / "models" / "net" / "1" / "report.json").read_text() == before
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["net"]


def test_a_repository_on_a_disk_of_its_own_is_staged_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mount point's parent lies on another disk, or may not be written: renames have to stay within.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    out = tmp_path / "models"
    with staged(out) as staging:
        staging.version("net", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["models"]
        staging.publish()
    assert [path.name for path in out.iterdir()] == ["net"]


def test_config_places_each_variant_on_its_device() -> None:
    text = config_text("net", INTERFACE, HOT)
    assert 'backend: "onnxruntime"' in text
    assert "dims: [ 227, 227, 3 ]" in text
    assert 'label_filename: "labels.txt"' in text
    assert "KIND_AUTO" in text
    assert "KIND_CPU" in config_text("net_int8", INTERFACE, INT8)
    assert "KIND_GPU" in config_text("net_fp16", INTERFACE, Variant(precision="fp16", target="cuda"))
    assert "KIND_GPU" in config_text("net_cuda", INTERFACE, Variant(target="cuda"))
