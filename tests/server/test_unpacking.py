"""Compressed bodies: they cost what they are worth, and no longer than somebody waits for the answer."""

import contextlib
import gzip
import json
import random
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.fakes import CROP, picture
from tests.server.harness import Harness, eventually, serving

from topfive.preprocessing import decode
from topfive_server.errors import BadRequestError
from topfive_server.job import Job
from topfive_server.receive import decompress

GZIP = {b"content-encoding": b"gzip"}
_decompressobj = zlib.decompressobj


class CountingStream:
    """Decompresses, and counts the bytes that it is handed and those that it hands back, which are copied."""

    handled = 0

    def __init__(self, wbits: int) -> None:
        self._stream = _decompressobj(wbits=wbits)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._stream.decompress(data, max_length)
        CountingStream.handled += len(data) + len(self._stream.unused_data)
        return plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_many_members_cost_in_proportion_to_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "decompressobj", CountingStream)

    def handled(members: int) -> int:
        CountingStream.handled = 0
        body = gzip.compress(b"x") * members
        assert decompress(body, GZIP, max_bytes=members) == b"x" * members
        return CountingStream.handled

    assert handled(4000) < 2.5 * handled(2000)


@pytest.mark.parametrize("sizes", [(0,), (1_000_000,), (1, 1_000_000, 0, 300, 70_000)])
def test_members_of_any_size_make_up_one_body(sizes: tuple[int, ...]) -> None:
    plain = [random.Random(size).randbytes(size) for size in sizes]
    body = b"".join(map(gzip.compress, plain))
    assert decompress(body, GZIP, max_bytes=sum(sizes)) == b"".join(plain)
    with pytest.raises(BadRequestError, match="truncated"):
        decompress(body[:-1], GZIP, max_bytes=sum(sizes))


@contextlib.contextmanager
def stuck_decoding(server: Harness) -> Iterator[None]:
    """Every decode thread is at work, and does not come back from it."""
    pool = server.model._pool
    free = threading.Event()

    def slow_decode(data: bytes, *arguments: object, **options: object) -> object:
        free.wait(30)
        return decode(data, *arguments, **options)  # type: ignore[arg-type]

    def classify() -> Job:
        return server.model.classify(picture(1), deadline=time.monotonic() + 60, priority="interactive")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topfive_server.decode_pool.decode", slow_decode)
        jobs = [server.on_loop(classify) for _ in range(2)]
        try:
            eventually(lambda: pool.why_stuck(0) != "")
            yield
        finally:
            free.set()
            eventually(lambda: all(job.answer.done() for job in jobs))


def compressed_requests() -> list[tuple[str, bytes]]:
    head = {"name": "image", "shape": [1, CROP, CROP, 3], "datatype": "UINT8"}
    infer = {"inputs": [head | {"data": [5] * CROP * CROP * 3}], "parameters": {"timeout": 300_000}}
    return [("/v1/classify", picture(5)), ("/v2/models/fake/infer", json.dumps(infer).encode())]


@pytest.mark.parametrize(("path", "body"), compressed_requests(), ids=["classify", "infer"])
def test_unpacking_knows_the_deadline(path: str, body: bytes) -> None:
    with serving(request_timeout_s=0.4, body_timeout_s=30) as server, stuck_decoding(server):
        reply = server.request("POST", path, gzip.compress(body), {"Content-Encoding": "gzip"})
        assert reply.status == 504
        assert b"deadline passed" in reply.body
        assert server.application.admission.bytes == 0


@pytest.mark.parametrize(("path", "body"), compressed_requests(), ids=["classify", "infer"])
def test_unpacking_ends_with_the_client_and_lets_go_of_the_body(path: str, body: bytes) -> None:
    size = 2_000_000
    large = gzip.compress(body + b" " * 10) + gzip.compress(random.Random(1).randbytes(size))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(large)}\r\n\r\n"
    )
    with serving() as server, stuck_decoding(server):
        tracemalloc.start()
        try:
            for _ in range(6):
                with server.connect() as connection:
                    connection.sendall(head.encode() + large)
                    eventually(lambda: server.application.admission.bytes == len(large))
                eventually(lambda: server.application.admission.bytes == 0)
            assert tracemalloc.get_traced_memory()[0] < 2 * size
        finally:
            tracemalloc.stop()
        route = path.replace("fake", "{model}")
        counted = {"route": route, "status": "499", "code": "client-gone"}
        eventually(lambda: server.metric("topfive_requests_total", **counted) == 6)
