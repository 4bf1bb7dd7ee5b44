"""The HTTP interface, over a real socket."""

import gzip
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.server.fakes import FakeEngine, make_info, picture
from tests.server.harness import Harness, Reply, eventually, read_reply, serving

from topfive_server.errors import all_errors

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def server() -> Iterator[Harness]:
    with serving(
        FakeEngine(make_info("fake", "1")),
        FakeEngine(make_info("fake", "2"), shift=1),
        FakeEngine(make_info("other", "1"), shift=2),
        max_body_bytes=100_000,
        max_images=8,
        max_pixels=100_000,
    ) as harness:
        yield harness


def multipart(*files: tuple[str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    body = b""
    for name, data in files:
        filename = "" if name is None else f'; filename="{name}"'
        body += (
            f'--XX\r\nContent-Disposition: form-data; name="file"{filename}\r\n\r\n'.encode() + data + b"\r\n"
        )
    return body + b"--XX--\r\n", {"Content-Type": "multipart/form-data; boundary=XX"}


def send_files(server: Harness, *files: tuple[str | None, bytes]) -> Reply:
    body, headers = multipart(*files)
    return server.request("POST", "/v1/classify?version=1", body, headers)


def test_the_image_as_the_body(server: Harness) -> None:
    reply = server.classify(picture(40, size=(30, 60)), "?version=1")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    image = reply.json["images"][0]
    assert reply.json == {"model": "fake", "version": "1", "images": [image]}
    assert (image["filename"], image["width"], image["height"]) == (None, 30, 60)
    assert image["top"] == [
        {"label": f"red {40 + rank}", "class": 40 + rank, "probability": 0.5 / 2**rank} for rank in range(5)
    ]


def test_server_timing_names_every_stage(server: Harness) -> None:
    timing = server.classify(picture(1)).headers["server-timing"]
    assert re.findall(r"(\w+);dur=\d+\.\d+", timing) == ["receive", "decode", "queue", "batch", "infer"]


def test_many_files_are_answered_in_order_each_with_its_name_or_its_error(server: Harness) -> None:
    reply = send_files(
        server, ("a.png", picture(3)), ("notes.txt", b"hello"), ("ü.png", picture(9)), (None, picture(4))
    )
    assert reply.status == 200
    images = reply.json["images"]
    assert [image["filename"] for image in images] == ["a.png", "notes.txt", "ü.png", None]
    assert images[1]["error"]["status"] == 415
    assert [image["top"][0]["class"] for image in images if "top" in image] == [3, 9, 4]


def test_when_no_file_was_classified_the_status_is_the_first_error_and_all_are_listed(
    server: Harness,
) -> None:
    reply = send_files(server, ("cut.png", picture(3)[:60]), ("notes.txt", b"hello"))
    assert (reply.status, reply.code) == (422, "corrupt-image")
    assert [image["error"]["status"] for image in reply.json["images"]] == [422, 415]


@pytest.mark.parametrize(
    ("query", "answered", "first"),
    [
        ("", ("fake", "2"), 11),
        ("?model=fake&version=1", ("fake", "1"), 10),
        ("?model=other", ("other", "1"), 12),
    ],
)
def test_model_and_version_are_chosen(
    server: Harness, query: str, answered: tuple[str, str], first: int
) -> None:
    reply = server.classify(picture(10), query)
    assert (reply.json["model"], reply.json["version"]) == answered
    assert reply.classes == [first]


@pytest.mark.parametrize(
    "query",
    [
        "?model=none", "?version=3", "?model=..%2f..%2fetc", "?model=%00", "?version=1%2f..%2f2", f"?model={'x' * 10_000}",
        "?model=", "?version=",
    ],
)  # fmt: skip
def test_unknown_models_and_versions(server: Harness, query: str) -> None:
    reply = server.classify(picture(10), query)
    assert (reply.status, reply.code) == (404, "unknown-model")
    assert len(reply.body) < 600


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (5, 5), (7, 7), (100, 100)])
def test_top_k(server: Harness, top_k: int, count: int) -> None:
    top = server.classify(picture(10), f"?version=1&top_k={top_k}").json["images"][0]["top"]
    assert len(top) == count
    probabilities = [entry["probability"] for entry in top]
    assert probabilities == sorted(probabilities, reverse=True)
    assert [entry["class"] for entry in top[:7]] == list(range(10, 10 + min(count, 7)))


