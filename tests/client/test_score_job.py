"""A scoring job: one row per file whatever happens, and never two of them."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.client.score_fakes import (
    CLASSES,
    FILES,
    REPOSITORY,
    FakeClassifier,
    color_of,
    copy_of,
    photos,
    rows_of,
    saved_rows,
    score_with,
    uninterrupted,
)

from topfive.scoring import (
    InterruptedJobError,
    JobConfig,
    LocalScorer,
    RefusedError,
    Source,
    StoppedError,
    Summary,
    run_job,
)

__all__ = ["photos", "uninterrupted"]


class StopAfter:
    """A reporter that stops the job once `files` files are done."""

    def __init__(self, files: int, stop: threading.Event) -> None:
        self.files, self.stop = files, stop
        self.notes: list[str] = []
        self.begun: dict[str, int] = {}

    def begin(self, **counts: int) -> None:
        self.begun = counts

    def advance(self, *, files: int, failures: int) -> None:
        self.files -= files
        if self.files <= 0:
            self.stop.set()

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def end(self) -> None:
        pass


# --- rows


def test_every_image_has_its_own_row_in_a_stable_order(photos: Path, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    summary = score_with(FakeClassifier(), photos, results)
    rows = rows_of(results)
    assert isinstance(summary, Summary)
    assert (summary.files, summary.ok, summary.failed) == (FILES, FILES, 0)
    assert [row["path"] for row in rows] == sorted(f"batch{i % 10}/{i:04}.png" for i in range(FILES))
    for row in rows:
        index = int(Path(row["path"]).stem)
        assert row["class_1"] == index % CLASSES
        assert row["probability_1"] == pytest.approx(index / 4096, rel=1e-5)
        assert (row["width"], row["height"]) == (20 + index % 7, 30)
        assert (row["model"], row["version"], row["status"], row["error"]) == ("fake", "1", "ok", None)
    assert not results.with_name("r.jsonl.parts").exists()


def test_how_many_threads_decode_is_known_where_there_is_no_affinity(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS

    def open_scorer(source: Source) -> LocalScorer:
        return LocalScorer(FakeClassifier(), source, top_k=5, max_pixels=JobConfig().max_pixels)

    assert run_job(str(photos), tmp_path / "r.csv", open_scorer, config=JobConfig()).ok == FILES


def test_statistics_are_written_beside_the_results(photos: Path, tmp_path: Path) -> None:
    (folder := copy_of(photos, tmp_path)).joinpath("bad.jpg").write_bytes(b"")
    (folder / "none.png").write_bytes(b"not an image")
    output = tmp_path / "r.csv"
    summary = score_with(FakeClassifier(), folder, output)
    assert isinstance(summary, Summary)
    stats = json.loads((tmp_path / "r.csv.stats.json").read_text())
    assert stats["files"] == FILES + 2
    assert stats["failed_by_status"] == {"corrupt-image": 1, "unsupported-format": 1}
    assert stats["fingerprint"] == "fingerprint of 1"
    assert stats["images_per_second"] > 0


def test_a_failed_file_is_a_row_that_says_why_and_takes_no_one_elses_answer(
    photos: Path, tmp_path: Path
) -> None:
    folder = copy_of(photos, tmp_path)
    broken = {
        "batch3/0013.png": (b"", "corrupt-image"),
        "batch3/0023.png": (b"<svg/>", "unsupported-format"),
        "batch9/0009.png": ((folder / "batch9/0009.png").read_bytes()[:50], "corrupt-image"),
        "batch9/0019.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 10, "corrupt-image"),
    }
    for path, (data, _) in broken.items():
        (folder / path).write_bytes(data)
    Image.new("1", (2000, 1001)).save(folder / "big.png")
    (folder / "long.png").write_bytes(b"\0" * 3_000_001)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    score_with(
        FakeClassifier(),
        folder,
        tmp_path / "r.jsonl",
        JobConfig(max_pixels=2_000_000, max_bytes=3_000_000),
    )
    rows = {row["path"]: row for row in rows_of(tmp_path / "r.jsonl")}
    assert len(rows) == FILES + 4
    expected = {path: status for path, (_, status) in broken.items()}
    expected |= {"big.png": "too-many-pixels", "long.png": "too-large", "pipe.jpg": "unreadable"}
    expected |= {"gone.jpg": "not-found"}
    assert {path: row["status"] for path, row in rows.items() if row["status"] != "ok"} == expected
    for path in expected:
        assert rows[path]["error"]
        assert rows[path]["label_1"] is None
    for path, row in rows.items():
        if row["status"] == "ok":
            assert row["class_1"] == int(Path(path).stem) % CLASSES


def test_the_three_formats_hold_the_same(photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = copy_of(photos, tmp_path)
    (folder / 'bad,\n"quoted" ü.jpg').write_bytes(b"")
    for suffix in ("jsonl", "csv", "parquet"):
        score_with(FakeClassifier(), folder, tmp_path / f"r.{suffix}")
    lines = rows_of(tmp_path / "r.jsonl")
    assert parquet.read_table(tmp_path / "r.parquet").to_pylist() == lines
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert table == [{k: "" if v is None else str(v) for k, v in row.items()} for row in lines]
    assert list(table[0]) == list(lines[0])


def test_fewer_classes_than_labels_asked_for_make_fewer_columns(photos: Path, tmp_path: Path) -> None:
    score_with(FakeClassifier(), photos, tmp_path / "r.jsonl", JobConfig(top_k=2))
    assert [name for name in rows_of(tmp_path / "r.jsonl")[0] if "label" in name] == ["label_1", "label_2"]


# --- an engine that fails


class Failing(FakeClassifier):
    """Fails on pictures of one color, or on all of them."""

    def __init__(self, poison: Sequence[object] | None) -> None:
        super().__init__()
        self.poison = poison

    def answer(self, pixel: object, top_k: int) -> list[tuple[str, int, float]]:
        if self.poison is None or pixel in self.poison:
            raise RuntimeError("CUDA error 700")
        return super().answer(pixel, top_k)


def test_an_image_that_the_engine_fails_on_costs_its_batch_nothing(photos: Path, tmp_path: Path) -> None:
    score_with(Failing([(16 * 5, 16 * 2, 0)]), photos, tmp_path / "r.jsonl")
    failures = [row for row in rows_of(tmp_path / "r.jsonl") if row["status"] != "ok"]
    assert [(row["path"], row["status"]) for row in failures] == [("batch7/0037.png", "engine-failed")]
    assert "CUDA error 700" in failures[0]["error"]


def test_an_engine_that_fails_on_everything_stops_the_job(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        StoppedError,
        match=r"32 files in a row failed; the engine failed .*: CUDA error 700.*the same command",
    ):
        score_with(Failing(None), photos, tmp_path / "r.jsonl", JobConfig(save_every_s=0))
    assert saved_rows(tmp_path / "r.jsonl") == 0
    score_with(FakeClassifier(), photos, tmp_path / "r.jsonl")
    assert {row["status"] for row in rows_of(tmp_path / "r.jsonl")} == {"ok"}


def test_a_job_that_goes_on_hands_the_engine_the_batches_it_would_have_had(
    photos: Path, tmp_path: Path
) -> None:
    order = sorted(f"batch{index % 10}/{index:04}.png" for index in range(FILES))
    broken = [color_of(int(Path(path).stem)) for path in order[13:]]
    with pytest.raises(StoppedError):
        score_with(Failing(broken), photos, tmp_path / "r.jsonl")
    assert saved_rows(tmp_path / "r.jsonl") == 13
    score_with(classifier := FakeClassifier(), photos, tmp_path / "r.jsonl")
    assert classifier.batches[:3] == [3, 8, 8]


# --- stop and go on


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_killed_again_and_again_it_ends_byte_identical(
    suffix: str, photos: Path, tmp_path: Path, uninterrupted: Callable[[str], bytes]
) -> None:
    output = tmp_path / f"results{suffix}"
    for saved in (48, 96, 144):
        command = [sys.executable, "-m", "tests.client.score_fakes", str(photos), str(output), "48"]
        process = subprocess.Popen(command, cwd=REPOSITORY)
        while saved_rows(output) < saved and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -9
        assert not output.exists()
    done = saved_rows(output)
    assert done == 144
    summary = score_with(classifier := FakeClassifier(), photos, output)
    assert isinstance(summary, Summary)
    assert summary.resumed_at == done
    assert sum(classifier.batches) == FILES - done
    assert output.read_bytes() == uninterrupted(suffix)
    assert not output.with_name(output.name + ".parts").exists()


@pytest.mark.parametrize("killed_in", ["write_table", "publish", "clear"])
def test_killed_while_publishing_it_publishes_on_the_next_run(
    killed_in: str, photos: Path, tmp_path: Path, uninterrupted: Callable[[str], bytes]
) -> None:
    output = tmp_path / "results.jsonl"
    script = f"""
