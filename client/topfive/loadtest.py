"""How much a server can take, and how long its answers then need: the loads of `topfive load-test`.

Two kinds of load. *Closed loop*: N connections, each sends its next request when the last one is answered, as N patient
users would; it finds the throughput. *Open loop*: requests leave at times drawn beforehand, whatever became of the
earlier ones, as a public would; it finds the latency. An answer's latency counts from the moment its request was *due*:
a stall of the server is charged to everybody who would have come during it, and not only to the one who was there
("coordinated omission", Gil Tene, "How NOT to Measure Latency", 2013). That also charges our own slowness, so each
point has the generator's lag and its share of a core, and says when they are too large to judge the server by.
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from topfive.errors import TopfiveError

_SEARCH_STEPS = 9
ANSWERS_FOR_P99 = 100
"""With fewer, the 99th percentile by nearest rank is the slowest answer, which is chance."""
_LATE_SHARE = 0.2
_LATE_MS = 2.0
"""Of lag; timers are this coarse on a machine that has time."""
_BUSY_CORES = 0.8


class LoadTestError(TopfiveError):
    """A load test that cannot be run as asked."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadTestConfig:
    """What to try, and for how long; every load is bounded."""

    connections: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (1, 16, 64)
    """Closed loop: how many connections to try, one number after the other."""
    rates: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())] = ()
    """Open loop: requests per second to try; by default shares of the best rate that the closed loop saw."""
    p99_ms: float | None = None
    """Search for the highest rate at which 99 % of the answers come within this many milliseconds, without errors."""
    duration_s: float = 5.0
    """Seconds for each point; at 100 requests per second, 5 s make the 99th percentile rest on 5 requests."""
    warmup_s: float = 1.0
    """Seconds of load before the first point, not counted."""
    arrivals: Literal["poisson", "even"] = "poisson"
    """Open loop: requests at random times, as from many independent users, or evenly spaced."""
    timeout_s: float = 10.0
    """Seconds after which a request counts as failed."""
    max_in_flight: int = 1000
    """Open loop: unanswered requests at which a point is broken off as overloaded."""
    max_image_bytes: int = 256 * 1024 * 1024
    """Bytes of images held in memory; files that would exceed it are left out."""
    max_images: int = 256
    """Different images to send; of more files, so many from first to last. Each is sent once before the loads."""
    seed: int = 0
    """Of the random times."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        for name in ("connections", "rates"):
            if not all(math.isfinite(value) and value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; every one must be above 0")
        for name in ("duration_s", "timeout_s", "max_in_flight", "max_image_bytes", "max_images", "p99_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be above 0")
        if not (math.isfinite(self.warmup_s) and self.warmup_s >= 0):
            raise ValueError(f"warmup_s is {self.warmup_s}; it must be at least 0")
        if not self.connections and not self.rates:
            raise ValueError("connections and rates are both empty; give at least one number to one of them")


@dataclass(kw_only=True)
class _Tally:
    """What happened during one point."""

    latencies_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    """When each of them was complete, from the start."""
    lags_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    overloaded: bool = False
    seconds: float = 0.0
    cpu_s: float = 0.0

    def count(self, error: str | None, latency_s: float, answered_s: float) -> None:
        """A request has its answer, or has failed."""
        if error is None:
            self.latencies_s.append(latency_s)
            self.answered_s.append(answered_s)
        else:
            self.errors[error] += 1

    def rate(self) -> float:
        """See `Point.rate`."""
        ends = self.seconds + min(self.latencies_s, default=0.0)
        return sum(answered <= ends for answered in self.answered_s) / self.seconds


@dataclass(frozen=True, kw_only=True)
class Point:
    """The outcome of one load."""

    loop: Literal["closed", "open"]
    asked: float
    """Connections of a closed loop; requests per second of an open one."""
    seconds: float
    answered: int
    """Requests that were classified."""
    errors: dict[str, int]
    """Failed requests by reason: a status, `timeout`, `connection`, or `malformed` (no topfive server's answer)."""
    rate: float
    """Classified requests per second. An open loop's last answers count until the shortest latency after the load: those
    of a queue that was left do not, nor are those missed that could not come sooner."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    lag_p99_ms: float
    """How late the generator itself sent, 99th percentile; part of the latencies of an open loop."""
    generator_cpu: float
    """Cores that the generator used."""
    overloaded: bool = False
    """Broken off because too many requests were unanswered."""
    probe: bool = False
    """Tried to see where the server fails (the sweep, the search), not asked for."""

    @property
    def failed(self) -> bool:
        """Whether requests failed, or the load was broken off."""
        return bool(self.errors) or self.overloaded

    @property
    def generator_late(self) -> bool:
        """Whether more than a fifth of the p99 may be the generator's own lag."""
        return self.lag_p99_ms > max(_LATE_MS, _LATE_SHARE * self.p99_ms)

    @property
    def generator_bound(self) -> bool:
        """Whether the generator was late, or used most of a core: a limit seen here may be its own."""
        return self.generator_late or self.generator_cpu > _BUSY_CORES

    def keeps(self, p99_ms: float) -> bool:
        """Whether all answers came, and 99 % of them in time."""
        return not self.failed and self.answered > 0 and self.p99_ms <= p99_ms


async def closed_loop(
    ask: Callable[[int], Awaitable[str | None]], connections: int, duration_s: float
) -> Point:
    """`connections` workers that each send when their last request is answered."""
    tally = _Tally()
    clock = asyncio.get_running_loop().time
    started, cpu = clock(), time.process_time()
    numbers = iter(range(2**62))

    async def worker() -> None:
        while (sent := clock()) < started + duration_s:
            error = await ask(next(numbers))
            tally.count(error, clock() - sent, clock() - started)

    await asyncio.gather(*(worker() for _ in range(connections)))
    tally.seconds, tally.cpu_s = clock() - started, time.process_time() - cpu
    return _point("closed", connections, tally)


async def open_loop(
    ask: Callable[[int], Awaitable[str | None]], rate: float, config: LoadTestConfig
) -> Point:
    """Requests at times drawn beforehand, whatever became of the earlier ones."""
    tally = _Tally()
    under_way: set[asyncio.Task[None]] = set()
    clock = asyncio.get_running_loop().time
    started, cpu = clock(), time.process_time()

    async def send(number: int, due: float) -> None:
        tally.lags_s.append(clock() - due)
        error = await ask(number)
        tally.count(error, clock() - due, clock() - started)

    for number, offset in enumerate(arrival_times(rate, config)):
        # Sleeping even when late lets the answers that have come be counted.
        await asyncio.sleep(max(0.0, started + offset - clock()))
        if clock() - started > 2 * config.duration_s:
            break  # the generator cannot send so fast, which its lag says; the load is bounded all the same
        if len(under_way) >= config.max_in_flight:
            tally.overloaded = True
            break
        task = asyncio.create_task(send(number, started + offset))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    else:
        await asyncio.sleep(max(0.0, started + config.duration_s - clock()))
    tally.seconds, tally.cpu_s = clock() - started, time.process_time() - cpu
    # Those that are under way have their time-out; their latencies and errors count.
    await asyncio.gather(*under_way)
    return _point("open", rate, tally)


def arrival_times(rate: float, config: LoadTestConfig) -> Iterator[float]:
    """Seconds from the start at which requests are due; the same for the same seed."""
    if config.arrivals == "even":
        # Not by adding up, which would gather rounding errors.
        yield from (number / rate for number in range(math.ceil(config.duration_s * rate)))
        return
    draw = random.Random(config.seed)  # noqa: S311
    due = draw.expovariate(rate)
    while due < config.duration_s:
        yield due
        due += draw.expovariate(rate)


async def search(
    try_rate: Callable[[float], Awaitable[Point]], capacity: float, p99_ms: float, least_rate: float = 0.0
) -> None:
    """Try rates until the highest that keeps `p99_ms` is known to 5 %, or after a few steps, or below `least_rate`."""
    low, high = 0.0, math.inf
    rate = 0.8 * capacity
    for _ in range(_SEARCH_STEPS):
        if (await try_rate(rate)).keeps(p99_ms):
            low = rate
        else:
            high = rate
        if high == math.inf:
            rate = 1.25 * low
        elif high - low <= 0.05 * high:
            return
        else:
            rate = (low + high) / 2
        if rate < least_rate:
            return


def lowest_miss(points: Sequence[Point], p99_ms: float) -> Point | None:
    """The open loop with the lowest rate that did not keep `p99_ms`."""
    missed = [point for point in points if point.loop == "open" and not point.keeps(p99_ms)]
    return min(missed, key=lambda point: point.asked, default=None)


def best_rate(points: Sequence[Point], p99_ms: float) -> Point | None:
    """The open loop with the highest rate that kept `p99_ms`, below the lowest that did not."""
    miss = lowest_miss(points, p99_ms)
    kept = [p for p in points if p.loop == "open" and (miss is None or p.asked < miss.asked)]
    return max(kept, key=lambda point: point.asked, default=None)


def limit_is_the_generators(points: Sequence[Point], p99_ms: float) -> bool:
    """Whether what ended the search for the highest rate may be the generator, and not the server."""
    end = lowest_miss(points, p99_ms) or best_rate(points, p99_ms)
    return end is not None and end.generator_bound


def _point(loop: Literal["closed", "open"], asked: float, tally: _Tally) -> Point:
    milliseconds = sorted(1000 * latency for latency in tally.latencies_s)
    return Point(
        loop=loop,
        asked=asked,
        seconds=tally.seconds,
        answered=len(milliseconds),
        errors=dict(tally.errors),
        rate=tally.rate(),
        p50_ms=quantile(milliseconds, 0.5),
        p90_ms=quantile(milliseconds, 0.9),
        p99_ms=quantile(milliseconds, 0.99),
        max_ms=quantile(milliseconds, 1.0),
        lag_p99_ms=quantile(sorted(1000 * lag for lag in tally.lags_s), 0.99),
        generator_cpu=tally.cpu_s / tally.seconds,
        overloaded=tally.overloaded,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `ordered` do not exceed (nearest rank); 0 of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
