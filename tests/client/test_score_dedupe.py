"""`--dedupe`: images of the same bytes are computed once in a job, and every file still gets its own row."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.client.fake_server import FakeServer
from tests.client.score_fakes import (
    REPOSITORY,
    FakeClassifier,
    color_of,
    draw_folder,
    rows_of,
    saved_rows,
    score_with,
)

from topfive.cli import main
from topfive.scoring import (
    JobConfig,
    Label,
    Outcome,
    RemoteScorer,
    ServerConfig,
    StoppedError,
    Summary,
    _job,
    patient_client,
    run_job,
)
from topfive.scoring._answers import Answers
from topfive.scoring._rows import Row, failed
from topfive.scoring._state import JobState

DISTINCT, FILES = 90, 150
DEDUPE = JobConfig(dedupe=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 files of 90 contents, copies near their originals and far from them."""
    folder = draw_folder(tmp_path_factory.mktemp("photos"), DISTINCT)
    files = sorted(folder.rglob("*.png"))
    for number, path in enumerate(files[:30]):
        shutil.copy(path, path.with_name(f"{path.stem} (copy).png"))
        shutil.copy(path, folder / f"zz{number:02}.png")
    return folder


def contents(photos: Path, paths: Sequence[str]) -> set[str]:
    return {hashlib.sha256((photos / path).read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_results_are_those_without_it_and_each_content_is_computed_once(
    suffix: str, photos: Path, tmp_path: Path
) -> None:
    plain, output = tmp_path / f"plain{suffix}", tmp_path / f"r{suffix}"
    score_with(FakeClassifier(), photos, plain)
    summary = score_with(classifier := FakeClassifier(), photos, output, DEDUPE)
    assert isinstance(summary, Summary)
    assert sum(classifier.batches) == DISTINCT
    assert (summary.files, summary.ok, summary.duplicates) == (FILES, FILES, FILES - DISTINCT)
    assert output.read_bytes() == plain.read_bytes()
    statistics = json.loads(output.with_name(f"{output.name}.stats.json").read_text())
    assert statistics["duplicates"] == FILES - DISTINCT
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for each in (plain, output) for name in (each.name, f"{each.name}.stats.json")
    )


def test_without_it_nothing_is_shared(photos: Path, tmp_path: Path) -> None:
    summary = score_with(classifier := FakeClassifier(), photos, tmp_path / "r.jsonl")
    assert isinstance(summary, Summary)
    assert sum(classifier.batches) == FILES
    assert summary.duplicates == 0


def test_killed_again_and_again_it_ends_byte_identical_and_computes_nothing_twice(
    photos: Path, tmp_path: Path
) -> None:
    score_with(FakeClassifier(), photos, tmp_path / "plain.jsonl")
    order = [row["path"] for row in rows_of(tmp_path / "plain.jsonl")]
    output = tmp_path / "r.jsonl"
    for images in (24, 24):
        command = [sys.executable, "-m", "tests.client.score_fakes", str(photos), str(output), str(images)]
        process = subprocess.Popen([*command, "dedupe"], cwd=REPOSITORY)
        # It hangs in the first batch beyond so many images; what was before it is saved.
        before, until = saved_rows(output), time.monotonic() + 60
        try:
            while (
                saved_rows(output) < before + images and process.poll() is None and time.monotonic() < until
            ):
                time.sleep(0.002)
        finally:
            process.kill()
        assert process.wait() == -9
    done = saved_rows(output)
    assert 48 <= done < FILES
    assert (tmp_path / "r.jsonl.parts/answers.sqlite").exists(), "nobody tidied up"
    summary = score_with(classifier := FakeClassifier(), photos, output, DEDUPE)
    assert isinstance(summary, Summary)
    missing = contents(photos, order[done:]) - contents(photos, order[:done])
    assert sum(classifier.batches) == len(missing)
    assert (summary.resumed_at, summary.duplicates) == (done, FILES - DISTINCT)
    assert output.read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


class Broken(FakeClassifier):
    """Fails on some colors."""

    poison: frozenset[object] = frozenset()

    def answer(self, pixel: object, top_k: int) -> list[tuple[str, int, float]]:
        if pixel in self.poison:
            raise RuntimeError("CUDA error 700")
        return super().answer(pixel, top_k)


def test_failures_are_not_shared(tmp_path: Path) -> None:
    """What failed may have failed for a reason that has passed."""

    class Once(FakeClassifier):
        failures = 0

        def classify_batch(self, *arguments: Any) -> Any:
            if not self.failures:
                self.failures += 1
                raise RuntimeError("CUDA error 700")
            return super().classify_batch(*arguments)

    folder = draw_folder(tmp_path / "photos", 1)
    for name in ("b", "c"):
        shutil.copy(folder / "batch0/0000.png", folder / f"{name}.png")
    (folder / "bad1.jpg").write_bytes(b"no image")
    (folder / "bad2.jpg").write_bytes(b"no image")
    summary = score_with(Once(max_batch=1), folder, tmp_path / "r.jsonl", DEDUPE)
    assert isinstance(summary, Summary)
    assert summary.failed_by_status == {"unsupported-format": 2, "engine-failed": 1}
    statuses = [row["status"] for row in rows_of(tmp_path / "r.jsonl")]
    assert statuses == ["engine-failed", "unsupported-format", "unsupported-format", "ok", "ok"]
    assert (summary.ok, summary.duplicates) == (2, 1)


def test_known_answers_do_not_hide_that_the_engine_is_broken(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "photos", 100)
    original = folder / "batch0/0000.png"
    paths = sorted(path for path in folder.rglob("*.png") if path != original)
    for path in paths[10::2]:
        shutil.copy(original, path.with_name(f"{path.stem} (copy).png"))
    classifier = Broken()
    classifier.poison = frozenset(color_of(int(path.stem)) for path in paths[10:])
    with pytest.raises(StoppedError, match=r"\d\d files in a row failed"):
        score_with(classifier, folder, tmp_path / "r.jsonl", DEDUPE)
    assert saved_rows(tmp_path / "r.jsonl") == 12, "the original, ten others, and a copy"
    score_with(FakeClassifier(), folder, tmp_path / "r.jsonl", DEDUPE)
    assert {row["status"] for row in rows_of(tmp_path / "r.jsonl")} == {"ok"}


def test_rows_of_known_answers_do_not_gather_behind_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image that the engine fails on, and after it nothing to compute."""
    monkeypatch.setattr(_job, "_MAX_UNSAVED_ROWS", 20)
    saved: list[int] = []
    save_part = JobState.save_part

    def spy(state: JobState, first: int, rows: list[Row]) -> None:
        saved.append(len(rows))
        save_part(state, first, rows)

    monkeypatch.setattr(JobState, "save_part", spy)
    folder = draw_folder(tmp_path / "photos", 2)
    for number in range(100):
        shutil.copy(folder / "batch0/0000.png", folder / f"copy{number:03}.png")
    classifier = Broken()
    classifier.poison = frozenset({color_of(1)})
    score_with(classifier, folder, tmp_path / "r.jsonl", DEDUPE)
    assert sum(saved) == 102
    assert max(saved) <= 20 + 2 * classifier.max_batch


def test_through_a_server_each_content_is_sent_once(photos: Path, tmp_path: Path, fake: FakeServer) -> None:
    fake.delay_s = 0.02
    client = patient_client(fake.url, transport=fake.transport())
    server = ServerConfig(requests=6, request_images=5)
    summary = run_job(
        str(photos),
        tmp_path / "r.jsonl",
        lambda source: RemoteScorer(client, source, top_k=5, config=server),
        config=DEDUPE,
    )
    assert summary.duplicates == FILES - DISTINCT
    sent = [data for request in fake.requests for _, data in request.parts]
    assert len(sent) == len(set(sent)) == DISTINCT
    assert fake.busiest > 1
    for row in rows_of(tmp_path / "r.jsonl"):
        content = (photos / row["path"]).read_bytes()
        assert row["label_1"] == hashlib.sha256(content).hexdigest()[:8] + "-0"


def test_the_command_tells_of_duplicates(
    photos: Path, tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", str(photos), "--output", str(tmp_path / "r.csv"), "--url", server.url, "--dedupe"]
    assert main(words) == 0
    assert f"r.csv: {FILES} rows, 0 failed, {FILES - DISTINCT} duplicates\n" in capsys.readouterr().out


# --- the table


ONE, TWO = (hashlib.sha256(name).hexdigest() for name in (b"one", b"two"))


def test_what_another_thread_computes_is_waited_for(tmp_path: Path) -> None:
    computing, may_end = threading.Event(), threading.Event()

    def slowly(widths: Sequence[int]) -> list[Outcome]:
        computing.set()
        assert may_end.wait(60)
        return [Outcome(width=widths[0])]

    def at_once(widths: Sequence[int]) -> list[Outcome]:
        may_end.set()
        return [Outcome(width=width) for width in widths]

    with Answers(tmp_path / "a.sqlite") as answers, ThreadPoolExecutor(1) as pool:
        first = pool.submit(answers.of, [(ONE, 1)], slowly)
        assert computing.wait(60)
        later = answers.of([(ONE, 10), (TWO, 2), (TWO, 20)], at_once)
        assert [(each.width, each.duplicate) for each in later] == [(1, True), (2, False), (2, True)]
        assert [(each.width, each.duplicate) for each in first.result()] == [(1, False)]
        assert answers.find(TWO) == Outcome(width=2, top=[], sha256=TWO, duplicate=True)


def test_who_waits_for_a_thread_that_fails_is_told(tmp_path: Path) -> None:
    computing, may_end = threading.Event(), threading.Event()

    def fail(_: Sequence[int]) -> list[Outcome]:
        computing.set()
        assert may_end.wait(60)
        raise StoppedError("the server is gone")

    def end_it(_: Sequence[int]) -> list[Outcome]:
        may_end.set()
        return [failed("no-answer", "broke off")]

    with Answers(tmp_path / "a.sqlite") as answers, ThreadPoolExecutor(1) as pool:
        first = pool.submit(answers.of, [(ONE, 1)], fail)
        assert computing.wait(60)
        with pytest.raises(StoppedError, match="is gone"):
            answers.of([(ONE, 1), (TWO, 2)], end_it)
        with pytest.raises(StoppedError, match="is gone"):
            first.result()
        assert answers.find(ONE) is None
        assert answers.find(TWO) is None, "a failure is no answer"
        again = answers.of([(ONE, 7)], lambda widths: [Outcome(width=width) for width in widths])
        assert again[0].width == 7


def test_a_table_that_cannot_be_written_stops_the_job(tmp_path: Path) -> None:
    with Answers(tmp_path / "a.sqlite") as answers:
        answers._execute("PRAGMA max_page_count=1")  # as if the disk were full
        long = [Outcome(sha256=ONE, top=[Label("tabby" * 10_000, 0, 1.0)])]
        with pytest.raises(StoppedError, match=r"a\.sqlite: database or disk is full"):
            answers.of([(ONE, None)], lambda _: long)
        assert not answers._under_way
    with pytest.raises(StoppedError, match="cannot use the table"):
        Answers(tmp_path / "nowhere/a.sqlite")
