"""What happens at twice the rate that the server can sustain?

Open-loop load (requests leave on schedule, whatever the answers do; latency counts from the scheduled moment, so nothing
is omitted): first at full speed to find the sustainable rate, then at 80 % of it, then at 200 % for a while, then at
80 % again. Every request carries `X-Timeout-Ms`, twice the p99 of the 80 % phase. Shown are the p99 of what was
accepted, the goodput, the refusals, the server's memory, and how soon it is back to normal.

    python benchmarks/overload.py models/ photographs/ --seconds 60 --json overload.json
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Beside this file, which is how Python finds it when this is run as a script.
from serve import hardware, load, server  # type: ignore[import-not-found]


@dataclass
class Phase:
    """What came of one phase of the load."""

    rate: float
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the phase began, seconds until the answer) of what was accepted and answered with 200."""
    seconds: float = 0.0
    memory_mib: float = 0.0

    def row(self) -> dict[str, Any]:
        """For the report."""
        waits = sorted(wait for _, wait in self.latencies)
        cuts = statistics.quantiles(waits, n=100) if len(waits) > 1 else [float("nan")] * 99
        return {
            "offered": round(self.rate, 1),
            "goodput": round(len(waits) / self.seconds, 1),
            "p50_ms": round(cuts[49] * 1000, 1),
            "p99_ms": round(cuts[98] * 1000, 1),
            "statuses": dict(sorted(self.statuses.items())),
            "memory_mib": round(self.memory_mib),
        }


class Client(asyncio.Protocol):
    """One connection that sends a request at a time, and reads as much of the answer as it has to."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[int] | None = None
        self._buffer = b""
        self._transport: asyncio.Transport
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """Send; the future holds the status, or 0 when the connection is lost."""
        self._answer = asyncio.get_running_loop().create_future()
        self._buffer = b""
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        """A piece of the answer."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(body) >= length and self._answer is not None and not self._answer.done():
            self.open = b"connection: close" not in head.lower()
            self._answer.set_result(int(head.split(b" ", 2)[1]))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio calls it so
        """The server has closed, which counts as status 0 when an answer was due."""
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(0)


class OpenLoop:
    """Sends requests on schedule over as many connections as that takes."""

    def __init__(self, url: str, images: Sequence[bytes]) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80
        self._images = itertools.cycle(images)
        self._idle: list[Client] = []

    async def run(self, phase: Phase, seconds: float, timeout_ms: int) -> None:
        """One phase; fills `phase`."""
        loop = asyncio.get_running_loop()
        start, tasks = loop.time(), set()
        for number in itertools.count():
            due = start + number / phase.rate
            if due - start > seconds:
                break
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            task = loop.create_task(self._one(phase, start, due, timeout_ms))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait(tasks)
        phase.seconds = loop.time() - start

    async def _one(self, phase: Phase, start: float, due: float, timeout_ms: int) -> None:
        loop = asyncio.get_running_loop()
        body = next(self._images)
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Timeout-Ms: {timeout_ms}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            client = self._idle.pop() if self._idle else await self._connect()
            status = await client.ask(head.encode() + body)
        except OSError:
            phase.statuses[0] += 1
            return
        if client.open:
            self._idle.append(client)
        phase.statuses[status] += 1
        if status == 200:
            phase.latencies.append((due - start, loop.time() - due))

    async def _connect(self) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(Client, self._host, self._port)
        return client


def memory_mib(port: int) -> float:
    """Resident memory of the process that serves the port: the one whose command line names it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"--port\0{port}\0".encode() in (folder / "cmdline").read_bytes():
                pages = int((folder / "statm").read_text().split()[1])
                return pages * 4096 / 2**20
        except OSError:  # it has just ended
            continue
    return float("nan")


def back_to_normal(phase: Phase, p99_s: float) -> float:
    """Seconds after which no answer took longer than three times the p99 of the first quiet phase."""
    return max((sent for sent, wait in phase.latencies if wait > 3 * p99_s), default=0.0)


async def measure(url: str, images: Sequence[bytes], sustainable: float, seconds: float) -> dict[str, Any]:
    """The three phases."""
    loop = OpenLoop(url, images)
    port = urlsplit(url).port or 80
    before, during, after = Phase(0.8 * sustainable), Phase(2 * sustainable), Phase(0.8 * sustainable)
    await loop.run(before, seconds / 2, 60_000)
    timeout_ms = max(1, int(2 * before.row()["p99_ms"]))
    for phase, length in ((during, seconds), (after, seconds / 2)):
        await loop.run(phase, length, timeout_ms)
        phase.memory_mib = memory_mib(port)
    p99_s = before.row()["p99_ms"] / 1000
    return {
        "timeout_ms": timeout_ms,
        "at 80 %": before.row(),
        "at 200 %": during.row(),
        "at 80 % again": after.row(),
        "p99 ratio (goal: at most 2)": round(during.row()["p99_ms"] / before.row()["p99_ms"], 2),
        "goodput / sustainable (goal: at least 0.9)": round(during.row()["goodput"] / sustainable, 2),
        "seconds until normal (goal: at most 2)": round(back_to_normal(after, p99_s), 2),
    }


def main() -> None:
    """Find the sustainable rate, run the phases, print and write what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="model repository")
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of the overload; the quiet phases take half"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", default="fp32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(options.images.iterdir())]
    with server(options.models, options.device, options.variant, ["--no-log-requests"]) as url:
        load(url, options.images, 32, 2)  # warm
        sustainable = load(url, options.images, 32, max(2, int(options.seconds / 6)))["rate"]
        started = time.time()
        report = asyncio.run(measure(url, images, sustainable, options.seconds))
    report = {"hardware": hardware(), "sustainable": round(sustainable, 1), **report}
    report["wall_s"] = round(time.time() - started, 1)
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
