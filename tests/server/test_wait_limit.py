"""Who is refused because too many are before him, by the limit alone and over HTTP with a fake engine."""

import re
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from tests.server.fakes import FakeEngine, make_info, picture
from tests.server.harness import Harness, Reply, eventually, serving
from tests.server.test_app import send_files
from tests.server.test_oip import arrays, infer

from topfive_server import admission
from topfive_server.admission import WaitLimit
from topfive_server.errors import QueueFullError


def refused(limit: WaitLimit, wait_s: float, full_batch_s: float = 1.0) -> bool:
    try:
        limit.check(wait_s, full_batch_s=full_batch_s)
    except QueueFullError:
        return True
    return False


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its time is the list's element."""
    now = [1000.0]
    monkeypatch.setattr(admission, "monotonic", lambda: now[0])
    return now


def test_a_burst_may_wait_longer_than_an_overload_until_that_is_over(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=3.0, overload_wait_s=0.5)
    assert not refused(limit, 3.0)
    assert refused(limit, 3.1)
    assert refused(limit, 0.6)
    assert not refused(limit, 0.5)
    now[0] += 0.9
    assert refused(limit, 3.0)  # which counts anew
    now[0] += 0.9
    assert refused(limit, 0.6)
    now[0] += 1.1
    assert not refused(limit, 3.0)


