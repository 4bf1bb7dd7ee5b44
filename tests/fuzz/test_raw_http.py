"""Below HTTP: bytes on a socket that are nearly requests. No 500, no hang, nothing kept, and the next request is served."""

import asyncio
import random
import re
import time
from typing import Final

import pytest
from tests.fuzz.budget import SECONDS, SEED
from tests.fuzz.seeds import BOUNDARY, form
from tests.server.fakes import picture
from tests.server.harness import Harness, eventually, serving

from topfive_server.errors import all_errors

CASES: Final = 2500
AT_ONCE: Final = 250
SOON_S: Final = 0.3
"""Limits on headers, bodies and idle connections: a half request is over soon."""
HANG_S: Final = 20.0
STATUSES: Final = {100, 200, 501} | {error.status for error in all_errors()} - {500}
"""501 is Triton's answer, below `/v2`, to a content coding that it does not know."""

_PATHS: Final = (
    *(
        b"/v1/classify",
        b"/v1/classify?top_k=3&model=fake",
        b"/v1/models",
        b"/v1/models/fake/labels?version=1",
    ),
    *(
        b"/healthz",
        b"/readyz",
        b"/",
        b"/docs",
        b"/metrics",
        b"/v2",
        b"/v2/models/fake",
        b"/v2/models/fake/infer",
    ),
    *(
        b"/v2/repository/index",
        b"*",
        b"http://[::1/",
        b"/v1/classify?%ff=%",
        b"//",
        b"/\xc3\xa9",
        b"/%00%ed%a0%80",
    ),
)
_METHODS: Final = (
    b"POST",
    b"PUT",
    b"GET",
    b"HEAD",
    b"OPTIONS",
    b"DELETE",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"G\xe9T",
)
_LENGTHS: Final = (b"0", b"1", b"-1", b"+5", b"5, 5", b"0x10", b"99999999", b"9" * 30, b"", b"\xb2")
_FIELDS: Final = (
    *(
        b"Host: x",
        b"Host:",
        b"Host: [",
        b"Host: \xff",
        b"Connection: close",
        b"Connection: upgrade",
        b"Upgrade: h2c",
    ),
    *(b"Expect: 100-continue", b"Expect: \x00", b"Content-Encoding: gzip", b"Content-Encoding: \xff\xfe"),
    *(
        b"Content-Type: multipart/form-data; boundary=" + BOUNDARY,
        b"Content-Type: multipart/form-data; boundary=",
    ),
    *(
        b"Content-Type: \xe9;=;",
        b"X-Timeout-Ms: 1",
        b"X-Timeout-Ms: \xb2",
        b"X-Priority: \xff",
        b"X-Request-ID: a\tb",
    ),
    *(
        b"Inference-Header-Content-Length: 2",
        b"Inference-Header-Content-Length: -1",
        b"Accept-Encoding: gzip, \xff",
    ),
    *(b" folded: line", b"no colon", b": no name", b"a: " + b"b" * 3000, b"Transfer-Encoding: gzip, chunked"),
)
_BODIES: Final = (
    *(b"", picture(7), form(picture(1), b"x"), form(picture(2))[:-5], b"{}", b'{"inputs": [{"name": 1}]}'),
    b'{"inputs":[{"name":"image","shape":[1,16,16,3],"datatype":"UINT8","parameters":{"binary_data_size":768}}]}',
)


def chunked(body: bytes, dice: random.Random) -> bytes:
    """The body in chunks, mostly well-formed (RFC 9112 section 7.1)."""
    out = b""
    while body:
        size = dice.randint(1, len(body))
        said = size if dice.random() < 0.95 else dice.choice((size + 1, size - 1, 2**40, 2**70))
        extension = b"" if dice.random() < 0.9 else b";a=" + dice.randbytes(3)
        out += b"%x%b\r\n%b\r\n" % (said, extension, body[:size])
        body = body[size:]
    return out + dice.choice((b"0\r\n\r\n", b"0\r\n" + trailers(dice), b"0\r\n", b"-1\r\n\r\n", b""))


def trailers(dice: random.Random) -> bytes:
    """What may follow the last chunk: any fields at all, and now and then more of them than headers may be large."""
    fields = dice.sample(_FIELDS, dice.randint(0, 4)) * dice.choice((1, 1, 1, 3000))
    return b"\r\n".join([*fields, b"", b""])


