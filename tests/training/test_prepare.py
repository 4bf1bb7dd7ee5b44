import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.io  # type: ignore[import-untyped]
import torch
from PIL import Image

from topfive.errors import TopfiveError
from topfive.model_spec import Preprocessing
from topfive.preprocessing import decode
from topfive_training.prepare import prepare
from topfive_training.shards import ShardError, ShardSquares, open_shards
from topfive_training.sources import DEVKIT, TRAIN_ARCHIVE, VAL_ARCHIVE


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((90, 70)).save(file, "JPEG")
    return file.getvalue()


def class_folders(root: Path, per_class: int = 5) -> Path:
    for label, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", per_class), ("val", 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                data = picture(100 * label + 10 * i + (split == "val"))
                # Two files whose names differ in the suffix alone.
                (folder / f"{i // 2}.{'jpg' if i % 2 else 'jpeg'}").write_bytes(data)
    return root


def original(path: Path, side: int) -> Any:
    return np.asarray(decode(path.read_bytes(), Preprocessing(short_side=side, crop=side)).image)


def manifest(dest: Path) -> Any:
    return json.loads((dest / "manifest.json").read_text())


@pytest.mark.parametrize("stored_as", ["raw", "jpeg"])
def test_every_square_is_there_with_its_class(tmp_path: Path, stored_as: Any) -> None:
    source = class_folders(tmp_path / "photos")
    prepare(source, tmp_path / "shards", format=stored_as, short_side=64, shard_images=4, processes=1)

    counts: dict[Literal["train", "val"], int] = {"train": 15, "val": 6}
    for split, count in counts.items():
        squares = ShardSquares(str(tmp_path / "shards"), split)
        assert len(squares) == count
        assert sorted(squares.images.names) == sorted(
            str(path.relative_to(source / split)) for path in (source / split).glob("*/*")
        )
        assert squares.cached == (stored_as == "raw")
        for index, name in enumerate(squares.images.names):
            assert ("ant", "bee", "cat")[squares.classes_N[index]] == name.split("/")[0]
            expected = original(source / split / name, 64)
            found = squares[index]
            assert found.dtype == np.uint8
            assert found.shape == (64, 64, 3)
            if stored_as == "raw":
                np.testing.assert_array_equal(found, expected)
            else:
                assert abs(found.astype(int) - expected.astype(int)).mean() < 3
    names = ShardSquares(str(tmp_path / "shards"), "train").images.names
    assert list(names) != sorted(names), "the training images are in order of their classes"


def test_the_manifest_vouches_for_every_shard(tmp_path: Path) -> None:
    prepare(
        class_folders(tmp_path / "photos"), tmp_path / "shards", short_side=64, shard_images=4, processes=1
    )
    found = manifest(tmp_path / "shards")
    assert found["labels"] == ["ant", "bee", "cat"]
    assert (found["format"], found["quality"], found["side"]) == ("jpeg", 90, 64)
    shards = found["splits"]["train"]["shards"] + found["splits"]["val"]["shards"]
    assert [s["images"] for s in shards] == [4, 4, 4, 3, 4, 2]
    for shard in shards:
        data = (tmp_path / "shards" / f"{shard['name']}.tar").read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert len(data) == shard["bytes"]
    assert not list((tmp_path / "shards").glob(".*"))


# In a process of its own: webdataset leaves files open, which the tests' strictness would not forgive.
READ_WITH_WEBDATASET = """
import hashlib, json, sys
import webdataset
suffix, *urls = sys.argv[1:]
samples = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple(suffix, "cls")
print(json.dumps([[hashlib.sha256(pixels.tobytes()).hexdigest(), label] for pixels, label in samples]))
"""


