"""The Open Inference Protocol over a real socket; requests as stock clients were recorded to send them."""

import contextlib
import gzip
import http.client
import json
import subprocess
import textwrap
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.server.fakes import CLASSES, CROP, FakeEngine, make_info, pixels, predictions
from tests.server.harness import Harness, Reply, eventually, serving
from tests.server.real_triton import triton_program

from topfive_server.load_shedding import ClosedLoops
from topfive_server.oip_codec import Interface, ProtocolError, encode_response, parse_request

INTERFACE = Interface(
    name="fake", side=CROP, classes=CLASSES, max_batch=8, labels=tuple(map(str, range(CLASSES)))
)
INFER = "/v2/models/fake/infer"


@pytest.fixture(scope="module", name="server")
def start_server() -> Iterator[Harness]:
    with serving(
        FakeEngine(make_info("fake", "1")),
        FakeEngine(make_info("fake", "2"), shift=1),
        max_body_bytes=400_000,
        max_images=8,
    ) as harness:
        yield harness


def tensor(*reds: int) -> NDArray[np.uint8]:
    return np.stack([pixels(red) for red in reds])


def message(
    images: NDArray[np.uint8], *, binary: bool = True, **members: Any
) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers, as tritonclient builds them."""
    record: dict[str, Any] = {"name": "image", "shape": list(images.shape), "datatype": "UINT8"}
    if binary:
        record["parameters"] = {"binary_data_size": images.size}
    else:
        record["data"] = images.ravel().tolist()
    head = json.dumps({"inputs": [record], **members}, separators=(",", ":")).encode()
    if not binary:
        return head, {}
    return head + images.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def infer(server: Harness, *reds: int, path: str = INFER, **kwargs: Any) -> Reply:
    body, headers = message(tensor(*reds), **kwargs)
    return server.request("POST", path, body, headers)


def arrays(reply: Reply) -> dict[str, NDArray[Any]]:
    """Every output of an answer, JSON and binary."""
    length = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    rest = reply.body[length:]
    found: dict[str, NDArray[Any]] = {}
    for output in json.loads(reply.body[:length])["outputs"]:
        kind: Any = {"FP32": "<f4", "INT64": "<i8", "BYTES": object}[output["datatype"]]
        if "data" in output:
            flat: Any = np.array(output["data"], kind)
        else:
            size = output["parameters"]["binary_data_size"]
            flat, rest = np.frombuffer(rest[:size], kind), rest[size:]
        found[output["name"]] = flat.reshape(output["shape"])
    assert rest == b""
    return found


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tensors_in_and_out(server: Harness, binary_in: bool, binary_out: bool) -> None:
    reply = infer(
        server,
        *(7, 200, 90),
        path="/v2/models/fake/versions/1/infer",
        binary=binary_in,
        id="42",
        parameters={"binary_data_output": binary_out},
    )
    assert reply.status == 200
    assert ("inference-header-content-length" in reply.headers) == binary_out
    kind = "application/octet-stream" if binary_out else "application/json"
    assert reply.headers["content-type"] == kind
    expected = predictions([7, 200, 90])
    got = arrays(reply)
    assert list(got) == ["probabilities", "classes", "scores"]
    np.testing.assert_array_equal(got["probabilities"], expected.probabilities_BT)
    np.testing.assert_array_equal(got["classes"], expected.classes_BT)
    np.testing.assert_array_equal(got["scores"], expected.scores_BC)
    head = json.loads(
        reply.body[: int(reply.headers.get("inference-header-content-length", len(reply.body)))]
    )
    assert (head["id"], head["model_name"], head["model_version"]) == ("42", "fake", "1")


@pytest.mark.parametrize(
    "path", [INFER, "/v2/health/ready", "/v2/models/fake", "/v2/models/none", "/v2/none"]
)
def test_answers_have_what_every_answer_has(server: Harness, path: str) -> None:
    reply = infer(server, 7) if path == INFER else server.request("GET", path, headers={"X-Request-ID": "me"})
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-store"
    assert (reply.headers["x-request-id"] == "me") == (path != INFER)
    timed = [part.partition(";")[0] for part in reply.headers.get("server-timing", "").split(", ")]
    assert timed == (["receive", "queue", "batch", "infer"] if path == INFER else [""])


@pytest.mark.parametrize(
    ("reds", "asked", "accept", "on_the_loop"),
    [
        (7, {}, "", True),
        (8, {}, "", False),
        (8, {"parameters": {"binary_data_output": True}}, "", True),
        (8, {"parameters": {"binary_data_output": True}}, "gzip", False),
        (8, {"outputs": [{"name": "probabilities"}]}, "gzip", True),
    ],
)
def test_large_answers_are_encoded_on_a_thread(
    server: Harness,
    monkeypatch: pytest.MonkeyPatch,
    reds: int,
    asked: dict[str, Any],
    accept: str,
    on_the_loop: bool,
) -> None:
    threads = []

    def noting(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return encode_response(*arguments)

    monkeypatch.setattr("topfive_server.oip.encode_response", noting)
    body, headers = message(tensor(*range(reds)), **asked)
    path = "/v2/models/fake/versions/1/infer"
    reply = server.request("POST", path, body, headers | {"Accept-Encoding": accept})
    if "content-encoding" in reply.headers:
        reply = Reply(reply.status, reply.headers, gzip.decompress(reply.body))
    np.testing.assert_array_equal(
        arrays(reply)["probabilities"], predictions(list(range(reds))).probabilities_BT
    )
    assert [thread is server._thread for thread in threads] == [on_the_loop]


def test_the_newest_version_answers_unless_one_is_named(server: Harness) -> None:
    assert infer(server, 10, binary=False).json["model_version"] == "2"
    assert arrays(infer(server, 10))["classes"][0, 0] == 11
    assert arrays(infer(server, 10, path="/v2/models/fake/versions/1/infer"))["classes"][0, 0] == 10


def test_chosen_outputs_binary_one_by_one(server: Harness) -> None:
    outputs = [{"name": "classes", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
    reply = infer(server, 10, outputs=outputs)
    got = arrays(reply)
    assert list(got) == ["classes", "probabilities"]
    assert len(reply.body) - int(reply.headers["inference-header-content-length"]) == 40


def test_nested_json(server: Harness) -> None:
    body = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "shape": [1, CROP, CROP, 3],
                    "datatype": "UINT8",
                    "data": tensor(9).tolist(),
                }
            ]
        }
    )
    reply = server.request("POST", "/v2/models/fake/versions/1/infer", body)
    assert reply.json["outputs"][1]["data"][0] == 9


def test_the_classification_extension(server: Harness) -> None:
    path = "/v2/models/fake/versions/1/infer"
    for binary in (False, True):
        parameters = {"classification": 2, "binary_data": binary}
        reply = infer(server, 10, 20, path=path, outputs=[{"name": "scores", "parameters": parameters}])
        if binary:
            length = int(reply.headers["inference-header-content-length"])
            assert json.loads(reply.body[:length])["outputs"][0]["parameters"] == {
                "binary_data_size": 4 * (4 + 18)
            }
            assert reply.body[length:].startswith(b"\x12\x00\x00\x000.500000:10:red 10\x12\x00\x00\x000.25")
        else:
            output = reply.json["outputs"][0]
            assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
            assert output["data"] == [
                "0.500000:10:red 10",
                "0.250000:11:red 11",
                "0.500000:20:red 20",
                "0.250000:21:red 21",
            ]
    outputs = [
        {"name": "classes", "parameters": {"classification": 1}},
        {"name": "probabilities", "parameters": {"classification": 99}},
    ]
    got = infer(server, 10, path=path, outputs=outputs).json["outputs"]
    assert got[0]["data"] == ["14:4"]
    assert got[1]["data"][:2] == ["0.500000:0", "0.250000:1"]
    assert got[1]["shape"] == [1, 5]


def test_the_raw_binary_request(server: Harness) -> None:
    reply = server.request(
        "POST",
        "/v2/models/fake/versions/1/infer",
        tensor(33).tobytes(),
        {"Inference-Header-Content-Length": "0"},
    )
    assert arrays(reply)["classes"][0, 0] == 33


def test_compressed_requests_and_answers(server: Harness) -> None:
    path = "/v2/models/fake/versions/1/infer"
    body, headers = message(tensor(5), parameters={"binary_data_output": True})
    for coding, pack, unpack in (
        ("gzip", gzip.compress, gzip.decompress),
        ("deflate", zlib.compress, zlib.decompress),
    ):
        fields = headers | {"Content-Encoding": coding, "Accept-Encoding": f"br, {coding};q=0.5"}
        reply = server.request("POST", path, pack(body), fields)
        assert reply.status == 200
        assert reply.headers["content-encoding"] == coding
        plain = Reply(reply.status, reply.headers, unpack(reply.body))
        assert arrays(plain)["classes"][0, 0] == 5
    for accept in ("gzip;q=0", "br", "identity", ""):
        assert (
            "content-encoding"
            not in server.request("POST", path, body, headers | {"Accept-Encoding": accept}).headers
        )


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("br", b"x", 501),
        ("gzip", b"not gzip", 400),
        ("gzip", gzip.compress(b"x" * 1000)[:-9], 400),
        ("gzip", gzip.compress(b"\0" * 10_000_000), 413),
    ],
)
def test_broken_compression_and_bombs(server: Harness, coding: str, body: bytes, status: int) -> None:
    reply = server.request("POST", INFER, body, {"Content-Encoding": coding})
    assert reply.status == status
    assert reply.json["error"]


IMAGE = {"name": "image", "shape": [1, CROP, CROP, 3], "datatype": "UINT8"}
DATA = [0] * (CROP * CROP * 3)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "failed to parse"),
        (b"{", "failed to parse"),
        (b"[1]", "must be an object"),
        (b"[" * 100_000, "failed to parse"),
        ({}, "'inputs'"),
        ({"inputs": 5}, "'inputs'"),
        ({"inputs": []}, "expected 1 inputs but got 0"),
        ({"inputs": [IMAGE | {"data": DATA}] * 2}, "expected 1 inputs but got 2"),
        ({"inputs": [5]}, "expected 1 inputs"),
        ({"inputs": [{"shape": [1]}]}, "'name'"),
        (
            {"inputs": [{"name": "IMAGE", "data": DATA}]},
            "unexpected inference input 'IMAGE' for model 'fake'",
        ),
        ({"inputs": [{"name": "image", "datatype": "UINT8"}]}, "'shape'"),
        ({"inputs": [{"name": "image", "shape": [1]}]}, "'datatype'"),
        ({"inputs": [IMAGE]}, "must set 'data'"),
        (
            {"inputs": [IMAGE | {"datatype": "FP32", "data": DATA}]},
            "data-type is 'FP32', but model 'fake' expects",
        ),
        (
            {"inputs": [IMAGE | {"shape": [1, 3, CROP, CROP], "data": DATA}]},
            r"Expected [-1,16,16,3], got [1,3,16,16]",
        ),
        ({"inputs": [IMAGE | {"shape": [CROP, CROP, 3], "data": DATA}]}, "got [16,16,3]"),
        ({"inputs": [IMAGE | {"shape": [0, CROP, CROP, 3], "data": []}]}, "batch-size must be >= 1 and <= 8"),
        ({"inputs": [IMAGE | {"shape": [9, CROP, CROP, 3], "data": DATA}]}, "batch-size must be"),
        ({"inputs": [IMAGE | {"shape": [-1, CROP, CROP, 3], "data": DATA}]}, "'shape'"),
        ({"inputs": [IMAGE | {"shape": [10**30, CROP, CROP, 3], "data": DATA}]}, "batch-size must be"),
        ({"inputs": [IMAGE | {"data": DATA[:-1]}]}, "must hold 768 whole numbers"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], 256]}]}, "between 0 and 255"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], -1]}]}, "between 0 and 255"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], 10**30]}]}, "'data'"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], 0.5]}]}, "'data'"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], "1"]}]}, "'data'"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], [1]]}]}, "'data'"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], True]}]}, "must hold 768 whole numbers"),
        ({"inputs": [IMAGE | {"data": [*DATA[:-1], float("nan")]}]}, "must hold 768 whole numbers"),
        ({"inputs": [IMAGE | {"data": [[0] * 400, [0] * 368]}]}, "must hold 768 whole numbers"),
        ({"inputs": [IMAGE | {"data": [[[[DATA]]]]}]}, "must hold 768 whole numbers"),
        ({"inputs": [IMAGE | {"data": [[[]] * 1000]}]}, "must hold 768 whole numbers"),
        ({"inputs": [IMAGE | {"data": {}}]}, "must hold 768 whole numbers"),
        (
            {"inputs": [IMAGE | {"data": DATA}], "outputs": [{"name": "NOPE"}]},
            "unexpected inference output 'NOPE'",
        ),
        (
            {"inputs": [IMAGE | {"data": DATA}], "outputs": [{"name": "features"}]},
            "it has probabilities, classes",
        ),
        ({"inputs": [IMAGE | {"data": DATA}], "outputs": [{"name": "scores"}] * 2}, "asked for twice"),
        ({"inputs": [IMAGE | {"data": DATA}], "outputs": "scores"}, "'outputs'"),
        ({"inputs": [IMAGE | {"data": DATA}], "id": 7}, "'id'"),
        ({"inputs": [IMAGE | {"data": DATA}], "parameters": 7}, "'parameters'"),
        ({"inputs": [IMAGE | {"data": DATA}], "parameters": {"timeout": -1}}, "'timeout'"),
        (
            {
                "inputs": [IMAGE | {"data": DATA}],
                "outputs": [{"name": "scores", "parameters": {"classification": -1}}],
            },
            "'classification'",
        ),
        (
            {"inputs": [IMAGE | {"parameters": {"shared_memory_region": "x"}}]},
            "shared memory is not supported",
        ),
    ],
)
def test_a_clients_mistake_is_a_400_with_a_sentence(server: Harness, body: Any, sentence: str) -> None:
    reply = server.request("POST", INFER, body if isinstance(body, bytes) else json.dumps(body))
    assert (reply.status, list(reply.json)) == (400, ["error"])
    assert sentence in reply.json["error"]


def test_texts_where_numbers_belong_take_no_memory() -> None:
    """NumPy's array of texts has room for the longest in each place."""
    data = ["x" * 2_000, *[""] * 60_000]
    body = json.dumps({"inputs": [IMAGE | {"data": data}]}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="whole numbers"):
            parse_request(body, None, INTERFACE)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "sent", "header", "sentence"),
    [
        (767, 767, None, "Expected 768, got 767"),
        (768, 760, None, "expecting 8 additional bytes"),
        (768, 770, None, "unexpected additional input data"),
        (768, 768, "99999", "inference header size should be in range (0, "),
        (768, 768, "-5", "got: -5"),
        (768, 768, "abc", "got: abc"),
        (768, 768, "0", "'raw_input' for model 'fake'. Expected 768, got "),
    ],
)
def test_binary_sizes_that_do_not_fit(
    server: Harness, size: int, sent: int, header: str | None, sentence: str
) -> None:
    head = json.dumps({"inputs": [IMAGE | {"parameters": {"binary_data_size": size}}]}).encode()
    reply = server.request(
        "POST", INFER, head + b"\0" * sent, {"Inference-Header-Content-Length": header or str(len(head))}
    )
    assert reply.status == 400
    assert sentence in reply.json["error"]


