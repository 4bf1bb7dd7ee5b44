"""The batcher alone, on an event loop, with a fake engine."""

import asyncio
import dataclasses
import math
import random
from collections.abc import Awaitable, Callable
from time import monotonic
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.fakes import FakeEngine, make_info, pixels, probability

from topfive_server import batcher as batching
from topfive_server import estimate
from topfive_server.batcher import Batcher
from topfive_server.errors import DeadlineExceededError, EngineFailedError, NotReadyError
from topfive_server.estimate import Lateness
from topfive_server.job import Job, Priority


class Log:
    """Keeps what the batcher reports."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.deaths: list[str] = []

    def batch_done(self, size: int, seconds: float) -> None:
        self.events.append(("done", size))

    def batch_failed(self, kind: str) -> None:
        self.events.append(("failed", kind))

    def dropped(self, stage: str, reason: str) -> None:
        self.events.append(("dropped", stage, reason))


class Bench:
    """A batcher with its fake engine."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        engine.telling = True
        self.log = Log()
        self.batcher = Batcher(engine, observer=self.log, on_dead=self.log.deaths.append, **settings)

    def send(
        self, red: int, *, timeout_s: float = 10, priority: Priority = "interactive", expected: bool = False
    ) -> Job:
        job = Job(deadline=monotonic() + timeout_s, priority=priority, loop=asyncio.get_running_loop())
        job.image = pixels(red)
        if not expected:
            self.batcher.expect(priority)
        self.batcher.submit(job)
        return job


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def red_of(job: Job) -> int:
    answer = job.answer.result()
    red = int(answer.classes_T[0])
    assert answer.probabilities_T[0] == answer.scores_C[red] == probability(red)
    return red


def test_a_lone_image_leaves_at_once() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(), max_delay_s=1000)
        job = bench.send(7)
        await settle()
        assert bench.engine.batches == [[7]]
        await job.answer
        assert red_of(job) == 7

    on_loop(test)


def test_an_idle_engine_waits_for_images_being_decoded() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(make_info()), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 5.0), (8, 5.0)])
        for _ in range(3):
            bench.batcher.expect("interactive")
        bench.send(1, expected=True)
        bench.send(2, expected=True)
        await settle()
        assert bench.engine.batches == []
        bench.batcher.withdraw("interactive")  # the third does not decode
        await settle()
        assert bench.engine.batches == [[1, 2]]

    on_loop(test)


def test_those_just_answered_may_join_the_next_batch() -> None:
    async def test() -> None:
        info = make_info(max_batch=4)
        bench = Bench(FakeEngine(info), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 1.0), (4, 1.0)])
        bench.engine.gate.clear()
        first = bench.send(1)
        await settle()
        second = bench.send(2)
        bench.engine.gate.set()
        await first.answer
        # The first client is back at once, with an image still to be decoded.
        bench.batcher.expect("interactive")
        await settle()
        assert bench.engine.batches == [[1]]
        third = bench.send(3, expected=True)
        await asyncio.gather(second.answer, third.answer)
        assert bench.engine.batches == [[1], [2, 3]]

    on_loop(test)


def test_an_engine_that_has_just_finished_lingers_only_for_a_moment() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 1.0), (8, 1.0)])
        bench.engine.gate.clear()
        first = bench.send(1)
        await settle()
        second = bench.send(2)
        bench.engine.gate.set()
        await asyncio.gather(first.answer, second.answer)
        assert bench.engine.batches == [[1], [2]]

    on_loop(test)


