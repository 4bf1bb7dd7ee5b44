"""Who is refused because too many are before him, by the limit alone and over HTTP with a fake engine."""

import contextlib
import http.client
import re
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from tests.server.fakes import FakeEngine, make_info, picture
from tests.server.harness import Harness, Reply, eventually, serving
from tests.server.test_app import multipart, send_files
from tests.server.test_oip import arrays, infer

from topfive_server import load_shedding
from topfive_server.errors import QueueFullError
from topfive_server.load_shedding import ClosedLoops, WaitLimit


def refused(
    limit: WaitLimit,
    wait_s: float,
    images: int = 0,
    *,
    full_batch_s: float = 1.0,
    max_batch: int = 32,
    loops: bool = False,
) -> bool:
    try:
        limit.check(wait_s, images, full_batch_s=full_batch_s, max_batch=max_batch, loops=loops)
    except QueueFullError:
        return True
    return False


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its time is the list's element."""
    now = [1000.0]
    monkeypatch.setattr(load_shedding, "monotonic", lambda: now[0])
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


@pytest.mark.parametrize(("let_in", "lasts"), [(19, False), (18, True)])
def test_an_overload_is_over_when_few_are_refused(let_in: int, lasts: bool, now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=3.0, overload_wait_s=0.5)
    began = now[0]
    assert refused(limit, 3.1)
    now[0] += 0.1
    assert refused(limit, 0.6)
    for _ in range(let_in):
        now[0] += 0.04
        assert not refused(limit, 0.5)
    # Two of 21 in a second are few, two of 20 are a tenth.
    now[0] = began + 1
    assert refused(limit, 3.0) is lasts


def test_each_second_of_an_overload_counts_for_itself(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=3.0, overload_wait_s=0.5)
    began = now[0]
    for _ in range(50):
        assert refused(limit, 3.1)
    now[0] = began + 0.9
    assert refused(limit, 3.1)
    now[0] = began + 1
    assert refused(limit, 3.0)
    for _ in range(30):
        assert not refused(limit, 0.5)
    now[0] = began + 1.9
    assert refused(limit, 0.6)
    now[0] = began + 2
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


def refusals(now: list[float], limit: WaitLimit, *queues: int, loops: bool = False) -> list[int]:
    """Who is refused of those who come one after the other and find so many images, of which 32 take a second."""
    found = []
    for images in queues:
        if refused(limit, images / 32, images, loops=loops):
            found.append(images)
        now[0] += 0.08
    return found


