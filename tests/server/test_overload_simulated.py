"""The rule that tells an overload, in simulated traffic: what a minute of real load shows, on every run and exactly.

The machine is the one of docs/lab-notes.md: two cores, int8; photographs are decoded while the engine has nothing to do,
then computed in batches of up to 32. `benchmarks/overload.py` measures the same with a real server.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import pytest

from topfive.loadtest import LoadTestConfig, arrival_times, quantile
from topfive_server.errors import QueueFullError
from topfive_server.estimate import BatchTimes
from topfive_server.load_shedding import WaitLimit

MAX_BATCH: Final = 32
DECODE_S: Final = 0.0013
"""For one photograph, with two of them at a time."""
BEST: Final = 250.0
"""Images a second in full batches."""
SUSTAINABLE: Final = 175.0
"""Images a second that `benchmarks/overload.py` found to keep a p99 within ten lone requests."""


TIMES: Final = BatchTimes()
TIMES.calibrate([(1, 0.0075), (MAX_BATCH, 0.085)])


@dataclass
class Machine:
    """Answers or refuses whoever comes, in the time of `now`."""

    now: list[float]
    limit: WaitLimit = field(default_factory=lambda: WaitLimit(max_wait_s=0, overload_wait_s=0))
    answered: list[tuple[float, float]] = field(default_factory=list)
    """When each came, and how long it took."""
    refused: list[float] = field(default_factory=list)
    """When each came."""

    def serve(self, arrivals: Iterable[float]) -> None:
        """All of them, to the last answer."""
        coming, queue = deque(sorted(arrivals)), deque[float]()
        at = 0.0

        def let_in(until: float, *, free_at: float, decoded: int = 0, computing: int = 0) -> None:
            while coming and coming[0] <= until:
                came = self.now[0] = coming.popleft()
                wait_s = (
                    max(free_at - came, 0)
                    + TIMES.predict_queue(len(queue), MAX_BATCH)
                    + (len(queue) - decoded) * DECODE_S
                )
                full_s = TIMES.predict(MAX_BATCH) + MAX_BATCH * DECODE_S
                try:
                    self.limit.check(wait_s, len(queue) + computing, full_batch_s=full_s, max_batch=MAX_BATCH)
                except QueueFullError:
                    self.refused.append(came)
                else:
                    queue.append(came)

        while coming or queue:
            if not queue:
                at = max(at, coming[0])
                let_in(at, free_at=at)
            decoded = 0
            while decoded < min(len(queue), MAX_BATCH):
                at += DECODE_S
                let_in(at, free_at=at, decoded=decoded)
                decoded += 1
            batch = [queue.popleft() for _ in range(decoded)]
            at += TIMES.predict(decoded)
            let_in(at, free_at=at, computing=decoded)
            self.answered += [(came, at - came) for came in batch]

    def p99_s(self, since: float, until: float) -> float:
        """Of what was answered of those who came within these seconds."""
        return quantile(sorted(wait_s for came, wait_s in self.answered if since <= came < until), 0.99)


def poisson(rate: float, begin: float, end: float, seed: int) -> list[float]:
    """Requests that come by themselves."""
    return [begin + due for due in arrival_times(rate, LoadTestConfig(duration_s=end - begin, seed=seed))]


def burst(images: int, within_s: float, *, seconds: int = 20) -> list[float]:
    """So many each second, evenly within its first part."""
    return [second + within_s * n / images for second in range(seconds) for n in range(images)]


@pytest.fixture(name="machine")
def new_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    clock = [0.0]
    monkeypatch.setattr("topfive_server.load_shedding.monotonic", lambda: clock[0])
    return Machine(clock)


@pytest.mark.parametrize("seed", range(8))
def test_at_twice_the_load_a_whole_minute_is_as_quick_and_as_busy_as_it_should_be(
    machine: Machine, seed: int
) -> None:
    quiet = poisson(0.8 * SUSTAINABLE, 0, 20, seed)
    machine.serve([*quiet, *poisson(2 * SUSTAINABLE, 20, 80, seed + 100)])
    assert min(machine.refused) > 20, "nobody is refused before"
    assert machine.p99_s(20, 80) <= 2 * machine.p99_s(2, 20), "its first second included"
    assert sum(came >= 20 for came, _ in machine.answered) / 60 >= 0.9 * BEST


@pytest.mark.parametrize(("load", "most"), [(0.75, 0.0), (0.85, 0.005), (0.95, 0.06)])
def test_what_can_be_served_is_hardly_ever_refused_for_a_queue_that_grows_by_chance(
    machine: Machine, load: float, most: float
) -> None:
    # As long as short waits were kept up until nobody was refused, it was 2 % and 9 % at 85 % and 95 %.
    arrivals = poisson(load * BEST, 0, 120, seed=1)
    machine.serve(arrivals)
    assert len(machine.refused) <= most * len(arrivals)


@pytest.mark.parametrize(("images", "within_s"), [(60, 0.0), (60, 0.2), (90, 0.4)])
def test_bursts_are_served_late_and_not_refused(machine: Machine, images: int, within_s: float) -> None:
    machine.serve(burst(images, within_s))
    assert machine.refused == []


def test_the_machine_does_one_thing_after_the_other(machine: Machine) -> None:
    machine.serve([1.0, 1.0, 5.0])
    two, one = TIMES.predict(2) + 2 * DECODE_S, TIMES.predict(1) + DECODE_S
    assert [came for came, _ in machine.answered] == [1.0, 1.0, 5.0]
    assert [wait_s for _, wait_s in machine.answered] == pytest.approx([two, two, one])
    machine.answered.clear()
    machine.serve([10.0] * 40)
    ends: Sequence[float] = sorted({came + wait_s for came, wait_s in machine.answered})
    assert [later - sooner for sooner, later in pairwise([10.0, *ends])] == pytest.approx(
        [TIMES.predict(32) + 32 * DECODE_S, TIMES.predict(8) + 8 * DECODE_S]
    )