def test_nobody_is_waited_for_who_is_back_already(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(make_info(max_batch=4)), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 5000.0), (4, 5000.0)])
        # A lone client, whose next photograph is decoded sooner than an engine lingers.
        for red in (1, 2):
            await bench.send(red, timeout_s=1e9).answer
            await settle()
        pair = [bench.send(red, timeout_s=1e9) for red in (3, 4)]
        await asyncio.gather(*(job.answer for job in pair))
        await settle()
        assert bench.engine.batches == [[1], [2], [3, 4]]
        # Of two that were answered together one is back.
        first = bench.send(5, timeout_s=1e9)
        await settle()
        assert len(bench.engine.batches) == 3
        second = bench.send(6, timeout_s=1e9)
        await asyncio.gather(first.answer, second.answer)
        assert bench.engine.batches[3:] == [[5, 6]]

    monkeypatch.setattr(batching, "_LINGER_S", 1000)
    on_loop(test)


def test_a_device_of_its_own_is_not_kept_waiting_for_longer_than_that_saves() -> None:
    async def test() -> None:
        info = dataclasses.replace(make_info(), device="cuda:0")
        bench = Bench(FakeEngine(info), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 0.02), (8, 0.02)])
        bench.batcher.expect("interactive")
        answer = await bench.send(1).answer
        assert 0.015 <= answer.batch_s < 10

    on_loop(test)


def test_the_window_counts_from_the_first_image() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(make_info()), max_delay_s=0.05)
        bench.batcher.times.calibrate([(1, 5.0), (8, 5.0)])
        bench.batcher.expect("interactive")  # and it never comes
        first = bench.send(1)
        await asyncio.sleep(0.03)
        bench.send(2)
        await first.answer
        assert bench.engine.batches == [[1, 2]]
        assert first.answer.result().batch_s >= 0.045

    on_loop(test)


def test_a_batch_is_kept_for_others_only_for_as_long_as_it_takes() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(make_info()), max_delay_s=1000)
        bench.batcher.times.calibrate([(1, 0.2), (8, 8 * 0.2)])
        bench.batcher.expect("interactive")  # and it never comes
        first = bench.send(1)
        await settle()
        bench.send(2)
        answer = await first.answer
        assert bench.engine.batches == [[1, 2]]
        assert 0.39 <= answer.batch_s < 10  # two are worth waiting for twice as long as one

    on_loop(test)


def test_what_decoding_takes_is_not_waiting_where_it_takes_turns_with_the_engine() -> None:
    async def test() -> None:
        info = dataclasses.replace(make_info(max_batch=4), takes_turns=True)
        batcher = Bench(FakeEngine(info), max_delay_s=0.5, decode_s=lambda: 0.1).batcher
        batcher.times.calibrate([(1, 0.2), (4, 0.8)])
        assert batcher._window_s(1) == pytest.approx(0.2)
        arrival = batcher.arriving("interactive")
        assert batcher._window_s(1) == pytest.approx(0.2), "whoever sends slowly is waited for no longer"
        batcher.expect("interactive")
        arrival.end()
        assert batcher._window_s(1) == pytest.approx(0.3), "he is being decoded now"
        batcher._come = 2
        assert batcher._window_s(2) == pytest.approx(0.7), "those who were decoded before him as well"
        batcher._come = 20
        assert batcher._window_s(2) == pytest.approx(0.8), "a full batch at most"
        assert batcher._window_s(4) == pytest.approx(0.9), "the decoding of a full batch, and max_delay_s"
        batcher.withdraw("interactive")

    on_loop(test)


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(make_info(max_batch=2)), max_delay_s=1000)
        bench.batcher.expect("interactive")
        bench.send(1)
        bench.send(2)
        await settle()
        assert bench.engine.batches == [[1, 2]]

    on_loop(test)


def test_images_gather_while_the_engine_works_and_one_full_batch_is_prefetched() -> None:
    async def test() -> None:
        engine = FakeEngine(make_info(max_batch=4))
        bench = Bench(engine)
        engine.gate.clear()
        jobs = [bench.send(0)]
        await settle()
        jobs += [bench.send(red) for red in (1, 2, 3)]
        await settle()
        assert engine.batches == [[0]]  # three would fit together with a fourth
        jobs += [bench.send(red) for red in range(4, 14)]
        await settle()
        assert engine.batches == [[0], [1, 2, 3, 4]]  # exactly one ahead
        engine.gate.set()
        await asyncio.gather(*(job.answer for job in jobs))
        assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13]]
        assert [red_of(job) for job in jobs] == list(range(14))

    on_loop(test)


