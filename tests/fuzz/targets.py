"""What must hold for any bytes at all: the functions that the guided fuzzer calls with input after input."""

import json
from contextlib import suppress
from typing import Final

from topfive.model_spec import Preprocessing
from topfive.preprocessing import FORMATS, ImageError, decode
from topfive_server.errors import RequestError, from_image_error
from topfive_server.oip_codec import Interface, ProtocolError, parse_request
from topfive_server.receive import MAX_FILENAME, decompress, unpack

_PREPROCESSING: Final = Preprocessing(short_side=20, crop=16)
_MAX_PIXELS: Final = 16_000_000
"""Enough that a scan or a conversion too many takes visibly long, and below the default, so that the memory limit of the
fuzzer's process shows who decodes before asking."""
_MAX_BYTES: Final = 200_000
_MAX_IMAGES: Final = 8
_INTERFACE: Final = Interface(name="m", side=4, classes=3, max_batch=2, labels=("a", "b", "c"))


def decode_one(data: bytes) -> None:
    """`decode` gives the promised square, or raises `ImageError`, which has an answer. Anything else is a finding."""
    try:
        decoded = decode(data, _PREPROCESSING, max_pixels=_MAX_PIXELS)
    except ImageError as error:
        check_answer(from_image_error(error))
        return
    except MemoryError:  # allowed: the server answers 503
        return
    assert decoded.image.mode == "RGB"
    assert decoded.image.size == (_PREPROCESSING.crop, _PREPROCESSING.crop)
    assert decoded.format in FORMATS
    assert 1 <= decoded.width * decoded.height <= _MAX_PIXELS


def unpack_one(data: bytes) -> None:
    """`decompress` and `unpack` give uploads within the limits, or raise `RequestError`."""
    content_type, _, rest = data.partition(b"\n")
    coding, _, body = rest.partition(b"\n")
    headers = {b"content-type": content_type}
    if coding:
        headers[b"content-encoding"] = coding
    try:
        plain = decompress(body, headers, max_bytes=_MAX_BYTES)
        uploads = unpack(plain, headers, max_images=_MAX_IMAGES)
    except RequestError as error:
        check_answer(error)
    else:
        assert 1 <= len(uploads) <= _MAX_IMAGES
        assert sum(len(upload.data) for upload in uploads) <= max(_MAX_BYTES, len(body))
        for upload in uploads:
            if upload.filename is not None:
                assert len(upload.filename) <= MAX_FILENAME
                json.dumps(upload.filename, ensure_ascii=False).encode()
    with suppress(ValueError):
        text_parts(data)


def text_parts(data: bytes) -> None:
    """A well-formed form of these bytes comes back as it was.

    Raises:
        ValueError: the bytes hold the delimiter, so no form can be made of them.
    """
    boundary = b"------------------------5a5a5a5a5a5a5a5a"
    if b"\r\n--" + boundary in b"\r\n" + data:
        raise ValueError
    parts = [data, data[: len(data) // 2]]
    head = b'\r\nContent-Disposition: form-data; name="f"; filename="%d"\r\n\r\n'
    body = (
        b"\r\n".join(b"--" + boundary + head % number + part for number, part in enumerate(parts))
        + b"\r\n--%b--\r\n" % boundary
    )
    headers = {b"content-type": b"multipart/form-data; boundary=" + boundary}
    uploads = unpack(body, headers, max_images=2)
    assert [bytes(upload.data) for upload in uploads] == parts
    assert [upload.filename for upload in uploads] == ["0", "1"]


def infer_one(data: bytes) -> None:
    """Triton's protocol: images of the declared shape, or `ProtocolError`; nothing that an answer could not repeat."""
    length, _, body = data.partition(b"\n")
    try:
        request = parse_request(body, length.decode("latin-1") or None, _INTERFACE)
    except ProtocolError as error:
        json.dumps(str(error), ensure_ascii=False).encode()
        return
    assert request.images_NHWC.shape[1:] == (_INTERFACE.side, _INTERFACE.side, 3)
    assert 1 <= len(request.images_NHWC) <= _INTERFACE.max_batch
    json.dumps([request.id, *(output.name for output in request.outputs)], ensure_ascii=False).encode()


def check_answer(error: RequestError) -> None:
    """The error can be sent: a sentence, and text that UTF-8 can hold."""
    assert 400 <= error.status < 500
    assert error.detail
    json.dumps(error.problem(), ensure_ascii=False, allow_nan=False).encode()
    for name, value in error.headers():
        assert name.isascii()
        assert b"\n" not in value