def test_binary_without_the_length_of_its_header(server: Harness) -> None:
    body, _ = message(tensor(1))
    assert server.request("POST", INFER, body).status == 400


def test_health_and_metadata(server: Harness) -> None:
    def get(path: str) -> Reply:
        return server.request("GET", path)

    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/fake/ready",
        "/v2/models/fake/versions/1/ready",
    ):
        assert (get(path).status, get(path).body) == (200, b"")
    assert get("/v2").json["name"] == "topfive"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(get("/v2").json["extensions"])
    metadata = get("/v2/models/fake").json
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, CROP, CROP, 3]}]
    assert metadata["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 5]},
        {"name": "classes", "datatype": "INT64", "shape": [-1, 5]},
        {"name": "scores", "datatype": "FP32", "shape": [-1, CLASSES]},
    ]
    assert get("/v2/models/fake/versions/1").json["versions"] == ["1"]
    config = get("/v2/models/fake/config").json
    assert (config["name"], config["max_batch_size"], config["input"][0]["dims"]) == (
        "fake",
        8,
        [CROP, CROP, 3],
    )
    index = server.request("POST", "/v2/repository/index", b"").json
    assert index == [{"name": "fake", "version": v, "state": "READY"} for v in ("1", "2")]


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v2/models/nope", 404, "Request for unknown model: 'nope' is not found"),
        (
            "GET",
            "/v2/models/fake/versions/7",
            404,
            "Request for unknown model: 'fake' version 7 is not found",
        ),
        ("GET", "/v2/models/fake/versions/x", 404, "Not Found"),
        ("GET", "/v2/models/nope/ready", 400, "Model version not ready"),
        ("GET", "/v2/models/fake/versions/7/ready", 400, "Model version not ready"),
        ("GET", "/v2/models/%2e%2e/config", 404, "Request for unknown model: '..' is not found"),
        ("GET", "/v2/models/a%2fb/config", 404, "Not Found"),
        ("GET", "/v2/", 404, "Not Found"),
        ("GET", "/v2/nope", 404, "Not Found"),
        ("GET", "/v2/models/fake/infer", 405, "Method Not Allowed"),
        ("POST", "/v2/models/fake", 405, "Method Not Allowed"),
        ("POST", "/v2/health/live", 405, "Method Not Allowed"),
        ("GET", "/v2/repository/index", 405, "Method Not Allowed"),
        ("POST", "/v2/models/nope/infer", 404, "Request for unknown model: 'nope' is not found"),
    ],
)
def test_what_is_not_there(server: Harness, method: str, path: str, status: int, error: str) -> None:
    reply = server.request(method, path, b"{}" if method == "POST" else None)
    assert (reply.status, reply.json) == (status, {"error": error})