@pytest.mark.parametrize(
    "query",
    [
        "?top_k=0",
        "?top_k=-1",
        "?top_k=101",
        "?top_k=five",
        "?top_k=",
        "?top_k=²",
        "?topk=1",
        "?top_k=%ff",
        "?x=1",
    ],
)
def test_bad_parameters(server: Harness, query: str) -> None:
    reply = server.request("POST", f"/v1/classify{query.replace('²', '%C2%B2')}", picture(1))
    assert (reply.status, reply.code) == (400, "bad-request")


@pytest.mark.parametrize(
    "header",
    [{"X-Timeout-Ms": "soon"}, {"X-Timeout-Ms": "0"}, {"X-Timeout-Ms": "-5"}, {"X-Priority": "urgent"}],
)
def test_bad_headers(server: Harness, header: dict[str, str]) -> None:
    reply = server.request("POST", "/v1/classify", picture(1), header)
    assert (reply.status, reply.code) == (400, "bad-request")
    assert next(iter(header)) in reply.json["detail"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "bad-request"),
        (b"hello", 415, "unsupported-format"),
        (b"8BPS\0\1" + bytes(50), 415, "unsupported-format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported-format"),
        (picture(1)[:60], 422, "corrupt-image"),
        (picture(1, size=(400, 300)), 413, "too-many-pixels"),
        (bytes(100_001), 413, "too-large"),
    ],
)
def test_bodies_that_are_no_image(server: Harness, body: bytes, status: int, code: str) -> None:
    reply = server.classify(body)
    assert (reply.status, reply.code) == (status, code)
    assert reply.json["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_allowed_format(server: Harness, form: str) -> None:
    assert server.classify(picture(0, form=form), "?version=1").classes == [0]


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1)])
def test_extreme_shapes(server: Harness, size: tuple[int, int]) -> None:
    assert server.classify(picture(8, size=size), "?version=1").classes == [8]


def test_gzip(server: Harness) -> None:
    assert server.classify(gzip.compress(picture(6)), "?version=1", Content_Encoding="gzip").classes == [6]
    two = gzip.compress(picture(6)[:50]) + gzip.compress(picture(6)[50:])
    assert server.classify(two, "?version=1", Content_Encoding="gzip").classes == [6]


@pytest.mark.parametrize(
    ("body", "coding", "status", "code"),
    [
        (gzip.compress(bytes(10_000_000)), "gzip", 413, "too-large"),
        (gzip.compress(picture(1))[:-9], "gzip", 400, "bad-request"),
        (b"no gzip", "gzip", 400, "bad-request"),
        (picture(1), "br", 415, "unsupported-format"),
    ],
)
def test_content_codings_that_do_not_work(
    server: Harness, body: bytes, coding: str, status: int, code: str
) -> None:
    reply = server.classify(body, Content_Encoding=coding)
    assert (reply.status, reply.code) == (status, code)


def test_too_many_images(server: Harness) -> None:
    reply = send_files(server, *[("a.png", picture(1))] * 9)
    assert (reply.status, reply.code) == (413, "too-many-images")
    assert send_files(server, *[("a.png", picture(1))] * 8).status == 200


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"--XX\r\n", "multipart/form-data; boundary=XX"),
        (b"--XX--\r\n", "multipart/form-data; boundary=XX"),
        (multipart(("a.png", picture(1)))[0][:-8], "multipart/form-data; boundary=XX"),
        (multipart(("a.png", picture(1)))[0], "multipart/form-data; boundary=YY"),
        (multipart(("a.png", picture(1)))[0], "multipart/form-data"),
        (multipart(("a.png", picture(1)))[0], "multipart/mixed; boundary=XX"),
        (multipart(("a.png", picture(1)))[0], f"multipart/form-data; boundary={'X' * 5000}"),
        (b"--XX\r\n" + b"A: b\r\n" * 3000 + b"\r\n\r\n--XX--\r\n", "multipart/form-data; boundary=XX"),
        (
            b"--XX\r\nContent-Disposition: " + b"a" * 50_000 + b"\r\n\r\n\r\n--XX--\r\n",
            "multipart/form-data; boundary=XX",
        ),
        (b"--XX\r\n\x00bad header\r\n\r\n\r\n--XX--\r\n", "multipart/form-data; boundary=XX"),
    ],
)
def test_malformed_multipart(server: Harness, body: bytes, content_type: str) -> None:
    reply = server.request("POST", "/v1/classify", body, {"Content-Type": content_type})
    assert (reply.status, reply.code) == (400, "bad-request")


def test_a_chunked_body(server: Harness) -> None:
    data = picture(77)
    pieces = [data[i : i + 7] for i in range(0, len(data), 7)]
    reply = server.request(
        "POST", "/v1/classify?version=1", iter(pieces), {"Transfer-Encoding": "chunked"}, chunked=True
    )
    assert reply.classes == [77]