@pytest.mark.parametrize(("stored_as", "suffix"), [("jpeg", "jpg"), ("raw", "npy")])
def test_webdataset_reads_the_shards(tmp_path: Path, stored_as: Any, suffix: str) -> None:
    dest = tmp_path / "shards"
    prepare(
        class_folders(tmp_path / "photos"), dest, format=stored_as, short_side=64, shard_images=4, processes=1
    )
    urls = [str(dest / f"{shard['name']}.tar") for shard in manifest(dest)["splits"]["train"]["shards"]]
    command = [sys.executable, "-W", "ignore", "-c", READ_WITH_WEBDATASET, suffix, *urls]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    squares = ShardSquares(str(dest), "train")
    assert json.loads(output) == [
        [hashlib.sha256(squares[index].tobytes()).hexdigest(), int(squares.classes_N[index])]
        for index in range(15)
    ]


def test_validation_crops_are_central(tmp_path: Path) -> None:
    prepare(class_folders(tmp_path / "photos"), tmp_path / "shards", format="raw", short_side=64, processes=1)
    whole, crop = (ShardSquares(str(tmp_path / "shards"), "val", side=side) for side in (None, 50))
    np.testing.assert_array_equal(crop[3], whole[3][7:57, 7:57])
    with pytest.raises(ShardError, match="holds squares of 64 pixels, and 65 are needed"):
        ShardSquares(str(tmp_path / "shards"), "val", side=65)


def test_statistics_are_those_of_the_training_squares(tmp_path: Path) -> None:
    prepare(
        class_folders(tmp_path / "photos"),
        tmp_path / "shards",
        format="raw",
        short_side=64,
        shard_images=4,
        processes=1,
    )
    dataset, training, validation = open_shards(str(tmp_path / "shards"), side=64, crop=56)
    pixels = np.stack([training.squares[i] for i in range(15)]).astype(np.float64)
    assert training.statistics is not None
    np.testing.assert_allclose(
        training.statistics.mean_image.numpy(), pixels.mean(0).transpose(2, 0, 1), rtol=1e-6
    )
    covariance = np.cov(pixels.reshape(-1, 3).T, bias=True)
    components = training.statistics.color_components.double().numpy()
    np.testing.assert_allclose(components @ components.T, covariance, rtol=1e-4)
    assert dataset.labels == ("ant", "bee", "cat")
    assert (len(validation.squares), validation.squares.side) == (6, 56)
    with pytest.raises(ShardError, match="recipe's short_side is 256; give --short-side 64"):
        open_shards(str(tmp_path / "shards"), side=256, crop=227)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "photos")
    for processes in (1, 2):
        prepare(source, tmp_path / str(processes), short_side=64, shard_images=4, processes=processes)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("1", "2"))
    assert one == two


def test_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dest = class_folders(tmp_path / "photos"), tmp_path / "shards"
    options: dict[str, Any] = {"short_side": 64, "shard_images": 4, "processes": 1}
    prepare(source, tmp_path / "expected", **options)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    # Killed when all shards but the last were there, and the last was half written.
    with monkeypatch.context() as patch:
        patch.setattr("topfive_training.prepare._finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, dest, **options)
    (dest / ".parts" / "val-000001.json").unlink()
    (dest / "val-000001.tar").write_bytes(b"half")
    (dest / "train-000002.tar").write_bytes(b"shorter than its record says")
    before = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    with pytest.raises(TopfiveError, match="the beginning of another preparation"):
        prepare(source, dest, **{**options, "short_side": 48})
    prepare(source, dest, **options)

    rewritten = {path.name for path in dest.glob("*.tar") if path.stat().st_mtime_ns != before[path.name]}
    assert rewritten == {"val-000001.tar", "train-000002.tar"}
    assert {f.name: f.read_bytes() for f in dest.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "expected").iterdir()
    }
    with pytest.raises(TopfiveError, match="is complete already"):
        prepare(source, dest, **options)


def test_files_that_are_no_images_are_left_out_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = class_folders(tmp_path / "photos")
    (source / "train" / "ant" / "notes.txt").write_text("not a picture")
    (source / "train" / "bee" / "cut.jpg").write_bytes(picture(7)[:300])
    prepare(source, tmp_path / "shards", short_side=64, shard_images=4, processes=1)
    unreadable = manifest(tmp_path / "shards")["splits"]["train"]["unreadable"]
    assert set(unreadable) == {"ant/notes.txt", "bee/cut.jpg"}
    assert "not an image of an allowed format" in unreadable["ant/notes.txt"]
    assert len(ShardSquares(str(tmp_path / "shards"), "train")) == 15
    assert "2 left out" in capsys.readouterr().err


