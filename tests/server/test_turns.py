"""Decoding waits for a batch that computes on the same cores, and the estimates know it."""

import asyncio
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.server.fakes import FakeEngine, make_info, picture
from tests.server.harness import eventually, serving
from tests.server.onnx_models import write_model
from tests.server.test_batcher import Bench

from topfive import preprocessing
from topfive_server import decode_pool, onnx_engine
from topfive_server.devices import Device
from topfive_server.lanes import HostLane
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import Repository
from topfive_server.session import RuntimeOptions
from topfive_server.turns import TURNS, Turns


@pytest.fixture
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor()


def test_a_decoder_waits_for_every_batch_that_computes(threads: ThreadPoolExecutor) -> None:
    turns = Turns()
    turns.wait()  # for nobody
    with turns.computing():
        with turns.computing():
            waiting = threads.submit(turns.wait)
            time.sleep(0.05)
            assert not waiting.done()
        time.sleep(0.05)
        assert not waiting.done()
    waiting.result(1)


def test_batches_without_a_pause_do_not_keep_a_decoder_waiting(threads: ThreadPoolExecutor) -> None:
    turns = Turns()
    first = turns.computing()
    first.__enter__()
    waiting = threads.submit(turns.wait)
    time.sleep(0.05)
    assert not waiting.done()
    with turns.computing():  # before the first has ended, as with two models
        first.__exit__(None, None, None)
        waiting.result(1)


def test_a_batch_that_failed_is_not_waited_for() -> None:
    turns = Turns()
    with pytest.raises(RuntimeError), turns.computing():
        raise RuntimeError
    turns.wait()


def test_a_hung_batch_does_not_stop_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "PATIENCE_S", 0.5)
    turns = Turns()
    with turns.computing():
        begun = time.monotonic()
        turns.wait()
        assert time.monotonic() - begun >= 0.45
        begun = time.monotonic()
        turns.wait()  # and not again by every image
        assert time.monotonic() - begun < 0.4


def test_an_image_is_not_decoded_while_a_batch_computes(threads: ThreadPoolExecutor) -> None:
    decoded = threading.Event()

    def decode(*arguments: object, **keywords: object) -> object:
        decoded.set()
        return real(*arguments, **keywords)  # type: ignore[arg-type]

    real = preprocessing.decode
    with pytest.MonkeyPatch.context() as patch, serving(FakeEngine()) as server:
        patch.setattr(decode_pool, "decode", decode)
        with TURNS.computing():
            reply = threads.submit(server.classify, picture(3))
            eventually(lambda: server.application.admission.images == 1)
            assert not decoded.wait(0.05)
        assert reply.result().classes == [3]
        assert server.on_loop(lambda: server.model._pool.seconds_per_image) > 0


@pytest.mark.parametrize(("asked", "cores", "takes"), [(0, 2, True), (2, 2, True), (1, 2, False)])
def test_an_engine_that_leaves_cores_to_the_decoders_takes_no_turns(
    asked: int, cores: int, takes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns()
    seen: list[bool] = []
    monkeypatch.setattr(onnx_engine, "TURNS", turns)
    monkeypatch.setattr(onnx_engine, "cores", lambda: cores)
    for name in ("read", "compute"):
        monkeypatch.setattr(HostLane, name, _spying(seen, getattr(HostLane, name), turns))
    write_model(tmp_path)
    options = RuntimeOptions(threads=asked, max_batch=2)
    engine = OnnxEngine(Repository(tmp_path).read("tiny"), Device(kind="cpu", reason="test"), options)
    try:
        assert engine.info.takes_turns == takes
        asyncio.run(engine.warm_up())
        # Computing, then reading the answers, which is no arithmetic.
        assert seen[:2] == [takes, False]
    finally:
        asyncio.run(engine.close())


def _spying(seen: list[bool], method: object, turns: Turns) -> object:
    def call(lane: object) -> object:
        if threading.current_thread().name.endswith("-0"):  # two lanes are warmed up at the same time
            seen.append(any(True for _ in turns._begun))
        return method(lane)  # type: ignore[operator]

    return call


def test_the_estimates_count_the_decoding_where_it_takes_turns() -> None:
    async def seconds(*, takes_turns: bool) -> tuple[float, float, float]:
        info = dataclasses.replace(make_info(max_batch=4), takes_turns=takes_turns)
        bench = Bench(FakeEngine(info), decode_s=lambda: 0.5)
        batcher = bench.batcher
        batcher.times.calibrate([(1, 1.0), (4, 1.0)])
        batcher.expect("interactive")
        batcher.expect("interactive")
        try:
            return (
                batcher.forecast.seconds_of_wait("interactive"),
                batcher.forecast.seconds_until_answered(),
                batcher.forecast.full_batch_s,
            )
        finally:
            batcher.withdraw("interactive")
            batcher.withdraw("interactive")
            await batcher.close()

    assert asyncio.run(seconds(takes_turns=True)) == (2.0, 2.5, 3.0)
    assert asyncio.run(seconds(takes_turns=False)) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("takes_turns", "seconds"), [(True, 0.0), (False, 5.0)])
def test_a_deadline_counts_the_decoding_once(takes_turns: bool, seconds: float) -> None:
    info = dataclasses.replace(make_info(), takes_turns=takes_turns)
    with serving(FakeEngine(info)) as server:
        endpoint, batcher = server.application._classify, server.model.batcher
        server.on_loop(lambda: endpoint._decode_s.observe(5.0))
        assert server.on_loop(lambda: endpoint._seconds_until_answered(batcher, 0)) == seconds


def test_a_batch_waits_for_what_must_be_decoded_first() -> None:
    async def run() -> None:
        info = dataclasses.replace(make_info(max_batch=4), takes_turns=True)
        bench = Bench(FakeEngine(info), decode_s=lambda: 0.1, max_delay_s=0.0)
        bench.batcher.times.calibrate([(1, 5.0), (4, 5.0)])
        for _ in range(3):
            bench.batcher.expect("interactive")
        jobs = []
        for red in range(3):  # each takes a tenth of a second, although nobody is to wait
            jobs.append(bench.send(red, expected=True))
            await asyncio.sleep(0.05)
        assert [(await job.answer).batch_size for job in jobs] == [3, 3, 3]
        await bench.batcher.close()

    asyncio.run(run())