def test_an_image_whose_client_left_never_reaches_the_engine() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine())
        bench.engine.gate.clear()
        bench.send(0)
        await settle()
        stays, leaves = bench.send(1), bench.send(2)
        leaves.answer.cancel()
        bench.engine.gate.set()
        await stays.answer
        assert bench.engine.batches == [[0], [1]]
        assert ("dropped", "engine", "client-gone") in bench.log.events

    on_loop(test)


def test_an_image_whose_deadline_passed_never_reaches_the_engine() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine())
        bench.engine.gate.clear()
        bench.send(0)
        await settle()
        late = bench.send(1, timeout_s=0.01)
        await asyncio.sleep(0.02)
        bench.engine.gate.set()
        with pytest.raises(DeadlineExceededError):
            await late.answer
        assert bench.engine.batches == [[0]]
        assert ("dropped", "engine", "deadline") in bench.log.events

    on_loop(test)


@pytest.mark.parametrize("late", [[0], [0, 1, 2]])
def test_a_deadline_that_passes_between_taking_a_batch_and_computing_it_is_that_images_alone(
    monkeypatch: pytest.MonkeyPatch, late: list[int]
) -> None:
    """On some event loops (uvloop) a timer comes between."""

    async def test() -> None:
        bench = Bench(FakeEngine())
        bench.batcher.expect("interactive")
        jobs = [bench.send(red) for red in range(3)]
        take = bench.batcher._take

        def then_it_is_late(free_at: float) -> list[Job]:
            batch = take(free_at)
            for index in late:
                jobs[index].fail(DeadlineExceededError("late"))
            return batch

        monkeypatch.setattr(bench.batcher, "_take", then_it_is_late)
        bench.batcher.withdraw("interactive")
        outcomes = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        await bench.batcher.close()
        in_time = [red for red in range(3) if red not in late]
        assert [isinstance(outcome, DeadlineExceededError) for outcome in outcomes] == [
            red in late for red in range(3)
        ]
        assert [red_of(jobs[red]) for red in in_time] == in_time
        assert bench.engine.batches == ([in_time] if in_time else [])
        done = [("done", len(in_time))] if in_time else []
        assert bench.log.events == [*[("dropped", "engine", "deadline")] * len(late), *done]

    on_loop(test)


def test_only_the_guilty_image_fails() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(guilty={5}))
        bench.engine.gate.clear()
        bench.send(0)
        await settle()
        jobs = [bench.send(red) for red in range(1, 9)]
        bench.engine.gate.set()
        outcomes = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        assert isinstance(outcomes[4], EngineFailedError)
        assert [red_of(job) for job in jobs if job is not jobs[4]] == [1, 2, 3, 4, 6, 7, 8]

    on_loop(test)


def test_a_batch_too_large_for_the_device_is_halved_until_it_fits() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(memory=2))
        bench.batcher.expect("interactive")
        jobs = [bench.send(red) for red in range(7)]
        bench.batcher.withdraw("interactive")
        await asyncio.gather(*(job.answer for job in jobs))
        assert [red_of(job) for job in jobs] == list(range(7))
        assert ("failed", "out-of-memory") in bench.log.events

    on_loop(test)


@pytest.mark.parametrize("kind", ["dead", "hung"])
def test_an_engine_that_is_gone_fails_what_waits_and_says_so_once(kind: str) -> None:
    async def test() -> None:
        engine = FakeEngine(make_info(max_batch=2), dead=kind == "dead", hangs=kind == "hung")
        bench = Bench(engine, engine_timeout_s=0.02)
        engine.gate.clear()
        jobs = [bench.send(red) for red in range(5)]
        await settle()
        engine.gate.set()
        outcomes = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        assert all(isinstance(outcome, NotReadyError) for outcome in outcomes)
        assert len(bench.log.deaths) == 1
        assert ("failed", kind) in bench.log.events
        with pytest.raises(NotReadyError):
            await bench.send(9).answer
        await bench.batcher.close()

    on_loop(test)