def test_shards_are_read_from_an_fsspec_url(tmp_path: Path) -> None:
    prepare(
        class_folders(tmp_path / "photos"), tmp_path / "shards", short_side=64, shard_images=4, processes=1
    )
    fsspec.filesystem("memory").put(str(tmp_path / "shards"), "/bucket/shards", recursive=True)
    here = ShardSquares(str(tmp_path / "shards"), "train")
    there = ShardSquares("memory://bucket/shards", "train")
    assert there.images.names == here.images.names
    assert not there.cached
    for index in (14, 0, 7):
        np.testing.assert_array_equal(there[index], here[index])
    with pytest.raises(ShardError, match=r"memory://nowhere/manifest\.json cannot be read"):
        ShardSquares("memory://nowhere", "train")


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    prepare(class_folders(tmp_path / "photos"), tmp_path / "shards", short_side=64, processes=1)
    tar = tmp_path / "shards" / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:5000])
    with pytest.raises(ShardError, match="shorter than its index says"):
        ShardSquares(str(tmp_path / "shards"), "train")[14]
    tar.write_bytes(bytes(len(whole)))
    with pytest.raises(ShardError, match="a stored image is damaged"):
        ShardSquares(str(tmp_path / "shards"), "train")[14]
    tar.unlink()
    with pytest.raises(ShardError, match=r"train-000000\.tar cannot be read"):
        ShardSquares(str(tmp_path / "shards"), "train")[14]
    newer = {**manifest(tmp_path / "shards"), "layout": 9}
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(ShardError, match="layout 9 and this program reads up to 1; update topfive"):
        ShardSquares(str(tmp_path / "shards"), "train")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "png"}, "format is 'png'; it must be jpeg or raw"),
        ({"quality": 0}, "quality is 0; it must be between 1 and 100"),
        ({"short_side": 8}, "side is 8; it must be between 32 and 4096 pixels"),
        ({"shard_images": 0}, "shard_images is 0"),
        ({"processes": 0}, "processes is 0; it must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TopfiveError, match=sentence):
        prepare(class_folders(tmp_path / "photos"), tmp_path / "shards", **options)
    assert not (tmp_path / "shards").exists()


def test_another_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").touch()
    with pytest.raises(TopfiveError, match="not an empty folder"):
        prepare(class_folders(tmp_path / "photos"), tmp_path / "shards", processes=1)


# The three archives of ILSVRC-2012, tiny.

SYNSETS = (
    # ILSVRC id, WordNet id, words, children, training images. As in the real meta.mat, the ids are not in the order of
    # the WordNet ids, and inner nodes of the tree come after the classes.
    (1, "n02119789", "kit fox, Vulpes macrotis", 0, 3),
    (2, "n01440764", "tench, Tinca tinca", 0, 2),
    (3, "n02012849", "crane", 0, 4),
    (4, "n00001740", "entity", 3, 0),
)
TRUTH = (3, 1, 1, 2, 3)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def ilsvrc(root: Path, truth: tuple[int, ...] = TRUTH, missing: int = 0) -> Path:
    root.mkdir()
    with tarfile.open(root / TRAIN_ARCHIVE, "w") as outer:
        for number, wnid, _, children, images in SYNSETS:
            if children:
                continue
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(images - (missing if wnid == "n02012849" else 0)):
                    add(tar, f"{wnid}_{i}.JPEG", picture(100 * number + i))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / VAL_ARCHIVE, "w") as tar:
        # Not in order, as in the real one.
        for i in reversed(range(len(TRUTH))):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", picture(1000 + i))
    kind = [
        ("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
        ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O"),
    ]  # fmt: skip
    rows = np.zeros((len(SYNSETS), 1), dtype=kind)
    for row, (number, wnid, words, children, images) in zip(rows, SYNSETS, strict=True):
        row[0] = (
            float(number), wnid, words, "a gloss", float(children), np.arange(children, dtype=float), 1.0, float(images),
        )  # fmt: skip
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": rows}, do_compression=True)
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        add(tar, f"{DEVKIT}/readme.txt", b"")
        add(tar, f"{DEVKIT}/data/meta.mat", meta.getvalue())
        lines = "".join(f"{number}\n" for number in truth)
        add(tar, f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
    return root


def test_ilsvrc_archives(tmp_path: Path) -> None:
    prepare(
        ilsvrc(tmp_path / "archives"),
        tmp_path / "shards",
        format="raw",
        short_side=64,
        shard_images=4,
        processes=1,
    )
    assert manifest(tmp_path / "shards")["labels"] == [
        "tench, Tinca tinca",
        "crane",
        "kit fox, Vulpes macrotis",
    ]
    train, val = (ShardSquares(str(tmp_path / "shards"), split) for split in ("train", "val"))
    wnids = ["n01440764", "n02012849", "n02119789"]
    numbers = {wnid: number for number, wnid, *_ in SYNSETS}
    assert len(train) == 9
    preprocessing = Preprocessing(short_side=64, crop=64)
    for index, name in enumerate(train.images.names):
        wnid, file = name.split("/")
        assert wnids[train.classes_N[index]] == wnid
        number = 100 * numbers[wnid] + int(file.removesuffix(".JPEG").split("_")[1])
        np.testing.assert_array_equal(train[index], np.asarray(decode(picture(number), preprocessing).image))
    # 3 -> crane, 1 -> kit fox, 2 -> tench, in the order of the WordNet ids.
    assert val.classes_N.tolist() == [1, 2, 2, 0, 1]
    assert val.images.names[0] == "ILSVRC2012_val_00000001.JPEG"
    for index in range(5):
        np.testing.assert_array_equal(
            val[index], np.asarray(decode(picture(1000 + index), preprocessing).image)
        )


def test_ilsvrc_devkit_may_be_unpacked(tmp_path: Path) -> None:
    root = ilsvrc(tmp_path / "archives")
    # Not tarfile: its `filter` came with 3.11.4, and Debian 12 has 3.11.2.
    subprocess.run(["tar", "-xzf", root / f"{DEVKIT}.tar.gz", "-C", root], check=True)
    (root / f"{DEVKIT}.tar.gz").unlink()
    prepare(root, tmp_path / "shards", short_side=64, processes=1)
    assert len(ShardSquares(str(tmp_path / "shards"), "val")) == 5


def test_ilsvrc_archives_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    def complaint(root: Path) -> str:
        with pytest.raises(TopfiveError) as caught:
            prepare(root, tmp_path / "shards", short_side=64, processes=1)
        assert not (tmp_path / "shards").exists()
        return str(caught.value)

    assert "holds 3 images of n02012849 and the devkit counts 4" in complaint(
        ilsvrc(tmp_path / "1", missing=1)
    )
    assert "holds 5 images and the devkit's ground truth 4 ids" in complaint(
        ilsvrc(tmp_path / "2", TRUTH[:4])
    )
    assert "has the ILSVRC id 9, which meta.mat does not know" in complaint(
        ilsvrc(tmp_path / "3", (*TRUTH[:4], 9))
    )
    for name, number in ((TRAIN_ARCHIVE, 4), (VAL_ARCHIVE, 5), (f"{DEVKIT}.tar.gz", 6)):
        root = ilsvrc(tmp_path / str(number))
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
        assert name in complaint(root)
        (root / name).unlink()
        assert name.removesuffix(".tar.gz") in complaint(root)


def test_the_order_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)  # the order must not come from torch's generator
    prepare(class_folders(tmp_path / "photos"), tmp_path / "a", short_side=64, processes=1)
    torch.manual_seed(2)
    prepare(tmp_path / "photos", tmp_path / "b", short_side=64, processes=1)
    assert (tmp_path / "a" / "manifest.json").read_text() == (tmp_path / "b" / "manifest.json").read_text()
