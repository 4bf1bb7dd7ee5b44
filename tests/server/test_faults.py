"""Faults injected for real: raw sockets that send nonsense, too much, too little, too slowly, or leave."""

import asyncio
import contextlib
import gzip
import json
import re
import resource
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.fakes import CROP, FakeEngine, picture
from tests.server.harness import Harness, eventually, read_reply, serving

from topfive.preprocessing import decode
from topfive_server.admission import Admission
from topfive_server.errors import TooLargeError
from topfive_server.receive import Chunks, decompress, read_body

POST = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Harness]:
    with serving(
        max_body_bytes=200_000,
        header_timeout_s=0.4,
        body_timeout_s=0.4,
        max_header_bytes=8192,
        keep_alive_s=5,
    ) as harness:
        yield harness


@pytest.fixture(autouse=True)
def others_are_unaffected(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every fault the module's server answers as before, and holds nothing of the request that failed."""
    yield
    if "server" in request.fixturenames:
        server: Harness = request.getfixturevalue("server")
        assert server.classify(picture(3)).classes == [3]
        eventually(lambda: server.application.admission.bytes == 0)
        assert server.application.admission.images == 0
        assert server.model.batcher.expected == 0


def closed_by_server(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),  # somebody speaks TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: many\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        POST + b"X\x00Y: 1\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_400_and_a_sentence(server: Harness, data: bytes) -> None:
    reply = server.raw(data)
    assert (reply.status, reply.code) == (400, "bad-request")


@pytest.mark.parametrize("path", [b"/v1/classify", b"/v2/models/fake/infer", b"/healthz"])
@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"deflate,chunked"]
)
def test_a_body_in_a_transfer_coding_that_is_not_understood_is_refused(
    server: Harness, path: bytes, coding: bytes
) -> None:
    packed = gzip.compress(picture(5))
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed)
    reply = server.raw(
        b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: %b\r\n\r\n%b" % (path, coding, chunk)
    )
    assert (reply.status, reply.code) == (400, "bad-request")
    assert "Transfer-Encoding" in reply.json["detail"]


def test_transfer_codings_have_no_case(server: Harness) -> None:
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(picture(5)), picture(5))
    assert server.raw(POST + b"Transfer-Encoding: Chunked\r\n\r\n" + chunk).classes == [5]


def test_no_content_length_is_an_empty_body(server: Harness) -> None:
    reply = server.raw(POST + b"\r\n")
    assert (reply.status, reply.code) == (400, "bad-request")
    assert "no body" in reply.json["detail"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"X-Long: " + b"x" * 9000 + b"\r\n\r\n",
        POST + b"".join(b"X-%d: y\r\n" % i for i in range(1000)) + b"\r\n",
        POST + b"X-Endless: " + b"x" * 20_000,
    ],
)
def test_huge_headers(server: Harness, head: bytes) -> None:
    reply = server.raw(head)
    assert (reply.status, reply.code) == (431, "headers-too-large")


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("trailer", [b"x-priority: nonsense", b"X-Timeout-Ms: 0", b"content-encoding: br"])
def test_a_trailer_is_no_header(server: Harness, trailer: bytes) -> None:
    image = picture(17)
    chunk = b"%x\r\n%b\r\n" % (len(image), image)
    # The last chunk comes by itself, for the request is begun before its trailers are here.
    with server.connect() as connection:
        connection.sendall(CHUNKED + b"\r\n" + chunk)
        eventually(lambda: server.application.admission.bytes == len(image))
        connection.sendall(b"0\r\n" + trailer + b"\r\n\r\n")
        assert read_reply(connection).classes == [17]
    assert server.raw(CHUNKED + b"\r\n" + chunk + b"0\r\n" + trailer + b"\r\n\r\n").classes == [17]


