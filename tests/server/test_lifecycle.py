"""Starting, stopping and not starting: real processes, real signals, and a client that counts."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.server.fakes import FakeEngine, picture
from tests.server.harness import Harness, eventually, read_reply, serving
from tests.server.onnx_models import write_model
from tests.server.real_server import TOPFIVE, Load, Process, run

from topfive_server import cli, logs
from topfive_server.config import ServerConfig
from topfive_server.lifecycle import accept_all, admit_the_last, listen
from topfive_server.serving import StartError


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root)
    return root


def test_sigterm_under_load_loses_nothing(repository: Path) -> None:
    with Process.running(repository, "--drain-delay-s", 0.5, "--no-log-requests") as process:
        load = Load(process.port, clients=12)
        eventually(lambda: load.counts["200"] > 100)
        status = process.stop()
        counts = load.finish()
        assert status == 0
        assert counts["lost"] == 0, counts
        assert set(counts) <= {"200", "503", "not accepted"}, counts
        messages = [line["message"] for line in process.log]
        assert "draining" in messages
        assert messages[-1] == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="sockets have filters on Linux only")
def test_nobody_is_accepted_only_to_be_reset_when_the_listener_closes() -> None:
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        listener.listen()
        address = listener.getsockname()
        with socket.create_connection(address, 1) as before:
            asyncio.run(admit_the_last([listener]))
            with pytest.raises(TimeoutError):  # not answered: a handshake would promise a reply
                socket.create_connection(address, 0.2)
            (accepted,) = accept_all(listener)
            with accepted:
                before.sendall(b"a request")
                assert accepted.recv(9) == b"a request"


def test_during_the_drain_everything_is_served_but_readiness_says_no() -> None:
    with serving(drain_delay_s=0.6) as server:
        kept = server.connect()
        kept.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(kept).status == 200
        server.loop.call_soon_threadsafe(server.server.stop)
        eventually(lambda: server.application.draining)
        reply = server.request("GET", "/readyz")
        assert (reply.status, reply.json["draining"]) == (503, True)
        reply = server.classify(picture(4))
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        eventually(lambda: server.server.should_exit)
        # The listener is closed, but what arrives on an open connection is still answered.
        body = picture(4)
        kept.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        reply = read_reply(kept)
        assert (reply.status, reply.code) == (503, "draining")
        assert "retry-after" in reply.headers
        kept.close()


def test_a_request_under_way_is_answered_before_the_end() -> None:
    with serving(FakeEngine(delay_s=0.5)) as server, ThreadPoolExecutor() as threads:
        pending = threads.submit(server.classify, picture(6))
        eventually(lambda: server.engine.seen == [6])
        server.loop.call_soon_threadsafe(server.server.stop)
        assert pending.result().classes == [6]
        server.stop()
        assert not server.server.lost_requests


def test_the_drain_time_is_bounded_and_the_loss_is_told() -> None:
    with serving(drain_timeout_s=1.0) as server, ThreadPoolExecutor() as threads:
        server.hold()
        pending = threads.submit(server.classify, picture(6))
        eventually(lambda: server.engine.seen == [6])
        server.loop.call_soon_threadsafe(server.server.stop)
        eventually(lambda: not server.application.admission.images)
        reply = pending.result()
        assert (reply.status, reply.code) == (503, "draining")
        assert server.server.lost_requests


def test_fractions_of_a_second_count() -> None:
    with serving(keep_alive_s=0.25, drain_timeout_s=0.5) as server:
        with contextlib.closing(server.connect()) as kept:
            kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_reply(kept).status == 200
            assert kept.recv(1) == b""
        assert server.server.config.timeout_keep_alive == 0.25
        server.stop()
        assert server.server.config.timeout_graceful_shutdown is not None
        assert 0.1 <= server.server.config.timeout_graceful_shutdown <= 0.5


def test_a_second_signal_stops_at_once(repository: Path) -> None:
    with Process.running(repository, "--drain-delay-s", 60) as process:
        process.process.send_signal(signal.SIGINT)
        eventually(lambda: any(line["message"] == "draining" for line in process.log))
        assert process.stop(signal.SIGINT, timeout_s=10) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_terminal_that_is_closed_drains_as_sigterm_does(repository: Path, processes: int) -> None:
    with Process.running(repository, "--drain-delay-s", 0, "--processes", processes) as process:
        assert process.stop(signal.SIGHUP) == 0
        messages = [line["message"] for line in process.log]
        assert "draining" in messages
        assert messages[-1] == "stopped"


def test_under_nohup_the_server_outlives_its_terminal(repository: Path) -> None:
    with Process.running(repository, "--drain-delay-s", 0, command=("nohup", TOPFIVE, "serve")) as process:
        process.process.send_signal(signal.SIGHUP)
        assert process.request("GET", "/healthz")[0] == 200
        assert process.stop() == 0


def test_a_second_signal_cuts_off_what_is_under_way() -> None:
    with serving(drain_timeout_s=600, grpc_port=0) as server, ThreadPoolExecutor() as threads:
        server.hold()
        pending = threads.submit(server.classify, picture(6))
        eventually(lambda: server.engine.seen == [6])
        server.loop.call_soon_threadsafe(server.server.stop)
        eventually(lambda: server.server._closing)
        server.loop.call_soon_threadsafe(server.server.stop)
        assert pending.result().code == "draining"
        assert server.server.lost_requests


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_cut_off_shows_in_the_exit_status(repository: Path, processes: int) -> None:
    flags = ("--processes", processes, "--drain-delay-s", 0, "--drain-timeout-s", 0.5)
    with (
        Process.running(repository, *flags) as process,
        socket.create_connection(("127.0.0.1", process.port)) as connection,
    ):
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        eventually(lambda: b"topfive_inflight_bytes 4.0" in process.request("GET", "/metrics")[1])
        assert process.stop() == 1
        assert read_reply(connection).code == "draining"


def test_the_second_of_two_servers_that_start_at_the_same_time_says_that_the_port_is_in_use() -> None:
    late = Harness([FakeEngine()], ServerConfig(drain_delay_s=0, grpc_port=0))  # it is bound
    with listen("127.0.0.1", late.port) as first:  # which SO_REUSEADDR allows as long as nobody listens
        first.listen()
        try:
            with pytest.raises(StartError, match="Address already in use; stop what listens there"):
                late.start()
        finally:
            with contextlib.suppress(StartError):
                late.stop()


def test_flags_environment_and_readiness_of_a_real_model(repository: Path) -> None:
    with Process.running(repository, "--max-images", 3, TOPFIVE_SERVE_MAX_BODY_BYTES="1000") as process:
        status, body = process.request("GET", "/readyz")
        assert (status, json.loads(body)["models"][0]["provider"]) == (200, "CPUExecutionProvider")
        status, body = process.request("POST", "/v1/classify", picture(200, form="JPEG"))
        assert status == 200
        assert json.loads(body)["model"] == "tiny"
        assert process.request("POST", "/v1/classify", bytes(1001))[0] == 413
        assert process.stop() == 0


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, message = run(tmp_path / "no such folder", "--port", port)
    assert status == 1
    assert re.search(rf"cannot listen on 127.0.0.1 port {port}: .*in use; .*--port", message)


def test_what_ends_a_start_is_said_in_the_form_of_the_log(tmp_path: Path) -> None:
    status, message = run(tmp_path / "none", "--port", 0)
    *_, last = [json.loads(line) for line in message.splitlines()]
    assert (status, last["level"]) == (1, "error")
    assert "none cannot be read" in last["message"]
    status, message = run(tmp_path / "none", "--port", 0, "--log-format", "text")
    assert (status, message.splitlines()[-1].partition(":")[0]) == (1, "topfive")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/nowhere"], "the model repository /nowhere cannot be read"),
        ([".", "--host", "no.such.host.invalid"], "give an address of this machine as --host"),
        ([".", "--drain-timeout-s", "-1"], "drain_timeout_s is -1"),
        ([".", "--max-body-bytes", "10", "--max-queue-bytes", "5"], "at most max_queue_bytes"),
        ([".", "--admin"], "admin is true without api_keys"),
        ([".", "--tls-key", "x"], "belong together"),
        ([".", "--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_what_cannot_start_says_why(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    status, message = run(*arguments, "--port", "0")
    assert status in {1, 2}
    assert sentence in message


def test_a_port_that_needs_privileges_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(host: str, port: int) -> None:
        raise PermissionError(13, "Permission denied")

    # Which ports are privileged, and whether the tests are, differs from machine to machine.
    monkeypatch.setattr(cli, "listen", refuse)
    monkeypatch.setattr(logs, "configure", lambda _: None)
    with pytest.raises(StartError, match="port 80: Permission denied; ports below 1024 need privileges"):
        cli.serve(tmp_path, config=ServerConfig(port=80, log_format="text"))


def test_an_empty_or_broken_repository_says_why(tmp_path: Path) -> None:
    assert "holds no model" in run(tmp_path, "--port", 0, "--device", "cpu")[1]
    model = write_model(tmp_path)
    model.write_bytes(model.read_bytes()[:100])
    status, message = run(tmp_path, "--port", 0, "--device", "cpu")
    assert status == 1
    assert "tiny/1/model.onnx" in message


def test_an_unknown_default_model(repository: Path) -> None:
    status, message = run(repository, "--port", 0, "--device", "cpu", "--model", "resnet")
    assert status == 1
    assert "'resnet'" in message
    assert "tiny" in message
