"""Limits, full disks and refusals of a scoring job: stopped with a sentence, and nothing saved is lost."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.client.score_fakes import (
    REPOSITORY,
    FakeClassifier,
    copy_of,
    draw_folder,
    photos,
    rows_of,
    score_with,
    uninterrupted,
)

from topfive.scoring import JobConfig, LocalScorer, RefusedError, StoppedError, run_job

__all__ = ["photos", "uninterrupted"]

# --- limits


def test_too_many_failures_stop_the_job_early(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "photos", 400)
    for path in sorted(folder.rglob("*.png"))[::2]:
        path.write_bytes(b"broken")
    classifier = FakeClassifier()
    with pytest.raises(StoppedError, match=r"files failed, more than --max-failure-rate 0.2 allows"):
        score_with(classifier, folder, tmp_path / "r.jsonl", JobConfig(max_failure_rate=0.2))
    assert sum(classifier.batches) < 60
    # Rows that failed in an earlier run count as well, so that repeating the command does not creep forward.
    with pytest.raises(StoppedError, match="more than"):
        score_with(again := FakeClassifier(), folder, tmp_path / "r.jsonl", JobConfig(max_failure_rate=0.2))
    assert sum(again.batches) <= 16
    score_with(FakeClassifier(), folder, tmp_path / "r.jsonl", JobConfig(max_failure_rate=0.5))
    assert len(rows_of(tmp_path / "r.jsonl")) == 400


def test_one_failure_is_too_many_when_none_is_allowed(photos: Path, tmp_path: Path) -> None:
    folder = copy_of(photos, tmp_path)
    (folder / "aaa.jpg").write_bytes(b"")
    with pytest.raises(StoppedError, match="1 of 8 files failed"):
        score_with(FakeClassifier(), folder, tmp_path / "r.jsonl", JobConfig(max_failure_rate=0))


def test_memory_is_bounded_by_a_few_batches(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "photos", 120)
    reads, answered = 0, 0
    most = 0

    class Slow(FakeClassifier):
        def classify_batch(self, squares: Sequence[Image.Image], top_k: int = 5) -> Any:
            nonlocal answered, most
            time.sleep(0.02)  # the decoders, had they no bound, would be done by now
            most = max(most, reads - answered)
            answered += len(squares)
            return super().classify_batch(squares, top_k)

    class Counting(LocalScorer):
        def _decode(self, *arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            return super()._decode(*arguments)

    run_job(
        str(folder),
        tmp_path / "r.jsonl",
        lambda source: Counting(Slow(), source, top_k=5, max_pixels=10**6, decode_threads=2),
    )
    assert 8 < most <= 3 * 8


RUN_AND_PRINT = """
import sys
from tests.client.score_fakes import *
from topfive.scoring import StoppedError
try:
    score_with(FakeClassifier(), Path(sys.argv[1]), Path(sys.argv[2]), JobConfig(save_every_s=0))
    print("done")
except StoppedError as error:
    print(error)
"""


FULL_DISK = """
mount -t tmpfs -o size=64k tmpfs "$1" || exit 90
"${@:3}"; echo "first $?"
ls "$1"/results.csv.parts/*-*.jsonl | wc -l
mount -o remount,size=10m "$1"
"${@:3}"; echo "second $?"
cp "$1/results.csv" "$2"
"""


def test_a_full_disk_stops_the_job_whole_and_it_goes_on_when_there_is_room(
    photos: Path, tmp_path: Path, uninterrupted: Callable[[str], bytes]
) -> None:
    (disk := tmp_path / "disk").mkdir()
    job = [sys.executable, "-c", RUN_AND_PRINT, str(photos), str(disk / "results.csv")]
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", FULL_DISK, "bash"]
    done = subprocess.run(
        [*command, str(disk), str(tmp_path), *job],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode == 90 or "unshare failed" in done.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    first, _, parts, second, published = done.stdout.splitlines()
    assert "the disk is full" in first
    assert "files are scored and saved" in first
    assert int(parts) >= 1
    assert (second, published) == ("done", "second 0")
    assert (tmp_path / "results.csv").read_bytes() == uninterrupted(".csv")


def test_a_file_size_limit_while_publishing_keeps_every_row(
    photos: Path, tmp_path: Path, uninterrupted: Callable[[str], bytes]
) -> None:
    output = tmp_path / "results.jsonl"
    limit = len(uninterrupted(".jsonl")) // 2
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_PRINT, str(photos), str(output)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "the disk is full. All 203 files are scored" in done.stdout
    assert not output.exists()
    score_with(classifier := FakeClassifier(), photos, output)
    assert classifier.batches == []
    assert output.read_bytes() == uninterrupted(".jsonl")


# --- refusals


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("r.xlsx", "it must end in .jsonl, .csv or .parquet"),
        ("folder.csv", "is a folder"),
        ("file/r.csv", "cannot write to"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_engine_loads(
    output: str, sentence: str, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    classifier = FakeClassifier()
    with pytest.raises(RefusedError, match=sentence):
        score_with(classifier, photos, tmp_path / output)
    assert not classifier.closed


def test_a_folder_without_images_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("x")
    with pytest.raises(RefusedError, match=r"there are no images .*--all-files"):
        score_with(classifier := FakeClassifier(), tmp_path / "empty", tmp_path / "out/r.csv")
    assert classifier.closed
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(RefusedError, match="there is no folder"):
        score_with(classifier, tmp_path / "none", tmp_path / "r.csv")
    with pytest.raises(RefusedError, match="`topfive classify` takes single images"):
        score_with(classifier, tmp_path / "empty/notes.txt", tmp_path / "r.csv")


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"top_k": 6}, {"max_failure_rate": 1.5}, {"max_bytes": 0}, {"save_every_s": -1}]
)
def test_nonsense_in_the_configuration_is_named(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name} is {wrong[name]}; it must be"):
        JobConfig(**wrong)
