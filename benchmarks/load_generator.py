"""Open-loop load over HTTP that takes little of the machine, and remembers every request.

Times and closed loops are `topfive.loadtest`'s: requests leave at times drawn beforehand and latency counts from when
one was due. `topfive.AsyncClient` takes 1.4 ms of a core per photograph here, which at the rates of an overload is a good
part of two cores; this bare protocol on uvloop with the C parser httptools takes 0.3 ms, and says what it used. (`wrk` and
`hey` are closed loops; `h2load` sends one body and shows no headers; other constant-rate generators are not in Debian.)
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from topfive.loadtest import LoadTestConfig, arrival_times, open_loop, quantile

REQUEST_TIMEOUT_S = 30.0
"""An answer that takes longer counts as lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What became of one request."""

    due_s: float
    """When it was due, seconds from the phase's start."""
    latency_s: float
    """From then until the answer was complete."""
    status: int
    """0: the connection was lost, or the answer took too long."""
    retry_after: str | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One open-loop load."""

    name: str
    rate: float
    """Requests per second asked for."""
    seconds: float
    timeout_ms: int
    """`X-Timeout-Ms` of every request; 0: none."""
    records: Sequence[Record]
    lag_p99_ms: float
    """How late the generator sent, 99th percentile."""
    generator_cpu: float
    """Cores that the generator used."""

    def accepted_ms(self, share: float) -> float:
        """A quantile of the latency of everything that was not refused, answered in time or not."""
        return quantile(sorted(1000 * r.latency_s for r in self.records if r.status != 429), share)

    def later(self, seconds: float) -> "Phase":
        """Without its first seconds."""
        records = [record for record in self.records if record.due_s >= seconds]
        return replace(self, seconds=self.seconds - seconds, records=records)

    @property
    def goodput(self) -> float:
        """Classified requests per second."""
        return sum(r.status == 200 for r in self.records) / self.seconds

    @property
    def statuses(self) -> dict[int, int]:
        """Answers by status."""
        return dict(sorted(Counter(r.status for r in self.records).items()))

    def row(self) -> dict[str, Any]:
        """For the report."""
        retry = Counter(str(r.retry_after) for r in self.records if r.status == 429)
        return {
            "phase": self.name,
            "rate": round(self.rate, 1),
            "seconds": self.seconds,
            "timeout_ms": self.timeout_ms,
            "goodput": round(self.goodput, 1),
            "p50_ms": round(self.accepted_ms(0.5), 1),
            "p99_ms": round(self.accepted_ms(0.99), 1),
            "max_ms": round(self.accepted_ms(1.0), 1),
            "statuses": self.statuses,
            "retry_after": dict(retry),
            "lag_p99_ms": round(self.lag_p99_ms, 1),
            "generator_cpu": round(self.generator_cpu, 3),
        }


class Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time."""

    def __init__(self) -> None:
        self.usable = True
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._answer: asyncio.Future[tuple[int, str | None]]
        self._retry_after: str | None = None

    def ask(self, head: bytes, body: bytes) -> asyncio.Future[tuple[int, str | None]]:
        """Send; the future will hold the status and Retry-After, (0, None) when the connection is lost."""
        self._answer = asyncio.get_running_loop().create_future()
        self._retry_after = None
        self._transport.writelines([head, body])  # in one system call, not copied
        return self._answer

    def close(self) -> None:
        """Let it go."""
        self.usable = False
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        """A piece of the answer."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of the answer; httptools calls this."""
        if name.lower() == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_message_complete(self) -> None:
        """The answer is complete; httptools calls this."""
        self.usable = self._parser.should_keep_alive()
        if not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._retry_after))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The server has closed it."""
        self.usable = False
        if hasattr(self, "_answer") and not self._answer.done():
            self._answer.set_result((0, None))


class Generator:
    """Sends images; remembers nothing but idle connections."""

    def __init__(self, url: str, images: Sequence[bytes]) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._images = images
        self._idle: list[Connection] = []

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def send(self, number: int, timeout_ms: int = 0) -> tuple[int, str | None]:
        """Send an image; status and Retry-After."""
        body = self._images[number % len(self._images)]
        timeout = f"X-Timeout-Ms: {timeout_ms}\r\n" if timeout_ms else ""
        head = (
            f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n{timeout}Content-Length: {len(body)}\r\n\r\n"
        )
        connection = None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                connection = await self._connection()
                answer = await connection.ask(head.encode(), body)
        except (OSError, TimeoutError):  # refused, or no answer: status 0
            if connection is not None:
                connection.close()
            return 0, None
        if connection.usable:
            self._idle.append(connection)
        return answer

    async def ask(self, number: int) -> str | None:
        """As `topfive.loadtest` wants it: None, or why it failed."""
        status, _ = await self.send(number)
        return None if status == 200 else str(status)

    async def phase(self, name: str, rate: float, seconds: float, timeout_ms: int = 0) -> Phase:
        """An open loop in which every request is remembered."""
        config = LoadTestConfig(duration_s=seconds, max_in_flight=100_000)
        due_s = list(arrival_times(rate, config))
        records: list[Record] = []
        began = time.monotonic()

        async def ask(number: int) -> str | None:
            status, retry_after = await self.send(number, timeout_ms)
            late_s = time.monotonic() - began - due_s[number]
            records.append(
                Record(due_s=due_s[number], latency_s=late_s, status=status, retry_after=retry_after)
            )
            return None if status == 200 else str(status)

        point = await open_loop(ask, rate, config)
        return Phase(
            name=name,
            rate=rate,
            seconds=seconds,
            timeout_ms=timeout_ms,
            records=sorted(records, key=lambda record: record.due_s),
            lag_p99_ms=point.lag_p99_ms,
            generator_cpu=point.generator_cpu,
        )

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port)
        return connection
