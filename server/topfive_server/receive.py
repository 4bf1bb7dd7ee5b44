"""From the socket to the bytes of each image, within limits of size, number and time.

Limits are applied while the body streams in: nothing larger than allowed is ever held in memory.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from topfive_server.admission import Ticket
from topfive_server.errors import (
    BadRequestError,
    BodyTimeoutError,
    TooLargeError,
    TooManyImagesError,
    UnsupportedImageError,
)

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

Receive = Callable[[], Awaitable[Any]]

CHUNKS: Final = "topfive.chunks"
"""Where the ASGI scope may hold a request's `Chunks`; the `http.request` messages are then empty."""
MAX_FILENAME: Final = 255
"""Characters of a file name that are kept."""
_CHEAP_BYTES: Final = 250_000
"""A multipart body up to this size is taken apart within a millisecond, even one that is all carriage returns."""
_SMALL: Final = 16 * 1024
"""Bytes of a piece of a body from which on it is kept as it came."""
_FIRST_STEP: Final = 512
"""Bytes that a compressed stream is handed at first, if it is not the body's first; twice as many each time."""


class ClientGoneError(Exception):
    """The connection closed before the body was complete; nobody is left to answer."""


class Upload(NamedTuple):
    """One image as it was sent."""

    filename: str | None
    data: bytes | memoryview


class Chunks:
    """Pieces in order, small ones put together: one by one they would take many times the memory of their bytes."""

    __slots__ = ("_list", "size")

    def __init__(self) -> None:
        self._list: list[bytes | bytearray] = []
        self.size = 0

    def add(self, chunk: bytes | bytearray) -> None:
        """A piece has come."""
        self.size += len(chunk)
        last = self._list[-1] if self._list else None
        if last is None or len(last) >= _SMALL or len(chunk) >= _SMALL:
            if chunk:  # the last message of a body may be empty
                self._list.append(chunk)
            return
        if not isinstance(last, bytearray):
            last = self._list[-1] = bytearray(last)
        last += chunk

    def take(self) -> list[bytes | bytearray]:
        """All there is."""
        taken, self._list, self.size = self._list, [], 0
        return taken

    def join(self) -> bytes:
        """All there is, as one; a single piece is not copied."""
        only = self._list[0] if len(self._list) == 1 else None
        return only if isinstance(only, bytes) else b"".join(self._list)


def declared_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Content-Length, or None for a chunked body.

    Raises:
        BadRequestError: not a number.
    """
    value = headers.get(b"content-length")
    if value is None:
        return None
    if not value.isdigit():
        raise BadRequestError("Content-Length must be a whole number of bytes")
    return int(value)


async def read_body(
    receive: Receive,
    headers: Mapping[bytes, bytes],
    ticket: Ticket,
    *,
    max_bytes: int,
    timeout_s: float,
    come: Chunks | None = None,
) -> bytes:
    """Read the whole body, from the messages or from `come`, which the protocol fills.

    Raises:
        TooLargeError: more than `max_bytes`, declared or counted.
        BodyTimeoutError: not complete within `timeout_s` seconds.
        QueueFullError: the server's memory for bodies is taken.
        ClientGoneError: the client has left.
    """
    length = declared_length(headers)
    if length is not None and length > max_bytes:
        raise TooLargeError(f"the body has {length:,} bytes; the limit is {max_bytes:,}")
    body = Chunks()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGoneError
                for chunk in come.take() if come is not None else [message.get("body", b"")]:
                    if body.size + len(chunk) > max_bytes:
                        raise TooLargeError(f"the body has more than {max_bytes:,} bytes, the limit")
                    ticket.add_bytes(len(chunk))
                    body.add(chunk)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        of = "" if length is None else f" of {length:,}"
        raise BodyTimeoutError(
            f"only {body.size:,}{of} bytes of the body came within {timeout_s:g} seconds"
        ) from None
    return body.join()


def decompress(body: bytes, headers: Mapping[bytes, bytes], *, max_bytes: int) -> bytes:
    """The body without its content coding.

    Raises:
        BadRequestError: broken compression.
        UnsupportedImageError: a content coding other than gzip.
        TooLargeError: more than `max_bytes` after decompression.
    """
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding in {b"gzip", b"x-gzip"}:
        return inflate(body, window=31, max_bytes=max_bytes)
    if coding != b"identity":
        name = coding.decode("latin-1")[:40]
        raise UnsupportedImageError(
            f"Content-Encoding {name} is not supported; send gzip, or nothing special"
        )
    return body


def unpack(body: bytes, headers: Mapping[bytes, bytes], *, max_images: int) -> list[Upload]:
    """The images of a complete, decompressed body: one, or the parts of a multipart form.

    Raises:
        BadRequestError: no body, broken multipart framing, no part.
        TooManyImagesError: more than `max_images` parts.
    """
    if not body:
        raise BadRequestError("the request has no body; send the image as the body, or as multipart files")
    content_type = headers.get(b"content-type", b"")
    if content_type[:20].lower().startswith(b"multipart/"):
        return _split(body, content_type, max_images)
    return [Upload(None, body)]


def is_cheap(body: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether `decompress` and `unpack` take no more than about a millisecond, so that they may run on the event loop."""
    return b"content-encoding" not in headers and (
        len(body) < _CHEAP_BYTES
        or not headers.get(b"content-type", b"")[:20].lower().startswith(b"multipart/")
    )


