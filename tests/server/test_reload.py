import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.server.fakes import CROP, FakeEngine, make_info, picture
from tests.server.harness import eventually, read_reply, serving
from tests.server.onnx_models import write_model

from topfive_server import reload
from topfive_server.app import Application
from topfive_server.canary import Canary
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import Device
from topfive_server.engine import EngineError
from topfive_server.folder import Found, find
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.reload import Reloader, ReloadPolicy
from topfive_server.repository import ModelVersion, Repository, RepositoryError
from topfive_server.served_model import ServedModel, golden_image
from topfive_server.serving import Loader, Offer, StartError, onnx_engines
from topfive_server.session import RuntimeOptions
from topfive_server.tally import Tally

CPU = Device(kind="cpu", reason="test")
Start = Callable[[], Awaitable[list[ModelVersion]]]


@dataclass
class FakeServed:
    """A version in service that only remembers."""

    info: Any
    health: Any = field(default_factory=lambda: SimpleNamespace(ready=True, reason=""))
    tally: Tally = field(default_factory=Tally)
    closed: bool = False

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed = True


class World:
    """A folder of tiny models, a registry, and a loader that fails as told."""

    def __init__(self, root: Path, **policy: Any) -> None:
        self.root = root
        self.models = Models()
        self.failing: dict[str, Exception] = {}
        self.loads: list[tuple[str, str]] = []
        self.counts: list[str] = []
        self.reloader = Reloader(
            find=self.find,
            load=self.load,
            models=self.models,
            policy=ReloadPolicy(**policy),
            count=self.counts.append,
        )

    def find(self) -> Found:
        return find(Repository(self.root), CPU, "auto")

    async def load(self, version: ModelVersion) -> None:
        self.loads.append((version.name, version.version))
        if version.version in self.failing:
            raise self.failing[version.version]
        served = FakeServed(make_info(version.name, version.version))
        self.models.add(served)  # type: ignore[arg-type]  # a stand-in

    def add(self, version: str, name: str = "tiny", **kwargs: Any) -> None:
        write_model(self.root, name, version, **kwargs)

    def remove(self, version: str, name: str = "tiny") -> None:
        shutil.rmtree(self.root / name / version)

    def serving(self, name: str = "tiny") -> list[str]:
        return sorted(self.models.versions(name), key=int)

    def states(self) -> dict[str, str]:
        return {row["version"]: row["state"] for row in self.reloader.status()}

    def reason(self, version: str) -> str:
        return str(next(row["reason"] for row in self.reloader.status() if row["version"] == version))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def test_a_new_version_takes_over_and_the_old_one_drains(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        await world.reloader.look()
        old: Any = world.models.get("tiny")
        world.add("2")
        status = await world.reloader.look()
        assert world.serving() == ["2"]
        assert status == [{"model": "tiny", "version": "2", "state": "serving", "share": 1.0, "reason": ""}]
        await world.reloader.close()
        assert old.closed
        assert world.counts == ["loaded", "loaded", "removed"]
        await world.reloader.look()
        assert world.loads == [("tiny", "1"), ("tiny", "2")]

    run(scenario)


def test_several_newest_versions_can_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, keep=2)
        for version in ("8", "9", "10"):
            world.add(version)
        await world.reloader.look()
        assert world.serving() == ["9", "10"]
        assert world.models.get("tiny").info.version == "10"
        assert world.models.get("tiny", "9").info.version == "9"

    run(scenario)


@pytest.mark.parametrize(
    "error", [EngineError("the golden image was not answered"), ValueError("a mistake of ours")]
)
def test_a_version_that_fails_is_refused_and_the_old_one_stays(tmp_path: Path, error: Exception) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        world.failing["2"] = error
        await world.reloader.look()
        assert world.serving() == ["1"]
        assert world.states() == {"1": "serving", "2": "refused"}
        assert world.reason("2") == str(error)
        assert world.counts[-1] == "refused"

    run(scenario)


def test_a_half_copied_version_is_refused_until_it_is_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        path = tmp_path / "tiny" / "2" / "model.onnx"
        whole = path.read_bytes()
        path.write_bytes(whole[:200])
        await world.reloader.look()
        assert world.serving() == ["1"]
        assert "tiny/2/model.onnx is cut off" in world.reason("2")
        path.write_bytes(whole)
        await world.reloader.look()
        assert world.serving() == ["2"]
        assert world.states() == {"2": "serving"}

    run(scenario)


