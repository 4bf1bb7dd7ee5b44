"""When a client asks again, decided without a network or a clock."""

import email.utils
import math
from collections.abc import Mapping
from typing import cast

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topfive._images import Upload
from topfive._protocol import Conversation, Options, Reply, Send, Sleep, parse_server_timing
from topfive._results import Classification
from topfive._retry import RetryBudget, RetryPolicy, parse_retry_after
from topfive.errors import ApiConnectionError, ApiStatusError, OverloadedError

NOW = 1_700_000_000.0


def http_date(seconds: float) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 0 "}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": http_date(NOW + 12)}, 12.0),
        ({"retry-after": http_date(NOW - 12)}, 0.0),
        ({"retry-after": http_date(NOW + 3612), "date": http_date(NOW + 3600)}, 12.0),
        ({"retry-after": http_date(NOW + 12), "date": "yesterday"}, 12.0),
        ({"retry-after": "Wed, 99 Nov 2026 07:28:00 GMT"}, None),
    ],
)
def test_retry_after_in_both_forms(headers: Mapping[str, str], expected: float | None) -> None:
    assert parse_retry_after(headers, now=lambda: NOW) == expected


@given(st.text())
def test_retry_after_never_fails(value: str) -> None:
    seconds = parse_retry_after({"retry-after": value, "date": value})
    assert seconds is None or (math.isfinite(seconds) and seconds >= 0)


@given(st.text())
def test_server_timing_never_fails(value: str) -> None:
    parse_server_timing(value)


def test_server_timing() -> None:
    header = (
        'receive;dur=0.2, decode;desc="JPEG, scaled";dur=1.9, cache;desc=hit, infer; DUR="9.5", bad;dur=x'
    )
    assert parse_server_timing(header) == {"receive": 0.2, "decode": 1.9, "infer": 9.5}


def test_delays_double_up_to_the_cap_less_up_to_half() -> None:
    policy = RetryPolicy(attempts=9, first_delay_s=1, max_delay_s=5)
    assert [policy.delay(n, None, lambda: 0.0) for n in range(1, 9)] == [1, 2, 4, 5, 5, 5, 5, 5]
    assert [policy.delay(n, None, lambda: 1.0) for n in range(1, 4)] == [0.5, 1, 2]
    assert policy.delay(9, None) is None


@given(
    attempt=st.integers(1, 3),
    retry_after=st.floats(0, 30),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_a_servers_wish_is_never_undercut_and_never_much_exceeded(
    attempt: int, retry_after: float, draw: float
) -> None:
    policy = RetryPolicy()
    delay = policy.delay(attempt, retry_after, lambda: draw)
    assert delay is not None
    assert retry_after <= delay <= max(1.25 * retry_after, policy.max_delay_s)


def test_a_wish_beyond_the_cap_ends_it() -> None:
    policy = RetryPolicy(max_retry_after_s=10)
    assert policy.delay(1, 10) is not None
    assert policy.delay(1, 10.1) is None


def test_the_budget_allows_retries_until_half_is_spent_and_refills_with_success() -> None:
    budget = RetryBudget(RetryPolicy(budget=6, refill=0.5))
    assert [budget.on_failure() for _ in range(5)] == [True, True, False, False, False]
    for _ in range(5):
        budget.on_success()
    assert budget.on_failure() is False
    for _ in range(100):
        budget.on_success()
    assert [budget.on_failure() for _ in range(4)] == [True, True, False, False]


class World:
    """Drives a conversation: answers from a list, a clock that only sleeping moves."""

    def __init__(self, answers: list[Reply], **policy: float) -> None:
        self.now = 100.0
        self.answers = answers
        self.sent: list[Send] = []
        self.slept: list[float] = []
        retry = RetryPolicy(**policy)  # type: ignore[arg-type]
        self.conversation = Conversation(
            url="http://fake", policy=retry, budget=RetryBudget(retry), clock=lambda: self.now
        )

    def classify(self, deadline: float | None = None) -> Classification:
        options = Options(
            top_k=None, model=None, version=None, timeout=httpx2.Timeout(30.0), deadline=deadline
        )
        steps = self.conversation.classify(Upload(data=b"x", filename=None), options)
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                return cast("Classification", stop.value)
            if isinstance(step, Sleep):
                self.slept.append(step.seconds)
                self.now += step.seconds
                reply = None
            else:
                self.sent.append(step)
                self.now += 0.5
                reply = self.answers.pop(0)


def answer() -> httpx2.Response:
    image = {"width": 1, "height": 1, "top": [{"label": "a", "class": 0, "probability": 1.0}]}
    return httpx2.Response(200, json={"model": "m", "version": "1", "images": [image]})


def busy(retry_after: str | None = None, status: int = 429) -> httpx2.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx2.Response(status, headers=headers, json={"detail": "full"})


def test_it_waits_as_long_as_the_server_says() -> None:
    world = World([busy("7"), busy("3", 503), answer()])
    world.classify()
    assert len(world.sent) == 3
    assert 7 <= world.slept[0] <= 8.75
    assert 3 <= world.slept[1] <= 3.75


def test_it_backs_off_by_itself_where_the_server_says_nothing() -> None:
    world = World([busy(), httpx2.ConnectError("no"), httpx2.RemoteProtocolError("cut"), answer()])
    world.classify()
    assert [0.1, 0.2, 0.4] <= world.slept <= [0.2, 0.4, 0.8]


def test_the_last_refusal_is_the_one_that_is_raised() -> None:
    world = World([httpx2.ConnectError("no"), busy(), busy(), busy("5")])
    with pytest.raises(OverloadedError) as caught:
        world.classify()
    assert caught.value.retry_after == 5
    assert len(world.slept) == 3, "no sleep after the last attempt"


@pytest.mark.parametrize("status", [400, 404, 413, 422, 500, 502, 504])
def test_other_refusals_are_final(status: int) -> None:
    world = World([busy("0", status)])
    with pytest.raises(ApiStatusError):
        world.classify()
    assert world.slept == []


def test_a_deadline_shrinks_with_every_attempt_and_is_never_slept_over() -> None:
    world = World([busy("1"), busy("1"), busy("1")], first_delay_s=0)
    with pytest.raises(OverloadedError):
        world.classify(deadline=3.0)
    assert len(world.sent) == 2, "a third would have come after the deadline"
    told = [int(send.headers["X-Timeout-Ms"]) for send in world.sent]
    assert told[0] == 3000
    assert told[1] == pytest.approx(3000 - 500 - 1000 * world.slept[0], abs=1)
    assert world.sent[1].timeout.read == pytest.approx(told[1] / 1000, abs=0.002)
    assert world.now - 100 <= 3.0


def test_one_attempt_means_no_retry() -> None:
    world = World([httpx2.ConnectError("no")], attempts=1)
    with pytest.raises(ApiConnectionError):
        world.classify()
    assert world.slept == []
