"""A server of its own for a benchmark, topfive's or another, and what it takes from the machine."""

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that is ready."""

    url: str
    pid: int
    ready_s: float
    """Seconds from the start of the process until `/readyz` said yes."""

    def rss_mib(self) -> float:
        """Resident memory of the process."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE / 2**20

    def cpu_s(self) -> float:
        """Seconds that the process has computed on all cores."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def free_port(count: int = 1) -> int:
    """The first of `count` successive ports of 127.0.0.1 on which nobody listens."""
    while True:
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            first = probes.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for following in range(port + 1, port + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", following))
            return port


def serving(
    models: Path, flags: Sequence[str] = (), *, log_requests: bool = False, patience_s: float = 120.0
) -> contextlib.AbstractContextManager[Served]:
    """Start `topfive serve` on a free port, wait until it is ready, end it afterwards; see `running`."""
    port = free_port()
    program = str(Path(sys.executable).with_name("topfive"))
    log = "--log-requests" if log_requests else "--no-log-requests"
    command = [program, "serve", str(models), "--port", str(port), log, *flags]
    return running(command, f"http://127.0.0.1:{port}", ready="/readyz", patience_s=patience_s)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    url: str,
    *,
    ready: str,
    environment: Mapping[str, str] | None = None,
    patience_s: float = 120.0,
) -> Iterator[Served]:
    """Start a server, wait until it answers `GET <url><ready>`, end it and all of its processes afterwards.

    Raises:
        SystemExit: it ended, or was not ready within `patience_s` seconds; with its last words.
    """
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            # A group of its own: workers that outlive their server would disturb the next measurement.
            start_new_session=True,
        )
        try:
            while not _ready(url + ready):
                if process.poll() is not None or time.monotonic() > started + patience_s:
                    log.seek(0)
                    words = log.read()[-2000:].decode(errors="replace")
                    sys.exit(f"`{' '.join(command)}` was not ready after {patience_s:g} s or ended:\n{words}")
                time.sleep(0.02)
            yield Served(url=url, pid=process.pid, ready_s=time.monotonic() - started)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


class MemoryWatch:
    """Samples a server's resident memory in a thread, from `with` to its end."""

    def __init__(self, served: Served, interval_s: float = 1.0) -> None:
        self.samples: list[tuple[float, float]] = []
        """(monotonic seconds, MiB)"""
        self._served = served
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # the server has ended
            while not self._stop.wait(self._interval_s):
                self.samples.append((time.monotonic(), self._served.rss_mib()))


def growth_mib_per_s(samples: Sequence[tuple[float, float]]) -> float:
    """Slope of memory over time: the median of all pairs' slopes (Theil-Sen), which single jumps do not move."""
    step = max(1, len(samples) // 400)
    thinned = samples[::step]
    slopes = [
        (later[1] - sooner[1]) / (later[0] - sooner[0])
        for index, sooner in enumerate(thinned)
        for later in thinned[index + 1 :]
        if later[0] > sooner[0]
    ]
    return statistics.median(slopes) if slopes else float("nan")
