"""What `topfive load-test` does with a server, in order: closed loops, then open loops."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from topfive._async_client import AsyncClient
from topfive._results import Model
from topfive._retry import RetryPolicy
from topfive.errors import ApiError, ApiStatusError, ApiTimeoutError
from topfive.loadtest import LoadTestConfig, LoadTestError, Point, closed_loop, open_loop, search

_SWEEP = (0.5, 0.7, 0.8, 0.9, 1.0)
"""Shares of the closed loop's best rate that the open loop tries when nothing else is asked for."""


@dataclass(kw_only=True)
class Measured:
    """What a test has found so far."""

    points: list[Point] = field(default_factory=list)
    models: tuple[Model, ...] = ()
    """Those that the server offers."""


async def run(
    url: str,
    bodies: Sequence[bytes],
    config: LoadTestConfig,
    *,
    measured: Measured,
    api_key: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """The whole test: closed loops, then open loops.

    Args:
        url: address of the server.
        bodies: image files, sent in turn.
        config: what to try.
        measured: takes what is found, as it is found, so that an end before the end leaves what was there.
        api_key: key that the server asks for.
        say: told what is about to happen.

    Raises:
        LoadTestError: not one image was classified.
        ApiError: the server cannot be asked at all.
    """
    points = measured.points
    # One attempt: what the server refuses is what we are here to see.
    retry = RetryPolicy(attempts=1)
    async with AsyncClient(url, api_key=api_key, timeout=config.timeout_s, retry=retry) as client:
        measured.models = await client.models()
        ask = _asker(client, bodies)
        if config.warmup_s:
            await closed_loop(ask, 4, config.warmup_s)
        for connections in config.connections:
            many = "" if connections == 1 else "s"
            say(f"closed loop, {connections} connection{many}, {config.duration_s:g} s")
            points.append(await closed_loop(ask, connections, config.duration_s))

        async def try_rate(rate: float) -> Point:
            say(f"open loop, {rate:.1f} requests/s, {config.duration_s:g} s")
            points.append(await open_loop(ask, rate, config))
            return points[-1]

        best = max((point.rate for point in points), default=0.0)
        if not config.rates and best == 0.0:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in points[0].errors.items())
            raise LoadTestError(
                f"no image was classified by {url} ({reasons}), so there is nothing to measure; "
                "`topfive classify` with one of them says why"
            )
        for rate in config.rates or (() if config.p99_ms else [share * best for share in _SWEEP]):
            await try_rate(rate)
        if config.p99_ms is not None:
            await try_rate(best / 2 or config.rates[0])  # what answers take without a queue
            await search(try_rate, max([best, *config.rates]), config.p99_ms)


def _asker(client: AsyncClient, bodies: Sequence[bytes]) -> Callable[[int], Awaitable[str | None]]:
    """`await ask(n)`: send the n-th image; None, or why it failed."""

    async def ask(number: int) -> str | None:
        try:
            await client.classify(bodies[number % len(bodies)])
        except ApiStatusError as error:
            return str(error.status)
        except ApiTimeoutError:
            return "timeout"
        except ApiError:
            return "connection"
        return None

    return ask