def test_statistics_count_requests_images_and_batches() -> None:
    with serving(FakeEngine(guilty={66})) as server:
        server.hold()
        first = [server.connect() for _ in range(2)]
        body, headers = message(tensor(1, 2))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        for connection in first:
            connection.sendall(
                f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode()
            )
            connection.sendall(body)
            # The first batch has begun before the second request comes, which waits for it: two batches of two.
            eventually(lambda: server.engine.seen == [1, 2])
        eventually(lambda: server.model.batcher.depth == 2)
        server.release()
        for connection in first:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            connection.close()
        assert infer(server, 66).status == 500
        stats = server.request("GET", "/v2/models/fake/stats").json["model_stats"][0]
        assert (stats["name"], stats["version"], stats["inference_count"], stats["execution_count"]) == (
            "fake",
            "1",
            4,
            2,
        )
        assert stats["inference_stats"]["success"]["count"] == 2
        assert stats["inference_stats"]["success"]["ns"] > stats["inference_stats"]["compute_infer"]["ns"] > 0
        assert stats["inference_stats"]["fail"]["count"] == 1
        # perf_analyzer ends itself where these differ.
        assert (
            len(
                {
                    stats["inference_stats"][f"compute_{part}"]["count"]
                    for part in ("input", "infer", "output")
                }
            )
            == 1
        )
        assert server.request("GET", "/v2/models/stats").json["model_stats"] == [stats]