def request(dice: random.Random) -> bytes:
    """One request, in which some things may be wrong or lies."""
    method = dice.choices(_METHODS, [20, 6, 8, 2, 1, 1, 1, 1, 1, 1])[0]
    version = dice.choices(
        (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.1 x", b""), [30, 3, 1, 1, 1, 1]
    )[0]
    body = dice.choice(_BODIES)
    fields = dice.sample(_FIELDS, dice.randint(0, 3))
    framing = dice.random()
    if framing < 0.25:
        body = chunked(body, dice)
        fields.append(b"Transfer-Encoding: chunked")
    if 0.2 < framing < 0.85:
        fields.append(b"Content-Length: %d" % len(body))
    elif framing > 0.8:
        fields.append(b"Content-Length: " + dice.choice((*_LENGTHS, b"%d" % max(0, len(body) - 1))))
    dice.shuffle(fields)
    end = b"\r\n" if dice.random() < 0.95 else b"\n"
    return end.join([b" ".join((method, dice.choice(_PATHS), version)), *fields, b"", body])


def message(dice: random.Random) -> bytes:
    """What one connection sends: one request or a few, and now and then a few bytes changed, lost or doubled."""
    data = bytearray(b"".join(request(dice) for _ in range(dice.choice((1, 1, 1, 2, 3)))))
    for _ in range(dice.choice((0, 0, 1, 3))):
        start = dice.randrange(len(data) + 1)
        end = start + dice.randint(0, 8)
        data[start:end] = dice.choice((b"", dice.randbytes(4), b"\r\n", b"\x00", bytes(data[start:end]) * 2))
    return bytes(data)


async def converse(port: int, data: bytes, cuts: list[int], *, leave: bool) -> bytes:
    """Send the data in pieces, and return what came until the server closed; or `leave` at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            writer.write(data[start:end])
            await writer.drain()
            if cuts:
                await asyncio.sleep(0.001)
        if leave:
            return b""
        async with asyncio.timeout(HANG_S):
            return await reader.read()
    except ConnectionError:  # it had heard enough
        return b""
    finally:
        writer.close()


async def try_all(port: int, dice: random.Random) -> int:
    """Returns how many conversations there were; fails at the first wrong answer."""
    end = time.monotonic() + SECONDS
    tried = answered = 0
    while tried < CASES or time.monotonic() < end:
        cases = []
        for _ in range(AT_ONCE):
            data = message(dice)
            cuts = sorted(dice.choices(range(len(data) + 1), k=dice.choice((0, 0, 2))))
            cases.append((data, cuts, dice.random() < 0.1))
        replies = await asyncio.gather(
            *(converse(port, data, cuts, leave=leave) for data, cuts, leave in cases), return_exceptions=True
        )
        for (data, cuts, _), reply in zip(cases, replies, strict=True):
            assert not isinstance(reply, BaseException), f"{reply!r} after {data!r}, cut at {cuts}"
            statuses = {int(digits) for digits in re.findall(rb"HTTP/1\.1 (\d{3})", reply)}
            assert statuses <= STATUSES, f"{statuses} after {data!r}, cut at {cuts}"
            answered += bool(statuses)
        tried += len(cases)
    assert answered > tried / 2  # or the cases are too wild to reach anything
    return tried


def still_serves(server: Harness) -> None:
    assert server.classify(picture(42)).classes == [42]
    assert server.request("GET", "/readyz").status == 200


@pytest.mark.timeout(300 + SECONDS)
def test_nearly_requests_neither_break_nor_block_the_server() -> None:
    limits = {"header_timeout_s": SOON_S, "body_timeout_s": SOON_S, "keep_alive_s": SOON_S}
    with serving(**limits) as server:
        asyncio.run(try_all(server.port, random.Random(SEED)))
        still_serves(server)
        eventually(lambda: server.metric("topfive_inflight_images") == 0)
        eventually(lambda: server.metric("topfive_inflight_bytes") == 0)
        eventually(lambda: not server.on_loop(lambda: server.server.server_state.connections))


@pytest.mark.timeout(60)
def test_what_drips_in_after_the_answer_does_not_keep_the_connection() -> None:
    with serving(keep_alive_s=1.0) as server, server.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.settimeout(0.1)
        for _ in range(200):
            try:
                connection.sendall(b".")
                if not connection.recv(65536):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        pytest.fail("the connection is still open")