def test_the_request_id_comes_back_or_is_made(server: Harness) -> None:
    assert server.classify(picture(1), X_Request_ID="abc-1").headers["x-request-id"] == "abc-1"
    assert server.request("GET", "/healthz", headers={"X-Request-ID": "h:2"}).headers["x-request-id"] == "h:2"
    for bad in ("", "a b", "x" * 200, 'quote"'):
        made = server.classify(picture(1), X_Request_ID=bad).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", made)


def test_every_request_without_an_id_gets_one_of_its_own(server: Harness) -> None:
    made = {server.request("GET", "/healthz").headers["x-request-id"] for _ in range(50)}
    assert len(made) == 50
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in made)


def test_models(server: Harness) -> None:
    models = server.request("GET", "/v1/models").json["models"]
    assert [(m["name"], m["version"], m["default"]) for m in models] == [
        ("fake", "1", False), ("fake", "2", True), ("other", "1", False),
    ]  # fmt: skip
    assert {"classes", "crop", "labels_url", "ready", "provider", "graph", "precision", "verified"} <= models[
        0
    ].keys()
    assert models[0]["fingerprint"] == "fingerprint of fake/1"
    labels = server.request("GET", models[0]["labels_url"]).json["labels"]
    assert labels[:2] == ["red 0", "red 1"]
    assert server.request("GET", "/v1/models/none/labels").code == "unknown-model"


def test_put_is_post_because_curl_sends_it_for_uploads(server: Harness) -> None:
    put, post = (server.request(method, "/v1/classify", picture(1)) for method in ("PUT", "POST"))
    assert (put.status, put.json) == (200, post.json)