def test_one_bad_image_fails_its_own_request_alone() -> None:
    with serving(FakeEngine(guilty={66})) as server:
        bad = infer(server, 1, 66, 2)
        assert (bad.status, list(bad.json)) == (500, ["error"])
        assert arrays(infer(server, 1, 2))["classes"][:, 0].tolist() == [1, 2]
        assert server.application.admission.images == 0


def test_a_timeout_is_a_504_and_the_work_is_dropped() -> None:
    with serving() as server:
        server.hold()
        reply = infer(server, 1, parameters={"timeout": 50_000})
        assert reply.status == 504
        server.release()
        assert server.application.admission.images == 0


def test_nothing_is_computed_for_a_client_that_has_left() -> None:
    with serving() as server:
        server.hold()
        blocker = server.connect()
        body, headers = message(tensor(1))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode()
        blocker.sendall(request + body)
        eventually(lambda: server.engine.seen == [1])
        body, _ = message(tensor(2))
        leaver = server.connect()
        leaver.sendall(request + body)
        eventually(lambda: server.model.batcher.depth == 1)
        leaver.close()
        eventually(lambda: server.application.admission.images == 1)
        server.release()
        eventually(lambda: server.application.admission.images == 0)
        assert infer(server, 3).status == 200
        assert server.engine.seen == [1, 3]
        blocker.close()


