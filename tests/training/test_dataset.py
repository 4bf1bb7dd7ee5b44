"""Which images a run finds in folders, which of them it sets aside, and what it refuses."""

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tests.training.train_runs import CLASSES, paint_photographs

from topfive_training.dataset import DataError, fingerprint, scan, scan_known, write_held_out
from topfive_training.sources import find_source


def test_one_folder_is_split_by_class_and_by_seed(photographs: Path) -> None:
    dataset = scan(photographs, validation_fraction=0.2, seed=0)
    assert dataset.labels == CLASSES
    assert sorted(dataset.training.names + dataset.validation.names) == sorted(
        f"{c}/{n:03d}.jpg" for c in CLASSES for n in range(10)
    )
    for images in (dataset.training, dataset.validation):
        assert [dataset.labels[c] for c in images.classes] == [name.split("/")[0] for name in images.names]
    assert [dataset.validation.classes.count(c) for c in range(3)] == [2, 2, 2]
    again, other = (scan(photographs, validation_fraction=0.2, seed=seed) for seed in (0, 1))
    assert again == dataset
    assert other.validation.names != dataset.validation.names


def test_class_folders_may_be_links(photographs: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        (linked / name).symlink_to(photographs / name)
    expected = scan(photographs, validation_fraction=0.2, seed=0)
    found = scan(linked, validation_fraction=0.2, seed=0)
    assert (found.training.names, found.validation.names) == (
        expected.training.names,
        expected.validation.names,
    )
    images, _ = scan_known(linked, CLASSES, tmp_path / "run")
    assert len(images) == 30
    source = find_source(linked, validation_fraction=0.2, seed=0)
    assert [entry.name for entry in source.splits["train"]] == list(expected.training.names)
    assert all(Image.open(io.BytesIO(entry.read())).size == (200, 150) for entry in source.splits["val"])


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    paint_photographs(tmp_path / "train", 3)
    paint_photographs(tmp_path / "val", 2, classes=CLASSES[:2])
    dataset = scan(tmp_path, validation_fraction=0.2, seed=0)
    assert (len(dataset.training), len(dataset.validation)) == (9, 4)
    assert any("red: no validation images" in remark for remark in dataset.remarks)


def test_a_validation_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    paint_photographs(tmp_path / "train", 2)
    paint_photographs(tmp_path / "val", 2, classes=("blue", "violet"))
    with pytest.raises(DataError, match="classes that the model does not know: violet"):
        scan(tmp_path, validation_fraction=0.2, seed=0)


def test_empty_class_folders_are_named_and_hidden_files_ignored(tmp_path: Path) -> None:
    paint_photographs(tmp_path, 2)
    (tmp_path / "yellow").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "blue" / ".DS_Store").write_bytes(b"x")
    dataset = scan(tmp_path, validation_fraction=0.2, seed=0)
    assert dataset.labels == CLASSES
    assert dataset.remarks == ("yellow: empty, so no class",)
    assert len(dataset.training) + len(dataset.validation) == 6


def test_a_single_class_none_or_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        scan(tmp_path / "nowhere", validation_fraction=0.2, seed=0)
    with pytest.raises(DataError, match="no class folder with files"):
        scan(tmp_path, validation_fraction=0.2, seed=0)
    paint_photographs(tmp_path, 2, classes=("blue",))
    with pytest.raises(DataError, match=r"only one class with files \(blue\)"):
        scan(tmp_path, validation_fraction=0.2, seed=0)


def test_evaluation_takes_what_the_run_set_aside(photographs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dataset = scan(photographs, validation_fraction=0.2, seed=0)
    write_held_out(run, dataset.validation)
    for folder in (run, run / "best"):
        images, remarks = scan_known(photographs, CLASSES, folder)
        assert sorted(images.names) == sorted(dataset.validation.names)
        assert "6 of the 30 images" in remarks[-1]
    everything, _ = scan_known(photographs, CLASSES, tmp_path)
    assert len(everything) == 30


def test_the_fingerprint_is_of_names_and_sizes(photographs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy)
    before, after = (scan(f, validation_fraction=0.2, seed=0).training for f in (photographs, copy))
    assert fingerprint(before) == fingerprint(after)
    after.path(0).write_bytes(b"another size")
    assert fingerprint(before) != fingerprint(after)
