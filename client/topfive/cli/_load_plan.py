"""What `topfive load-test` does with a server, in order: each image once, closed loops, open loops."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from topfive._async_client import AsyncClient
from topfive._results import Model
from topfive._retry import RetryPolicy
from topfive.errors import (
    ApiConnectionError,
    ApiResponseError,
    ApiStatusError,
    ApiTimeoutError,
    BadRequestError,
    OverloadedError,
    PayloadTooLargeError,
    ServerError,
    UnreadableImageError,
    UnsupportedImageError,
    UploadTimeoutError,
)
from topfive.loadtest import LoadTestConfig, LoadTestError, Point, closed_loop, open_loop, search

_OF_THE_IMAGE = (BadRequestError, PayloadTooLargeError, UnreadableImageError, UnsupportedImageError)
_MAY_PASS = (ApiTimeoutError, OverloadedError, ServerError, UploadTimeoutError)
"""Failures that say nothing about an image."""
_SWEEP = (0.5, 0.7, 0.8, 0.9, 1.0)
"""Shares of the closed loop's best rate that the open loop tries when nothing else is asked for."""
_SEARCH_REQUESTS = 10
"""The search tries no rate at which it would expect to send fewer."""


@dataclass(kw_only=True)
class Measured:
    """What a test has found so far."""

    points: list[Point] = field(default_factory=list)
    models: tuple[Model, ...] = ()
    """Those that the server offers."""
    refused: dict[str, str] = field(default_factory=dict)
    """Images that the server refuses, by name, and why; they are not part of the loads."""


async def run(
    url: str,
    images: Mapping[str, bytes],
    config: LoadTestConfig,
    *,
    measured: Measured,
    api_key: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """The whole test: each image once, then closed loops, then open loops.

    Args:
        url: address of the server.
        images: image files by name, sent in turn.
        config: what to try.
        measured: takes what is found, as it is found, so that an end before the end leaves what was there.
        api_key: key that the server asks for.
        say: told what is about to happen, and of images that are left out.

    Raises:
        LoadTestError: no topfive server is there, or not one image was classified.
        ApiConnectionError: no server answers, or it has gone in the midst of the test.
        ApiError: the server refuses whatever it is asked.
    """
    points = measured.points
    # One attempt: what the server refuses is what we are here to see.
    retry = RetryPolicy(attempts=1)
    async with AsyncClient(url, api_key=api_key, timeout=config.timeout_s, retry=retry) as client:
        measured.models = await _models(client)
        ask = _asker(client, await _accepted(client, images, measured, say))
        if config.warmup_s:
            await closed_loop(ask, 4, config.warmup_s)

        async def record(point: Point) -> Point:
            points.append(point)
            if "connection" in point.errors:
                await _models(client)  # raises when the server has gone, which ends the test
            return point

        for connections in config.connections:
            many = "" if connections == 1 else "s"
            say(f"closed loop, {connections} connection{many}, {config.duration_s:g} s")
            await record(await closed_loop(ask, connections, config.duration_s))

        async def try_rate(rate: float, *, probe: bool = True) -> Point:
            say(f"open loop, {rate:.1f} requests/s, {config.duration_s:g} s")
            return await record(replace(await open_loop(ask, rate, config), probe=probe))

        best = max((point.rate for point in points), default=0.0)
        if not config.rates and best == 0.0:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in points[0].errors.items())
            raise LoadTestError(
                f"no image was classified by {url} ({reasons}), so there is nothing to measure; "
                "`topfive classify` with one of them says why"
            )
        for rate in config.rates:
            await try_rate(rate, probe=False)
        if config.p99_ms is not None:
            await try_rate(best / 2 or config.rates[0])  # what answers take without a queue
            least_rate = _SEARCH_REQUESTS / config.duration_s
            await search(try_rate, max([best, *config.rates]), config.p99_ms, least_rate)
        elif not config.rates:
            for share in _SWEEP:
                await try_rate(share * best)


async def _models(client: AsyncClient) -> tuple[Model, ...]:
    """The models that the server offers; what is no topfive server is called so."""
    try:
        return await client.models()
    except (ApiResponseError, ApiStatusError) as error:
        if isinstance(error, ApiStatusError) and error.code:
            raise
        raise LoadTestError(f"what answers at {client.url} is not a topfive server: {error}") from error


async def _accepted(
    client: AsyncClient, images: Mapping[str, bytes], measured: Measured, say: Callable[[str], None]
) -> list[bytes]:
    """Send each image once and leave out those that are refused: they would count as failures of the server.

    Raises:
        LoadTestError: all are.
    """
    slots = asyncio.Semaphore(4)

    async def refusal(body: bytes) -> str | None:
        async with slots:
            try:
                await client.classify(body)
            except _OF_THE_IMAGE as error:
                return str(error)
            except _MAY_PASS:
                return None  # the loads show it
            except ApiConnectionError as error:
                await _models(client)  # raises when the server has gone
                return str(error)  # a server may hang up on a file that is too large while it is still sent
            return None

    say(f"each image once ({len(images)})")
    accepted = []
    for name, reason in zip(images, await asyncio.gather(*map(refusal, images.values())), strict=True):
        if reason is None:
            accepted.append(images[name])
        else:
            measured.refused[name] = reason
            say(f"left out, the server refuses it: {name}: {reason}")
    if not accepted:
        raise LoadTestError(f"{client.url} refuses every image given, so there is nothing to measure")
    return accepted


def _asker(client: AsyncClient, bodies: Sequence[bytes]) -> Callable[[int], Awaitable[str | None]]:
    """`await ask(n)`: send the n-th image; None, or why it failed."""

    async def ask(number: int) -> str | None:
        try:
            await client.classify(bodies[number % len(bodies)])
        except ApiStatusError as error:
            return str(error.status)
        except ApiTimeoutError:
            return "timeout"
        except ApiConnectionError:
            return "connection"
        except ApiResponseError:
            return "malformed"
        return None

    return ask
