"""The whole path with real processes: pictures, two training processes, export, server, curl, SDK, scoring, SIGTERM.

Every step is a command as a user types it, on what the step before wrote. The network is small and trained for two
epochs: what it answers does not matter here, only that everybody gets the same answer.
"""

import asyncio
import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import topfive

for needed in ("torch", "onnx", "onnxruntime", "fastapi"):
    pytest.importorskip(needed, reason="the whole path needs every extra: pip install 'topfive[all]'")

CLASSES = ("checkerboard", "cross", "disc")
TOLERANCE = 1e-4
"""Largest difference of a probability between two ways to ask; batches of another size round otherwise."""


def run(*words: str | Path, status: int = 0) -> str:
    """Run `topfive WORDS`, which must end with `status`; returns its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "topfive", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == status, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def curl(*words: str | Path) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what curl got."""
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_code}", *map(str, words)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e") / "pictures"
    run("demo-images", folder, "--classes", str(len(CLASSES)), "--per-class", "12")
    return folder


@pytest.fixture(scope="module")
def checkpoint(pictures: Path) -> Path:
    out = pictures.parent / "run"
    run(
        "train",
        pictures,
        "--out",
        out,
        "--processes",
        "2",
        "--epochs",
        "2",
        "--width",
        "0.1",
        "--batch-size",
        "12",
    )
    return out


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Path:
    out = checkpoint.parent / "models"
    run("export", checkpoint, "--out", out)
    return out