def test_an_answer_with_the_wrong_number_of_rows_is_not_believed() -> None:
    class Short(FakeEngine):
        async def predict(self, images: Any) -> Any:
            return await super().predict(images[:1])

    async def test() -> None:
        bench = Bench(Short())
        bench.batcher.expect("interactive")
        jobs = [bench.send(red) for red in range(3)]
        bench.batcher.withdraw("interactive")
        await asyncio.gather(*(job.answer for job in jobs))
        assert [red_of(job) for job in jobs] == [0, 1, 2]  # one by one they are right
        assert ("failed", "error") in bench.log.events

    on_loop(test)


def test_people_go_before_scoring_and_scoring_does_not_starve() -> None:
    async def test() -> None:
        engine = FakeEngine(make_info(max_batch=2))
        bench = Bench(engine)
        engine.gate.clear()
        bench.send(0)
        bench.send(0)
        await settle()
        bench.send(255, priority="batch")
        jobs = [bench.send(red) for red in range(1, 31)]
        engine.gate.set()
        await asyncio.gather(*(job.answer for job in jobs))
        batch_of_255 = next(i for i, batch in enumerate(engine.batches) if 255 in batch)
        assert 6 <= batch_of_255 <= 10  # behind people, but not behind all of them
        people = [red for red in engine.seen if red not in {0, 255}]
        assert people == sorted(people)

    on_loop(test)


def test_close_answers_everything_first() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(delay_s=0.01))
        jobs = [bench.send(red) for red in range(20)]
        await bench.batcher.close()
        assert [red_of(job) for job in jobs] == list(range(20))

    on_loop(test)


def test_the_estimate_follows_the_measured_batch_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        bench = Bench(FakeEngine())
        assert bench.batcher.forecast.seconds_until_answered() == 0
        bench.batcher.times.calibrate([(1, 0.0075), (8, 0.025)])  # half of what it takes later
        for size in (1, 2, 4, 8) * 20:
            bench.batcher.times.observe(size, 0.010 + 0.005 * size)
        np.testing.assert_allclose(bench.batcher.times.fixed, 0.010, rtol=0.01)
        np.testing.assert_allclose(bench.batcher.times.predict(6), 0.040, rtol=0.01)
        np.testing.assert_allclose(
            bench.batcher.forecast.seconds_until_answered(17), 2 * 0.050 + 0.015, rtol=0.01
        )
        bench.engine.gate.clear()
        for red in range(8 + 8 + 4):
            bench.send(red)
        await settle()
        running = [since for since, _ in bench.batcher._computing.values()]
        clock(monkeypatch, estimate)[0] = max(running)
        # One batch runs and one is prefetched (8 each, 50 ms); four wait and one more makes five (35 ms).
        np.testing.assert_allclose(bench.batcher.forecast.seconds_until_answered(), 0.135, atol=0.02)

    on_loop(test)


_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 255), st.sampled_from(["interactive", "batch"])),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("turn"), st.integers(1, 5)),
        st.tuples(st.just("hold")),
        st.tuples(st.just("release")),
        st.tuples(st.just("expect")),
    ),
    max_size=60,
)