def test_a_queue_that_keeps_growing_is_an_overload_before_it_is_too_long(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    # 0.8 of a batch, above the slot before in four of six: from there on only 0.3 of one may be waited for.
    assert refusals(now, limit, 2, 8, 8, 14, 19, 17, 26, 10, 9, 10) == [26, 10, 10]
    now[0] += 1.1
    assert not refused(limit, 2.0, 64)


@pytest.mark.parametrize(
    ("what", "queues"),
    [
        ("a burst that comes within three slots", (0, 20, 40, 60, 60, 55, 50, 60, 60)),
        ("patient clients", (0, 63, 63, 63, 63, 63, 63)),
        ("clients that come in two camps", (63, 31, 40, 50, 63, 33, 41, 52, 62, 30, 63)),
        ("growth that is still short", (1, 2, 4, 8, 12, 16, 22)),
        ("growth of a server that has just begun", (2, 8, 14, 20, 26, 32)),
        ("growth that is slow", (50, 51, 52, 53, 54, 55, 56, 57)),
        ("growth to what it was a moment ago", (63, 63, 10, 20, 30, 40, 50, 60, 63)),
        ("growth in every other slot", (5, 10, 10, 20, 20, 25, 25, 30, 30, 40, 40, 50, 50, 60)),
        ("growth below what it was within", (0, 5, 10, 30, 15, 20, 29)),
    ],
)
def test_no_overload_is(what: str, queues: tuple[int, ...], now: list[float]) -> None:
    assert refusals(now, WaitLimit(max_wait_s=0, overload_wait_s=0), *queues) == [], what


def test_who_finds_less_than_others_of_his_slot_found_sees_no_growth(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert refusals(now, limit, 6, 6, 6, 10, 14, 18) == []
    # Of the slot that makes it an overload the first finds too little for one, and the third less than the second.
    assert not refused(limit, 22 / 32, 22)
    limit.check(0.6, 30, full_batch_s=1.0, max_batch=32)  # many images that take little
    assert not refused(limit, 29 / 32, 29)
    assert refused(limit, 31 / 32, 31)


def test_growth_across_a_time_in_which_nobody_came_is_none(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert refusals(now, limit, 2, 5, 8, 12, 15, 18) == []
    now[0] += 0.3
    assert not refused(limit, 1.2, 40)


def test_many_who_never_stop_are_tried_again_after_a_while(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert refusals(now, limit, 4, 8, 12, 14, 16, 20, 32) == [32]
    # One in each slot: refused for a minute from the first on, and let in from then on.
    assert len(refusals(now, limit, *[40] * 1000)) == pytest.approx(60 / 0.08, abs=2)
    assert refusals(now, limit, *[40] * 20) == []


def test_an_overload_by_clients_in_a_loop_is_tried_anew_sooner(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert refused(limit, 2.6, 83)  # all have come at once, behind a batch of others
    assert len(refusals(now, limit, *[63] * 1000, loops=True)) == pytest.approx(10 / 0.08, abs=2)


def test_clients_in_a_loop_may_come_one_after_the_other(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=0, overload_wait_s=0)
    assert refusals(now, limit, *range(0, 70, 7), loops=True) == []
    # Once it is one, it lasts: in an overload requests that come by themselves look like loops at times.
    assert refusals(now, limit, 70, 72, loops=False) == [70, 72]
    assert refusals(now, limit, 74, loops=True) == [74]
    # But not beyond the limit of all, and then the overload lasts.
    assert refusals(now, WaitLimit(max_wait_s=0, overload_wait_s=0), 81, 40, loops=True) == [81, 40]


def test_loops_are_told_by_how_soon_they_ask_again() -> None:
    loops = ClosedLoops()
    for _ in range(15):
        loops.answered()
        assert not loops.asked(0.001)
    loops.answered()
    assert loops.asked(0.001)
    for _ in range(200):  # a third of the requests finds a connection that was just answered
        loops.answered()
        loops.answered()
        loops.answered()
        loops.asked(0.001)
        loops.asked(0.5)
        loops.asked(None)
    assert not loops.asked(None)
    for _ in range(200):
        loops.answered()
        loops.asked(0.019)
    assert loops.asked(None)
    for _ in range(200):  # everybody comes back, and nobody at once
        loops.answered()
        loops.asked(0.021)
    assert not loops.asked(None)


def test_a_request_knows_how_long_ago_its_connection_was_answered_out_of_a_large_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float | None] = []

    def note(loops: ClosedLoops, since_answer_s: float | None) -> bool:
        seen.append(since_answer_s)
        return False

    def count(loops: ClosedLoops) -> None:
        answered.append(loops)

    answered: list[ClosedLoops] = []
    monkeypatch.setattr(ClosedLoops, "asked", note)
    monkeypatch.setattr(ClosedLoops, "answered", count)
    # However the first of them are batched, one of the batches is full.
    body, kind = multipart(*[("a.png", picture(red)) for red in range(24)])
    with serving(FakeEngine(make_info(max_batch=8))) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            for data, headers in (
                (picture(1), {}),
                (picture(2), {}),
                (body, kind),
                (picture(3), {}),
                # Scoring asks in a loop, whatever people do.
                (body, kind | {"X-Priority": "batch"}),
                (picture(4), {}),
            ):
                connection.request("POST", "/v1/classify", data, headers)
                assert connection.getresponse().read()
    assert [since_s is not None for since_s in seen] == [False, False, False, True, False, False]
    assert seen[3] is not None
    assert 0 <= seen[3] < 5
    assert len(answered) == 1


def test_whoever_wants_bursts_answered_late_sets_both_to_the_same(now: list[float]) -> None:
    limit = WaitLimit(max_wait_s=2.0, overload_wait_s=2.0)
    assert refusals(now, limit, 4, 16, 32, 48, 60, 64) == []


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

    def note(
        _: WaitLimit, wait_s: float, images: int, *, full_batch_s: float, max_batch: int, loops: bool
    ) -> None:
        assert (wait_s, images, max_batch, loops) == (0, 0, 8, False)
        seen.append(full_batch_s)

    monkeypatch.setattr(WaitLimit, "check", note)
    with serving(FakeEngine(make_info(max_batch=8))) as server:
        server.on_loop(lambda: server.model.batcher.times.calibrate([(1, 1.0), (8, 8.0)]))
        assert server.classify(picture(1)).status == 200
    assert seen == [8.0]


def test_the_limit_is_told_how_many_are_before_and_whether_clients_ask_in_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, bool]] = []

    def note(
        _: WaitLimit, wait_s: float, images: int, *, full_batch_s: float, max_batch: int, loops: bool
    ) -> None:
        seen.append((images, loops))

    monkeypatch.setattr(WaitLimit, "check", note)
    monkeypatch.setattr(ClosedLoops, "asked", lambda _, __: True)
    with serving(FakeEngine(make_info(max_batch=8))) as server, ThreadPoolExecutor() as threads:
        slow = Slow(server, threads)
        slow.queue(1, 2)
        assert slow.answered() == [0, 1, 2]
    # One in the engine, then one that waits as well.
    assert seen == [(0, True), (1, True), (2, True)]


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
        eventually(lambda: server.on_loop(lambda: batcher.forecast.seconds_of_wait("interactive")) == 0)