import os, sys
from topfive.scoring import _job, _state
from tests.client.score_fakes import *
die = lambda *a, **k: os.kill(os.getpid(), 9)
if {killed_in!r} == "write_table":
    _job.write_table = lambda path, rows, **k: (path.write_text("half"), die())
else:
    real = _state.JobState.{killed_in}
    _state.JobState.{killed_in} = lambda self, *a: (real(self, *a) if self.begun and {killed_in == "publish"} else None, self.begun and die())
score_with(FakeClassifier(), Path(sys.argv[1]), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", script, str(photos), str(output)]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -9
    classifier = FakeClassifier()
    score_with(classifier, photos, output)
    assert classifier.batches == []
    assert output.read_bytes() == uninterrupted(".jsonl")
    assert not output.with_name(output.name + ".parts").exists()
    assert json.loads(output.with_name(output.name + ".stats.json").read_text())["files"] == FILES


def test_a_stopped_job_saves_what_it_has_and_says_how_to_go_on(
    photos: Path, tmp_path: Path, uninterrupted: Callable[[str], bytes]
) -> None:
    output = tmp_path / "r.jsonl"
    reporter = StopAfter(50, stop := threading.Event())
    with pytest.raises(
        InterruptedJobError, match=r"\d+ of 203 files are scored and saved .* the same command"
    ):
        score_with(FakeClassifier(), photos, output, reporter=reporter, stop=stop)
    assert 50 <= (done := saved_rows(output)) < FILES
    again = StopAfter(10**9, threading.Event())
    score_with(FakeClassifier(), photos, output, reporter=again)
    assert again.begun == {"total": FILES, "done": done, "failures": 0}
    assert output.read_bytes() == uninterrupted(".jsonl")


def stopped_job(photos: Path, output: Path, **config: Any) -> None:
    stop = threading.Event()
    with pytest.raises(InterruptedJobError):
        score_with(
            FakeClassifier(), photos, output, JobConfig(**config), reporter=StopAfter(50, stop), stop=stop
        )


def test_files_that_vanish_fail_and_files_that_appear_wait(photos: Path, tmp_path: Path) -> None:
    folder, output = copy_of(photos, tmp_path), tmp_path / "r.jsonl"
    stopped_job(folder, output)
    (folder / "batch9/0009.png").unlink()
    shutil.copy(folder / "batch0/0000.png", folder / "aaa.png")
    reporter = StopAfter(10**9, threading.Event())
    score_with(FakeClassifier(), folder, output, reporter=reporter)
    rows = rows_of(output)
    assert len(rows) == FILES
    assert [row["path"] for row in rows if row["status"] == "not-found"] == ["batch9/0009.png"]
    assert any("added since" in note for note in reporter.notes)


def test_a_folder_that_vanishes_stops_the_job_instead_of_failing_every_row(
    photos: Path, tmp_path: Path
) -> None:
    folder, output = copy_of(photos, tmp_path), tmp_path / "r.jsonl"
    stopped_job(folder, output)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="there is no folder"):
        score_with(FakeClassifier(), folder, output)
    (tmp_path / "elsewhere").rename(folder)

    class Mover(FakeClassifier):
        def classify_batch(self, *arguments: Any) -> Any:
            if folder.exists():
                folder.rename(tmp_path / "elsewhere")
            return super().classify_batch(*arguments)

    with pytest.raises(StoppedError, match=r"is gone .*files are scored and saved"):
        score_with(Mover(), folder, output)
    (tmp_path / "elsewhere").rename(folder)
    score_with(FakeClassifier(), folder, output)
    assert all(row["status"] == "ok" for row in rows_of(output))


