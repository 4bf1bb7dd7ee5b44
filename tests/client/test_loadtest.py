"""The load test's loops and its search, on a clock that only waiting moves."""

import asyncio
import itertools
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from topfive.loadtest import (
    LoadTestConfig,
    Point,
    arrival_times,
    best_rate,
    closed_loop,
    limit_is_the_generators,
    open_loop,
    quantile,
    search,
)

T = TypeVar("T")
Ask = Callable[[int], Awaitable[str | None]]


class VirtualLoop(asyncio.SelectorEventLoop):
    """Waiting takes no time; it only moves the loop's clock."""

    def __init__(self) -> None:
        loop = self

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> list[Any]:
                loop.now += timeout or 0.0
                return list(super().select(0))

        self.now = 0.0
        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


def server_of(workers: int, service_s: float, stall_s: float = 0.0) -> Ask:
    """A server that takes `service_s` for a request, `workers` at once; the first one stalls it."""
    slots = asyncio.Semaphore(workers)

    async def ask(number: int) -> str | None:
        async with slots:
            await asyncio.sleep(service_s + (stall_s if number == 0 else 0.0))
        return None

    return ask


EVEN = LoadTestConfig(arrivals="even", duration_s=10.0)


def test_a_closed_loop_measures_throughput_and_service_time() -> None:
    async def run() -> Point:
        return await closed_loop(server_of(2, 0.010), connections=8, duration_s=10.0)

    point = virtually(run())
    assert point.rate == pytest.approx(200, rel=0.01)
    assert point.p50_ms == pytest.approx(40, rel=0.01)
    assert (point.loop, point.asked, point.errors, point.overloaded) == ("closed", 8, {}, False)


def test_an_open_loop_below_capacity_sees_the_service_time() -> None:
    async def run() -> Point:
        return await open_loop(server_of(1, 0.010), 50, EVEN)

    point = virtually(run())
    assert point.answered == 500
    assert point.rate == pytest.approx(50, rel=0.01)
    assert point.p99_ms == pytest.approx(10, rel=0.01)
    assert point.lag_p99_ms == pytest.approx(0, abs=0.01)
    assert not point.generator_late


def test_a_stall_is_charged_to_all_who_would_have_come_during_it() -> None:
    """Coordinated omission: one second of stall in ten must show in a tenth of the latencies, not in one."""

    async def run() -> tuple[Point, Point]:
        opened = await open_loop(server_of(1, 0.001, stall_s=1.0), 100, EVEN)
        closed = await closed_loop(server_of(1, 0.001, stall_s=1.0), 1, 10.0)
        return opened, closed

    opened, closed = virtually(run())
    assert opened.p90_ms > 100
    assert opened.p99_ms > 800
    assert closed.p99_ms < 2, "a closed loop cannot see it"


def test_a_generator_that_is_late_charges_itself_and_says_so() -> None:
    async def run() -> Point:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)

        async def ask(number: int) -> str | None:
            if number == 3:
                loop.now += 2.0  # the generator itself was held up
            return None

        return await open_loop(ask, 10, EVEN)

    point = virtually(run())
    assert point.max_ms == pytest.approx(2000, rel=0.01)
    assert point.p90_ms > 900, "those that it sent late are charged as well"
    assert point.lag_p99_ms > 1700
    assert point.generator_bound


def test_a_generator_that_cannot_send_so_fast_ends_the_load_all_the_same() -> None:
    async def run() -> Point:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)

        async def ask(_: int) -> str | None:
            loop.now += 1.0  # of the generator's own time
            return None

        return await open_loop(ask, 10, EVEN)

    point = virtually(run())
    assert point.seconds <= 22
    assert point.generator_late


def test_overload_is_broken_off() -> None:
    async def run() -> Point:
        return await open_loop(server_of(1, 1.0), 100, replace(EVEN, max_in_flight=50))

    point = virtually(run())
    assert point.overloaded
    assert point.answered == 50
    assert not point.keeps(1e9)


@pytest.mark.parametrize(
    ("service_s", "asked", "reached"),
    [(0.010, 200, 100), (0.010, 50, 50), (4.0, 0.2, 0.2)],
    ids=["queue", "no queue", "slow, no queue"],
)
def test_the_rate_is_what_the_server_did_while_the_load_lasted(
    service_s: float, asked: float, reached: float
) -> None:
    async def run() -> Point:
        return await open_loop(server_of(1, service_s), asked, EVEN)

    assert virtually(run()).rate == pytest.approx(reached, rel=0.02)


