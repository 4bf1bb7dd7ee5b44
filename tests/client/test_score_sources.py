"""Listings that are the same on every run, and files that are read or say why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.client.score_fakes import FakeClassifier, rows_of, score_with

from topfive.scoring import JobConfig, RefusedError
from topfive.scoring._sources import LocalFolder, ReadError, open_source


def listed(folder: Path, *, all_files: bool = False) -> list[str]:
    return list(LocalFolder(folder, max_bytes=100).list(all_files=all_files))


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_images_are_listed_by_ending_whatever_its_case_depth_first(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        "b/2.JPG",
        "b/10.jpeg",
        "a.png",
        "c.txt",
        "b.webp",
        ".hidden/x.tiff",
        "B/1.Gif",
        "jpg",
        "ü.bmp",
    )
    assert listed(tmp_path) == [
        ".hidden/x.tiff", "B/1.Gif", "a.png", "b/10.jpeg", "b/2.JPG", "b.webp", "ü.bmp",
    ]  # fmt: skip
    assert set(listed(tmp_path, all_files=True)) - set(listed(tmp_path)) == {"c.txt", "jpg"}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make_files(tmp_path / "data", "a/1.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/self.png").symlink_to("self.png")
    assert listed(tmp_path / "data") == ["a/1.png", "b/1.png", "self.png"]
    with pytest.raises(ReadError, match="symbolic links"):
        LocalFolder(tmp_path / "data", max_bytes=100).read("self.png")


def test_a_folder_that_cannot_be_listed_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "a/1.png", "secret/2.png", "z.png")
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("topfive.scoring._sources.os.scandir", scandir)
    assert listed(tmp_path) == ["a/1.png", "secret/", "z.png"]
    with pytest.raises(ReadError, match="could not be listed") as caught:
        LocalFolder(tmp_path, max_bytes=100).read("secret/")
    assert caught.value.status == "unreadable"


def test_a_file_name_that_is_not_utf_8_is_scored_and_named(tmp_path: Path) -> None:
    (folder := tmp_path / "photos").mkdir()
    name = os.fsdecode(b"caf\xe9 \\ \n.png")
    Image.new("RGB", (9, 9)).save(folder / name)
    for suffix in ("jsonl", "csv", "parquet"):
        score_with(FakeClassifier(), folder, tmp_path / f"r.{suffix}")
    assert [(row["path"], row["status"]) for row in rows_of(tmp_path / "r.jsonl")] == [
        ("caf\\xe9 \\ \n.png", "ok")
    ]


def test_the_jobs_own_files_are_not_scored(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    output = tmp_path / "r.jsonl"
    score_with(FakeClassifier(), tmp_path, output, JobConfig(all_files=True))
    score_with(FakeClassifier(), tmp_path, output, JobConfig(all_files=True, overwrite=True))
    assert [row["path"] for row in rows_of(output)] == ["a.png", "r.jsonl.stats.json"]


def test_a_url_is_scored_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    Image.new("RGB", (9, 9), (16, 0, 0)).save(tmp_path / "x.png")
    memory.pipe("/score/b/x.png", (tmp_path / "x.png").read_bytes())
    memory.pipe("/score/a.png", b"no image")
    memory.pipe("/score/large.png", b"\0" * 5000)
    memory.pipe("/score/notes.txt", b"")
    score_with(FakeClassifier(), "memory://score", tmp_path / "r.jsonl", JobConfig(max_bytes=4000))
    assert [(row["path"], row["status"]) for row in rows_of(tmp_path / "r.jsonl")] == [
        ("a.png", "unsupported-format"),
        ("b/x.png", "ok"),
        ("large.png", "too-large"),
    ]
    with pytest.raises(ReadError) as caught:
        open_source("memory://score", max_bytes=100).read("gone.png")
    assert caught.value.status == "not-found"


@pytest.mark.parametrize("url", ["memory://none", "no-such-scheme://x"])
def test_a_url_that_is_no_folder_is_refused(url: str) -> None:
    with pytest.raises(RefusedError, match=url):
        open_source(url, max_bytes=100)


def test_scoring_loads_with_the_base_dependencies_alone() -> None:
    script = "import sys, topfive.scoring, topfive.cli.score; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"numpy", "pyarrow", "fsspec", "onnxruntime", "torch", "topfive_server"} & set(loaded)