@pytest.mark.parametrize(
    ("classifier", "config", "difference"),
    [
        (FakeClassifier(version="2"), JobConfig(), "version was 1, now 2"),
        (FakeClassifier(), JobConfig(top_k=3), "top_k was 5, now 3"),
        (FakeClassifier(), JobConfig(all_files=True), "all_files was False, now True"),
        (FakeClassifier(), JobConfig(dedupe=True), "dedupe was False, now True"),
    ],
)
def test_a_job_is_not_resumed_as_another_one(
    classifier: FakeClassifier, config: JobConfig, difference: str, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.jsonl"
    stopped_job(photos, output)
    with pytest.raises(RefusedError, match=f"{difference}.*--overwrite"):
        score_with(classifier, photos, output, config)
    assert saved_rows(output) >= 50, "the refusal must not cost what was saved"
    score_with(FakeClassifier(), photos, output)
    assert len(rows_of(output)) == FILES


def test_overwrite_starts_anew_with_the_other_model(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    stopped_job(photos, output)
    score_with(FakeClassifier(version="2"), photos, output, JobConfig(overwrite=True))
    assert {row["version"] for row in rows_of(output)} == {"2"}
    with pytest.raises(RefusedError, match="exists already; --overwrite"):
        score_with(FakeClassifier(), photos, output)
    score_with(FakeClassifier(), photos, output, JobConfig(overwrite=True))
    assert {row["version"] for row in rows_of(output)} == {"1"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_new_results_take_the_place_of_the_old_in_one_step(photos: Path, tmp_path: Path, suffix: str) -> None:
    """Who reads the old results has them to the end, and a job that stops has not touched them."""
    output = tmp_path / f"r{suffix}"
    statistics = output.with_name(f"{output.name}.stats.json")
    score_with(FakeClassifier(version="1"), photos, output, JobConfig(top_k=1))
    old, old_statistics = output.read_bytes(), statistics.read_bytes()
    again = JobConfig(top_k=2, overwrite=True)
    (stop := threading.Event()).set()
    with pytest.raises(InterruptedJobError):
        score_with(FakeClassifier(version="2"), photos, output, again, stop=stop)
    assert (output.read_bytes(), statistics.read_bytes()) == (old, old_statistics)
    with output.open("rb") as reader, statistics.open("rb") as other:
        score_with(FakeClassifier(version="2"), photos, output, again)
        assert (reader.read(), other.read()) == (old, old_statistics)
    assert output.read_bytes() != old
    assert json.loads(statistics.read_bytes())["version"] == "2"


def test_damaged_state_is_refused_not_published(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    stopped_job(photos, output, save_every_s=0)
    parts = sorted((tmp_path / "r.jsonl.parts").glob("*-*.jsonl"))
    saved = parts[1].read_bytes()
    parts[1].write_bytes(saved[:-300])
    with pytest.raises(RefusedError, match=r"r.jsonl.parts is damaged .*--overwrite"):
        score_with(FakeClassifier(), photos, output)
    parts[1].unlink()
    with pytest.raises(RefusedError, match="are missing"):
        score_with(FakeClassifier(), photos, output)
    parts[1].write_bytes(saved)
    with (tmp_path / "r.jsonl.parts/listing.jsonl").open("a") as listing:
        listing.write('"more.png"\n')
    with pytest.raises(RefusedError, match="listing"):
        score_with(FakeClassifier(), photos, output)


def test_two_processes_cannot_work_on_one_job(photos: Path, tmp_path: Path) -> None:
    class Second(FakeClassifier):
        def classify_batch(self, *arguments: Any) -> Any:
            with pytest.raises(RefusedError, match="another process is scoring into"):
                score_with(FakeClassifier(), photos, tmp_path / "r.jsonl", JobConfig(overwrite=True))
            return super().classify_batch(*arguments)

    score_with(Second(), photos, tmp_path / "r.jsonl")
    assert len(rows_of(tmp_path / "r.jsonl")) == FILES
