"""Scoring through a server: patient with one that is away or busy, and never in doubt about whose answer is whose."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.client.fake_server import Answer, FakeServer, Request, answer_classify, refusal
from tests.client.score_fakes import FILES, draw_folder, rows_of

from topfive.scoring import (
    InterruptedJobError,
    JobConfig,
    RefusedError,
    RemoteScorer,
    ServerConfig,
    ServerGoneError,
    Source,
    StoppedError,
    Summary,
    patient_client,
    run_job,
)
from topfive.scoring import _remote as remote


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("photos"), FILES)


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(remote, "_MAX_DELAY_S", 0.02)


class Server(FakeServer):
    """Answers images by `rule` first; may be away."""

    away: bool = False
    rule: Callable[[Request], Answer | None] = staticmethod(lambda _: None)

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        if self.away:
            raise httpx2.ConnectError("Connection refused")
        return super().answer(method, target, headers, body)

    def _route(self, request: Request) -> Answer:
        ruled = self.rule(request) if request.path == "/v1/classify" else None
        return ruled or super()._route(request)


@pytest.fixture
def fake() -> Server:
    return Server()


def score_through(
    fake: FakeServer,
    folder: Path,
    output: Path,
    *,
    config: JobConfig | None = None,
    server: ServerConfig | None = None,
    **more: Any,
) -> Summary:
    stop, notes = more.pop("stop", threading.Event()), more.pop("notes", [])

    def open_scorer(source: Source) -> RemoteScorer:
        client = patient_client(fake.url, transport=fake.transport())
        return RemoteScorer(client, source, top_k=5, config=server, stop=stop, note=notes.append, **more)

    return run_job(str(folder), output, open_scorer, config=config, stop=stop)


def assert_complete(folder: Path, output: Path, *, but: Sequence[str] = ()) -> None:
    """Every file has one row, in order, with the answer for its own bytes."""
    rows = rows_of(output)
    assert [row["path"] for row in rows] == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.png")
    )
    for row in rows:
        if row["path"] in but:
            assert row["status"] != "ok"
        else:
            assert (
                row["label_1"] == hashlib.sha256((folder / row["path"]).read_bytes()).hexdigest()[:8] + "-0"
            )


def test_every_file_gets_the_answer_for_its_own_bytes(photos: Path, tmp_path: Path, fake: Server) -> None:
    fake.delay_s = 0.01
    summary = score_through(
        fake, photos, tmp_path / "r.jsonl", server=ServerConfig(requests=3, request_images=10)
    )
    assert_complete(photos, tmp_path / "r.jsonl")
    assert (summary.model, summary.version, summary.ok) == ("alexnet", "1", FILES)
    requests = [request for request in fake.requests if request.path == "/v1/classify"]
    assert {len(request.parts) for request in requests} == {10, FILES % 10}
    assert {(request.query["model"], request.query["version"]) for request in requests} == {("alexnet", "1")}
    assert {request.headers["x-priority"] for request in requests} == {"batch"}
    assert 1 < fake.busiest <= 3


def test_the_same_over_a_real_socket(photos: Path, tmp_path: Path, server: FakeServer) -> None:
    run_job(
        str(photos),
        tmp_path / "r.jsonl",
        lambda source: RemoteScorer(patient_client(server.url), source, top_k=5),
    )
    assert_complete(photos, tmp_path / "r.jsonl")


def test_a_refused_image_is_a_row_with_the_servers_code_and_sentence(tmp_path: Path, fake: Server) -> None:
    folder = draw_folder(tmp_path / "photos", 40)
    (folder / "batch3/0013.png").write_bytes(b"text")
    (folder / "batch5/0005.png").unlink()
    (folder / "batch5/0005.png").symlink_to("nowhere")
    score_through(fake, folder, tmp_path / "r.jsonl")
    bad = ["batch3/0013.png", "batch5/0005.png"]
    assert_complete(folder, tmp_path / "r.jsonl", but=bad)
    rows = {row["path"]: row for row in rows_of(tmp_path / "r.jsonl")}
    assert [rows[path]["status"] for path in bad] == ["unsupported-format", "not-found"]
    assert "allowed format" in rows[bad[0]]["error"]


def test_a_busy_server_is_asked_again_when_it_says(
    photos: Path, tmp_path: Path, fake: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return False

    refused = iter(range(20))
    fake.rule = lambda _: (
        refusal(429, "queue-full", "the queue is full", Retry_After="7")
        if next(refused, None) is not None
        else None
    )
    score_through(fake, photos, tmp_path / "r.jsonl", stop=Stop())
    assert_complete(photos, tmp_path / "r.jsonl")
    assert len(waits) == 20
    assert min(waits) >= 7


def test_a_server_that_goes_away_for_a_while_costs_time_only(
    photos: Path, tmp_path: Path, fake: Server
) -> None:
    answered = iter(range(1000))

    def leave(_: Request) -> None:
        if next(answered) == 5:
            fake.away = True
            threading.Timer(0.3, lambda: setattr(fake, "away", False)).start()

    fake.rule = leave
    notes: list[str] = []
    score_through(fake, photos, tmp_path / "r.jsonl", notes=notes, server=ServerConfig(requests=1))
    assert_complete(photos, tmp_path / "r.jsonl")
    assert len(notes) == 2
    assert "gives no answer" in notes[0]
    assert "answers again" in notes[1]


def test_a_server_that_stays_away_stops_the_job_which_goes_on_later(
    photos: Path, tmp_path: Path, fake: Server
) -> None:
    answered = iter(range(1000))

    def leave(_: Request) -> None:
        fake.away = next(answered) >= 5

    fake.rule = leave
    server = ServerConfig(patience_s=0.2, requests=2)
    with pytest.raises(
        ServerGoneError, match=r"no answer for 0.2 s .*files are scored and saved.*the same command"
    ):
        score_through(fake, photos, tmp_path / "r.jsonl", server=server)
    assert ServerGoneError.exit_code == 3
    fake.away, fake.rule = False, lambda _: None
    before = len(fake.requests)
    summary = score_through(fake, photos, tmp_path / "r.jsonl", server=server)
    assert_complete(photos, tmp_path / "r.jsonl")
    assert summary.resumed_at > 0
    assert sum(len(request.parts) for request in fake.requests[before:]) == FILES - summary.resumed_at


def test_an_image_that_breaks_the_connection_does_not_stop_the_others(tmp_path: Path, fake: Server) -> None:
    folder = draw_folder(tmp_path / "photos", 60)
    poison = (folder / "batch3/0023.png").read_bytes()

    def crash(request: Request) -> None:
        if any(data == poison for _, data in request.parts):
            raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")

    fake.rule = crash
    server = ServerConfig(requests=2, request_images=4)
    score_through(fake, folder, tmp_path / "r.jsonl", server=server)
    assert_complete(folder, tmp_path / "r.jsonl", but=["batch3/0023.png"])
    row = next(row for row in rows_of(tmp_path / "r.jsonl") if row["status"] != "ok")
    assert row["status"] == "no-answer"
    assert "the server is ready but gives this file no answer" in row["error"]


def test_waiting_for_a_server_ends_when_the_job_is_stopped(
    photos: Path, tmp_path: Path, fake: Server
) -> None:
    stop = threading.Event()

    def leave(_: Request) -> None:
        fake.away = True
        threading.Timer(0.1, stop.set).start()

    fake.rule = leave
    started = time.monotonic()
    with pytest.raises(InterruptedJobError, match="files are scored and saved"):
        score_through(fake, photos, tmp_path / "r.jsonl", stop=stop)
    assert time.monotonic() - started < 60, "it must not wait for its patience of 300 s to end"


def test_answers_of_another_version_stop_the_job(photos: Path, tmp_path: Path, fake: Server) -> None:
    def swapped(request: Request) -> Answer:
        status, headers, body = answer_classify(request)
        return status, headers, json.dumps({**json.loads(body), "version": "2"}).encode()

    fake.rule = swapped
    with pytest.raises(
        StoppedError, match="was asked for alexnet version 1 and answers with alexnet version 2"
    ):
        score_through(fake, photos, tmp_path / "r.jsonl")


def test_other_weights_under_the_same_version_stop_the_job_at_once(
    photos: Path, tmp_path: Path, fake: Server
) -> None:
    batches = 0

    def restart(request: Request) -> Answer | None:
        nonlocal batches
        batches += 1
        if batches == 2:
            fake.fingerprint = "cd" * 32
            raise httpx2.ReadError("Connection reset by peer")
        return None

    fake.rule = restart
    server = ServerConfig(requests=1, request_images=2)
    with pytest.raises(StoppedError, match="came back with another alexnet version 1"):
        score_through(fake, photos, tmp_path / "labels.jsonl", server=server)


def test_a_job_goes_on_only_with_the_weights_that_it_began_with(
    photos: Path, tmp_path: Path, fake: Server
) -> None:
    output, stop = tmp_path / "labels.jsonl", threading.Event()

    def stop_later(request: Request) -> Answer | None:
        stop.set()
        return None

    fake.rule = stop_later
    config = JobConfig(save_every_s=0)
    server = ServerConfig(requests=1, request_images=2)
    with pytest.raises(InterruptedJobError):
        score_through(fake, photos, output, config=config, server=server, stop=stop)
    fake.rule = lambda _: None
    fake.fingerprint = "cd" * 32
    with pytest.raises(RefusedError, match=f"fingerprint was {'ab' * 32}, now {'cd' * 32}"):
        score_through(fake, photos, output, config=config, server=server)
    fake.fingerprint = "ab" * 32
    score_through(fake, photos, output, config=config, server=server)
    assert len(rows_of(output)) == FILES


def test_a_version_that_leaves_the_server_stops_the_job(photos: Path, tmp_path: Path, fake: Server) -> None:
    fake.rule = lambda _: refusal(404, "unknown-model", "there is no version 1 of alexnet")
    with pytest.raises(StoppedError, match="refuses: there is no version 1 of alexnet"):
        score_through(fake, photos, tmp_path / "r.jsonl")


def test_a_server_that_fails_on_everything_stops_the_job(photos: Path, tmp_path: Path, fake: Server) -> None:
    fake.rule = lambda _: (500, {"Content-Type": "text/plain"}, b"Internal Server Error")
    with pytest.raises(StoppedError, match="files in a row failed"):
        score_through(fake, photos, tmp_path / "r.jsonl")


@pytest.mark.parametrize("asked", [{"model": "resnet"}, {"version": "7"}])
def test_a_model_that_the_server_does_not_offer_is_refused(
    asked: dict[str, Any], photos: Path, tmp_path: Path, fake: Server
) -> None:
    with pytest.raises(RefusedError, match=r"does not offer .*; it offers alexnet version 1"):
        score_through(fake, photos, tmp_path / "r.jsonl", **asked)


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"request_images": 0}, {"patience_s": -1.0}])
def test_nonsense_in_the_configuration_is_named(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name} is {wrong[name]}; it must be"):
        ServerConfig(**wrong)