def test_a_full_queue_and_a_server_that_ends_say_so() -> None:
    with serving(max_queue_images=2, max_images=2) as server:
        server.hold()
        with server.connect() as waiting:
            body, headers = message(tensor(1, 2))
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            waiting.sendall(
                f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode()
                + body
            )
            eventually(lambda: server.application.admission.images == 2)
            full = infer(server, 3)
            assert full.status == 429
            assert int(full.headers["retry-after"]) >= 1
            server.on_loop(server.application.refuse_new)
            assert infer(server, 3).status == 503
            server.release()


def test_health_while_draining() -> None:
    with serving(drain_delay_s=2.0) as server:
        server.on_loop(server.server.stop)
        assert server.request("GET", "/v2/health/ready").status == 503
        assert server.request("GET", "/v2/health/live").status == 200
        assert infer(server, 3).status == 200


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.binary(max_size=300), header=st.none() | st.text(max_size=8) | st.integers(-5, 300).map(str))
def test_arbitrary_bytes_are_refused_in_good_order(body: bytes, header: str | None) -> None:
    with pytest.raises(ProtocolError):
        parse_request(body, header, INTERFACE)


@pytest.mark.parametrize(
    "request_",
    [{"id": "\ud800", "inputs": [IMAGE | {"data": DATA}]}, {"inputs": [IMAGE | {"name": "\udfff"}]}],
    ids=["id", "name"],
)
def test_half_a_surrogate_pair_is_no_text(server: Harness, request_: dict[str, Any]) -> None:
    reply = server.request("POST", INFER, json.dumps(request_).encode())
    assert reply.status == 400
    assert "surrogates not allowed" in reply.json["error"]


