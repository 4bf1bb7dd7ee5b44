"""Clients that ask again at once when they are refused do not take the cores from the others."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.server.fakes import CROP, FakeEngine, make_info, picture
from tests.server.harness import Harness, eventually, read_reply, serving

from topfive_server import load_shedding
from topfive_server.load_shedding import Refusals


def test_as_many_as_are_allowed_are_answered_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(load_shedding, "monotonic", lambda: now[0])
    refusals = Refusals()
    allowed = int(Refusals.LEAST_PER_S)
    assert [refusals.refuse() for _ in range(allowed)] == [0.0] * allowed
    assert refusals.refuse() == pytest.approx(1 / allowed)
    assert refusals.refuse() == pytest.approx(2 / allowed)
    now[0] += 2 / allowed
    refusals.answered()
    assert refusals.refuse() == pytest.approx(0, abs=1e-9)
    assert max(refusals.refuse() for _ in range(10 * allowed)) == Refusals.LONGEST_S
    now[0] += 100  # nothing is saved up beyond a second's worth
    assert sum(refusals.refuse() == 0 for _ in range(3 * allowed)) == allowed


@contextlib.contextmanager
def filled(least_per_s: float, longest_s: float) -> Iterator[Harness]:
    """A server with room for one image, which is taken, so that every other is refused, and its connection paused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refusals, "LEAST_PER_S", least_per_s)
        patch.setattr(Refusals, "LONGEST_S", longest_s)
        engine = FakeEngine(make_info(max_batch=1))
        with serving(engine, max_queue_images=1, max_images=1, keep_alive_s=30) as server:
            server.hold()
            taker = threading.Thread(target=server.classify, args=(picture(1),))
            taker.start()
            eventually(lambda: server.application.admission.images == 1)
            server.on_loop(lambda: setattr(server.application._refusals, "_left", 0.0))
            yield server
            server.release()
            taker.join()


@pytest.fixture
def full() -> Iterator[Harness]:
    """Pauses of up to a second."""
    with filled(1.0, 1.0) as server:
        yield server


IMAGE = {"name": "image", "shape": [1, CROP, CROP, 3], "datatype": "UINT8", "data": [0] * CROP * CROP * 3}
TENSOR = json.dumps({"inputs": [IMAGE]})
CLASSIFY, INFER = ("/v1/classify", picture(2)), ("/v2/models/fake/infer", TENSOR)


def ask(
    connection: http.client.HTTPConnection, path: str = "/v1/classify", body: str | bytes = picture(2)
) -> tuple[int, float]:
    begun = time.monotonic()
    connection.request("POST", path, body)
    answer = connection.getresponse()
    answer.read()
    return answer.status, time.monotonic() - begun


def paused(server: Harness) -> bool:
    """Whether a connection is; the end of a refused request's body may come after its answer."""
    return any(connection._pause for connection in server.server.server_state.connections)  # type: ignore[union-attr]


def connect(server: Harness) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)


@pytest.mark.parametrize("what", [CLASSIFY, INFER], ids=["classify", "infer"])
def test_the_refusal_is_quick_and_the_next_request_of_its_connection_waits(
    full: Harness, what: tuple[str, str | bytes]
) -> None:
    hasty, other = connect(full), connect(full)
    status, seconds = ask(hasty, *what)
    assert (status, seconds < 0.5) == (429, True)
    eventually(lambda: paused(full))
    status, seconds = ask(hasty, *what)
    assert (status, seconds > 0.7) == (429, True)
    other.request("GET", "/healthz")
    assert json.loads(other.getresponse().read())["status"] == "alive"
    # After the pause the connection serves as ever.
    full.release()
    eventually(lambda: full.application.admission.images == 0)
    assert ask(hasty)[0] == 200
    status, seconds = ask(hasty)
    assert (status, seconds < 0.5) == (200, True)
    hasty.close()
    other.close()


def test_a_body_that_comes_after_its_refusal_is_taken_before_the_pause(full: Harness) -> None:
    with socket.create_connection(("127.0.0.1", full.port), 10) as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
        assert read_reply(connection).status == 429
        time.sleep(0.05)
        assert not paused(full)  # the rest must be read, or its sender cannot come to read the answer
        begun = time.monotonic()
        connection.sendall(bytes(200_000) + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection).status == 200
        assert time.monotonic() - begun < 5


def test_a_client_that_leaves_in_its_pause_is_forgotten(full: Harness) -> None:
    connection = connect(full)
    assert ask(connection)[0] == 429
    eventually(lambda: paused(full))
    connection.close()
    eventually(lambda: len(full.server.server_state.connections) == 1)  # who has taken the place


def test_every_answer_allows_another_refusal() -> None:
    with serving(FakeEngine()) as server:
        refusals = server.application._refusals
        server.on_loop(lambda: setattr(refusals, "_left", -5.0))
        for number, (path, body) in enumerate((CLASSIFY, INFER), 1):
            assert server.request("POST", path, body).status == 200
            eventually(lambda number=number: refusals._left == number - 5.0)  # type: ignore[misc]
        # What is no answer to an image allows none.
        assert server.request("GET", "/healthz").status == 200
        assert server.request("GET", "/v2").status == 200
        assert server.classify(b"no image").status == 415
        assert server.request("POST", INFER[0], "{}").status == 400
        last = {"route": "/v2/models/{model}/infer", "status": "400", "code": "bad-request"}
        eventually(lambda: server.metric("topfive_requests_total", **last) == 1)
        assert refusals._left == -3.0


def test_the_drain_ends_the_pauses() -> None:
    with filled(0.01, 60.0) as server, contextlib.closing(connect(server)) as hasty:
        assert ask(hasty)[0] == 429
        eventually(lambda: paused(server))
        hasty.request("POST", "/v1/classify", picture(2))  # which nobody reads
        server.on_loop(server.server.stop)
        answer = hasty.getresponse()
        assert (answer.status, json.loads(answer.read())["type"]) == (503, "urn:topfive:error:draining")
