"""`--processes`: real processes behind one port, real signals, and clients that count."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.fakes import make_certificate, picture
from tests.server.harness import eventually
from tests.server.onnx_models import write_model
from tests.server.real_server import Load, Process, run

BODY = picture(10, size=(40, 30), form="JPEG")
KEY = {"X-API-Key": "secret"}


@pytest.fixture(name="models")
def make_models(tmp_path: Path) -> Path:
    write_model(tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture(name="admin")
def make_admin(tmp_path: Path) -> tuple[str, ...]:
    keys = tmp_path / "keys.txt"
    keys.write_text(hashlib.sha256(b"secret").hexdigest() + " tests\n")
    return ("--admin", "--api-keys", str(keys))


@contextlib.contextmanager
def connections(process: Process, count: int) -> Iterator[list[http.client.HTTPConnection]]:
    """Connections that are open at the same time."""
    with contextlib.ExitStack() as stack:
        opened = [http.client.HTTPConnection("127.0.0.1", process.port, timeout=20) for _ in range(count)]
        for connection in opened:
            stack.enter_context(contextlib.closing(connection)).connect()
        yield opened


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> Any:
    connection.request(method, path, body, KEY)
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status == 200, text
    return json.loads(text)


def versions(process: Process, rounds: int = 1) -> Counter[str]:
    """Which versions answer, asked of both workers."""
    with connections(process, 4) as opened:
        answers = [ask(c, "POST", "/v1/classify", BODY) for c in opened for _ in range(rounds)]
    return Counter(answer["version"] for answer in answers)


def pids(process: Process) -> dict[int, int]:
    """Of the workers, by number."""
    return {line["worker"]: line["pid"] for line in process.log if line["message"] == "worker started"}


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        # A zombie has ended: its parent has only not looked yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def ready(process: Process) -> bool:
    return process.request("GET", "/readyz")[0] == 200


def metric(process: Process, name: str) -> float:
    text = process.request("GET", "/metrics")[1].decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def test_connections_are_dealt_out_evenly_and_metrics_are_of_all(models: Path) -> None:
    with Process.running(models, "--processes", 2) as process:
        with connections(process, 16) as opened:
            for connection in opened:
                assert ask(connection, "POST", "/v1/classify", BODY)["model"] == "tiny"

        def asked() -> Counter[int]:
            return Counter(line["worker"] for line in process.log if line.get("path") == "/v1/classify")

        eventually(lambda: asked().total() == 16)  # a line is written after its answer
        assert asked() == {1: 8, 2: 8}
        for _ in range(3):  # whichever worker answers
            assert metric(process, "topfive_images_total") == 16
            assert metric(process, "topfive_decode_seconds_count") == 16
        assert metric(process, "topfive_workers") == 2
        text = process.request("GET", "/metrics")[1].decode()
        assert {f'process_resident_memory_bytes{{worker="{n}"}}' for n in range(3)} == set(
            re.findall(r"^process_resident_memory_bytes\S+", text, re.MULTILINE)
        )
        body = json.loads(process.request("GET", "/readyz")[1])
        assert body["ready"]
        assert [row["worker"] for row in body["workers"]] == [1, 2]
        assert process.stop() == 0


def test_a_killed_worker_costs_only_its_own_connections_and_comes_back(models: Path) -> None:
    with Process.running(models, "--processes", 2, "--no-log-requests") as process:
        load = Load(process.port, clients=8)
        eventually(lambda: load.counts["200"] > 100)
        images = metric(process, "topfive_images_total")
        victim = pids(process)[1]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: not alive(victim))
        assert (
            metric(process, "topfive_images_total") >= images
        )  # a counter that falls is a restart to Prometheus
        eventually(lambda: pids(process)[1] != victim, 30)
        eventually(lambda: ready(process), 30)
        served = load.counts["200"]
        eventually(lambda: load.counts["200"] > served + 100)
        assert process.stop() == 0
        counts = load.finish()
        # Of eight connections, and one that asked for metrics while the last of them came, a worker has five at most.
        assert counts["lost"] <= 5, counts
        assert set(counts) <= {"200", "503", "lost", "not accepted"}, counts
        (line,) = [line for line in process.log if "has ended" in line["message"]]
        assert line["message"] == "worker 1 has ended (SIGKILL); its requests under way are lost"
        assert not any(map(alive, pids(process).values()))


def test_readiness_names_the_worker_that_is_away_and_a_hung_one_is_replaced(models: Path) -> None:
    with Process.running(models, "--processes", 2, "--engine-timeout-s", 1.5) as process:
        victim = pids(process)[2]
        os.kill(victim, signal.SIGSTOP)
        eventually(lambda: not alive(victim), 30)
        with connections(process, 2) as opened:
            while True:
                opened[0].request("GET", "/readyz")
                answer = opened[0].getresponse()
                body = json.loads(answer.read())
                if answer.status == 200:
                    break
                assert [row["worker"] for row in body["workers"] if not row["ready"]] == [2]
        assert pids(process)[2] != victim
        assert metric(process, "topfive_worker_restarts_total") == 1
        assert any("worker 2 does not answer any more" in line["message"] for line in process.log)
        assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_loses_nothing(models: Path, number: signal.Signals) -> None:
    with Process.running(models, "--processes", 2, "--drain-delay-s", 0.5, "--no-log-requests") as process:
        load = Load(process.port, clients=12)
        eventually(lambda: load.counts["200"] > 100)
        os.killpg(process.process.pid, number)
        assert process.process.wait(30) == 0
        counts = load.finish()
        assert counts["lost"] == 0, counts
        assert set(counts) <= {"200", "503", "not accepted"}, counts
        assert not any(map(alive, pids(process).values()))
        process._reader.join()
        messages = [line["message"] for line in process.log]
        assert messages.count("draining") == 3
        assert messages[-1] == "stopped"


def test_a_second_signal_ends_all_at_once(models: Path) -> None:
    with Process.running(models, "--processes", 2, "--drain-delay-s", 60) as process:
        process.process.send_signal(signal.SIGINT)
        eventually(lambda: any(line["message"] == "draining" for line in process.log))
        assert process.stop(signal.SIGINT, timeout_s=15) == 1
        assert not any(map(alive, pids(process).values()))


def test_a_second_signal_does_not_wait_for_a_worker_that_hangs(models: Path) -> None:
    flags = ("--processes", 2, "--drain-timeout-s", 600, "--engine-timeout-s", 600)
    with Process.running(models, *flags) as process, contextlib.ExitStack() as stack:
        victim = pids(process)[2]
        stack.enter_context(contextlib.suppress(ProcessLookupError))
        stack.callback(os.kill, victim, signal.SIGKILL)
        os.kill(victim, signal.SIGSTOP)
        process.process.send_signal(signal.SIGTERM)
        eventually(lambda: any(line["message"] == "draining" for line in process.log))
        assert process.stop(timeout_s=30) == 1
        assert not any(map(alive, pids(process).values()))


def test_a_connection_that_never_says_hello_does_not_keep_a_worker_from_ending(
    models: Path, tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path, "server", "-nodes")
    flags = ("--tls-certificate", certificate, "--tls-key", key, "--drain-delay-s", 0, "--drain-timeout-s", 1)
    with (
        Process.running(models, "--processes", 2, *flags) as process,
        socket.create_connection(("127.0.0.1", process.port)),
    ):
        assert process.stop() == 0


def test_no_orphans_stay_when_the_parent_is_killed(models: Path) -> None:
    with Process.running(models, "--processes", 2) as process:
        with connections(process, 2) as opened:
            for connection in opened:
                # On its way in when the parent dies: it was accepted, so it is answered.
                connection.putrequest("POST", "/v1/classify")
                connection.putheader("Content-Length", str(len(BODY)))
                connection.endheaders(BODY[:100])
            eventually(lambda: metric(process, "topfive_inflight_bytes") == 200)
            process.process.kill()
            process.process.wait()
            for connection in opened:
                connection.send(BODY[100:])
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
        eventually(lambda: not any(map(alive, pids(process).values())), 20)
        with socket.socket() as probe:  # the port is free at once
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", process.port))


def test_a_reload_reaches_all_and_a_worker_that_comes_back_has_it(
    models: Path, admin: tuple[str, ...]
) -> None:
    with Process.running(models, "--processes", 2, "--versions", 1, *admin) as process:
        assert versions(process) == {"1": 4}
        write_model(models, version="2", seed=5)
        with connections(process, 1) as (operator,):
            rows = ask(operator, "POST", "/v1/admin/reload")["versions"]
            assert [(row["version"], row["state"]) for row in rows] == [("2", "serving")]
            assert versions(process) == {"2": 4}
            # One that fails is refused in all, and says where.
            write_model(models, version="3", weight_scale=float("nan"))
            rows = ask(operator, "POST", "/v1/admin/reload")["versions"]
            assert [(row["version"], row["state"]) for row in rows] == [("2", "serving"), ("3", "refused")]
            assert rows[1]["reason"].startswith("worker 1: ")
            assert versions(process) == {"2": 4}
            assert ask(operator, "GET", "/v1/admin/versions")["versions"] == rows
        shutil.rmtree(models / "tiny" / "3")
        write_model(models, version="4", seed=6)  # there, but nobody has asked for it
        victim = pids(process)[2]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: any(line["message"] == "worker 2 serves again" for line in process.log), 30)
        assert versions(process) == {"2": 4}
        assert process.stop() == 0


def test_a_canary_is_on_trial_in_all_and_the_folder_is_watched_once(
    models: Path, admin: tuple[str, ...]
) -> None:
    flags = ("--canary-percent", 50, "--watch", "--watch-interval-s", 0.2)
    with Process.running(models, "--processes", 2, *admin, *flags) as process:
        write_model(models, version="2", seed=5)
        eventually(lambda: versions(process, rounds=4)["2"] == 8, 30)
        with connections(process, 1) as (operator,):
            rows = ask(operator, "POST", "/v1/admin/models/tiny/canary?percent=100")["versions"]
            assert [(row["version"], row["state"]) for row in rows] == [("2", "serving")]
            operator.request("POST", "/v1/admin/models/tiny/canary?percent=5", headers=KEY)
            assert operator.getresponse().status == 404
        assert versions(process) == {"2": 4}
        shares = [line for line in process.log if "gets 50 % of the requests" in line["message"]]
        assert len(shares) == 1
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--processes", "0"], "processes is 0; it must be between 1 and 1024"),
        (
            ["--processes", "8"],
            (
                "max_queue_images is 256, which leaves each of the 8 processes less than max_images (64); "
                "raise max_queue_images to 512 or lower max_images"
            ),
        ),
        (
            ["--processes", "2", "--api-keys", "/nowhere"],
            "worker 1 cannot start: the file of API keys /nowhere",
        ),
        (
            ["--processes", "2", "--tls-certificate", "/nowhere", "--tls-key", "/nowhere"],
            "--tls-certificate /nowhere cannot be read: No such file",
        ),
    ],
)
def test_what_cannot_start_says_why(models: Path, flags: list[str], sentence: str) -> None:
    status, message = run(models, "--port", 0, "--device", "cpu", *flags)
    assert status in {1, 2}
    assert sentence in re.sub(r"\s*│?\n│?\s*", " ", message)


def test_a_model_that_a_worker_cannot_run_ends_the_start(tmp_path: Path) -> None:
    write_model(tmp_path, weight_scale=float("nan"))
    status, message = run(tmp_path, "--port", 0, "--device", "cpu", "--processes", 2)
    assert status == 1
    assert "worker 1: model tiny/1 gave answers that are not numbers" in message


def test_the_grpc_port_is_shared(models: Path) -> None:
    grpcclient = pytest.importorskip("tritonclient.grpc")
    with Process.running(models, "--processes", 2, "--grpc-port", 0) as process:
        addresses = {line["worker"]: line["address"] for line in process.log if "address" in line}
        assert sorted(addresses) == [1, 2]
        assert addresses[1] == addresses[2]
        assert grpcclient.InferenceServerClient(addresses[1]).is_server_ready()
        status, message = run(
            models,
            "--port",
            0,
            "--device",
            "cpu",
            "--processes",
            2,
            "--grpc-port",
            addresses[1].partition(":")[2],
        )
        assert status == 1
        assert "for gRPC; give another --grpc-port" in message
        assert process.stop() == 0
