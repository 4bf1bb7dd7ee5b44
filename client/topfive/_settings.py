"""What both clients are made with."""

import math
import os
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import httpx2

from topfive._protocol import Options
from topfive._retry import RetryPolicy
from topfive._version import __version__
from topfive.errors import TopfiveError

Priority: TypeAlias = Literal["interactive", "batch"]

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "TOPFIVE_URL"
API_KEY_VARIABLE = "TOPFIVE_API_KEY"
DEFAULT_TIMEOUT = httpx2.Timeout(30.0, connect=5.0)
"""Seconds for each phase: to connect, to send a piece, to wait for a piece of the answer, to get a connection."""
_LONGEST_S = 86_400.0
"""What a longer time limit counts as, in seconds: a server takes no larger `X-Timeout-Ms`, and a socket has a limit too."""


LIMITS = httpx2.Limits(keepalive_expiry=30.0)
"""As many connections as callers at once; httpx2's own 20 kept alive would open one anew for every 21st thread."""


class ClientError(TopfiveError, ValueError):
    """An argument of a client that makes no sense."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Address, credentials and time limits of a client, checked."""

    url: str
    """Base address without a trailing slash."""
    headers: dict[str, str]
    timeout: httpx2.Timeout
    retry: RetryPolicy

    @classmethod
    def make(
        cls,
        url: str | None,
        api_key: str | None,
        timeout: float | httpx2.Timeout | None,
        retry: RetryPolicy | None,
        priority: Priority | None,
    ) -> "Settings":
        """From a client's arguments and the environment.

        Raises:
            ClientError: an address without http:// or https://, or a key, time limit or priority that is none.
        """
        url = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ClientError(f"the address {url!r} is not a URL: {error}") from error
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ClientError(
                f"the address {url!r} must begin with http:// or https:// and name a host, as {DEFAULT_URL}"
            )
        headers = {"User-Agent": f"topfive-python/{__version__}", "Accept": "application/json"}
        api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        if api_key:
            if not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
                # Without the key: it is a secret, also where it is wrong.
                raise ClientError("the API key must be printable ASCII characters without spaces around them")
            headers["Authorization"] = f"Bearer {api_key}"
        if priority is not None:
            if priority not in get_args(Priority):
                raise ClientError(f"priority is {priority!r}; it must be {' or '.join(get_args(Priority))}")
            headers["X-Priority"] = priority
        return cls(
            url=url.rstrip("/"),
            headers=headers,
            timeout=_timeout(timeout, DEFAULT_TIMEOUT),
            retry=retry or RetryPolicy(),
        )

    def options(
        self,
        *,
        top_k: int | None,
        model: str | None,
        version: str | int | None,
        timeout: float | httpx2.Timeout | None,
        deadline: float | None,
    ) -> Options:
        """A call's arguments, checked.

        Raises:
            ClientError: a number that cannot be.
        """
        if top_k is not None and top_k < 1:
            raise ClientError(f"top_k is {top_k}; it must be at least 1")
        return Options(
            top_k=top_k,
            model=model,
            version=None if version is None else str(version),
            timeout=_timeout(timeout, self.timeout),
            deadline=None if deadline is None else _limit("deadline", deadline),
        )


def _timeout(given: float | httpx2.Timeout | None, default: httpx2.Timeout) -> httpx2.Timeout:
    if given is None:
        return default
    if not isinstance(given, httpx2.Timeout):
        return httpx2.Timeout(_limit("timeout", given))
    phases = given.as_dict().items()
    return httpx2.Timeout(
        **{name: None if value is None else _limit(f"timeout of {name}", value) for name, value in phases}
    )


def _limit(name: str, seconds: float) -> float:
    if not 0 < seconds < math.inf:
        raise ClientError(f"{name} is {seconds}; it must be a finite number above 0, in seconds")
    return min(seconds, _LONGEST_S)