def test_errors_are_counted_by_reason_and_are_no_latencies() -> None:
    async def run() -> Point:
        async def ask(number: int) -> str | None:
            return [None, "429", "timeout"][number % 3]

        return await open_loop(ask, 9, replace(EVEN, duration_s=1.0))

    point = virtually(run())
    assert (point.answered, point.errors) == (3, {"429": 3, "timeout": 3})
    assert not point.keeps(1e9)


def test_arrival_times() -> None:
    assert list(arrival_times(4, replace(EVEN, duration_s=1.0))) == [0.0, 0.25, 0.5, 0.75]
    poisson = LoadTestConfig(duration_s=100.0, seed=1)
    times = list(arrival_times(50, poisson))
    assert times == list(arrival_times(50, poisson))
    assert times != list(arrival_times(50, replace(poisson, seed=2)))
    assert len(times) == pytest.approx(5000, rel=0.05)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


def test_quantiles_are_nearest_rank() -> None:
    values = list(range(1, 101))
    random.Random(0).shuffle(values)
    ordered = sorted(map(float, values))
    assert [quantile(ordered, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert quantile([7.0], 0.5) == 7
    assert quantile([], 0.99) == 0


def point_at(rate: float, p99_ms: float, **changes: Any) -> Point:
    values = {"loop": "open", "asked": rate, "seconds": 1.0, "answered": 100, "errors": {}, "rate": rate}
    latencies = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "max_ms"), p99_ms)
    return Point(**{**values, **latencies, "lag_p99_ms": 0.0, "generator_cpu": 0.1, **changes})


@pytest.mark.parametrize("limit", [30.0, 75.0, 99.0, 160.0, 240.0])
def test_the_search_finds_the_limit_to_a_few_percent(limit: float) -> None:
    tried: list[Point] = []

    async def try_rate(rate: float) -> Point:
        tried.append(point_at(rate, 20.0 if rate <= limit else 500.0))
        return tried[-1]

    virtually(search(try_rate, capacity=100.0, p99_ms=100.0))
    best = best_rate(tried, 100.0)
    assert best is not None
    assert 0.94 * limit <= best.asked <= limit
    assert len(tried) <= 9


def test_a_limit_that_nothing_keeps_is_found_to_be_so() -> None:
    tried: list[Point] = []

    async def try_rate(rate: float) -> Point:
        tried.append(point_at(rate, 500.0))
        return tried[-1]

    virtually(search(try_rate, capacity=100.0, p99_ms=100.0))
    assert best_rate(tried, 100.0) is None
    assert len(tried) <= 9


def test_the_search_ends_where_next_to_nothing_would_be_sent() -> None:
    tried: list[float] = []

    async def try_rate(rate: float) -> Point:
        tried.append(rate)
        return point_at(rate, 500.0)

    virtually(search(try_rate, capacity=100.0, p99_ms=100.0, least_rate=20.0))
    assert tried == [80.0, 40.0, 20.0]


def test_a_limit_is_the_generators_where_that_was_late() -> None:
    sound, late, missed = point_at(100, 50), point_at(150, 900, lag_p99_ms=800.0), point_at(150, 900)
    assert limit_is_the_generators([sound, late], 100.0)
    assert limit_is_the_generators([replace(sound, lag_p99_ms=30.0)], 100.0)
    assert not limit_is_the_generators([sound, missed], 100.0)
    assert not limit_is_the_generators([sound, missed, replace(late, asked=200.0)], 100.0)


def test_a_lucky_point_above_a_failed_one_does_not_count() -> None:
    points = [point_at(120, 50), point_at(100, 500), point_at(80, 40), point_at(50, 30)]
    best = best_rate(points, 100.0)
    assert best is not None
    assert best.asked == 80


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"connections": (0,)}, "connections is"),
        ({"rates": (1.0, float("nan"))}, "rates is"),
        ({"duration_s": 0}, "duration_s is 0"),
        ({"p99_ms": -1}, "p99_ms is -1"),
        ({"warmup_s": -1}, "warmup_s is -1"),
        ({"connections": ()}, "both empty"),
    ],
)
def test_nonsense_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoadTestConfig(**fields)
