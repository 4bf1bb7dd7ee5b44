"""Compressed bodies: they cost what they are worth, and no longer than somebody waits for the answer."""

import gzip
import random
import zlib
from typing import Any

import pytest

from topfive_server.errors import BadRequestError
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
