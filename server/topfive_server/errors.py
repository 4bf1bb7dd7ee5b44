"""Everything that a request can be refused for: one hierarchy, each class with its status and its code.

`app` turns these into `application/problem+json` (RFC 9457); the table in docs/architecture.md lists the same rows.
"""

import math
from typing import ClassVar

from topfive.preprocessing import CorruptImageError, ImageError, ImageTooLargeError, UnsupportedFormatError


class RequestError(Exception):
    """A request, or one image of it, that gets an error for an answer; the message is a sentence for its sender."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    close: ClassVar[bool] = False
    """Whether the connection is closed after the answer, because its input was not read to the end."""

    def __init__(self, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to this error."""
        headers = [(b"connection", b"close")] if self.close else []
        if self.retry_after_s is not None:
            # RFC 9110 section 10.2.3: whole seconds; never "now", which would invite a busy loop.
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        return headers

    def problem(self) -> dict[str, object]:
        """The members that every problem document has; the request's own are added by the caller."""
        return {
            "type": f"urn:topfive:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }


class BadRequestError(RequestError):
    """Malformed: a parameter, a header, the multipart framing."""

    status = 400
    code = "bad-request"
    title = "Malformed request"


class UnauthorizedError(RequestError):
    """No API key, or none that is known."""

    status = 401
    code = "unauthorized"
    title = "A known API key is required"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """RFC 9110 section 11.6.1 wants the scheme named."""
        return [*super().headers(), (b"www-authenticate", b'Bearer realm="topfive"')]


class NotFoundError(RequestError):
    """No such path."""

    status = 404
    code = "not-found"
    title = "No such path"


class UnknownModelError(RequestError):
    """No such model, or not in that version."""

    status = 404
    code = "unknown-model"
    title = "Unknown model or version"


class MethodNotAllowedError(RequestError):
    """The path exists, the method does not."""

    status = 405
    code = "method-not-allowed"
    title = "Method not allowed"

    def __init__(self, detail: str, *, allow: str) -> None:
        super().__init__(detail)
        self.allow = allow

    def headers(self) -> list[tuple[bytes, bytes]]:
        """RFC 9110 section 15.5.6 wants the allowed methods listed."""
        return [*super().headers(), (b"allow", self.allow.encode("ascii"))]


class BodyTimeoutError(RequestError):
    """The body came too slowly."""

    status = 408
    code = "body-timeout"
    title = "The body came too slowly"
    close = True


class TooLargeError(RequestError):
    """Too many bytes, as sent or once decompressed."""

    status = 413
    code = "too-large"
    title = "Too many bytes"
    close = True


class TooManyPixelsError(RequestError):
    """Too many pixels, by the image's header."""

    status = 413
    code = "too-many-pixels"
    title = "Too many pixels"


class TooManyImagesError(RequestError):
    """More images in one request than allowed."""

    status = 413
    code = "too-many-images"
    title = "Too many images"


class UnsupportedImageError(RequestError):
    """Not an allowed image format, or an unknown content coding."""

    status = 415
    code = "unsupported-format"
    title = "Unsupported format"


class CorruptError(RequestError):
    """An allowed format that does not decode."""

    status = 422
    code = "corrupt-image"
    title = "The image does not decode"


class QueueFullError(RequestError):
    """Admission refused: too many images or bytes in flight. Nothing was computed."""

    status = 429
    code = "queue-full"
    title = "The queue is full"


class DeadlineUnreachableError(RequestError):
    """Admission refused: `X-Timeout-Ms` cannot be met. Nothing was computed."""

    status = 429
    code = "deadline-unreachable"
    title = "The deadline cannot be met"


class HeadersTooLargeError(RequestError):
    """The request line and headers, or the trailers, exceed their limit (RFC 6585 section 5)."""

    status = 431
    code = "headers-too-large"
    title = "The headers are too large"
    close = True


class InternalError(RequestError):
    """A mistake of ours; the log has the traceback under the request's id."""


class EngineFailedError(RequestError):
    """The engine failed on this image alone."""

    code = "engine-failed"
    title = "The engine failed on this image"


class NotReadyError(RequestError):
    """Nothing can be computed at the moment."""

    status = 503
    code = "not-ready"
    title = "Not ready"


class DrainingError(RequestError):
    """The server is shutting down."""

    status = 503
    code = "draining"
    title = "Shutting down"
    close = True


class DeadlineExceededError(RequestError):
    """Accepted, but the deadline passed."""

    status = 504
    code = "deadline-exceeded"
    title = "The deadline passed"


def all_errors() -> list[type[RequestError]]:
    """Every class of the hierarchy below `RequestError`; documentation and metrics are made from it."""
    return sorted(RequestError.__subclasses__(), key=lambda kind: (kind.status, kind.code))


def from_image_error(error: ImageError) -> RequestError:
    """The answer to an image that `topfive.preprocessing.decode` refused."""
    if isinstance(error, UnsupportedFormatError):
        return UnsupportedImageError(str(error))
    if isinstance(error, ImageTooLargeError):
        return TooManyPixelsError(str(error))
    assert isinstance(error, CorruptImageError)  # noqa: S101  the hierarchy has three leaves
    return CorruptError(str(error))
