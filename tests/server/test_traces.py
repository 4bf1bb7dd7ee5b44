"""Traces as a collector receives them: a real server process, and a small collector that reads OTLP over HTTP."""

import asyncio
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.server.fakes import picture
from tests.server.harness import Reply, eventually
from tests.server.onnx_models import write_model
from tests.server.real_server import Process, run

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = ["receive", "decode", "queue", "batch", "infer"]
ERROR = 2
"""`STATUS_CODE_ERROR` in OTLP."""


class Collector:
    """Takes `POST /v1/traces`, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.stalled = threading.Event()
        """While set, nothing is answered."""
        self.free = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if collector.stalled.is_set():
                    collector.free.wait(60)
                assert self.path == "/v1/traces"
                message = trace_service.ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    collector.resources.append(attributes(resource.resource))
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.free.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def of(self, request_id: str) -> Any:
        """The server span of a request."""
        eventually(
            lambda: any(attributes(span).get("topfive.request_id") == request_id for span in self.spans)
        )
        (span,) = (s for s in self.spans if attributes(s).get("topfive.request_id") == request_id)
        return span

    def below(self, parent: Any) -> list[Any]:
        """A span's children, in order."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: (span.start_time_unix_nano, STAGES.index(span.name)))


def attributes(owner: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in owner.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root)
    return root


@pytest.fixture(scope="module")
def server(repository: Path, collector: Collector) -> Iterator[Process]:
    with Process.running(
        repository, "--traces", "--body-timeout-s", 0.3, "--grpc-port", 0, **environment(collector)
    ) as process:
        yield process
        assert process.stop() == 0


def environment(collector: Collector) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_SERVICE_NAME": "five",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }


def ask(
    server: Process, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[Reply, str]:
    """The answer, and the id under which the request is found."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    reply = Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    connection.close()
    return reply, reply.headers["x-request-id"]


def log_line(server: Process, request_id: str) -> dict[str, Any]:
    eventually(lambda: any(line.get("request_id") == request_id for line in server.log))
    return next(line for line in server.log if line.get("request_id") == request_id)


def test_a_request_is_one_span_with_its_stages_below_it(server: Process, collector: Collector) -> None:
    reply, request_id = ask(
        server,
        "POST",
        "/v1/classify?top_k=1",
        picture(7),
        traceparent=f"00-{TRACE}-{PARENT}-01",
        tracestate="vendor=1",
        X_Request_ID="ours-1",
    )
    assert (reply.status, request_id) == (200, "ours-1")
    span = collector.of("ours-1")
    assert (span.name, span.kind) == ("POST /v1/classify", 2)  # SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.trace_state == "vendor=1"
    assert span.status.code == 0
    known = attributes(span)
    assert known["http.request.method"] == "POST"
    assert known["http.route"] == known["url.path"] == "/v1/classify"
    assert known["http.response.status_code"] == 200
    assert known["client.address"] == "127.0.0.1"
    assert (known["topfive.model"], known["topfive.model_version"]) == ("tiny", "1")
    assert (known["topfive.images"], known["topfive.code"]) == (1, "ok")

    children = collector.below(span)
    assert [child.name for child in children] == STAGES
    moment = span.start_time_unix_nano
    for child in children:
        assert child.trace_id == span.trace_id
        assert moment <= child.start_time_unix_nano <= child.end_time_unix_nano <= span.end_time_unix_nano
        moment = child.start_time_unix_nano
    timing = dict(part.split(";dur=") for part in reply.headers["server-timing"].split(", "))
    for child in children:
        took_ms = (child.end_time_unix_nano - child.start_time_unix_nano) / 1e6
        assert took_ms == pytest.approx(float(timing[child.name]), abs=1.0)
    assert attributes(children[-1])["topfive.batch_size"] == 1
    assert all(child.status.code == 0 for child in children)

    assert log_line(server, "ours-1")["trace_id"] == TRACE
    assert collector.resources[0]["service.name"] == "five"
    assert collector.resources[0]["deployment.environment.name"] == "test"
    assert collector.resources[0]["service.version"]


def test_without_a_parent_a_trace_begins_here(server: Process, collector: Collector) -> None:
    for header in ({}, {"traceparent": "00-nonsense-01"}):
        _, request_id = ask(server, "POST", "/v1/classify", picture(7), **header)
        span = collector.of(request_id)
        assert span.parent_span_id == b""
        assert log_line(server, request_id)["trace_id"] == span.trace_id.hex() != TRACE


def test_a_parent_that_is_not_sampled_is_followed(server: Process, collector: Collector) -> None:
    unsampled = "1" * 32
    _, request_id = ask(server, "POST", "/v1/classify", picture(7), traceparent=f"00-{unsampled}-{PARENT}-00")
    assert log_line(server, request_id)["trace_id"] == unsampled
    _, later = ask(server, "POST", "/v1/classify", picture(7))
    collector.of(later)
    assert not [span for span in collector.spans if span.trace_id.hex() == unsampled]


def test_of_several_images_the_stages_are_those_of_the_last(server: Process, collector: Collector) -> None:
    bmp = picture(1, size=(2000, 2000), form="PNG")
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n' + data + b"\r\n"
        for data in (b"no image", picture(3), bmp)
    )
    reply, request_id = ask(
        server, "POST", "/v1/classify", parts + b"--b--\r\n", Content_Type="multipart/form-data; boundary=b"
    )
    assert reply.status == 200
    span = collector.of(request_id)
    assert attributes(span)["topfive.images"] == 3
    assert [child.name for child in collector.below(span)] == STAGES


def test_a_clients_mistake_is_no_error_of_the_servers_span(server: Process, collector: Collector) -> None:
    reply, request_id = ask(server, "POST", "/v1/classify", b"no image")
    span = collector.of(request_id)
    assert (reply.status, span.status.code) == (415, 0)
    assert attributes(span)["topfive.code"] == "unsupported-format"
    assert [child.name for child in collector.below(span)] == ["receive", "decode"]


def test_an_error_of_the_servers_is_one_and_so_is_the_stage_it_was_in(
    server: Process, collector: Collector
) -> None:
    # Its deadline passes while its body is awaited.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/v1/classify")
    for name, value in {"Content-Length": "1000", "X-Timeout-Ms": "100", "X-Request-ID": "late"}.items():
        connection.putheader(name, value)
    connection.endheaders(b"abc")
    assert connection.getresponse().status == 504
    connection.close()
    span = collector.of("late")
    assert span.status.code == ERROR
    assert attributes(span)["error.type"] == "deadline-exceeded"
    (stage,) = collector.below(span)
    assert (stage.name, stage.status.code) == ("receive", ERROR)


def test_other_routes_have_a_span_without_stages_and_probes_have_none(
    server: Process, collector: Collector
) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/v2/health/ready"):
        _, request_id = ask(server, "GET", path)
        assert "trace_id" not in log_line(server, request_id)
    _, models = ask(server, "GET", "/v1/models/tiny/labels")
    _, nothing = ask(server, "GET", "/nothing/here")
    assert collector.of(models).name == "GET /v1/models/{name}/labels"
    assert collector.of(nothing).name == "GET"
    assert collector.below(collector.of(models)) == []
    assert not [span for span in collector.spans if "ready" in span.name or "metrics" in span.name]


def test_tritons_protocol_over_rest_and_grpc(server: Process, collector: Collector) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    import numpy as np

    crop = json.loads(ask(server, "GET", "/v1/models")[0].body)["models"][0]["crop"]
    square = np.zeros((1, crop, crop, 3), np.uint8)
    body = {
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": list(square.shape), "data": square.tolist()}
        ]
    }
    reply, request_id = ask(server, "POST", "/v2/models/tiny/infer", json.dumps(body).encode())
    assert reply.status == 200
    span = collector.of(request_id)
    assert span.name == "POST /v2/models/{model}/infer"
    assert [child.name for child in collector.below(span)] == ["receive", "queue", "batch", "infer"]

    address = next(line["address"] for line in server.log if line["message"] == "serving gRPC")
    client = grpc.InferenceServerClient(address)
    tensor = grpc.InferInput("image", list(square.shape), "UINT8")
    tensor.set_data_from_numpy(square)
    client.infer("tiny", [tensor], headers={"traceparent": f"00-{'2' * 32}-{PARENT}-01"})
    client.close()
    eventually(lambda: any(span.trace_id.hex() == "2" * 32 for span in collector.spans))
    span = next(
        s for s in collector.spans if s.trace_id.hex() == "2" * 32 and s.parent_span_id.hex() == PARENT
    )
    assert span.name == "inference.GRPCInferenceService/ModelInfer"
    assert [child.name for child in collector.below(span)] == ["queue", "batch", "infer"]


def test_the_last_spans_are_sent_at_the_end(repository: Path, collector: Collector) -> None:
    lazy = {**environment(collector), "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with Process.running(repository, "--traces", "--drain-delay-s", 0, **lazy) as process:
        _, request_id = ask(process, "POST", "/v1/classify", picture(7))
        assert process.stop() == 0
    assert collector.of(request_id).name == "POST /v1/classify"


def test_each_of_several_processes_sends_its_spans(repository: Path, collector: Collector) -> None:
    with Process.running(repository, "--traces", "--processes", 2, **environment(collector)) as process:
        workers: set[int] = set()
        while workers != {
            1,
            2,
        }:  # each connection goes to the one with the fewest, as far as the parent has heard
            request_id = ask(process, "POST", "/v1/classify", picture(3))[1]
            assert [child.name for child in collector.below(collector.of(request_id))] == STAGES
            workers.add(log_line(process, request_id)["worker"])
        assert process.stop() == 0


@pytest.mark.parametrize("state", ["stalled", "gone"])
def test_a_collector_that_is_no_use_costs_no_request(repository: Path, state: str) -> None:
    collector = Collector()
    variables = environment(collector) | {
        "OTEL_BSP_MAX_QUEUE_SIZE": "64",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64",
    }
    try:
        if state == "stalled":
            collector.stalled.set()
        else:
            collector.close()
        arguments = ("--traces", "--drain-delay-s", 0, "--drain-timeout-s", 300, "--no-log-requests")
        with Process.running(repository, *arguments, **variables) as process:
            with ThreadPoolExecutor(4) as threads:
                asked = [threads.submit(ask, process, "POST", "/v1/classify", picture(7)) for _ in range(60)]
                assert {future.result()[0].status for future in asked} == {200}
            # Soon, whatever time the requests may take, and the exit status is theirs.
            assert process.stop(timeout_s=12) == 0
            assert process.log[-1]["message"] == "stopped"
    finally:
        if state == "stalled":
            collector.close()


def test_with_traces_off_the_sdk_is_not_imported(repository: Path) -> None:
    code = (
        "import sys, threading, os, signal, time\n"
        "from pathlib import Path\n"
        "from topfive_server import cli\n"
        "from topfive_server.config import ServerConfig\n"
        "threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "status = cli.serve(Path(sys.argv[1]), config=ServerConfig(port=0, device='cpu', drain_delay_s=0))\n"
        "loaded = [m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'topfive_server.traces'))]\n"
        "print(status, loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(repository)], capture_output=True, text=True, timeout=60, check=True
    )
    assert '"message": "stopped"' in done.stderr
    assert done.stdout.strip() == "0 []"


def test_what_keeps_it_from_sending_is_a_sentence(repository: Path, tmp_path: Path) -> None:
    status, message = run(
        repository, "--port", 0, "--device", "cpu", "--traces", OTEL_EXPORTER_OTLP_PROTOCOL="grpc"
    )
    assert status == 1
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is grpc; --traces sends by http/protobuf only" in message
    # As where the extra is not installed: FastAPI brings OpenTelemetry's API, and nothing brings its SDK.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.sdk'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    status, message = run(repository, "--port", 0, "--device", "cpu", "--traces", PYTHONPATH=path)
    assert status == 1
    assert "--traces needs opentelemetry" in message
    assert "pip install 'topfive[telemetry]'" in message


def test_a_wall_clock_that_jumps_changes_no_duration(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topfive_server.exchange import Exchange
    from topfive_server.load_shedding import Refusals
    from topfive_server.traces import Traces

    for name, value in environment(collector).items():
        monkeypatch.setenv(name, value)
    hours = iter(range(100, 0, -1))  # an hour back whenever somebody looks
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 3_600_000_000_000)

    async def send(_: Any) -> None:
        raise AssertionError

    async def record() -> None:
        ended = time.monotonic()
        scope = {"method": "POST", "path": "/v1/classify", "scheme": "http", "http_version": "1.1"}
        exchange = Exchange(
            scope, send, headers={}, request_id="jump", started=ended - 2, closing=False, refusals=Refusals()
        )
        exchange.timings["receive"] = 0.5
        traces = Traces()
        traces.record_http(exchange, ended)
        await traces.close(10)

    asyncio.run(record())
    span = collector.of("jump")
    (receive,) = collector.below(span)
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(2e9, abs=1e4)
    assert receive.end_time_unix_nano - receive.start_time_unix_nano == pytest.approx(5e8, abs=1e4)
    assert receive.start_time_unix_nano == span.start_time_unix_nano