class Server:
    """A `topfive serve` process."""

    def __init__(self, models: Path, log: Path, *, port: str = "0") -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "topfive", "serve", models, "--port", port, "--device", "cpu"],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.url = self._wait_until_serving()

    def _wait_until_serving(self) -> str:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r'"message": "serving", "url": "([^"]+)"', self.log.read_text()):
                return found[1]
            time.sleep(0.05)
        raise AssertionError(f"the server does not serve:\n{self.log.read_text()}")

    def kill(self) -> None:
        """As a machine that loses power."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    server = Server(models, models.parent / "serve.log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def photo(pictures: Path) -> Path:
    return min((pictures / "val").rglob("*.jpg"))


@pytest.fixture(scope="module")
def answer(server: Server, photo: Path) -> dict[str, Any]:
    """What `curl` gets for one photo: what everybody else must get for it."""
    status, body = curl("--data-binary", f"@{photo}", f"{server.url}/v1/classify")
    assert status == 200, body
    return body


def assert_same(top: list[tuple[str, int, float]], expected: list[dict[str, Any]]) -> None:
    assert [(label, index) for label, index, _ in top] == [(e["label"], e["class"]) for e in expected]
    assert [p for _, _, p in top] == pytest.approx([e["probability"] for e in expected], abs=TOLERANCE)


def test_training_leaves_a_checkpoint_of_what_it_was_told(checkpoint: Path) -> None:
    spec = json.loads((checkpoint / "model.json").read_text())
    assert tuple(spec["labels"]) == CLASSES
    assert spec["architecture"]["width"] == 0.1
    assert {"top1", "top5", "loss"} <= spec["metrics"].keys()
    epochs = [json.loads(line) for line in (checkpoint / "train.jsonl").read_text().splitlines()]
    assert max(entry.get("epoch", 0) for entry in epochs) == 2


def test_export_leaves_a_verified_repository(models: Path) -> None:
    assert (models / "alexnet/labels.txt").read_text().split() == list(CLASSES)
    for name in ("alexnet", "alexnet_image"):
        assert (models / name / "config.pbtxt").is_file()
        assert (models / name / "1/model.onnx").stat().st_size > 1_000_000
        assert json.loads((models / name / "1/report.json").read_text())


def test_curl_a_body(answer: dict[str, Any], photo: Path, server: Server) -> None:
    assert (answer["model"], answer["version"]) == ("alexnet", "1")
    (image,) = answer["images"]
    assert image["filename"] is None
    assert {entry["label"] for entry in image["top"]} == set(CLASSES)
    assert sum(entry["probability"] for entry in image["top"]) == pytest.approx(1, abs=1e-3)
    status, put = curl("-T", photo, f"{server.url}/v1/classify")
    assert (status, put["images"]) == (200, answer["images"])


def test_curl_several_files_of_which_one_is_bad(
    answer: dict[str, Any], photo: Path, server: Server, models: Path
) -> None:
    labels = models / "alexnet/labels.txt"
    status, body = curl("-F", f"file=@{photo}", "-F", f"file=@{labels}", f"{server.url}/v1/classify?top_k=2")
    assert status == 200
    good, bad = body["images"]
    assert good["filename"] == photo.name
    assert_same(
        [(e["label"], e["class"], e["probability"]) for e in good["top"]], answer["images"][0]["top"][:2]
    )
    assert (bad["filename"], bad["error"]["status"]) == ("labels.txt", 415)
    status, problem = curl("--data-binary", f"@{labels}", f"{server.url}/v1/classify")
    assert (status, problem["type"]) == (415, "urn:topfive:error:unsupported-format")
    assert "JPEG" in problem["detail"]


def test_the_sdk(answer: dict[str, Any], photo: Path, server: Server, pictures: Path) -> None:
    expected = answer["images"][0]["top"]
    with topfive.Client(server.url) as client:
        result = client.classify(photo)
        assert_same([(e.label, e.class_index, e.probability) for e in result.top], expected)
        photos = sorted((pictures / "val").rglob("*.jpg"))
        results = list(client.classify_many([*photos, server.log]))
        assert [each.ok for each in results] == [True] * len(photos) + [False]
        with pytest.raises(topfive.UnsupportedImageError):
            client.classify(server.log)
        with pytest.raises(topfive.NotFoundError):
            client.classify(photo, model="resnet")

    data = photo.read_bytes()

    async def ask() -> topfive.Classification:
        async with topfive.AsyncClient(server.url) as client:
            return await client.classify(data)

    top = asyncio.run(ask()).top
    assert_same([(e.label, e.class_index, e.probability) for e in top], expected)


def test_topfive_classify(answer: dict[str, Any], photo: Path, server: Server) -> None:
    result = json.loads(run("classify", "--json", photo, "--url", server.url))
    assert_same(
        [(e["label"], e["class"], e["probability"]) for e in result["top"]], answer["images"][0]["top"]
    )
    assert CLASSES[0] in run("classify", photo, "--url", server.url)
    run("classify", server.log, "--url", server.url, status=1)


def test_scoring_through_the_server_and_in_process_agree(
    answer: dict[str, Any], photo: Path, server: Server, models: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "val/broken.jpg").write_bytes(photo.read_bytes()[:200])
    through, within = tmp_path / "through.jsonl", tmp_path / "within.jsonl"
    run("score", pictures, "--output", through, "--url", server.url, status=5)
    run("score", pictures, "--output", within, "--model", models, "--device", "cpu", status=5)
    tables = [[json.loads(line) for line in path.read_text().splitlines()] for path in (through, within)]
    names = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.jpg"))
    for table in tables:
        assert sorted(row["path"] for row in table) == names
        assert [row["path"] for row in table if row["status"] != "ok"] == ["val/broken.jpg"]
        assert {row["status"] for row in table} == {"ok", "corrupt-image"}
    for one, other in zip(*tables, strict=True):
        expected = [
            {"label": one[f"label_{i}"], "class": one[f"class_{i}"], "probability": one[f"probability_{i}"]}
            for i in range(1, len(CLASSES) + 1)
            if one["status"] == "ok"
        ]
        got = [
            (other[f"label_{i}"], other[f"class_{i}"], other[f"probability_{i}"])
            for i in range(1, len(expected) + 1)
        ]
        assert one["path"] == other["path"]
        assert_same(got, expected)
        if one["path"] == str(photo.relative_to(pictures)):
            assert_same(got, answer["images"][0]["top"])


def test_scoring_outlives_the_servers_death(models: Path, pictures: Path, tmp_path: Path) -> None:
    for copy in range(12):
        (tmp_path / f"photos/{copy:02}").mkdir(parents=True)
        (tmp_path / f"photos/{copy:02}/link").symlink_to(pictures / "train")
    output = tmp_path / "results.csv"
    server = Server(models, tmp_path / "first.log")
    words = [
        "score",
        str(tmp_path / "photos"),
        "--output",
        str(output),
        "--url",
        server.url,
        "--save-every-s",
        "0",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "topfive", *words], stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("results.csv.parts/*-*.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.002)
        server.kill()
        assert job.stderr is not None
        while "gives no answer" not in job.stderr.readline():
            assert job.poll() is None
        server = Server(models, tmp_path / "second.log", port=server.url.rpartition(":")[2])
        try:
            _, notes = job.communicate(timeout=60)
        finally:
            server.kill()
    assert job.returncode == 0, notes
    assert "answers again" in notes
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 12 * 36
    assert {row["status"] for row in rows} == {"ok"}


def test_sigterm_answers_what_was_accepted_and_exits_0(models: Path, photo: Path, tmp_path: Path) -> None:
    """Four clients send one request after the other, each on a connection of its own, into the drain."""
    server = Server(models, tmp_path / "serve.log")
    answered, lost, refused = [0] * 4, list[str](), threading.Event()
    data = photo.read_bytes()

    def ask(index: int) -> None:
        with topfive.Client(server.url, retry=topfive.RetryPolicy(attempts=1)) as client:
            while True:
                try:
                    client.classify(data)
                    answered[index] += 1
                except (topfive.UnavailableError, topfive.ApiConnectionError) as error:
                    # Draining, or nobody listens any more; anything else is an accepted request without an answer.
                    if isinstance(error, topfive.ApiConnectionError) and "no server answers" not in str(
                        error
                    ):
                        lost.append(str(error))
                    refused.set()
                    return

    clients = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in clients:
        thread.start()
    deadline = time.monotonic() + 60
    while min(answered) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    before = sum(answered)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0, server.log.read_text()
    for thread in clients:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert before >= 12
    assert refused.is_set()
    assert lost == []
