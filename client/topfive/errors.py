"""What a user can get wrong and what a server can answer, as exceptions whose message is one sentence.

Every part raises subclasses of `TopfiveError` for input, configuration and surroundings that it cannot work with. The
command line prints the sentence and exits with `exit_code`; a program catches the class.

    TopfiveError
      ApiError                        asking a server went wrong
        ApiConnectionError            no server answered
          ApiTimeoutError             ... in time
        ApiResponseError              something answered that is no topfive server
        ApiStatusError                the server refused, in its own words: `.status`, `.code`, `.request_id`, …
          BadRequestError             400
          AuthenticationError         401, 403
          NotFoundError               404: unknown model or version
          UploadTimeoutError          408: the upload was too slow
          PayloadTooLargeError        413: too many bytes, pixels or images
          UnsupportedImageError       415: not an allowed format
          UnreadableImageError        422: an allowed format that does not decode
          OverloadedError             429: refused before any work was done; `.retry_after`
          ServerError                 5xx
            UnavailableError          503: starting or stopping; `.retry_after`
            DeadlineExceededError     504: accepted, but too late
"""

from typing import ClassVar, Final


class TopfiveError(Exception):
    """Base of the errors that are for people: the message names the input, the limit and the way out."""

    exit_code: ClassVar[int] = 1
    """Exit status of a command that ends with this error."""


class ApiError(TopfiveError):
    """Base of everything that can go wrong between a client and a server."""


class ApiConnectionError(ApiError):
    """No server answered: nothing listens there, the name is unknown, its certificate is not trusted, or the connection broke."""

    exit_code = 3


class ApiTimeoutError(ApiConnectionError):
    """No answer within the time-out or the deadline."""


class ApiResponseError(ApiError):
    """The answer is not one that a topfive server gives; the address may be of something else."""


class ApiStatusError(ApiError):
    """The server refused the request or one of its images; the message is the server's sentence."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "",
        title: str = "",
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, of the answer or of this image."""
        self.code = code
        """Machine-readable reason, e.g. `queue-full`; empty when the answer came from something in between."""
        self.title = title
        """Short name of the kind of problem."""
        self.request_id = request_id
        """Identifies the request in the server's log."""
        self.retry_after = retry_after
        """Seconds after which the server asks to be tried again, or None."""


class BadRequestError(ApiStatusError):
    """400: a malformed request or parameter."""


class AuthenticationError(ApiStatusError):
    """401 or 403: an API key is needed, or this one will not do."""


class NotFoundError(ApiStatusError):
    """404: no such model, version or path."""


class UploadTimeoutError(ApiStatusError):
    """408: the server gave up waiting for the upload."""


class PayloadTooLargeError(ApiStatusError):
    """413: too many bytes, pixels, or images in one request."""


class UnsupportedImageError(ApiStatusError):
    """415: not one of the allowed image formats."""


class UnreadableImageError(ApiStatusError):
    """422: an allowed format that does not decode."""


class OverloadedError(ApiStatusError):
    """429: the server had no room, or could not have answered in time; nothing was computed."""


class ServerError(ApiStatusError):
    """5xx: the fault is not with the request."""


class UnavailableError(ServerError):
    """503: the server is starting or stopping."""


class DeadlineExceededError(ServerError):
    """504: accepted, but the deadline passed before the answer."""


_BY_STATUS: Final[dict[int, type[ApiStatusError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    408: UploadTimeoutError,
    413: PayloadTooLargeError,
    415: UnsupportedImageError,
    422: UnreadableImageError,
    429: OverloadedError,
    503: UnavailableError,
    504: DeadlineExceededError,
}


def class_of_status(status: int) -> type[ApiStatusError]:
    """The exception class for an HTTP status."""
    return _BY_STATUS.get(status) or (ServerError if status >= 500 else ApiStatusError)