@pytest.mark.parametrize("piece", [b"a: b\r\n", b"x"], ids=["many fields", "one endless field"])
@pytest.mark.parametrize("answered", [False, True])
def test_endless_trailers_end_the_connection(server: Harness, piece: bytes, answered: bool) -> None:
    with server.connect() as connection:
        # To the second there is no parameter `none`, which is said before the body comes.
        path = b"/v1/classify?none=1" if answered else b"/v1/classify"
        connection.sendall(CHUNKED.replace(b"/v1/classify", path) + b"\r\n1\r\nx\r\n")
        if answered:
            assert read_reply(connection).status == 400
        else:
            eventually(lambda: server.application.admission.bytes == 1)
        connection.sendall(b"0\r\n")
        held = piece * (50_000 // len(piece))
        sent = 0
        try:
            while sent < 5_000_000:
                connection.sendall(held)
                sent += len(held)
        except OSError:
            pass  # the server has closed
        assert sent < 5_000_000


def test_trailers_too_large_are_told_so(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(CHUNKED + b"\r\n1\r\nx\r\n")
        eventually(lambda: server.application.admission.bytes == 1)
        connection.sendall(b"0\r\n" + b"a: b\r\n" * 1500)
        reply = read_reply(connection)
        assert (reply.status, reply.code) == (431, "headers-too-large")
        assert closed_by_server(connection)


def test_slow_headers(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\n")
        time.sleep(0.2)
        connection.sendall(b"Host: x\r\n")  # a byte now and then does not restart the clock
        reply = read_reply(connection)
        assert (reply.status, reply.code) == (408, "body-timeout")
        assert closed_by_server(connection)


def test_a_connection_that_never_asks_is_closed(server: Harness) -> None:
    with server.connect() as connection:
        assert closed_by_server(connection)


def test_slow_headers_of_a_second_request(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection).status == 200
        connection.sendall(b"GET /heal")
        assert read_reply(connection).status == 408
        assert closed_by_server(connection)


@pytest.mark.parametrize("drip", [b"", b"x"])
def test_slow_body(server: Harness, drip: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\nabc")
        for _ in range(2):
            time.sleep(0.1)
            connection.sendall(drip)
        reply = read_reply(connection)
        assert (reply.status, reply.code) == (408, "body-timeout")
        assert closed_by_server(connection)


def test_a_deadline_shorter_than_the_body_takes(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(POST + b"X-Timeout-Ms: 100\r\nContent-Length: 1000\r\n\r\nabc")
        reply = read_reply(connection)
        assert (reply.status, reply.code) == (504, "deadline-exceeded")


def test_a_declared_body_too_large_is_refused_before_it_is_sent(server: Harness) -> None:
    reply = server.raw(POST + b"Content-Length: 200001\r\nExpect: 100-continue\r\n\r\n")
    assert (reply.status, reply.code) == (413, "too-large")


def test_an_endless_chunked_body_is_refused_while_it_streams(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 50_000_000:
                connection.sendall(b"1000\r\n" + bytes(4096) + b"\r\n")
                sent += 4096
        except OSError:
            pass  # the server has closed
        assert sent < 50_000_000
    eventually(
        lambda: (
            server.metric("topfive_requests_total", route="/v1/classify", status="413", code="too-large") >= 1
        )
    )


def test_tens_of_thousands_of_tiny_chunks(server: Harness) -> None:
    data = picture(9, size=(220, 100), form="BMP")
    assert len(data) > 65_536
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data)
    reply = server.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert reply.classes == [9]


@contextlib.contextmanager
def memory(most: int) -> Iterator[None]:
    """Fails where more bytes than that are allocated at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_tiny_chunks_take_the_memory_of_their_bytes() -> None:
    size = 200_000
    with serving() as server, server.connect() as connection:
        connection.sendall(CHUNKED + b"\r\n2\r\nab\r\n")
        eventually(lambda: server.application.admission.bytes == 2)
        with memory(5 * size):
            for _ in range(size // 2000):
                connection.sendall(b"2\r\nab\r\n" * 1000)
            eventually(lambda: server.application.admission.bytes == size + 2)


def test_a_body_of_many_messages_takes_the_memory_of_its_bytes() -> None:
    size = 200_000
    left = size

    async def receive() -> dict[str, object]:
        nonlocal left
        left -= 2
        return {"type": "http.request", "body": b"%c%c" % (left % 251, left % 241), "more_body": left > 0}

    ticket = Admission(max_images=1, max_bytes=size).ticket(lambda: 0.0)
    with memory(5 * size):
        body = asyncio.run(read_body(receive, {}, ticket, max_bytes=size, timeout_s=60.0))
    assert body == b"".join(b"%c%c" % (n % 251, n % 241) for n in range(size - 2, -1, -2))


@given(sizes=st.lists(st.sampled_from([0, 1, 5, 16_383, 16_384, 40_000]), max_size=12))
def test_pieces_are_put_together_in_order(sizes: list[int]) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    chunks = Chunks()
    for piece in pieces:
        chunks.add(piece)
    assert chunks.size == sum(sizes)
    assert chunks.join() == b"".join(pieces)
    assert b"".join(chunks.take()) == b"".join(pieces)
    assert (chunks.size, chunks.join()) == (0, b"")
    assert pieces == [bytes([number]) * size for number, size in enumerate(sizes)]


def test_a_body_of_one_piece_is_not_copied() -> None:
    chunks = Chunks()
    chunks.add(piece := bytes(100))
    assert chunks.join() is piece


def test_a_gzip_bomb_is_not_held_in_memory_before_it_is_refused() -> None:
    bomb = gzip.compress(bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match="after decompression"):
            decompress(bomb, {b"content-encoding": b"gzip"}, max_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/fake/infer"])
def test_a_compressed_body_takes_up_what_it_unpacks_to(path: str) -> None:
    image = picture(5) + bytes(1_000_000)  # what follows a PNG is ignored
    head = {"name": "image", "shape": [1, CROP, CROP, 3], "datatype": "UINT8"}
    if path != "/v1/classify":
        image = json.dumps({"inputs": [head | {"data": [0] * CROP * CROP * 3}]}).encode() + b" " * 1_000_000
    body, headers = gzip.compress(image), {"Content-Encoding": "gzip"}
    assert len(body) < 10_000
    most = len(image) + 100_000
    with (
        serving(max_queue_bytes=most, max_body_bytes=most) as server,
        ThreadPoolExecutor() as threads,
    ):
        server.hold()
        first = threads.submit(server.request, "POST", path, body, headers)
        eventually(lambda: server.engine.seen != [])
        assert server.application.admission.bytes == len(image)
        assert server.request("POST", path, body, headers).status == 429
        assert server.application.admission.bytes == len(image)
        server.release()
        assert first.result().status == 200
        assert server.application.admission.bytes == 0


def test_a_body_cut_short_by_the_client(server: Harness) -> None:
    before = server.engine.seen
    with server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\nabc")
        eventually(lambda: server.application.admission.bytes == 3)
    eventually(lambda: server.application.admission.bytes == 0)
    assert server.engine.seen == before
    eventually(
        lambda: (
            server.metric("topfive_requests_total", route="/v1/classify", status="499", code="client-gone")
            >= 1
        )
    )


def test_a_connection_reset_in_mid_upload(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\nabc")
        # Closing with a linger time of zero sends RST instead of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_pipelined_requests_are_answered_in_order(server: Harness) -> None:
    with server.connect() as connection:
        for red in (1, 2, 3):
            body = picture(red)
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answers = connection.makefile("rb")
        heads = b""
        while heads.count(b'"top"') < 3:
            heads += answers.readline()
            if b'"images"' in heads[-4000:] or heads.endswith(b"\r\n\r\n"):
                heads += answers.read1(65536)
        assert [heads.index(b'"class": %d,' % red) for red in (1, 2, 3)] == sorted(
            heads.index(b'"class": %d,' % red) for red in (1, 2, 3)
        )


@pytest.mark.parametrize(
    "fault",
    [
        b"GET /healthz HTTP/1.1\r\nHost:",  # and no more: it is too slow
        b"\x00garbage\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX-Long: " + b"x" * 9000 + b"\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["slow headers", "garbage", "huge headers", "a broken body"],
)
@pytest.mark.parametrize("before", [1, 2])
def test_the_fault_of_a_pipelined_request_is_not_told_to_those_before_it(fault: bytes, before: int) -> None:
    with serving(header_timeout_s=0.3, max_header_bytes=8192) as server, server.connect() as connection:
        server.hold()
        bodies = [picture(red) for red in range(before)]
        # In one piece: behind a request that waits for its turn the server reads on only by and by.
        requests = [POST + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
        connection.sendall(b"".join([*requests, fault]))
        eventually(lambda: len(server.server.server_state.connections) == 1)
        [protocol] = server.server.server_state.connections
        eventually(lambda: protocol._deaf)  # type: ignore[union-attr]  # it is ours
        server.release()
        answers = connection.makefile("rb").read()  # until the server closes
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200"] * before
    assert re.findall(rb'"top": \[{"label": "red (\d+)"', answers) == [b"%d" % red for red in range(before)]
    assert answers.count(b"connection: close") == 1


def test_a_fault_behind_an_answer_is_not_answered_too(server: Harness) -> None:
    with server.connect() as connection:
        connection.sendall(CHUNKED.replace(b"classify", b"classify?none=1") + b"\r\n1\r\nx\r\n")
        assert read_reply(connection).status == 400
        connection.sendall(b"ZZ\r\n")
        assert closed_by_server(connection)


def test_hundreds_of_idle_connections_hurt_nobody(server: Harness) -> None:
    idle = [server.connect() for _ in range(500)]
    try:
        for connection in idle[::2]:
            connection.sendall(POST + b"Content-Length: 100\r\n\r\n")
        with ThreadPoolExecutor(8) as threads:
            replies = list(threads.map(lambda red: server.classify(picture(red)), range(100)))
        assert [reply.classes for reply in replies] == [[red] for red in range(100)]
    finally:
        for connection in idle:
            connection.close()


def test_thousands_of_connections_that_wait_hurt_nobody() -> None:
    """Idle ones, half of a head, half of a body: as many as this machine lets one process hold both ends of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(3000, (hard - 500) // 2)
    beginnings = (b"", b"GET /heal", POST + b"Content-Length: 100\r\n\r\nabc")
    idle: list[socket.socket] = []
    try:
        with serving(header_timeout_s=60, body_timeout_s=60) as server:
            for number in range(count):
                idle.append(server.connect())
                idle[-1].sendall(beginnings[number % 3])
            eventually(lambda: len(server.server.server_state.connections) == count)
            with ThreadPoolExecutor(8) as threads:
                replies = list(threads.map(lambda red: server.classify(picture(red)), range(100)))
            assert [reply.classes for reply in replies] == [[red] for red in range(100)]
            assert server.request("GET", "/readyz").status == 200
            for connection in idle:
                connection.close()
            eventually(lambda: server.application.admission.bytes == 0)
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_leaves_while_it_waits_is_computed_for_by_nobody() -> None:
    with serving() as server, ThreadPoolExecutor() as threads:
        server.hold()
        first = threads.submit(server.classify, picture(1))
        eventually(lambda: server.engine.seen == [1])
        with server.connect() as connection:
            body = picture(2)
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            eventually(lambda: server.model.batcher.depth == 1)
        eventually(lambda: server.application.admission.images == 1)
        third = threads.submit(server.classify, picture(3))
        eventually(lambda: server.model.batcher.depth == 2)
        server.release()
        assert (first.result().classes, third.result().classes) == ([1], [3])
        assert server.engine.seen == [1, 3]
        assert server.metric("topfive_dropped_images_total", stage="engine", reason="client-gone") == 1


def test_a_client_that_leaves_is_not_even_decoded_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    free = threading.Event()

    def slow_decode(data: bytes, *arguments: object, **options: object) -> object:
        free.wait(10)
        decoded.append(len(data))
        return decode(data, *arguments, **options)  # type: ignore[arg-type]

    with serving() as server, ThreadPoolExecutor() as threads:
        monkeypatch.setattr("topfive_server.decode_pool.decode", slow_decode)
        # The engine's thread, which decodes for who is alone, and both decode threads.
        stays = [threads.submit(server.classify, picture(red)) for red in (1, 2, 4)]
        eventually(lambda: server.application.admission.images == 3)
        with server.connect() as connection:
            body = picture(3, size=(50, 50))
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            eventually(lambda: server.application.admission.images == 4)
        eventually(lambda: server.application.admission.images == 3)
        free.set()
        assert sorted(future.result().classes[0] for future in stays) == [1, 2, 4]
        eventually(
            lambda: server.metric("topfive_dropped_images_total", stage="decode", reason="client-gone") == 1
        )
        assert len(decoded) == 3
        assert sorted(server.engine.seen) == [1, 2, 4]


def test_the_upload_of_a_client_that_leaves_is_dropped_wherever_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a decode thread (all are busy), and decoded for the engine: what nobody waits for is not counted any more."""
    free = threading.Event()
    size = 3_000_000

    def slow_decode(data: bytes, *arguments: object, **options: object) -> object:
        free.wait(30)
        return decode(data, *arguments, **options)  # type: ignore[arg-type]

    def leave(server: Harness, body: bytes, once: Callable[[], bool]) -> None:
        images = server.application.admission.images
        with server.connect() as connection:
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            eventually(lambda: server.application.admission.images == images + 1 and once())
        eventually(lambda: server.application.admission.images == images)

    with serving() as server, ThreadPoolExecutor() as threads:
        server.hold()
        stays = [threads.submit(server.classify, picture(1))]
        eventually(lambda: server.engine.seen == [1])
        leave(server, picture(2), lambda: server.model.batcher.depth == 1)
        [[waiting], _] = server.model.batcher._queue._lanes.values()
        eventually(lambda: waiting.image is None)
        monkeypatch.setattr("topfive_server.decode_pool.decode", slow_decode)
        stays += [threads.submit(server.classify, picture(red)) for red in (3, 4)]
        eventually(lambda: server.application.admission.images == 3)
        with memory(6 * size):  # the client's own, and what the server holds for a moment
            body = picture(5) + bytes(size)
            for _ in range(10):
                leave(server, body, lambda: True)
        free.set()
        server.release()
        assert sorted(future.result().classes[0] for future in stays) == [1, 3, 4]
        assert sorted(server.engine.seen) == [1, 3, 4]


def test_all_timing_is_on_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        real = time.time
        for jump in (-1e9, 1e9):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            reply = server.classify(picture(5), X_Timeout_Ms="5000")
            assert reply.classes == [5]
            assert "infer" in reply.headers["server-timing"]


def test_an_engine_that_runs_out_of_memory_still_answers_everybody() -> None:
    with serving(FakeEngine(memory=1)) as server, ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda red: server.classify(picture(red)), range(40)))
        assert [reply.classes for reply in replies] == [[red] for red in range(40)]


def test_a_mistake_of_ours_is_a_500_with_an_id_and_no_details(monkeypatch: pytest.MonkeyPatch) -> None:
    from topfive_server import classify

    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    with serving() as server:
        monkeypatch.setattr(classify, "read_options", broken)
        reply = server.classify(picture(1))
        assert (reply.status, reply.code) == (500, "internal")
        assert b"secret" not in reply.body
        assert reply.json["request_id"] == reply.headers["x-request-id"]
