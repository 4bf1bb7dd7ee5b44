"""What the log and the metrics are told of a request: served, refused by whomever, given up, over HTTP and over gRPC."""

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.fakes import FakeEngine, make_info, picture, pixels
from tests.server.harness import Harness, eventually, read_reply, serving

from topfive_server.accounting import Account, Accounts
from topfive_server.config import ServerConfig
from topfive_server.job import Job
from topfive_server.logs import REQUESTS, JsonFormatter
from topfive_server.metrics import Metrics

REFUSALS: list[tuple[bytes, int, str]] = [
    (b"HELLO\r\n\r\n", 400, "bad-request"),
    (
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Filler: " + bytes([97]) * 70_000 + b"\r\n\r\n",
        431,
        "headers-too-large",
    ),
    (b"CONNECT a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
    (b"GET /slow?secret=1 HTTP/1.1\r\nHost: x\r\n", 408, "body-timeout"),
]


class Lines(logging.Handler):
    """The lines of requests, as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self._formatter = JsonFormatter()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self._formatter.format(record))

    def of(self, request_id: str) -> dict[str, Any]:
        """The one line of a request; it may be written after its answer."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [row for row in map(json.loads, list(self.texts)) if row["request_id"] == request_id]
            return bool(found)

        eventually(there)
        assert len(found) == 1
        return found[0]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger(REQUESTS)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def latencies(server: Harness, outcome: str, route: str = "/v1/classify") -> float:
    return server.metric("topfive_request_seconds_count", route=route, outcome=outcome)


def requests(server: Harness, route: str, status: int, code: str) -> float:
    return server.metric("topfive_requests_total", route=route, status=str(status), code=code)


# ---------------------------------------------------------------------- metrics


def test_the_latency_of_what_is_served_is_apart_from_that_of_refusals_and_mistakes() -> None:
    with serving(FakeEngine(make_info(max_batch=1)), max_queue_images=1, max_images=1) as server:
        server.hold()
        taker = threading.Thread(target=server.classify, args=(picture(1),))
        taker.start()
        eventually(lambda: server.application.admission.images == 1)
        assert server.classify(picture(2)).status == 429
        server.release()
        taker.join()
        assert server.classify(b"no image").status == 415
        server.engine.guilty = {7}
        assert server.classify(picture(7)).status == 500
        for outcome in ("ok", "refused", "client", "server"):
            eventually(lambda outcome=outcome: latencies(server, outcome) == 1)  # type: ignore[misc]


def test_a_quantile_read_from_the_buckets_is_near_the_truth() -> None:
    [family] = Metrics().queue_seconds.collect()
    edges = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
    assert edges[-2:] == [60, float("inf")]  # the default deadline
    within = [edge for edge in edges if 0.001 <= edge <= 1]
    assert all(high / low <= 1.7 for low, high in itertools.pairwise(within))


def test_what_may_be_counted_is_there_before_it_first_is() -> None:
    with serving() as server:
        registry = server.application.metrics.registry
        version = {"model": "fake", "version": "1"}
        for name, labels in (
            *(("engine_failures", version | {"kind": k}) for k in ("error", "out-of-memory", "dead", "hung")),
            *(("engine_rebuilds", version | {"result": result}) for result in ("ok", "failed")),
            *(
                ("dropped_images", {"stage": stage, "reason": reason})
                for stage in ("decode", "engine")
                for reason in ("client-gone", "deadline")
            ),
        ):
            assert registry.get_sample_value(f"topfive_{name}_total", labels) == 0, (name, labels)


def test_images_that_fail_or_are_given_up_have_waited_too() -> None:
    with serving() as server:
        before = [server.metric(f"topfive_{stage}_seconds_count") for stage in ("decode", "queue")]
        assert before == [0, 0]
        assert server.classify(b"no image").status == 415
        eventually(lambda: server.metric("topfive_decode_seconds_count") == 1)
        server.hold()
        computed = threading.Thread(target=server.classify, args=(picture(1),))
        computed.start()
        eventually(lambda: server.engine.seen == [1])
        assert server.classify(picture(2), X_Timeout_Ms="300").status == 504
        eventually(lambda: server.metric("topfive_queue_seconds_count") == 1)
        assert server.metric("topfive_queue_seconds_sum") > 0.1
        server.release()
        computed.join()
        eventually(lambda: server.metric("topfive_queue_seconds_count") == 2)
        assert server.metric("topfive_decode_seconds_count") == 3


def test_an_image_given_up_while_it_was_decoded_counts_from_when_it_had_come() -> None:
    metrics, loop = Metrics(), asyncio.new_event_loop()
    account = Account(request_id="x", started=100.0, method="POST", path="/v1/classify", client=None)
    account.status, account.timings["receive"] = 504, 0.5
    account.jobs = [Job(deadline=102.0, priority="interactive", loop=loop)]
    Accounts(ServerConfig(log_requests=False), metrics).close(account, ended=102.0)
    assert metrics.registry.get_sample_value("topfive_decode_seconds_sum") == 1.5
    loop.close()


def test_an_unanswered_body_counts_with_the_bytes_that_came(lines: Lines) -> None:
    with serving(log_requests=True, body_timeout_s=0.2) as server:
        for path, id_ in (("/v1/classify", "one"), ("/v2/models/fake/infer", "two")):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-ID: {id_}\r\nContent-Length: 9000\r\n\r\n"
            assert server.raw(head.encode() + bytes(1234)).status == 408
            assert lines.of(id_)["bytes"] == 1234
        assert server.metric("topfive_received_bytes_total") == 2468


def test_what_is_not_allowed_on_a_route_counts_as_that_route(tmp_path: Path) -> None:
    with serving() as server:
        for method, path, route in (
            ("GET", "/v1/classify", "/v1/classify"),
            ("GET", "/v2/models/fake/infer", "/v2/models/{model}/infer"),
            ("POST", "/v2/health/live", "/v2/health/live"),
        ):
            assert server.request(method, path).status == 405
            eventually(lambda route=route: requests(server, route, 405, "method-not-allowed") == 1)  # type: ignore[misc]
        assert server.request("POST", "/v2/models/nope/infer").status == 404
        eventually(lambda: requests(server, "/v2/models/{model}/infer", 404, "unknown-model") == 1)


# ---------------------------------------------------------------------- what the protocol refuses


@pytest.mark.parametrize(
    ("sent", "status", "code"), REFUSALS, ids=["no HTTP", "too large", "no URL", "too slow"]
)
def test_what_is_refused_before_it_is_a_request_leaves_its_trace(
    lines: Lines, sent: bytes, status: int, code: str
) -> None:
    with serving(log_requests=True, header_timeout_s=0.2) as server:
        reply = server.raw(sent)
        assert (reply.status, reply.code) == (status, code)
        id_ = reply.json["request_id"]
        assert reply.headers["x-request-id"] == id_
        line = lines.of(id_)
        assert (line["status"], line["code"], line["client"]) == (status, code, "127.0.0.1")
        assert line["receive_ms"] >= 0
        assert "secret" not in lines.texts[0]
        eventually(lambda: requests(server, "other", status, code) == 1)
        assert latencies(server, "client", "other") == 1


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/fake/infer"])
def test_a_bad_chunk_is_what_its_answer_says_and_not_a_client_that_left(
    lines: Lines, path: str, at_once: bool
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(log_requests=True) as server, server.connect() as connection:
        connection.sendall(head.encode() + (b"ZZ\r\n" if at_once else b""))
        if not at_once:
            eventually(lambda: bool(server.on_loop(lambda: len(server.server.server_state.tasks))))
            connection.sendall(b"ZZ\r\n")
        reply = read_reply(connection)
        assert (reply.status, reply.code, reply.json["request_id"]) == (400, "bad-request", "mine")
        line = lines.of("mine")
        assert (line["status"], line["code"]) == (400, "bad-request")
        route = path.replace("fake", "{model}")
        assert requests(server, route, 400, "bad-request") == 1
        assert requests(server, route, 499, "client-gone") == 0


def test_a_refusal_does_not_take_the_id_of_the_request_before(lines: Lines) -> None:
    with serving(log_requests=True) as server, server.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\n\r\n")
        assert read_reply(connection).json["status"] == "alive"
        connection.sendall(b"\x01\x02\x03\r\n\r\n")
        reply = read_reply(connection)
        assert (reply.status, reply.code) == (400, "bad-request")
        assert reply.json["request_id"] != "mine"
        assert lines.of(reply.json["request_id"])["path"] != "/healthz"


def test_a_url_that_is_none_is_not_said_in_the_place_of_an_earlier_answer() -> None:
    with serving() as server, server.connect() as connection:
        server.hold()
        body = picture(5)
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body + b"CONNECT a HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: server.engine.seen == [5])
        server.release()
        assert read_reply(connection).classes == [5]
        assert connection.recv(1) == b""


# ---------------------------------------------------------------------- the log


def test_a_failed_request_says_in_which_stage_it_was(lines: Lines) -> None:
    with serving(log_requests=True, slow_request_ms=60_000) as server:
        server.hold()
        computed = threading.Thread(target=server.classify, args=(picture(1),))
        computed.start()
        eventually(lambda: server.engine.seen == [1])
        assert server.classify(picture(2), X_Request_ID="late", X_Timeout_Ms="300").status == 504
        line = lines.of("late")
        assert (line["stage"], line["slowest"], line["message"]) == ("queue", "queue", "request")
        assert line["queue_ms"] > 100
        assert line["decode_ms"] >= 0
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/classify", picture(3), {"X-Request-ID": "gone"})
        eventually(lambda: server.application.admission.images == 2)
        connection.close()
        line = lines.of("gone")
        assert (line["status"], line["stage"]) == (499, "queue")
        server.release()
        computed.join()
        assert server.classify(b"no image", X_Request_ID="bad").status == 415
        line = lines.of("bad")
        assert line["decode_ms"] >= 0
        assert "slowest" not in line


def test_the_json_log_gives_a_terminal_no_orders() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "\x9b2J \u202e \u2028 é \U000e0001 \ud800", (), None)
    text = JsonFormatter().format(record)
    assert text.isprintable()
    assert "é" in text
    assert json.loads(text)["message"] == record.msg


def test_a_wrong_key_is_told_from_none_and_the_log_says_whose_key_it_was(
    tmp_path: Path, lines: Lines
) -> None:
    keys = tmp_path / "keys.txt"
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in ("first", "second")]
    keys.write_text(f"{digests[0]}  alice\n{digests[1]}\n")
    with serving(log_requests=True, api_keys=keys) as server:
        assert server.classify(picture(1), X_API_Key="first", X_Request_ID="one").status == 200
        assert lines.of("one")["key"] == "alice"
        assert server.classify(picture(1), X_API_Key="second", X_Request_ID="two").status == 200
        assert lines.of("two")["key"] == "line 2"
        wrong = server.classify(picture(1), X_API_Key="third", X_Request_ID="three")
        assert (wrong.status, wrong.code) == (401, "unauthorized")
        assert "not one of this server's" in wrong.json["detail"]
        assert "key" not in lines.of("three")
        assert "send an API key" in server.classify(picture(1)).json["detail"]
        assert not any(secret in text for text in lines.texts for secret in ("first", "second", "third"))
        eventually(lambda: requests(server, "/v1/classify", 401, "unauthorized") == 2)


