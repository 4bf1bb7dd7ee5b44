"""The client's whole conversation with a server, without input or output.

A call is a generator: it yields what to do next (`Send`, `Sleep`) and is sent what came of it (a response, or the
transport's error). `Client` and `AsyncClient` are the two drivers; building requests, reading answers and deciding
about retries is here, once.
"""

import math
import re
import ssl
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import httpx2

from topfive._images import Upload
from topfive._results import Classification, Failure, Label, Model
from topfive._retry import RETRIED_STATUSES, RetryBudget, RetryPolicy, parse_retry_after
from topfive.errors import (
    ApiConnectionError,
    ApiResponseError,
    ApiStatusError,
    ApiTimeoutError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PayloadTooLargeError,
    class_of_status,
)

_ERROR_TYPE = "urn:topfive:error:"
_QUOTED = re.compile('"([^"]*)"')
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError)
"""What reading an answer of another shape raises; the last one for a number such as 1e999."""
_OF_THE_CALL = (AuthenticationError, BadRequestError, NotFoundError)
"""Refusals that no other image would escape; they end `classify_many` instead of becoming values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Send this request."""

    method: str
    path: str
    timeout: httpx2.Timeout
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = None

    def request(self, http: httpx2.Client | httpx2.AsyncClient) -> httpx2.Request:
        """As httpx2's request."""
        return http.build_request(
            self.method,
            self.path,
            params=dict(self.params) or None,
            headers=dict(self.headers),
            content=self.content,
            files=None if self.files is None else list(self.files),
            timeout=self.timeout,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sleep:
    """Wait this many seconds."""

    seconds: float


T = TypeVar("T")
Reply: TypeAlias = httpx2.Response | httpx2.RequestError | None
Steps: TypeAlias = Generator[Send | Sleep, Reply, T]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a caller may ask of one classification."""

    top_k: int | None
    model: str | None
    version: str | None
    timeout: httpx2.Timeout
    deadline: float | None
    """Seconds for the whole call, retries included."""

    def params(self) -> dict[str, str]:
        """The query of the request."""
        asked = {"top_k": self.top_k, "model": self.model, "version": self.version}
        return {name: str(value) for name, value in asked.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One client's side: where it asks, and how it asks again."""

    url: str
    policy: RetryPolicy
    budget: RetryBudget
    clock: Callable[[], float] = time.monotonic

    def classify(self, upload: Upload, options: Options) -> Steps[Classification]:
        """One image, as the raw body of a request."""
        response = yield from self._ask(
            Send(
                method="POST",
                path="v1/classify",
                timeout=options.timeout,
                params=options.params(),
                headers={"Content-Type": "application/octet-stream"},
                content=upload.data,
            ),
            options.deadline,
        )
        result = read_images(response, [upload], self.url)[0]
        if isinstance(result, Failure):
            raise result.error
        return result

    def classify_batch(
        self, items: Sequence[Upload | Failure], options: Options
    ) -> Steps[list[Classification | Failure]]:
        """The images of a batch in one multipart request; what concerns one image becomes a value."""
        uploads = [item for item in items if isinstance(item, Upload)]
        results = iter((yield from self._classify_uploads(uploads, options)) if uploads else [])
        return [item if isinstance(item, Failure) else next(results) for item in items]

    def _classify_uploads(
        self, uploads: Sequence[Upload], options: Options
    ) -> Steps[list[Classification | Failure]]:
        response = yield from self._ask(
            Send(
                method="POST",
                path="v1/classify",
                timeout=options.timeout,
                params=options.params(),
                files=[("file", (u.basename, u.data, "application/octet-stream")) for u in uploads],
            ),
            options.deadline,
        )
        try:
            return read_images(response, uploads, self.url)
        except PayloadTooLargeError as error:
            if len(uploads) == 1:
                return [Failure(filename=uploads[0].filename, error=error)]
            # Together they exceed a limit of the server that we do not know; each half may not.
            half = len(uploads) // 2
            first = yield from self._classify_uploads(uploads[:half], options)
            second = yield from self._classify_uploads(uploads[half:], options)
            return first + second
        except _OF_THE_CALL:
            raise
        except ApiStatusError as error:
            return [Failure(filename=upload.filename, error=error) for upload in uploads]

    def models(self, timeout: httpx2.Timeout) -> Steps[tuple[Model, ...]]:
        """The models that the server offers."""
        response = yield from self._ask(Send(method="GET", path="v1/models", timeout=timeout), None)
        return read_models(response, self.url)

    def ready(self, timeout: httpx2.Timeout) -> Steps[bool]:
        """Whether the server says that it can answer; one request, no retries."""
        reply = yield Send(method="GET", path="readyz", timeout=timeout)
        return isinstance(reply, httpx2.Response) and reply.status_code == httpx2.codes.OK

    def _ask(self, send: Send, deadline: float | None) -> Steps[httpx2.Response]:
        """Send until there is an answer, or no retry, time or budget is left.

        Raises:
            ApiConnectionError: no answer, at last.
        """
        ends = math.inf if deadline is None else self.clock() + deadline
        attempt = 0
        while True:
            attempt += 1
            reply = yield _limited(send, ends - self.clock())
            if isinstance(reply, httpx2.Response) and reply.status_code not in RETRIED_STATUSES:
                self.budget.on_success()
                return reply
            wait = self._wait(attempt, reply, ends)
            if wait is None:
                if isinstance(reply, httpx2.Response):
                    return reply
                raise _connection_error(reply, self.url, deadline) from reply
            yield Sleep(seconds=wait)

    def _wait(self, attempt: int, reply: Reply, ends: float) -> float | None:
        """Seconds to wait before asking again, or None not to."""
        may_retry = self.budget.on_failure()
        retry_after = parse_retry_after(reply.headers) if isinstance(reply, httpx2.Response) else None
        wait = self.policy.delay(attempt, retry_after)
        if not may_retry or wait is None or self.clock() + wait >= ends:
            return None
        if isinstance(reply, httpx2.TimeoutException) and not isinstance(reply, httpx2.ConnectTimeout):
            return None
        if isinstance(reply, httpx2.ConnectError) and _untrusted(reply):
            return None  # it would be the same certificate
        return wait


def _limited(send: Send, remaining: float) -> Send:
    """The same request within `remaining` seconds, of which the server is told."""
    if remaining == math.inf:
        return send
    remaining = max(remaining, 0.001)
    phases = {
        name: remaining if value is None else min(value, remaining)
        for name, value in send.timeout.as_dict().items()
    }
    headers = {**send.headers, "X-Timeout-Ms": str(max(1, int(remaining * 1000)))}
    return replace(send, timeout=httpx2.Timeout(**phases), headers=headers)


def _connection_error(
    cause: httpx2.RequestError | None, url: str, deadline: float | None
) -> ApiConnectionError:
    if untrusted := _untrusted(cause):
        return ApiConnectionError(
            f"the certificate of {url} is not trusted ({untrusted}); to trust it, name a file that holds it, "
            "or its authority's, in SSL_CERT_FILE"
        )
    if isinstance(cause, httpx2.ConnectTimeout | httpx2.ConnectError):
        return ApiConnectionError(
            f"no server answers at {url} ({_reason(cause)}); start one with `topfive serve`, or give another address"
        )
    if isinstance(cause, httpx2.TimeoutException):
        phase = {"ReadTimeout": "reading", "WriteTimeout": "sending"}.get(type(cause).__name__, "waiting")
        limit = "its time-out" if deadline is None else f"the deadline of {deadline:g} s"
        return ApiTimeoutError(f"the server at {url} did not answer within {limit} (while {phase})")
    return ApiConnectionError(f"the connection to {url} broke ({_reason(cause)})")


def _untrusted(cause: BaseException | None) -> str:
    """Why the server's certificate is not trusted, or nothing where that is not what went wrong."""
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return "" if cause is None else cause.verify_message or str(cause)


def _reason(cause: Exception | None) -> str:
    return str(cause) or type(cause).__name__


def read_images(
    response: httpx2.Response, uploads: Sequence[Upload], url: str
) -> list[Classification | Failure]:
    """The answers for `uploads`, in their order.

    Raises:
        ApiStatusError: the request as a whole was refused.
        ApiResponseError: not an answer of a topfive server, or one for another number of images.
    """
    body = _json_object(response)
    if not isinstance(body.get("images"), list):
        _raise_for_status(response, body, url)
    images = body.get("images")
    if not isinstance(images, list) or len(images) != len(uploads):
        found = f"{len(images)} results" if isinstance(images, list) else "no results"
        raise ApiResponseError(f"{url} answered {found} for {len(uploads)} images; it is no topfive server")
    request_id = response.headers.get("x-request-id", "")
    timing = parse_server_timing(response.headers.get("server-timing", ""))
    results: list[Classification | Failure] = []
    try:
        for upload, image in zip(uploads, images, strict=True):
            if "error" in image:
                error = _status_error(image["error"], response, int(image["error"]["status"]))
                results.append(Failure(filename=upload.filename, error=error))
                continue
            results.append(
                Classification(
                    filename=upload.filename,
                    width=int(image["width"]),
                    height=int(image["height"]),
                    top=tuple(
                        Label(
                            label=str(top["label"]),
                            class_index=int(top["class"]),
                            probability=float(top["probability"]),
                        )
                        for top in image["top"]
                    ),
                    model=str(body["model"]),
                    version=str(body["version"]),
                    request_id=request_id,
                    timing_ms=timing,
                )
            )
    except _MALFORMED as error:
        raise ApiResponseError(f"the answer of {url} is malformed: {error!r}") from error
    return results


def read_models(response: httpx2.Response, url: str) -> tuple[Model, ...]:
    """The list of models.

    Raises:
        ApiStatusError: refused.
        ApiResponseError: not an answer of a topfive server.
    """
    body = _json_object(response)
    _raise_for_status(response, body, url)
    try:
        return tuple(
            Model(
                name=str(model["name"]),
                version=str(model["version"]),
                default=bool(model["default"]),
                classes=int(model["classes"]),
                crop=int(model["crop"]),
                fingerprint=str(model["fingerprint"]),
            )
            for model in body["models"]
        )
    except _MALFORMED as error:
        raise ApiResponseError(f"the answer of {url} is malformed: {error!r}") from error


def parse_server_timing(header: str) -> dict[str, float]:
    """Milliseconds by stage of a `Server-Timing` header (`decode;dur=1.9, infer;dur=9.2`)."""
    timing = {}
    # Descriptions are quoted and may hold the separators; they are not needed.
    for entry in _QUOTED.sub(lambda match: re.sub("[,;]", " ", match[1]), header).split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            try:
                if key.strip().lower() == "dur":
                    timing[name] = float(value)
            except ValueError:
                continue
    return timing


def _json_object(response: httpx2.Response) -> dict[str, Any]:
    """The body as a JSON object, or an empty one: what stands between us and the server answers in HTML."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _raise_for_status(response: httpx2.Response, body: Mapping[str, Any], url: str) -> None:
    if response.status_code >= 400:
        raise _status_error(body, response, response.status_code)
    if response.status_code != httpx2.codes.OK or not body:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        raise ApiResponseError(f"{url} answered {status} and no result; it is no topfive server")


def _status_error(problem: Mapping[str, Any], response: httpx2.Response, status: int) -> ApiStatusError:
    """The exception for a problem document (RFC 9457), of an answer or of one image in it."""
    kind, title = str(problem.get("type", "")), str(problem.get("title", ""))
    detail = str(problem.get("detail", "")) or title
    return class_of_status(status)(
        detail or f"the server answered {status} {response.reason_phrase}".strip(),
        status=status,
        code=kind.removeprefix(_ERROR_TYPE) if kind.startswith(_ERROR_TYPE) else "",
        title=title,
        request_id=str(problem.get("request_id") or response.headers.get("x-request-id", "")),
        retry_after=parse_retry_after(response.headers),
    )
