"""Who works on a job: one process, which has the folder to itself until it lets go of it."""

import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from topfive.scoring import RefusedError
from topfive.scoring._state import JobRecord, JobState

RECORD = JobRecord(folder="f", all_files=False, top_k=5, model="m", version="1", fingerprint="x")


def test_a_folder_that_is_let_go_of_is_not_taken_from_the_next(tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"

    def work(_: int) -> bool:
        try:
            with JobState.claim(output, overwrite=False) as state:
                state.write_listing(["a.jpg"])
                state.begin(RECORD)
                state.clear()
        except RefusedError as error:
            assert "another process" in str(error)  # noqa: PT017
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(1000))) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "r.jsonl"
    lock, waiting = fcntl.flock, ["the other process removes the folder before we have the lock"]

    def late(*arguments: Any) -> None:
        if waiting.pop() if waiting else None:
            shutil.rmtree(tmp_path / "r.jsonl.parts")
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with JobState.claim(output, overwrite=False) as state:
        state.write_listing(["a.jpg"])
        with pytest.raises(RefusedError, match="another process"), JobState.claim(output, overwrite=False):
            pass
        state.begin(RECORD)
    assert state.begun


def test_results_that_appear_while_the_folder_is_claimed_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.jsonl"
    lock = fcntl.flock

    def late(*arguments: Any) -> None:
        lock(*arguments)
        output.write_text("what the other process wrote before it let go")

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RefusedError, match="exists already"), JobState.claim(output, overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == [output]