# ---------------------------------------------------------------------- gRPC


def test_grpc_is_accounted_for_as_http_is(lines: Lines) -> None:
    pytest.importorskip("tritonclient.grpc")
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    square = InferInput("image", [1, *pixels(7).shape], "UINT8")
    square.set_data_from_numpy(pixels(7)[None])
    with serving(log_requests=True, grpc_port=0) as server:
        assert server.server._grpc is not None
        client = InferenceServerClient(f"127.0.0.1:{server.server._grpc.port}")
        with contextlib.closing(client):
            client.infer("fake", [square], headers={"x-request-id": "one"})
            line = lines.of("one")
            assert (line["path"], line["status"], line["code"], line["client"], line["model"], line["images"]) == (
                "/inference.GRPCInferenceService/ModelInfer", 200, "ok", "127.0.0.1", "fake", 1,
            )  # fmt: skip
            assert line["bytes"] > pixels(7).nbytes
            assert line["infer_ms"] >= 0
            assert server.metric("topfive_received_bytes_total") == line["bytes"]
            assert server.metric("topfive_queue_seconds_count") == 1
            assert server.metric("topfive_decode_seconds_count") == 0  # it came decoded
            assert latencies(server, "ok", "grpc ModelInfer") == 1
            with pytest.raises(InferenceServerException):
                client.infer("nope", [square], headers={"x-request-id": "two"})
            assert lines.of("two")["code"] == "unknown-model"
            assert requests(server, "grpc ModelInfer", 404, "unknown-model") == 1
            server.hold()
            with pytest.raises(InferenceServerException):
                client.infer("fake", [square], headers={"x-request-id": "late"}, timeout=300_000)
            line = lines.of("late")
            assert (line["status"], line["stage"]) == (504, "infer")
            server.release()


def test_many_texts_over_grpc_are_not_made_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    oip_grpc = pytest.importorskip("topfive_server.oip_grpc")
    import numpy as np
    from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

    threads: list[str] = []
    to_binary = oip_grpc.to_binary

    def spied(values: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return bytes(to_binary(values))

    monkeypatch.setattr(oip_grpc, "to_binary", spied)
    images = np.stack([pixels(red) for red in range(8)])
    squares = InferInput("image", list(images.shape), "UINT8")
    squares.set_data_from_numpy(images)
    with serving(grpc_port=0) as server:
        assert server.server._grpc is not None
        client = InferenceServerClient(f"127.0.0.1:{server.server._grpc.port}")
        with contextlib.closing(client):
            result = client.infer(
                "fake", [squares], outputs=[InferRequestedOutput("scores", class_count=256)]
            )
            assert result.as_numpy("scores").shape == (8, 256)
            assert threads[-1].startswith("decode")
            client.infer("fake", [squares])
            assert not threads[-1].startswith("decode")
