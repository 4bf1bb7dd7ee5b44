"""When to ask again: a policy, and a budget shared by all calls of a client."""

import email.utils
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

RETRIED_STATUSES: Final = frozenset({429, 503})
"""Refusals that pass; nothing was computed for them."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How a client asks again after a refusal that passes (429, 503) or a broken connection.

    Asking again is safe: to classify an image changes nothing. Answers that were too slow are not asked for again,
    since that adds load where there is too much.
    """

    attempts: int = 4
    """Requests sent at most, the first included; 1 never retries."""
    first_delay_s: float = 0.2
    """Seconds before the second request; doubles with each further one, less a random part of up to half."""
    max_delay_s: float = 10.0
    """Seconds that the doubling delay stops at."""
    max_retry_after_s: float = 30.0
    """Longest `Retry-After` of a server that is waited for, in seconds; when it says more, the call fails at once."""
    budget: float = 20.0
    """Tokens of the client: a failed request takes one, and retries stop while half or fewer are left (gRFC A6)."""
    refill: float = 0.1
    """Tokens that a successful request gives back: in the long run, retries per success."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; it must be at least 1")
        for name in ("first_delay_s", "max_delay_s", "max_retry_after_s", "budget", "refill"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a finite number, at least 0")

    def delay(
        self, attempt: int, retry_after: float | None, draw: Callable[[], float] = random.random
    ) -> float | None:
        """Seconds to wait after the failed request number `attempt` (from 1), or None to give up.

        Args:
            attempt: how many requests have been sent.
            retry_after: what the server asked for, in seconds.
            draw: gives a random number in [0, 1), so that many clients do not come back at the same moment.
        """
        if attempt >= self.attempts:
            return None
        doubled = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(attempt - 1, 60))
        backoff = doubled * (1 - draw() / 2)
        if retry_after is None:
            return backoff
        if retry_after > self.max_retry_after_s:
            return None
        # Never earlier than the server said.
        return max(backoff, retry_after * (1 + draw() / 4))


class RetryBudget:
    """Keeps retries a small share of all requests, so that they cannot bury a server that struggles.

    The token bucket of gRPC (gRFC A6). Safe to share between threads: a lost update costs one token, no more.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._tokens = policy.budget

    def on_success(self) -> None:
        """A request was answered."""
        self._tokens = min(self._policy.budget, self._tokens + self._policy.refill)

    def on_failure(self) -> bool:
        """A request failed in a way that may pass; whether it may be retried."""
        self._tokens = max(0.0, self._tokens - 1)
        return self._tokens > self._policy.budget / 2


def parse_retry_after(headers: Mapping[str, str], *, now: Callable[[], float] = time.time) -> float | None:
    """Seconds to wait by a `Retry-After` header, a number or an HTTP date (RFC 9110 section 10.2.3); None without one.

    A date is counted from the answer's own `Date` where it has one, so that a wrong clock here does no harm.
    """
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        until = _parse_date(value)
        if until is None:
            return None
        sent = _parse_date(headers.get("date", ""))
        return max(0.0, until - (now() if sent is None else sent))
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _parse_date(value: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
