"""What each of several processes gets, what a server of many says of itself, and a version that one of them cannot load."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from tests.server.onnx_models import write_model

from topfive_server import reload
from topfive_server.canary import Canary
from topfive_server.config import ServerConfig
from topfive_server.devices import Device
from topfive_server.engine import EngineError
from topfive_server.folder import Found
from topfive_server.metrics_sum import MetricsSum, Process, Snapshot, snapshot
from topfive_server.reload import ReloadPolicy
from topfive_server.replication import Replicator
from topfive_server.repository import Repository
from topfive_server.server_status import together
from topfive_server.session import RuntimeOptions
from topfive_server.shares import divide, part
from topfive_server.tally import Tally


def gpus(count: int) -> list[Device]:
    return [Device(kind="cuda", index=index, reason="test") for index in range(count)]


@pytest.mark.parametrize(
    ("processes", "count", "expected"),
    [
        (2, 1, ["cuda:0", "cuda:0"]),
        (3, 3, ["cuda:0", "cuda:1", "cuda:2"]),
        (5, 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        (2, 5, ["cuda:0,cuda:2,cuda:4", "cuda:1,cuda:3"]),
    ],
)
def test_every_gpu_has_a_process_and_every_process_a_gpu(
    processes: int, count: int, expected: list[str]
) -> None:
    config = ServerConfig(processes=processes, max_images=1)
    shares = divide(config, RuntimeOptions(), gpus(count))
    assert [",".join(map(str, share.devices)) for share in shares] == expected
    assert [share.number for share in shares] == [*range(1, processes + 1)]


def test_the_parts_of_every_limit_add_up_to_it() -> None:
    config = ServerConfig(processes=3, max_images=8, decode_threads=8, max_queue_images=100, watch=True)
    runtime = RuntimeOptions(threads=7, gpu_memory_bytes=1001)
    shares = divide(config, runtime, [Device(kind="cpu", reason="test")])
    assert [share.config.decode_threads for share in shares] == [3, 3, 2]
    assert [share.config.max_queue_images for share in shares] == [34, 33, 33]
    assert sum(share.config.max_queue_bytes for share in shares) == config.max_queue_bytes
    assert [share.runtime.threads for share in shares] == [3, 2, 2]
    assert not any(share.config.watch for share in shares)  # the parent watches
    few = divide(config, RuntimeOptions(threads=1), [Device(kind="cpu", reason="test")])
    assert [share.runtime.threads for share in few] == [1, 1, 1]
    assert [part(7, 3, index) for index in range(3)] == [3, 2, 2]


def test_processes_that_share_a_gpu_share_its_memory() -> None:
    config, runtime = ServerConfig(processes=3), RuntimeOptions(gpu_memory_bytes=1001)
    assert [s.runtime.gpu_memory_bytes for s in divide(config, runtime, gpus(2))] == [501, 1001, 500]
    assert [s.runtime.gpu_memory_bytes for s in divide(config, runtime, gpus(4))] == [1001, 1001, 1001]


# ---------------------------------------------------------------------- metrics


def counted(answers: float, ready: float, waiting: float) -> Snapshot:
    registry = CollectorRegistry()
    counter = Counter("topfive_answers", "Answers.", ["code"], registry=registry)
    counter.labels("ok").inc(answers)
    Gauge("topfive_ready", "Ready.", registry=registry).set(ready)
    Gauge("topfive_queue", "Waiting.", registry=registry).set(waiting)
    Gauge("topfive_build_info", "One.", registry=registry).set(1)
    Gauge("process_bytes", "Own.", registry=registry).set(answers)
    return snapshot(registry)


def values(text: bytes) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


FIRST, SECOND = Process(1, 101), Process(2, 102)


def test_counters_add_up_and_gauges_as_they_mean() -> None:
    sums = MetricsSum()
    read = values(sums.render({FIRST: counted(3, 1, 5), SECOND: counted(4, 0, 6)}, all_there=True))
    assert read['topfive_answers_total{code="ok"}'] == 7
    assert read["topfive_ready"] == 0
    assert read["topfive_queue"] == 11
    assert read["topfive_build_info"] == 1
    assert read['process_bytes{worker="1"}'] == 3
    assert read['process_bytes{worker="2"}'] == 4


def test_a_counter_never_falls_whoever_dies_or_is_silent() -> None:
    sums = MetricsSum()
    sums.render({FIRST: counted(30, 1, 5), SECOND: counted(4, 1, 6)}, all_there=True)
    silent = values(sums.render({SECOND: counted(5, 1, 6)}, all_there=False))
    assert silent['topfive_answers_total{code="ok"}'] == 35
    assert (silent["topfive_queue"], silent["topfive_ready"]) == (6, 0)
    sums.departed(FIRST)
    sums.departed(FIRST)
    again = Process(1, 103)
    back = values(sums.render({again: counted(1, 1, 0), SECOND: counted(6, 1, 0)}, all_there=True))
    assert back['topfive_answers_total{code="ok"}'] == 37
    assert 'process_bytes{worker="1"}' in back
    sums.departed(again)
    left = values(sums.render({SECOND: counted(6, 1, 0)}, all_there=False))
    assert left['topfive_answers_total{code="ok"}'] == 37


def test_who_dies_after_its_answer_and_before_the_others_is_counted_once() -> None:
    sums = MetricsSum()
    sums.render({FIRST: counted(100, 1, 0)}, all_there=True)
    sums.departed(FIRST)
    late = values(sums.render({FIRST: counted(110, 1, 0), SECOND: counted(0, 1, 0)}, all_there=True))
    assert late['topfive_answers_total{code="ok"}'] == 100
    assert late["topfive_ready"] == 0  # one worker serves; there ought to be two
    successor = values(sums.render({Process(1, 103): counted(3, 1, 0)}, all_there=True))
    assert successor['topfive_answers_total{code="ok"}'] == 103


# ---------------------------------------------------------------------- readiness


def answer(ready: bool, reason: str = "", device: str = "cuda:0") -> dict[str, Any]:
    row = {"name": "m", "version": "1", "ready": ready, "reason": reason, "provider": "p", "device": device}
    return {"ready": ready, "draining": False, "models": [row]}


def test_one_worker_that_is_not_ready_speaks_for_all() -> None:
    body = together({1: answer(True), 2: answer(True, device="cuda:1")}, draining=False)
    assert body["ready"]
    assert body["models"][0]["device"] == "cuda:0,cuda:1"
    body = together({1: answer(True), 2: answer(False, "hung"), 3: "it has ended"}, draining=False)
    assert not body["ready"]
    assert body["models"][0]["reason"] == "worker 2: hung"
    assert body["workers"] == [
        {"worker": 1, "ready": True, "reason": ""},
        {"worker": 2, "ready": False, "reason": "m version 1: hung"},
        {"worker": 3, "ready": False, "reason": "it has ended"},
    ]
    assert not together({1: answer(True)}, draining=True)["ready"]


# ---------------------------------------------------------------------- versions


class FakeWorker:
    """Remembers what it was told, and fails to prepare the versions it is told to fail."""

    def __init__(self, number: int, fails: str = "", fingerprint: str = "same") -> None:
        self.number = number
        self.serving = True
        self.told: list[str] = []
        self.channel = self
        self.rows: list[Any] = []
        self.fails = fails
        self.fingerprint = fingerprint

    async def prepare(self, version: Any) -> str:
        self.told.append(f"prepare {version.version}")
        if version.version == self.fails:
            raise EngineError(f"worker {self.number}: no memory")
        return self.fingerprint

    async def tell(self, what: str, **arguments: Any) -> None:
        self.told.append(f"{what} {arguments.get('version', '')}".strip())

    async def ask(self, what: str) -> list[Any]:
        return self.rows


def replicating(workers: list[FakeWorker]) -> Replicator:
    return Replicator(
        {worker.number: worker for worker in workers},  # type: ignore[misc]  # stand-ins
        find=lambda: Found([], [], {}),
        policy=ReloadPolicy(),
        count=lambda _: None,
        patience_s=1.0,
    )


def test_a_version_that_one_process_cannot_load_serves_in_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        write_model(tmp_path, version="5")
        version = Repository(tmp_path).read("tiny")
        workers = [FakeWorker(1), FakeWorker(2, fails="5"), FakeWorker(3)]
        replicator = replicating(workers)
        with pytest.raises(EngineError, match="worker 2: no memory"):
            await replicator.load(version)
        assert [worker.told for worker in workers] == [["prepare 5", "discard 5"]] * 3
        assert replicator.versions.names() == []
        # What the first cannot load, the others do not try: it may have ended the process.
        workers = [FakeWorker(1, fails="5"), FakeWorker(2)]
        with pytest.raises(EngineError, match="worker 1"):
            await replicating(workers).load(version)
        assert workers[1].told == ["discard 5"]
        workers = [FakeWorker(1), FakeWorker(2, fingerprint="other")]
        with pytest.raises(EngineError, match="changed while they were read"):
            await replicating(workers).load(version)

    asyncio.run(scenario())


def test_the_health_of_a_version_is_that_of_the_worst(tmp_path: Path) -> None:
    async def scenario() -> None:
        write_model(tmp_path, version="5")
        workers = [FakeWorker(1), FakeWorker(2)]
        replicator = replicating(workers)
        await replicator.load(Repository(tmp_path).read("tiny"))
        assert [worker.told for worker in workers] == [["prepare 5", "install 5"]] * 2
        (entry,) = replicator.versions.everything()
        workers[0].rows = [["tiny", "5", True, "", 10, 1]]
        workers[1].rows = [["tiny", "5", False, "it hangs", 20, 2]]
        await replicator.ask_health()
        assert (entry.health.ready, entry.health.reason) == (False, "worker 2: it hangs")
        assert entry.tally == Tally(answered=30, failed=3)
        workers[1].rows = [["tiny", "5", True, "", 10, 1]]
        await replicator.ask_health()
        assert (entry.health.ready, entry.health.reason) == (True, "")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "said", [[False, "it hangs", 3, 0], [True, "", 3, 9]], ids=["it died", "its engine fails"]
)
def test_a_canary_that_is_bad_in_one_process_is_taken_back_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    async def scenario() -> None:
        for version in ("5", "6"):
            write_model(tmp_path, version=version)
        workers = [FakeWorker(1), FakeWorker(2)]
        replicator = replicating(workers)
        for version in ("5", "6"):
            await replicator.load(Repository(tmp_path).read("tiny", version))
        replicator.versions.canaries["tiny"] = Canary(version="6", stable="5", share=0.1)
        healthy = [["tiny", "5", True, "", 100, 0], ["tiny", "6", True, "", 10, 0]]
        workers[0].rows, workers[1].rows = healthy, [healthy[0], ["tiny", "6", *said]]
        guard = asyncio.create_task(replicator.reloader.guard_canaries())
        async with asyncio.timeout(20):
            while not all("remove 6" in worker.told for worker in workers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        guard.cancel()
        assert [*replicator.versions.versions("tiny")] == ["5"]

    monkeypatch.setattr(reload, "GUARD_INTERVAL_S", 0.01)
    asyncio.run(scenario())


def test_a_process_that_comes_back_has_the_same_default_model_as_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        replicator = replicating([FakeWorker(1)])
        for name in ("tiny", "aaa"):
            write_model(tmp_path, name, version="1")
            await replicator.load(Repository(tmp_path).read(name))
        assert [entry.version.name for entry in replicator.versions.everything()] == ["tiny", "aaa"]

    asyncio.run(scenario())