def test_a_whole_surrogate_pair_is(server: Harness) -> None:
    reply = server.request(
        "POST", INFER, json.dumps({"id": "\U0001f600", "inputs": [IMAGE | {"data": DATA}]}).encode()
    )
    assert (reply.status, reply.json["id"]) == (200, "\U0001f600")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "data", "x"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    record=st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON),
    rest=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), JSON),
)
def test_arbitrary_json_is_refused_in_good_order(record: dict[str, Any], rest: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_request(json.dumps({"inputs": [IMAGE | record], **rest}).encode(), None, INTERFACE)


CLIENT = """
import asyncio, sys
import numpy as np
import tritonclient.http as http
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

url, crop = sys.argv[1], int(sys.argv[2])
client = http.InferenceServerClient(url, concurrency=4)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("fake", "1")
assert not client.is_model_ready("nope")
assert client.get_server_metadata()["name"] == "topfive"
assert client.get_model_metadata("fake")["inputs"][0]["shape"] == [-1, crop, crop, 3]
assert client.get_model_config("fake")["max_batch_size"] == 8
assert client.get_model_repository_index()[0]["state"] == "READY"

images = np.zeros((3, crop, crop, 3), np.uint8)
images[:, :, :, 0] = np.array([10, 20, 30])[:, None, None]

def inputs(module, binary=True):
    tensor = module.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return [tensor]

def check(result):
    assert result.as_numpy("classes")[:, 0].tolist() == [10, 20, 30]
    assert result.as_numpy("scores").shape == (3, 256)
    np.testing.assert_array_equal(result.as_numpy("probabilities")[:, :2], [[0.5, 0.25]] * 3)

for binary in (True, False):
    for compression in (None, "gzip", "deflate"):
        check(client.infer("fake", inputs(http, binary), model_version="1", request_id="r",
                           request_compression_algorithm=compression, response_compression_algorithm=compression))
outputs = [http.InferRequestedOutput("classes", binary_data=False), http.InferRequestedOutput("scores"),
           http.InferRequestedOutput("probabilities")]
check(client.infer("fake", inputs(http), model_version="1", outputs=outputs, priority=1, timeout=5_000_000))
top = client.infer("fake", inputs(http), model_version="1", outputs=[http.InferRequestedOutput("scores", class_count=2)])
assert top.as_numpy("scores").tolist()[0] == [b"0.500000:10:red 10", b"0.250000:11:red 11"]
for pending in [client.async_infer("fake", inputs(http), model_version="1") for _ in range(8)]:
    check(pending.get_result())
try:
    client.infer("nope", inputs(http))
except InferenceServerException as error:
    assert "unknown model" in str(error), error
else:
    raise AssertionError
assert client.get_inference_statistics("fake", "1")["model_stats"][0]["inference_count"] >= 45

async def main():
    async with aio.InferenceServerClient(url) as client:
        for result in await asyncio.gather(*(client.infer("fake", inputs(aio), model_version="1") for _ in range(4))):
            check(result)

asyncio.run(main())
print("all answered")
"""


@pytest.mark.triton
def test_the_stock_triton_client_works_unchanged(server: Harness) -> None:
    """tritonclient.http lives in the environment of the real Triton: its gevent does not fit into ours."""
    python = triton_program().with_name("python")
    done = subprocess.run(
        [python, "-c", textwrap.dedent(CLIENT), f"127.0.0.1:{server.port}", str(CROP)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "all answered", done.stderr


def test_clients_in_a_loop_are_told_by_their_connections_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def note(_: ClosedLoops, since_answer_s: float | None) -> bool:
        seen.append(since_answer_s is not None)
        return False

    monkeypatch.setattr(ClosedLoops, "asked", note)
    lone, many = message(tensor(1)), message(tensor(*range(8)))
    scoring = message(tensor(*range(8)), parameters={"priority": 2})
    with serving(FakeEngine(make_info("fake", "1", max_batch=8))) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            for body, headers in (lone, lone, many, lone, scoring, lone):
                connection.request("POST", INFER, body, headers)
                assert connection.getresponse().read()
    # Only after a large batch, and not after scoring, which asks in a loop whatever people do.
    assert seen == [False, False, False, True, False, False]