def test_the_watch_waits_until_files_have_settled_and_does_not_retry_in_vain(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        world.failing["2"] = EngineError("no")
        await world.reloader.look(settled_only=True)
        assert world.loads == [("tiny", "1")]
        for _ in range(3):
            await world.reloader.look(settled_only=True)
        assert world.loads == [("tiny", "1"), ("tiny", "2")]
        del world.failing["2"]
        (tmp_path / "tiny" / "2" / "report.json").write_text("{}")
        for _ in range(3):
            await world.reloader.look(settled_only=True)
        assert world.loads == [("tiny", "1"), ("tiny", "2"), ("tiny", "2")]
        assert world.serving() == ["2"]

    run(scenario)


def test_the_watch_looks_by_itself_and_survives_a_missing_folder(tmp_path: Path) -> None:
    async def scenario() -> None:
        root = tmp_path / "models"
        world = World(root)
        watch = asyncio.create_task(world.reloader.watch(0.01))
        await asyncio.sleep(0.05)
        world.add("1")
        async with asyncio.timeout(10):
            while world.serving() != ["1"]:  # noqa: ASYNC110  the folder is on the other side
                await asyncio.sleep(0.01)
        shutil.rmtree(root)
        await asyncio.sleep(0.05)
        assert not watch.done()
        assert world.serving() == ["1"]
        watch.cancel()

    run(scenario)


def test_removing_a_version_brings_the_one_before_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        world.add("2")
        await world.reloader.look()
        world.remove("2")
        await world.reloader.look()
        assert world.serving() == ["1"]

    run(scenario)


def test_the_last_version_never_goes(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        world.add("1", name="other")
        await world.reloader.look()
        world.remove("1")
        await world.reloader.look()
        assert world.models.names() == ["other"]
        world.add("1", name="other_image", side="image")
        world.remove("1", name="other")
        await world.reloader.look()
        assert world.models.names() == ["other"]
        world.remove("1", name="other_image")
        with pytest.raises(RepositoryError, match="holds no model"):
            await world.reloader.look()
        assert world.models.names() == ["other"]

    run(scenario)


def test_a_version_in_service_whose_files_break_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        world.add("2")
        await world.reloader.look()
        (tmp_path / "tiny" / "2" / "model.onnx").write_bytes(b"")
        await world.reloader.look()
        assert "2" in world.serving()

    run(scenario)


def test_changed_files_of_a_version_in_service_are_loaded_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        world.add("1")
        await world.reloader.look()
        world.remove("1")
        world.add("1", seed=3)
        await world.reloader.look()
        assert world.loads == [("tiny", "1"), ("tiny", "1")]

    run(scenario)


def test_a_canary_gets_its_share_and_then_takes_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, canary_share=0.25)
        world.add("1")
        await world.reloader.look()
        assert world.models.canaries == {}
        world.add("2")
        await world.reloader.look()
        picked = [world.models.pick("tiny").info.version for _ in range(400)]
        assert 98 <= picked.count("2") <= 102
        assert max(len(run) for run in "".join(picked).split("2")) <= 5  # spread, not in bursts
        assert world.models.get("tiny", "1").info.version == "1"
        assert world.states() == {"1": "serving", "2": "canary"}
        assert not world.models.is_default(world.models.get("tiny", "2"))
        await world.reloader.set_canary("tiny", 0.5)
        picked = [world.models.pick("tiny").info.version for _ in range(400)]
        assert 198 <= picked.count("2") <= 202
        await world.reloader.set_canary("tiny", 1)
        assert world.serving() == ["2"]
        assert world.models.get("tiny").info.version == "2"

    run(scenario)


@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/fake/infer"])
def test_a_request_counts_once_for_the_canarys_share(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is let in by one version is answered by it, and what only describes a model does not count."""
    touched: list[str] = []
    refuse_a_long_wait = ServedModel.refuse_a_long_wait

    def noting(self: ServedModel, *arguments: Any) -> None:
        touched.append(self.info.version)
        refuse_a_long_wait(self, *arguments)

    monkeypatch.setattr(ServedModel, "refuse_a_long_wait", noting)
    stable, trial = FakeEngine(), FakeEngine(make_info(version="2"))
    square = {
        "name": "image",
        "shape": [1, CROP, CROP, 3],
        "datatype": "UINT8",
        "data": [9] * CROP * CROP * 3,
    }
    body = picture(9) if path.startswith("/v1") else json.dumps({"inputs": [square]}).encode()
    with serving(stable, trial) as server:
        canary = Canary(version="2", stable="1", share=0.1)
        server.on_loop(lambda: server.application.models.canaries.update(fake=canary))
        for _ in range(50):
            reply = server.request("POST", path, body)
            assert (reply.status, reply.json.get("version", reply.json.get("model_version"))) == (
                200,
                touched[-1],
            )
            assert server.request("GET", "/v1/models/fake/labels").status == 200
            assert server.request("GET", "/v2/models/fake").status == 200
        assert canary._requests == len(touched) == 50
        assert 4 <= len(trial.batches) <= 6


def test_a_request_whose_version_goes_while_it_arrives_is_answered_by_another() -> None:
    stable, trial = FakeEngine(), FakeEngine(make_info(version="2"))
    body = picture(4)
    with serving(stable, trial) as server, server.connect() as connection:
        models = server.application.models
        canary = Canary(version="2", stable="1", share=0.99)  # the first goes there
        server.on_loop(lambda: models.canaries.update(fake=canary))
        head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body[:9])
        eventually(lambda: server.application.admission.bytes == 9)

        async def take_back() -> None:
            del models.canaries["fake"]
            model = models.remove("fake", "2")
            assert model is not None
            await model.close()

        server.call(take_back())
        connection.sendall(body[9:])
        reply = read_reply(connection)
        assert (reply.status, reply.json["version"], reply.classes) == (200, "1", [4])
        assert (stable.seen, trial.seen) == ([4], [])


def test_nobody_meets_a_canary_before_it_is_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, canary_share=0.9)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        met: list[str] = []
        load = world.reloader._load

        async def slowly(version: ModelVersion) -> None:
            met.extend(world.models.pick("tiny").info.version for _ in range(50))
            await load(version)
            met.extend(world.models.pick("tiny").info.version for _ in range(50))

        world.reloader._load = slowly
        await world.reloader.look()
        assert set(met) == {"1"}
        assert "2" in {world.models.pick("tiny").info.version for _ in range(5)}

    run(scenario)


def test_a_canary_that_dies_is_rolled_back_and_its_reason_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, canary_share=0.25)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        await world.reloader.look()
        canary: Any = world.models.get("tiny", "2")
        canary.health.ready, canary.health.reason = False, "the engine is gone"
        for _ in range(3):
            await world.reloader.look(settled_only=True)
        assert world.serving() == ["1"]
        assert world.reason("2") == "the canary died: the engine is gone"
        assert world.loads == [("tiny", "1"), ("tiny", "2")]
        assert world.counts[-2:] == ["removed", "rolled-back-dead"]
        assert world.models.get("tiny").info.version == "1"

    run(scenario)


def test_a_canary_whose_engine_fails_is_rolled_back_without_a_look_at_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reload, "GUARD_INTERVAL_S", 0.01)
    stable, trial = FakeEngine(), FakeEngine(make_info(version="2"), guilty={9})
    counts: list[str] = []
    with serving(stable, trial) as server:
        models = server.application.models
        reloader = Reloader(
            find=lambda: Found([], [], {}),
            load=_load_nothing,
            models=models,
            policy=ReloadPolicy(),
            count=counts.append,
        )
        models.canaries["fake"] = Canary(version="2", stable="1", share=0.5)
        guard = server.call(_begin(reloader.guard_canaries()))
        # Neither a bad image nor one on which the engine fails now and then condemns it.
        for body in [b"no image"] * 40 + [picture(9)] * 2 + [picture(3)] * 40:
            server.request("POST", "/v1/classify", body)
        trial_model = models.get("fake", "2")
        assert trial_model.tally.failed == 1
        assert models.canaries

        def rolled_back() -> bool:
            server.request("POST", "/v1/classify", picture(9))
            return not models.canaries

        eventually(rolled_back)
        assert models.versions("fake").keys() == {"1"}
        assert [server.request("POST", "/v1/classify", picture(9)).status for _ in range(5)] == [200] * 5
        server.on_loop(guard.cancel)
        refused = next(row for row in reloader.status() if row["state"] == "refused")
        assert refused["version"] == "2"
        assert "the canary's engine failed on" in refused["reason"]
        assert counts == ["removed", "rolled-back-failing"]


async def _load_nothing(_: ModelVersion) -> None:
    raise AssertionError


async def _begin(forever: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(forever)


@pytest.mark.parametrize(
    ("trial", "stable", "worse"),
    [
        (Tally(0, 5), Tally(0, 0), True),
        (Tally(0, 4), Tally(100, 0), False),  # too few to tell
        (Tally(95, 5), Tally(400, 0), True),
        (Tally(995, 5), Tally(400, 0), False),  # the stable version may fail as rarely
        (Tally(90, 10), Tally(900, 100), False),
        (Tally(50, 50), Tally(80, 20), False),
        (Tally(50, 50), Tally(95, 5), True),
        (Tally(100, 0), Tally(0, 100), False),
    ],
)
def test_what_is_clearly_worse(trial: Tally, stable: Tally, *, worse: bool) -> None:
    assert trial.clearly_worse_than(stable) is worse


def test_a_canary_that_has_died_gets_no_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, canary_share=0.9)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        await world.reloader.look()
        canary: Any = world.models.get("tiny", "2")
        canary.health.ready = False
        assert {world.models.pick("tiny").info.version for _ in range(20)} == {"1"}

    run(scenario)


def test_a_link_turned_to_files_of_equal_size_and_time_is_noticed(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path / "models")
        for version in ("1", "2"):
            write_model(tmp_path / "store", "tiny", version, seed=int(version))
            for file in (tmp_path / "store" / "tiny" / version).iterdir():
                os.utime(file, (1e9, 1e9))
        link, next_link = (tmp_path / "models" / "tiny" / name for name in ("7", "next"))
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / "store" / "tiny" / "1")
        await world.reloader.look()
        next_link.symlink_to(tmp_path / "store" / "tiny" / "2")
        next_link.rename(link)
        await world.reloader.look()
        assert world.loads == [("tiny", "7")] * 2

    run(scenario)


@pytest.mark.parametrize("version", ["1", "2"], ids=["in place", "a new one"])
def test_a_copy_under_way_is_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    async def scenario() -> None:
        world = World(tmp_path / "models")
        world.add("1")
        await world.reloader.look()
        write_model(tmp_path / "source", "tiny", version, seed=7)
        whole = (tmp_path / "source" / "tiny" / version / "model.onnx").read_bytes()
        path = tmp_path / "models" / "tiny" / version / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        for part in range(1, 9):
            path.write_bytes(whole[: len(whole) * part // 9])
            await world.reloader.look(settled_only=True)
            assert world.serving() == ["1"]
        assert "refused" not in world.counts
        for _ in range(3):  # it has come to a stop
            await world.reloader.look(settled_only=True)
        assert world.counts.count("refused") == 1
        path.write_bytes(whole)
        for _ in range(2):
            await world.reloader.look(settled_only=True)
        assert world.loads == [("tiny", "1"), ("tiny", version)]
        assert world.states() == {version: "serving"}
        assert [r.levelname for r in caplog.records].count("ERROR") == 1

    run(scenario)


def test_a_missing_folder_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = World(tmp_path / "models")
        looks = 0

        def find() -> Found:
            nonlocal looks
            looks += 1
            return world.find()

        world.reloader._find = find
        watch = asyncio.create_task(world.reloader.watch(0.001))
        async with asyncio.timeout(20):
            while looks < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        watch.cancel()
        assert len(caplog.records) == 1
        assert "cannot be read" in caplog.text

    run(scenario)


def test_a_model_that_is_added_does_not_become_the_default_by_its_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        for name in ("tiny", "small"):
            world.add("1", name=name)
        await world.reloader.look()
        assert world.models.default_name() == "small"
        world.add("1", name="aaa")
        world.add("2", name="small")
        await world.reloader.look()
        assert world.models.get().info.version == "2"
        assert world.models.default_name() == "small"
        shutil.rmtree(tmp_path / "small")
        await world.reloader.look()
        assert world.models.default_name() == "tiny"

    run(scenario)


def test_a_canary_can_be_taken_back_and_a_failed_one_leaves_no_trace(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, canary_share=0.25)
        world.add("1")
        await world.reloader.look()
        world.add("2")
        world.failing["2"] = EngineError("no")
        await world.reloader.look()
        assert world.models.canaries == {}
        del world.failing["2"]
        await world.reloader.look()
        with pytest.raises(ValueError, match=r"share is 1.5; it must be between 0 and 1"):
            await world.reloader.set_canary("tiny", 1.5)
        await world.reloader.set_canary("tiny", 0)
        assert world.serving() == ["1"]
        assert world.reason("2") == "taken back by an operator"
        with pytest.raises(ValueError, match="no canary"):
            await world.reloader.set_canary("tiny", 0)

    run(scenario)


def test_one_trial_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, canary_share=0.25)
        for version in ("1", "2", "3"):
            world.add(version)
            await world.reloader.look()
        assert world.serving() == ["1", "2"]
        await world.reloader.set_canary("tiny", 1)
        await world.reloader.look()
        assert world.states() == {"2": "serving", "3": "canary"}

    run(scenario)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.33, 0.5, 0.9, 0.99, 1.0])
def test_a_canarys_share_holds_at_every_length(share: float) -> None:
    canary = Canary(version="2", stable="1", share=share)
    hits = 0
    for requests in range(1, 2001):
        hits += canary.pick() == "2"
        assert abs(hits - share * requests) <= 3


def test_policies_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        ReloadPolicy(keep=0)
    with pytest.raises(ValueError, match=r"canary_share is 1.0; it must be at least 0 and below 1"):
        ReloadPolicy(canary_share=1.0)
    with pytest.raises(ValueError, match="share is 2"):
        Canary(version="2", stable="1", share=2)


# ---------------------------------------------------------------------- with real engines


@asynccontextmanager
async def real(root: Path, **settings: Any) -> AsyncIterator[tuple[Start, Reloader, Models]]:
    config = ServerConfig(**settings)
    pool = DecodePool(threads=1, max_pixels=config.max_pixels)
    models, metrics = Models(), Metrics()
    offer = Offer(root, device=CPU, variant="auto", config=config)
    engines = onnx_engines([CPU], RuntimeOptions(threads=1))
    loader = Loader(engines=engines, config=config, models=models, pool=pool, metrics=metrics)

    async def start() -> list[ModelVersion]:
        return await offer.start(loader.load)

    policy = ReloadPolicy(keep=config.versions)
    try:
        yield start, Reloader(find=offer.find, load=loader.load, models=models, policy=policy), models
    finally:
        for model in list(models):
            await model.close()
        pool.close()


def test_real_versions_are_swapped_without_losing_an_image(tmp_path: Path) -> None:
    async def scenario() -> None:
        write_model(tmp_path, "tiny", "1")
        async with real(tmp_path) as (start, reloader, models):
            for version in await start():
                reloader.adopt(version)
            answered: list[str] = []
            stop = False

            async def client() -> None:
                while not stop:
                    model = models.pick("tiny")
                    job = model.classify(golden_image(), deadline=float("inf"), priority="interactive")
                    await job.answer
                    answered.append(model.info.version)

            clients = [asyncio.create_task(client()) for _ in range(4)]
            for number in ("2", "3"):
                write_model(tmp_path, "tiny", number, seed=int(number))
                await reloader.look()
                await asyncio.sleep(0.1)
            stop = True
            await asyncio.gather(*clients)  # raises if one image was lost
            await reloader.close()
            assert set(answered) == {"1", "2", "3"}
            assert [model.info.version for model in models] == ["3"]

    run(scenario)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"weight_scale": float("nan")}, "not numbers"),
        ({"drop_output": "scores"}, "it must give probabilities"),
        ({"side": 13}, "it must take `image`"),
        ({"metadata": None}, "no 'topfive' metadata"),
    ],
)
def test_a_bad_model_is_refused_while_the_good_one_serves(
    tmp_path: Path, damage: dict[str, Any], reason: str
) -> None:
    async def scenario() -> None:
        write_model(tmp_path, "tiny", "1")
        async with real(tmp_path) as (start, reloader, models):
            await start()
            write_model(tmp_path, "tiny", "2", **damage)
            status = {row["version"]: row for row in await reloader.look()}
            assert status["2"]["state"] == "refused"
            assert reason in status["2"]["reason"]
            assert await models.get("tiny").ready()

    run(scenario)


def test_a_broken_newest_version_stops_the_start_and_an_older_one_does_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        write_model(tmp_path, "tiny", "1").write_bytes(b"")
        write_model(tmp_path, "tiny", "2")
        async with real(tmp_path) as (start, _, models):
            await start()
            assert models.get("tiny").info.version == "2"
        write_model(tmp_path, "tiny", "3").write_bytes(b"")
        async with real(tmp_path) as (start, _, models):
            with pytest.raises(StartError, match=r"tiny/3/model.onnx is empty"):
                await start()

    run(scenario)


# ---------------------------------------------------------------------- the admin routes


def test_admin_routes_are_off_unless_asked_for() -> None:
    with serving(FakeEngine()) as server:
        for method, path in (("POST", "/v1/admin/reload"), ("GET", "/v1/admin/versions")):
            assert server.request(method, path).status == 404


def test_admin_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world_of: list[World] = []
    original = Application.__init__

    def with_reloader(self: Application, config: ServerConfig, *, models: Models, **kwargs: Any) -> None:
        world = World(tmp_path, canary_share=0.5)
        world.models = models
        world.reloader._models = models
        world_of.append(world)
        original(self, config, models=models, **kwargs | {"reloader": world.reloader})

    monkeypatch.setattr(Application, "__init__", with_reloader)
    with serving(FakeEngine(replace(make_info("tiny", "1")))) as server:
        world = world_of[0]
        world.add("1")
        server.call(_adopt(world))
        assert server.request("GET", "/v1/admin/versions").json["versions"][0]["state"] == "serving"
        world.add("2")
        rows = server.request("POST", "/v1/admin/reload").json["versions"]
        assert [(row["version"], row["state"], row["share"]) for row in rows] == [
            ("1", "serving", 0.5),
            ("2", "canary", 0.5),
        ]
        reply = server.request("POST", "/v1/admin/models/tiny/canary?percent=10")
        assert reply.json["versions"][1]["share"] == 0.1
        assert server.request("POST", "/v1/admin/models/tiny/canary?percent=101").status == 400
        assert server.request("POST", "/v1/admin/models/nope/canary?percent=1").code == "not-found"
        reply = server.request("POST", "/v1/admin/models/tiny/canary?percent=0")
        assert reply.json["versions"][1]["state"] == "refused"
        shutil.rmtree(tmp_path / "tiny")
        refused = server.request("POST", "/v1/admin/reload")
        assert refused.code == "bad-request"
        assert "nothing was changed" in json.loads(refused.body)["detail"]


async def _adopt(world: World) -> None:
    world.reloader.adopt(Repository(world.root).read("tiny"))


VERIFIED = {"passed": True, "variant": {"family": "tiny", "precision": "fp32", "target": "cpu", "views": 1}}


def replace_weights(root: Path, version: str) -> None:
    """Other weights under the report of those that were verified."""
    other = write_model(root.parent / "other", "tiny", version, seed=99)
    shutil.copy(other, root / "tiny" / version / "model.onnx")


def test_weights_that_were_exchanged_after_the_export_are_not_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        root = tmp_path / "models"
        write_model(root, "tiny", "1", report=VERIFIED)
        write_model(root, "tiny", "2", report=VERIFIED)
        replace_weights(root, "2")
        async with real(root) as (start, reloader, models):
            with pytest.raises(StartError, match=r"tiny/2/model\.onnx is not the file that its report\.json"):
                await start()
        shutil.rmtree(root / "tiny" / "2")
        async with real(root) as (start, reloader, models):
            for version in await start():
                reloader.adopt(version)
            info = models.get("tiny").info
            assert (info.graph, info.precision, info.verified) == ("tiny", "fp32", True)
            write_model(root, "tiny", "3", report=VERIFIED)
            replace_weights(root, "3")
            status = {row["version"]: row for row in await reloader.look()}
            assert [model.info.version for model in models] == ["1"]
            assert status["3"]["state"] == "refused"
            assert "is not the file that its report.json is about" in status["3"]["reason"]

    run(scenario)


def test_a_broken_variant_beside_a_good_one_says_how_to_do_without_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        write_model(tmp_path, "tiny", "1", report=VERIFIED)
        broken = write_model(tmp_path, "tiny_int8", "1")
        broken.write_bytes(broken.read_bytes()[:200])
        async with real(tmp_path) as (start, _, _):
            with pytest.raises(StartError, match=f"or remove {broken.parent} to serve without it"):
                await start()

    run(scenario)


def test_a_default_model_that_is_not_there_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def load(version: ModelVersion) -> None:
            raise AssertionError(f"{version.name} was loaded")

        write_model(tmp_path, "tiny")
        offer = Offer(tmp_path, device=CPU, variant="auto", config=ServerConfig(model="nosuch"))
        with pytest.raises(StartError, match=r"there is no model 'nosuch' in .*; it holds tiny"):
            await offer.start(load)

    run(scenario)
