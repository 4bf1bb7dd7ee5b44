"""How folders of images are walked."""

from pathlib import Path

import pytest
from tests.client.fake_server import jpeg

from topfive._folders import IMAGE_SUFFIXES, files_below
from topfive.cli.load_test import read_images
from topfive.scoring._sources import open_source
from topfive_export.corpus import given_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders, of which one is a link, with files to pass over and links that lead in circles."""
    for name in ("far/2.jpg", "far/deep/1.jpg", "data/a/3.jpg", "data/a/.hidden.jpg", "data/.cache/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "data/b").symlink_to("../far")
    (tmp_path / "data/a/up").symlink_to("..")
    (tmp_path / "far/deep/self").symlink_to(".")
    return tmp_path / "data"


def test_links_are_followed_but_not_in_circles_and_hidden_files_passed_over(folder: Path) -> None:
    found = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    assert found == ["a/3.jpg", "b/2.jpg", "b/deep/1.jpg"]


def test_the_load_test_takes_the_same_files(folder: Path) -> None:
    bodies, left_out = read_images([folder], 100, 100)
    assert list(bodies.values()) == [b"data/a/3.jpg", b"far/2.jpg", b"far/deep/1.jpg"]
    assert left_out == 0


def test_every_part_takes_the_same_names_for_images(tmp_path: Path) -> None:
    names = [f"picture{suffix}" for suffix in IMAGE_SUFFIXES] + ["PICTURE.JPEG"]
    for name in [*names, "picture.txt", "jpg"]:
        (tmp_path / name).write_bytes(jpeg() if name in names else b"")
    listed = open_source(str(tmp_path), max_bytes=10**6).list(all_files=False)
    assert sorted(listed) == sorted(names)
    assert [picture.name for picture in given_pictures(tmp_path, [], limit=99)] == sorted(names)
    bodies, _ = read_images([tmp_path], 10**6, 100)
    assert len(bodies) == len(names)
    documented = (Path(__file__).parents[2] / "docs/scoring.md").read_text(encoding="utf-8")
    assert [suffix for suffix in IMAGE_SUFFIXES if f"`{suffix}`" not in documented] == []


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        list(files_below(tmp_path / "nowhere"))
