"""Threads that do not come back: the process says so, and ends all the same."""

import json
import signal
import socket
import sys
from pathlib import Path

import pytest
from tests.server import stuck_server
from tests.server.fakes import picture
from tests.server.harness import eventually
from tests.server.onnx_models import write_model
from tests.server.real_server import Process

STUCK = picture(9, size=(stuck_server.STUCK_WIDTH, 60))
COMMAND = (sys.executable, stuck_server.__file__)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root)
    return root


def stick(process: Process, files: int) -> socket.socket:
    """One request of several pictures, which no single thread decodes; whoever closes the connection has left."""
    parts = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n%b\r\n' % STUCK
        for _ in range(files)
    )
    body = parts + b"--x--\r\n"
    connection = socket.create_connection(("127.0.0.1", process.port))
    connection.sendall(
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    eventually(lambda: b"topfive_inflight_images %d.0" % files in process.request("GET", "/metrics")[1])
    return connection


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stuck_decoder_does_not_keep_the_process_from_ending(repository: Path, processes: int) -> None:
    flags = ("--processes", processes, "--decode-threads", 4, "--drain-delay-s", 0, "--drain-timeout-s", 0.5)
    with Process.running(repository, *flags, command=COMMAND) as process:
        with stick(process, files=2):
            assert process.stop(timeout_s=20) == 1  # that request was cut off
        assert process.log[-1]["message"] == "stopped"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_client_that_has_left_a_stuck_decoder_does_not_count_as_lost(
    repository: Path, processes: int
) -> None:
    flags = ("--processes", processes, "--decode-threads", 4, "--drain-delay-s", 0, "--drain-timeout-s", 1)
    with Process.running(repository, *flags, command=COMMAND) as process:
        stick(process, files=2).close()
        eventually(lambda: b"topfive_inflight_images 0.0" in process.request("GET", "/metrics")[1])
        assert process.stop(timeout_s=20) == 0


def test_when_no_decoder_comes_back_the_probes_say_so(repository: Path) -> None:
    flags = ("--decode-threads", 2, "--engine-timeout-s", 1, "--drain-delay-s", 0, "--drain-timeout-s", 0.5)
    with Process.running(repository, *flags, command=COMMAND) as process:
        assert process.request("GET", "/healthz")[0] == 200
        with stick(process, files=2):
            eventually(lambda: process.request("GET", "/healthz")[0] == 503)
            status, body = process.request("GET", "/readyz")
            assert status == 503
            assert "decoding has been stuck for" in json.loads(body)["models"][0]["reason"]
            assert "restart" in process.request("GET", "/healthz")[1].decode()
            assert process.request("GET", "/v2/health/live")[0] == 503
            assert process.request("GET", "/v2/health/ready")[0] == 503
            assert process.stop(timeout_s=20) == 1


def test_a_process_of_several_whose_decoders_do_not_come_back_is_started_again(repository: Path) -> None:
    flags = ("--processes", 2, "--decode-threads", 4, "--engine-timeout-s", 1, "--drain-delay-s", 0)
    with Process.running(repository, *flags, command=COMMAND) as process:
        with stick(process, files=2):
            eventually(lambda: any("serves again" in line["message"] for line in process.log), timeout_s=60)
        assert any("decoding has been stuck" in line["message"] for line in process.log)
        assert process.stop(signal.SIGTERM, timeout_s=20) == 0


def test_a_signal_after_the_drain_ends_the_process_at_once_with_the_status_that_is_due(
    repository: Path,
) -> None:
    with (
        Process.running(
            repository, "--drain-delay-s", 0, "--drain-timeout-s", 0.5, command=COMMAND
        ) as process,
        stick(process, files=1),  # alone, it hangs in a thread of the engine, whose end is waited for
    ):
        process.process.send_signal(signal.SIGTERM)
        eventually(lambda: process.log[-1]["message"] == "stopped")
        assert process.stop(timeout_s=20) == 1
        assert "the engine of" not in process.log[-1]["message"]  # it was not waited for