class Script:
    """What can happen to a batcher, by name."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sent: list[tuple[int, Job]] = []
        self.expected = 0

    async def send(self, red: int, priority: Priority) -> None:
        expected = self.expected > 0
        priority = "interactive" if expected else priority  # as `expect` has said
        self.sent.append((red, self.bench.send(red, priority=priority, expected=expected)))
        self.expected -= self.expected > 0

    async def expect(self) -> None:
        self.bench.batcher.expect("interactive")
        self.expected += 1

    async def leave(self, index: int) -> None:
        if index < len(self.sent):
            self.sent[index][1].answer.cancel()

    async def turn(self, times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(0)

    async def hold(self) -> None:
        self.bench.engine.gate.clear()

    async def release(self) -> None:
        self.bench.engine.gate.set()

    async def end(self) -> None:
        await self.release()
        for _ in range(self.expected):
            self.bench.batcher.withdraw("interactive")
        await self.bench.batcher.close()


@settings(max_examples=150, deadline=None)
@given(
    events=_EVENTS,
    max_batch=st.integers(1, 5),
    guilty=st.sets(st.integers(0, 255), max_size=60),
    memory=st.integers(1, 5),
)
def test_any_interleaving_gives_each_image_its_own_answer(
    events: list[tuple[Any, ...]], max_batch: int, guilty: set[int], memory: int
) -> None:
    async def test() -> None:
        engine = FakeEngine(make_info(max_batch=max_batch), guilty=guilty, memory=memory)
        script = Script(Bench(engine, max_delay_s=0.001))
        for kind, *rest in events:
            await getattr(script, kind)(*rest)
        await script.end()
        assert all(len(batch) <= max_batch for batch in engine.batches)
        for red, job in script.sent:
            assert job.answer.done()
            if red in guilty and not job.answer.cancelled():
                assert isinstance(job.answer.exception(), EngineFailedError)
            elif not job.answer.cancelled():
                assert red_of(job) == red

    on_loop(test)


def test_nearly_all_answers_keep_the_learned_lateness(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    now = clock(monkeypatch, estimate)
    lateness, late = Lateness(), 0
    for number in range(6000):
        now[0] += 0.01
        actual_s = 0.1 * draw.lognormvariate(
            0.3, 0.3
        )  # half of them take 1.35 times as long as predicted, or more
        late += number >= 1000 and actual_s > 0.1 * lateness.factor
        lateness.observe(0.1, actual_s)
    assert 0.01 < late / 5000 < 0.05


def test_lateness_is_bounded_and_forgotten_when_nothing_teaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch, estimate)
    lateness = Lateness()
    assert lateness.factor == 1
    for _ in range(1000):
        lateness.observe(0.1, 100.0)
    assert lateness.factor == pytest.approx(4)
    now[0] += 10
    assert lateness.factor == pytest.approx(1 + 3 / math.e)
    for _ in range(10_000):
        lateness.observe(0.1, 0.01)
    assert lateness.factor == 1


def test_the_wait_is_what_is_before_an_image_of_its_priority() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine(make_info(max_batch=4)))
        wait = bench.batcher.forecast.seconds_of_wait
        bench.batcher.times.calibrate([(1, 1000.0), (4, 1000.0)])
        assert wait("interactive") == wait("batch") == 0  # however slow the model is
        bench.engine.gate.clear()
        bench.send(0, timeout_s=10_000)
        await settle()
        for red in range(3):
            bench.send(red, priority="batch", timeout_s=10_000)
        bench.batcher.expect("batch")
        bench.batcher.expect("batch")
        assert wait("interactive") == pytest.approx(1000, abs=20)  # scoring lets people go first
        assert wait("batch") == pytest.approx(3000, abs=20)
        for _ in range(3):
            bench.batcher.expect("interactive")
        assert wait("interactive") == pytest.approx(2000, abs=20)
        assert wait("batch") == pytest.approx(3000, abs=20)
        assert bench.batcher.expected == 5

    on_loop(test)


def clock(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[float]:
    """A clock of the module's own, which stands still; its time is the list's element."""
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def test_an_answer_that_would_come_too_late_does_not_take_the_engines_time() -> None:
    async def test() -> None:
        bench = Bench(FakeEngine())
        bench.batcher.times.calibrate([(1, 2.0), (8, 2.0)])
        hopeless, patient = bench.send(1, timeout_s=1), bench.send(2, timeout_s=10)
        with pytest.raises(DeadlineExceededError):
            await hopeless.answer
        await patient.answer
        assert bench.engine.batches == [[2]]

    on_loop(test)