def test_the_limits_follow_the_time_of_a_full_batch(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert not refused(limit, 2.5 * 7, full_batch_s=7)
    assert refused(limit, 2.6 * 7, full_batch_s=7)
    assert not refused(limit, WaitLimit.OVERLOAD_BATCHES * 7, full_batch_s=7)
    assert refused(limit, WaitLimit.OVERLOAD_BATCHES * 7 + 0.1, full_batch_s=7)
    now[0] += 10
    # A model whose batches take no time is not thereby without patience.
    assert not refused(limit, 0.5, full_batch_s=0.0001)
    assert refused(limit, 0.51, full_batch_s=0.0001)
    assert not refused(limit, 0.02, full_batch_s=0.0001)


def waits(now: list[float], limit: WaitLimit, *waits_s: float, every_s: float = 0.1) -> list[bool]:
    """Who is refused of those who come one after the other and would wait so long."""
    outcomes = []
    for wait_s in waits_s:
        outcomes.append(refused(limit, wait_s))
        now[0] += every_s
    return outcomes


def test_a_wait_that_keeps_growing_is_an_overload_before_it_is_too_long(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    # 0.5 of a full batch, for a fourth slot in a row: from there on only 0.28 may be waited for.
    assert waits(now, limit, 0.1, 0.2, 0.4, 0.5, 0.3, 0.28) == [False, False, False, True, True, False]
    now[0] += 1.1
    assert not refused(limit, 2.0)


@pytest.mark.parametrize(
    ("what", "waits_s"),
    [
        ("a burst that comes within two slots", (0.0, 0.9, 1.8, 1.8, 1.7, 1.6, 1.8, 1.8)),
        ("patient clients", (0.0, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9)),
        ("clients whose number of batches wavers", (1.0, 1.3, 1.6, 1.2, 1.4, 1.6, 1.3, 1.5, 1.6)),
        ("growth that is still short", (0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.49, 0.3)),
        ("growth too slow to go on", (0.8, 0.81, 0.82, 0.83, 0.84, 0.85, 0.86)),
    ],
)
def test_no_overload_is(what: str, waits_s: tuple[float, ...], now: list[float]) -> None:
    assert not any(waits(now, WaitLimit(max_wait_s=0, overload_wait_s=0), *waits_s)), what


def test_growth_across_a_pause_is_none(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert not any(waits(now, limit, 0.3, 0.6, 0.9, every_s=0.1))
    now[0] += 0.2
    assert not refused(limit, 1.2)


def test_whoever_wants_bursts_answered_late_sets_both_to_the_same(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=2.0, overload_wait_s=2.0)
    assert not any(waits(now, limit, 0.1, 0.5, 1.0, 1.5, 1.9, 2.0))


def test_overload_never_allows_more_than_the_limit_does() -> None:
    limit = WaitLimit(max_wait_s=1.0, overload_wait_s=60.0)
    assert refused(limit, 1.1)
    assert refused(limit, 1.1)
    assert not refused(limit, 1.0)


def test_nothing_before_a_request_is_never_too_much() -> None:
    limit = WaitLimit(max_wait_s=0.001, overload_wait_s=0.001)
    assert refused(limit, 1.0)
    assert not refused(limit, 0.0)


class Slow:
    """A server whose batches of up to 8 take 10 s, by its measurements; the first stays in the engine."""

    def __init__(self, server: Harness, threads: ThreadPoolExecutor) -> None:
        self.server = server
        self.threads = threads
        server.on_loop(lambda: server.model.batcher.times.calibrate([(1, 10.0), (8, 10.0)]))
        server.hold()
        self.pending = [self.send(0)]
        eventually(lambda: server.engine.batches == [[0]])

    def send(self, red: int, **headers: str) -> Future[Reply]:
        return self.threads.submit(self.server.classify, picture(red), **headers)

    def queue(self, *reds: int, **headers: str) -> None:
        """Send, and wait until all are decoded and wait for the engine."""
        for red in reds:
            self._queue_one(red, headers)

    def _queue_one(self, red: int, headers: dict[str, str]) -> None:
        batcher = self.server.model.batcher
        depth = batcher.depth
        self.pending.append(self.send(red, **headers))
        eventually(lambda: batcher.depth == depth + 1)

    def answered(self) -> list[int]:
        self.server.release()
        return sorted(reply.result().classes[0] for reply in self.pending)


def test_a_wait_too_long_is_refused_at_once_and_says_when_to_come_back() -> None:
    with (
        serving(FakeEngine(make_info(max_batch=8)), max_wait_ms=14_000) as server,
        ThreadPoolExecutor() as threads,
    ):
        slow = Slow(server, threads)
        slow.queue(1)  # 10 s are before it, however slow that is
        reply = server.classify(picture(2))
        assert (reply.status, reply.code) == (429, "queue-full")
        assert re.search(r"take \d{5} ms.* at most 14000 ms", reply.json["detail"])
        assert reply.headers["retry-after"] == "6"  # 20 s are before it, and 14 s allowed
        assert server.application.admission.images == 2
        assert slow.answered() == [0, 1]
        assert server.classify(picture(2)).classes == [2]


def test_the_default_limit_follows_the_models_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(WaitLimit, "check", lambda _, __, *, full_batch_s: seen.append(full_batch_s))
    with serving(FakeEngine(make_info(max_batch=8))) as server:
        server.on_loop(lambda: server.model.batcher.times.calibrate([(1, 1.0), (8, 8.0)]))
        assert server.classify(picture(1)).status == 200
    assert seen == [8.0]


def test_scoring_waits_and_is_in_nobodys_way() -> None:
    with (
        serving(FakeEngine(make_info(max_batch=8)), max_wait_ms=14_000) as server,
        ThreadPoolExecutor() as threads,
    ):
        slow = Slow(server, threads)
        slow.queue(1, 2, 3, X_Priority="batch")
        slow.queue(4)  # before those three
        assert server.classify(picture(9)).code == "queue-full"
        slow.queue(5, X_Priority="batch")
        assert slow.answered() == [0, 1, 2, 3, 4, 5]


def test_a_patient_client_is_refused_like_any_other() -> None:
    with (
        serving(FakeEngine(make_info(max_batch=8)), max_wait_ms=14_000) as server,
        ThreadPoolExecutor() as threads,
    ):
        slow = Slow(server, threads)
        slow.queue(1)
        assert server.classify(picture(2), X_Timeout_Ms="59000").code == "queue-full"
        assert slow.answered() == [0, 1]


def test_a_request_of_many_images_does_not_wait_for_itself() -> None:
    with serving(FakeEngine(make_info(max_batch=2)), max_wait_ms=1) as server:
        server.on_loop(lambda: server.model.batcher.times.calibrate([(1, 10.0), (2, 10.0)]))
        reply = send_files(server, *[("a.png", picture(red)) for red in range(30)])
        assert reply.status == 200
        assert len(reply.json["images"]) == 30


def test_the_open_inference_protocol_is_bounded_alike() -> None:
    with (
        serving(FakeEngine(make_info(max_batch=8)), max_wait_ms=14_000) as server,
        ThreadPoolExecutor() as threads,
    ):
        slow = Slow(server, threads)
        slow.queue(1)
        reply = infer(server, 2)
        assert (reply.status, reply.headers["retry-after"]) == (429, "6")
        scoring = threads.submit(infer, server, 3, parameters={"priority": 2})
        eventually(lambda: server.model.batcher.depth == 2)
        assert slow.answered() == [0, 1]
        assert arrays(scoring.result())["classes"][0, 0] == 3
        batcher = server.model.batcher
        eventually(lambda: server.on_loop(lambda: batcher.seconds_of_wait("interactive")) == 0)
