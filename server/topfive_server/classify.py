"""`POST /v1/classify`, from the first byte to the last: the hot path of the server, a plain ASGI endpoint.

It bypasses FastAPI's parameter machinery, which costs as much as everything here; `openapi` describes it.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import numpy as np

from topfive_server.admission import Admission, Ticket
from topfive_server.arrival import Arrival
from topfive_server.batcher import Batcher
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.errors import (
    BadRequestError,
    BodyTimeoutError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    DrainingError,
    NotReadyError,
    RequestError,
    TooLargeError,
)
from topfive_server.estimate import Average, Lateness
from topfive_server.exchange import ANSWERED, SINCE_ANSWER, Exchange
from topfive_server.job import PRIORITIES, Answer, Job, Priority
from topfive_server.models import Models
from topfive_server.receive import (
    CHUNKS,
    ClientGoneError,
    Receive,
    Upload,
    declared_length,
    decompress,
    is_cheap,
    read_body,
    unpack,
)
from topfive_server.served_model import ServedModel
from topfive_server.waiting import wait_for_answers, wait_for_work

MAX_TOP_K: Final = 100
_PARAMETERS: Final = ("top_k", "model", "version")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOptions:
    """What a classify request asks for besides its images."""

    top_k: int
    model: str | None
    version: str | None
    timeout_s: float
    has_deadline: bool
    """Whether the client named the time-out; ours is no reason to refuse admission."""
    priority: Priority


class ClassifyEndpoint:
    """Receives, admits, decodes, batches and answers."""

    def __init__(
        self, *, config: ServerConfig, models: Models, pool: DecodePool, admission: Admission
    ) -> None:
        self.draining = False
        """Set when the listener has closed; what still arrives is refused."""
        self._config = config
        self._models = models
        self._pool = pool
        self._admission = admission
        self._receive_s = Average()
        self._decode_s = Average()
        self._lateness = Lateness()

    async def __call__(self, exchange: Exchange, receive: Receive) -> None:
        """Answer one request.

        Raises:
            RequestError: it cannot be served; to be answered with its problem document.
        """
        exchange.route = "/v1/classify"
        try:
            await self._classify(exchange, receive)
        except ClientGoneError:
            exchange.code = "client-gone"

    async def _classify(self, exchange: Exchange, receive: Receive) -> None:
        options = read_options(exchange, self._config)
        deadline = exchange.started + options.timeout_s
        model = self._models.pick(options.model, options.version)
        arrival = self._admit(exchange, options, model)
        with self._admission.ticket(self._retry_after(model)) as ticket:
            try:
                try:
                    uploads = await self._receive(exchange, receive, ticket, options)
                finally:
                    exchange.timings["receive"] = monotonic() - exchange.started
                # A hot reload may have happened while the body came in.
                model = self._models.pick(options.model, options.version, before=model)
                exchange.model, exchange.version = model.info.name, model.info.version
                begun = monotonic()
                left_s = deadline - begun if options.has_deadline else float("inf")
                predicted_s = self._refuse_if_late(model, len(uploads), left_s)
                alone = len(uploads) == 1 and model.batcher.is_alone(arrival)
                jobs = [
                    model.classify(u.data, deadline=deadline, priority=options.priority, alone=alone)
                    for u in uploads
                ]
                exchange.jobs = jobs
            finally:
                arrival.end()
            try:
                outcomes = await wait_for_answers(jobs, deadline=deadline, receive=receive)
            finally:
                self._lateness.observe(predicted_s, monotonic() - begun)
            exchange.scope[ANSWERED] = model.remember_answer(options.priority, outcomes)
            await self._answer(
                exchange, model, options.top_k, list(zip(uploads, jobs, outcomes, strict=True))
            )

    async def _receive(
        self, exchange: Exchange, receive: Receive, ticket: Ticket, options: RequestOptions
    ) -> list[Upload]:
        """Read the body and take it apart; the request then has its places in the queue."""
        config = self._config
        timeout_s = min(config.body_timeout_s, options.timeout_s)
        try:
            body = await read_body(
                receive,
                exchange.headers,
                ticket,
                max_bytes=config.max_body_bytes,
                timeout_s=timeout_s,
                come=exchange.scope.get(CHUNKS),
            )
        except BodyTimeoutError as error:
            if timeout_s < config.body_timeout_s:
                raise DeadlineExceededError(f"the deadline passed: {error.detail}") from None
            raise
        uploads = await self._unpack(exchange, receive, body, ticket, exchange.started + options.timeout_s)
        ticket.add_images(len(uploads))
        exchange.images = len(uploads)
        return uploads

    def _admit(self, exchange: Exchange, options: RequestOptions, model: ServedModel) -> Arrival:
        """Refuse before the body is read what could not be served."""
        if self.draining:
            raise DrainingError("the server is shutting down; send the request to another", retry_after_s=1)
        if not model.health.ready:
            raise NotReadyError(
                f"model {model.info.name} is not ready: {model.health.reason}", retry_after_s=5
            )
        length = declared_length(exchange.headers) or 0
        if length > self._config.max_body_bytes:
            raise TooLargeError(
                f"the body has {length:,} bytes; the limit is {self._config.max_body_bytes:,}"
            )
        self._admission.check(expected_bytes=length, retry_after_s=self._retry_after(model))
        model.refuse_a_long_wait(options.priority, exchange.scope.get(SINCE_ANSWER))
        if options.has_deadline:
            self._refuse_if_late(model, 1, options.timeout_s - self._receive_s.or_zero())
        return model.batcher.arriving(options.priority)

    def _refuse_if_late(self, model: ServedModel, images: int, left_s: float) -> float:
        """Seconds until images that are handed in now are answered, from what was measured.

        Raises:
            DeadlineUnreachableError: more than `left_s`.
        """
        predicted_s = self._seconds_until_answered(model.batcher, images)
        needed_s = predicted_s * self._lateness.factor
        if needed_s > left_s:
            raise DeadlineUnreachableError(
                f"an answer takes {needed_s * 1000:.0f} ms at the present load, "
                f"and only {max(left_s, 0) * 1000:.0f} ms of X-Timeout-Ms are left",
                retry_after_s=needed_s - left_s,
            )
        return predicted_s

    async def _unpack(
        self, exchange: Exchange, receive: Receive, body: bytes, ticket: Ticket, deadline: float
    ) -> list[Upload]:
        """Take the body apart; what it has grown by is taken up, too."""
        headers = exchange.headers

        def work() -> tuple[int, list[Upload]]:
            plain = decompress(body, headers, max_bytes=self._config.max_body_bytes)
            return len(plain), unpack(plain, headers, max_images=self._config.max_images)

        if is_cheap(body, headers):
            size, uploads = work()
        else:
            size, uploads = await wait_for_work(self._pool.run(work), deadline=deadline, receive=receive)
        ticket.add_bytes(size - len(body))
        return uploads

    async def _answer(
        self,
        exchange: Exchange,
        model: ServedModel,
        top_k: int,
        results: Sequence[tuple[Upload, Job, Answer | RequestError]],
    ) -> None:
        observer, labels = model.observer, model.info.spec.labels
        images: list[dict[str, Any]] = []
        timings = exchange.timings
        first_error: RequestError | None = None
        succeeded = 0
        for upload, job, outcome in results:
            image: dict[str, Any] = {"filename": upload.filename}
            if isinstance(outcome, RequestError):
                first_error = first_error or outcome
                image["error"] = outcome.problem()
                observer.image_failed(outcome.code)
            else:
                succeeded += 1
                image |= {"width": job.width, "height": job.height, "top": top(outcome, labels, top_k)}
                for stage, seconds in (
                    ("decode", job.decode_s),
                    ("queue", outcome.queue_s),
                    ("batch", outcome.batch_s),
                    ("infer", outcome.infer_s),
                ):
                    timings[stage] = max(timings.get(stage, 0.0), seconds)
                observer.image_ok()
            images.append(image)
        if succeeded:
            self._receive_s.observe(timings["receive"])
            self._decode_s.observe(timings["decode"])
            await exchange.answer_json(
                {"model": model.info.name, "version": model.info.version, "images": images}
            )
            return
        assert first_error is not None  # noqa: S101  there is at least one image, and none succeeded
        if len(images) == 1 and images[0]["filename"] is None:
            raise first_error
        await exchange.answer_problem(first_error, images=images)

    def _retry_after(self, model: ServedModel) -> Callable[[], float]:
        """Seconds until the queue has drained, at the measured rate."""
        return lambda: self._seconds_until_answered(model.batcher, 0)

    def _seconds_until_answered(self, batcher: Batcher, images: int) -> float:
        seconds = batcher.forecast.seconds_until_answered(images)
        return seconds if batcher.counts_decoding else seconds + self._decode_s.or_zero()


def read_options(exchange: Exchange, config: ServerConfig) -> RequestOptions:
    """Parse and check the parameters and headers.

    Raises:
        BadRequestError: one that is unknown, malformed or out of range.
    """
    query = exchange.query()
    for name in query:
        if name not in _PARAMETERS:
            close = difflib.get_close_matches(name, _PARAMETERS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(_PARAMETERS)}"
            raise BadRequestError(f"there is no parameter {name[:40]!r}; {hint}")
    top_k = _whole_number("top_k", query.get("top_k", "5"), 1, MAX_TOP_K)
    timeout = exchange.headers.get(b"x-timeout-ms")
    timeout_s = config.request_timeout_s
    if timeout is not None:
        timeout_ms = _whole_number("X-Timeout-Ms", timeout.decode("latin-1"), 1, 86_400_000)
        timeout_s = min(timeout_s, timeout_ms / 1000)
    priority = exchange.headers.get(b"x-priority", b"interactive").decode("latin-1")
    if priority not in PRIORITIES:
        raise BadRequestError(f"X-Priority is {priority[:40]!r}; it must be {' or '.join(PRIORITIES)}")
    return RequestOptions(
        top_k=top_k,
        model=query.get("model"),
        version=query.get("version"),
        timeout_s=timeout_s,
        has_deadline=timeout is not None,
        priority=priority,
    )


def _whole_number(name: str, text: str, low: int, high: int) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high:
        return int(text)
    raise BadRequestError(f"{name} is {text[:40]!r}; it must be a whole number between {low} and {high:,}")


def top(answer: Answer, labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """The most likely classes, descending: `[{label, class, probability}]`."""
    classes = answer.classes_T[:top_k]
    probabilities = answer.probabilities_T[:top_k]
    if top_k > len(classes) and len(answer.scores_C) > len(classes):
        classes = np.argsort(-answer.scores_C, kind="stable")[:top_k]
        probabilities = answer.scores_C[classes]
    # Through text: a float32's own digits (0.83), not those of the double nearest to it (0.8299999833106995).
    return [
        {"label": labels[c], "class": c, "probability": float(str(p))}
        for c, p in zip(classes.tolist(), probabilities, strict=True)
    ]