def inflate(body: bytes, *, window: int, max_bytes: int) -> bytes:
    """Decompress one stream after the other, in time that grows with the body, never holding more than `max_bytes`.

    Args:
        body: streams without a gap; gzip calls them members (RFC 1952 section 2.2).
        window: zlib's `wbits`: 31 for gzip, 15 for what HTTP calls deflate (RFC 1950).
        max_bytes: of the output.

    Raises:
        BadRequestError: broken compression.
        TooLargeError: more than `max_bytes`.
    """
    rest = memoryview(body)
    out: list[bytes] = []
    size = 0
    step = len(body)  # almost always there is one stream
    while rest:
        stream = zlib.decompressobj(wbits=window)
        while not stream.eof:
            if not rest:
                raise BadRequestError("the compressed body is truncated")
            try:
                out.append(stream.decompress(rest[:step], max_bytes - size + 1))
            except zlib.error as error:
                raise BadRequestError(f"the compressed body is corrupt: {error}") from error
            size += len(out[-1])
            if size > max_bytes:
                raise TooLargeError(
                    f"the body has more than {max_bytes:,} bytes after decompression, the limit"
                )
            # What a stream leaves over is a copy. It must be short where there are many streams.
            rest = rest[min(step, len(rest)) - len(stream.unused_data) :]
            step *= 2
        step = _FIRST_STEP
    return b"".join(out)


class _Parts:
    """Collects the parts that the multipart parser finds; `python_multipart` calls the `on_` methods."""

    def __init__(self, max_images: int) -> None:
        self.uploads: list[Upload] = []
        self._max_images = max_images
        self._pieces: list[memoryview] = []
        self._field = self._value = b""
        self._disposition = b""

    def on_part_begin(self) -> None:
        if len(self.uploads) == self._max_images:
            raise TooManyImagesError(f"the request has more than {self._max_images} images, the limit")
        self._pieces = []
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        # Near a false boundary the parser hands out its own small buffer instead of the body.
        self._pieces.append(memoryview(data)[start:end])

    def on_part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename")
        filename = None if name is None else name.decode("utf-8", "replace")[:MAX_FILENAME]
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self.uploads.append(Upload(filename, data))


def _split(body: bytes, content_type: bytes, max_images: int) -> list[Upload]:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequestError("a multipart body must be multipart/form-data with a boundary")
    parts = _Parts(max_images)
    callbacks: MultipartCallbacks = {
        "on_part_begin": parts.on_part_begin,
        "on_header_field": parts.on_header_field,
        "on_header_value": parts.on_header_value,
        "on_header_end": parts.on_header_end,
        "on_part_data": parts.on_part_data,
        "on_part_end": parts.on_part_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequestError(f"the multipart body is malformed: {error}") from error
    if parser.state != MultipartState.END:
        raise BadRequestError("the multipart body ends before its closing boundary")
    if not parts.uploads:
        raise BadRequestError("the multipart body has no part; send each image as a file")
    return parts.uploads
