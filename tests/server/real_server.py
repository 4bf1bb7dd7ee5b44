"""`topfive serve` in a process of its own, clients that count what becomes of their requests, and its log."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.server.fakes import picture

TOPFIVE = str(Path(sys.executable).with_name("topfive"))


class Process:
    """`topfive serve` in a process of its own, on a free port."""

    def __init__(
        self, *arguments: object, command: Sequence[str] = (TOPFIVE, "serve"), **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [*command, *map(str, arguments), "--port", "0", "--device", "cpu"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            cwd="/",
            start_new_session=True,  # as a terminal does: a signal to the group reaches every process of it
        )
        self.log: list[dict[str, Any]] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line))
            if url := self.log[-1].get("url"):
                self.port = int(url.rpartition(":")[2])
                break
        else:
            raise AssertionError(f"ended with {self.process.wait()}: {self.log}")
        # Somebody has to read on, or the pipe fills and the server waits.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line))

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        self.process.send_signal(number)
        status = self.process.wait(timeout_s)
        self._reader.join()
        return status

    @classmethod
    @contextlib.contextmanager
    def running(
        cls, *arguments: object, command: Sequence[str] = (TOPFIVE, "serve"), **environment: str
    ) -> Iterator["Process"]:
        process = cls(*arguments, command=command, **environment)
        try:
            yield process
        finally:
            if process.process.poll() is None:
                process.process.kill()
                process.process.wait()
            process._reader.join()
            assert process.process.stderr is not None
            process.process.stderr.close()

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()


def run(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit status and stderr of a `topfive serve` that is not expected to stay."""
    done = subprocess.run(
        [TOPFIVE, "serve", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


class Load:
    """Clients that send one request after the other and count every outcome."""

    def __init__(self, port: int, clients: int) -> None:
        self.port = port
        self.counts: Counter[str] = Counter()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> Counter[str]:
        self._end.set()
        for thread in self._threads:
            thread.join(30)
        return self.counts

    def _client(self) -> None:
        body = picture(10, size=(300, 200), form="JPEG")
        connection: http.client.HTTPConnection | None = None
        while not self._end.is_set():
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                try:
                    connection.connect()
                except OSError:
                    self._count("not accepted")
                    time.sleep(0.01)
                    connection = None
                    continue
            try:
                connection.request("POST", "/v1/classify", body)
                answer = connection.getresponse()
                answer.read()
                self._count(str(answer.status))
                if answer.getheader("connection") == "close":
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException):
                self._count("lost")
                if connection is not None:
                    connection.close()
                connection = None

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.counts[outcome] += 1