def test_unknown_paths_and_methods(server: Harness) -> None:
    assert server.request("GET", "/v1/nothing").code == "not-found"
    reply = server.request("DELETE", "/v1/classify")
    assert (reply.status, reply.code, reply.headers["allow"]) == (405, "method-not-allowed", "POST, PUT")
    reply = server.request("POST", "/healthz")
    assert (reply.status, reply.code, reply.headers["allow"]) == (405, "method-not-allowed", "GET, HEAD")


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v2", "/v2/health/ready", "/nothing"]
)
def test_head_is_get_without_the_body(server: Harness, path: str) -> None:
    """As load balancers probe; whatever followed the head would be taken for the next answer."""
    expected = server.request("GET", path)
    with server.connect() as connection:
        for _ in range(2):
            connection.sendall(b"HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
            received = b""
            while not received.endswith(b"\r\n\r\n"):
                received += connection.recv(65536)
            head = received.decode("latin-1").lower()
            assert head.startswith(f"http/1.1 {expected.status} ")
            assert f"content-type: {expected.headers['content-type']}\r\n" in head
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_reply(connection).json["status"] == "alive"


def test_what_allows_get_allows_head_and_says_so(server: Harness) -> None:
    assert server.request("DELETE", "/healthz").headers["allow"] == "GET, HEAD"
    reply = server.request("HEAD", "/v1/classify")
    assert (reply.status, reply.headers["allow"]) == (405, "POST, PUT")


def test_health_and_readiness(server: Harness) -> None:
    assert server.request("GET", "/healthz").json["status"] == "alive"
    reply = server.request("GET", "/readyz")
    assert reply.status == 200
    assert {(m["name"], m["version"], m["ready"], m["provider"]) for m in reply.json["models"]} == {
        ("fake", "1", True, "fake"), ("fake", "2", True, "fake"), ("other", "1", True, "fake"),
    }  # fmt: skip


def test_metrics_count_what_happened(server: Harness) -> None:
    before = server.metric("topfive_images_total", model="fake", version="1", outcome="ok")
    server.classify(picture(1), "?version=1")
    server.classify(b"hello", "?version=1")
    text = server.request("GET", "/metrics").body.decode()
    assert f'topfive_images_total{{model="fake",outcome="ok",version="1"}} {before + 1}' in text
    assert 'topfive_requests_total{code="unsupported-format",route="/v1/classify",status="415"}' in text
    assert 'topfive_ready{model="fake",version="1"} 1.0' in text
    assert "topfive_inflight_images 0.0" in text


def test_the_pages_are_strict_and_hold_nothing_from_elsewhere(server: Harness) -> None:
    for path in ("/", "/docs"):
        reply = server.request("GET", path)
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert reply.headers["x-content-type-options"] == "nosniff"
        links = re.findall(r'(?:src|href)="([^"]+)"', reply.body.decode())
        assert links
        for link in links:
            assert link.startswith("/")
            assert server.request("GET", link).status == 200


def test_openapi_describes_every_route_and_every_error(server: Harness) -> None:
    document = server.request("GET", "/openapi.json").json
    assert {"/v1/classify", "/v1/models", "/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    responses = document["paths"]["/v1/classify"]["post"]["responses"]
    assert {kind.status for kind in all_errors()} | {200} == set(map(int, responses))


def test_the_documented_status_table_is_the_hierarchy() -> None:
    rows = re.findall(r"^\| (\d{3})[^|]*\| ([^|]*)\|", ARCHITECTURE.read_text(), re.MULTILINE)
    documented = {(int(status), code) for status, codes in rows for code in re.findall(r"`([a-z-]+)`", codes)}
    assert documented == {(kind.status, kind.code) for kind in all_errors()}


def test_concurrent_requests_each_get_their_own_answer(server: Harness) -> None:
    def one(red: int) -> list[int]:
        return server.classify(picture(red), "?version=1").classes

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(one, range(200))) == [[red] for red in range(200)]


def test_several_requests_on_one_connection(server: Harness) -> None:
    from tests.server.harness import read_reply

    with server.connect() as connection:
        for red in (5, 6, 7):
            body = picture(red)
            head = f"POST /v1/classify?version=1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert read_reply(connection).classes == [red]


def test_one_line_in_the_log_for_each_request(capfd: pytest.CaptureFixture[str]) -> None:
    from topfive_server import logs

    logs.configure("json")
    with serving(log_requests=True) as server:
        server.classify(picture(1), X_Request_ID="one")
        server.classify(b"hello", X_Request_ID="two")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    requests: list[dict[str, Any]] = [line for line in lines if line["logger"] == "topfive_server.requests"]
    assert [(r["request_id"], r["status"], r["code"]) for r in requests] == [
        ("one", 200, "ok"), ("two", 415, "unsupported-format"),
    ]  # fmt: skip
    assert requests[0]["infer_ms"] >= 0
    assert requests[0]["model"] == "fake"


def test_a_path_forges_no_line_and_gives_a_terminal_no_orders(capfd: pytest.CaptureFixture[str]) -> None:
    from topfive_server import logs

    logs.configure("text")
    with serving(log_requests=True) as server:
        path = b"/%0A00:00:00%20warning%20key%20of%20alice%20revoked%1b[2J%c2%9b%e2%80%ae%C3%A9"
        server.raw(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    logs.configure("json")
    [line] = [line for line in capfd.readouterr().err.split("\n") if "alice" in line]
    assert r"path=/\n00:00:00 warning key of alice revoked\x1b[2J\x9b\u202eé status=404" in line


def test_a_traceback_keeps_its_lines_in_the_text_log() -> None:
    from topfive_server import logs

    error = ValueError("of two\nlines \x1b[2J")
    record = logging.LogRecord("a", logging.ERROR, "", 0, "failed\n!", (), (ValueError, error, None))
    first, *others = logs.TextFormatter().format(record).split("\n")
    assert first.endswith(r"failed\n!")
    assert others == ["ValueError: of two", r"lines \x1b[2J"]


def test_a_slow_request_says_which_stage_it_was_in(capfd: pytest.CaptureFixture[str]) -> None:
    from topfive_server import logs

    with serving(slow_request_ms=100, body_timeout_s=0.3) as server, ThreadPoolExecutor() as threads:
        logs.configure("json")
        server.hold()
        computed = threads.submit(server.classify, picture(1), X_Request_ID="a", X_Timeout_Ms="300")
        eventually(lambda: server.engine.seen == [1])
        queued = threads.submit(server.classify, picture(2), X_Request_ID="b", X_Timeout_Ms="300")
        with server.connect() as connection:
            connection.sendall(
                b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: c\r\nContent-Length: 9\r\n\r\nx"
            )
            assert read_reply(connection).status == 408
        assert {computed.result().status, queued.result().status} == {504}
        server.release()
    logs.configure("json")
    lines = map(json.loads, filter(None, capfd.readouterr().err.splitlines()))
    told = {line["request_id"]: line for line in lines if line["message"] == "slow request"}
    assert {key: line["slowest"] for key, line in told.items()} == {
        "a": "infer",
        "b": "queue",
        "c": "receive",
    }
    assert {line["level"] for line in told.values()} == {"warning"}


def test_readiness_sends_an_image_through_the_whole_path_and_notices_wrong_answers() -> None:
    with serving() as server:
        server.on_loop(lambda: setattr(server.model.batcher, "last_success", float("-inf")))
        assert server.request("GET", "/readyz").status == 200
        assert len(server.engine.batches) == 1
        assert server.request("GET", "/readyz").status == 200
        assert len(server.engine.batches) == 1  # the success is fresh
        server.engine.shift = 1
        server.on_loop(lambda: setattr(server.model.batcher, "last_success", float("-inf")))
        reply = server.request("GET", "/readyz")
        assert (reply.status, reply.json["ready"]) == (503, False)


@pytest.mark.parametrize("fault", ["dead", "hangs"])
def test_a_lost_engine_is_unready_and_is_rebuilt(fault: str) -> None:
    with serving(engine_timeout_s=0.1) as server:
        setattr(server.engine, fault, True)
        reply = server.classify(picture(1))
        assert (reply.status, reply.code) == (503, "not-ready")
        assert int(reply.headers["retry-after"]) >= 1
        assert server.request("GET", "/readyz").status == 503
        refused = server.classify(picture(2))
        assert (refused.status, refused.code) == (503, "not-ready")
        setattr(server.engine, fault, False)
        eventually(lambda: server.request("GET", "/readyz").status == 200)
        assert server.classify(picture(3)).classes == [3]
        assert server.metric("topfive_engine_rebuilds_total", model="fake", version="1", result="ok") == 1


def test_an_engine_failure_hits_the_guilty_image_alone() -> None:
    with serving(FakeEngine(guilty={5})) as server:
        reply = send_files(server, *[(f"{red}.png", picture(red)) for red in range(8)])
        assert reply.status == 200
        errors = {
            i: image["error"]["status"] for i, image in enumerate(reply.json["images"]) if "error" in image
        }
        assert errors == {5: 500}
        assert server.classify(picture(5)).code == "engine-failed"
        assert server.request("GET", "/readyz").status == 200


def test_a_full_queue_is_refused_at_once_and_says_when_to_come_back() -> None:
    with (
        serving(FakeEngine(make_info(max_batch=2)), max_queue_images=6, max_images=6) as server,
        ThreadPoolExecutor() as threads,
    ):
        server.hold()
        pending = [threads.submit(server.classify, picture(red)) for red in range(6)]
        eventually(lambda: server.application.admission.images == 6)
        reply = server.classify(picture(9))
        assert (reply.status, reply.code) == (429, "queue-full")
        assert int(reply.headers["retry-after"]) >= 1
        server.release()
        assert sorted(future.result().classes[0] for future in pending) == list(range(6))
        assert server.classify(picture(9)).classes == [9]
        assert server.application.admission.images == server.application.admission.bytes == 0


def test_a_multi_image_request_counts_as_what_it_is() -> None:
    with serving(max_queue_images=8, max_images=8) as server, ThreadPoolExecutor() as threads:
        server.hold()
        pending = threads.submit(send_files, server, *[("a.png", picture(1))] * 5)
        eventually(lambda: server.application.admission.images == 5)
        assert send_files(server, *[("a.png", picture(1))] * 4).code == "queue-full"
        server.release()
        assert pending.result().status == 200


def test_bytes_in_flight_are_bounded() -> None:
    with serving(max_queue_bytes=1000, max_body_bytes=900) as server, server.connect() as slow:
        slow.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 800\r\n\r\n" + bytes(700))
        eventually(lambda: server.application.admission.bytes == 700)
        reply = server.classify(bytes(400))
        assert (reply.status, reply.code) == (429, "queue-full")


def test_a_deadline_that_cannot_be_met_is_refused_before_anything_is_computed() -> None:
    with serving() as server:
        for _ in range(30):
            server.on_loop(lambda: server.model.batcher.times.observe(1, 0.2))
        reply = server.classify(picture(1), X_Timeout_Ms="100")
        assert (reply.status, reply.code) == (429, "deadline-unreachable")
        assert "retry-after" in reply.headers
        assert server.engine.batches == []
        assert server.classify(picture(1), X_Timeout_Ms="5000").status == 200


def test_a_deadline_that_passes_is_504_and_the_engine_is_spared() -> None:
    with serving() as server, ThreadPoolExecutor() as threads:
        server.hold()
        first = threads.submit(server.classify, picture(1))
        eventually(lambda: server.engine.batches == [[1]])
        started = time.monotonic()
        reply = server.classify(picture(2), X_Timeout_Ms="60")
        assert (reply.status, reply.code) == (504, "deadline-exceeded")
        assert time.monotonic() - started >= 0.06
        server.release()
        assert first.result().classes == [1]
        eventually(
            lambda: server.metric("topfive_dropped_images_total", stage="engine", reason="deadline") == 1
        )
        assert server.engine.batches == [[1]]
