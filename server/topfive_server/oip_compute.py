"""From a parsed request of the Open Inference Protocol to its answers, through the batcher; for REST and gRPC."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topfive_server.accounting import Account
from topfive_server.config import ServerConfig
from topfive_server.errors import RequestError, UnknownModelError
from topfive_server.job import Answer, Job, Priority
from topfive_server.models import Models
from topfive_server.oip_codec import InferRequest, Interface, ProtocolError
from topfive_server.receive import Receive
from topfive_server.served_model import ServedModel
from topfive_server.waiting import wait_for_answers


async def compute(
    model: ServedModel,
    request: InferRequest,
    *,
    started: float,
    config: ServerConfig,
    receive: Receive | None,
    jobs: list[Job],
    since_answer_s: float | None = None,
) -> list[Answer]:
    """Every image's answer.

    Args:
        model: answers.
        request: the images, and how long they may take.
        started: when the request came, on the monotonic clock.
        config: bounds the time-out.
        receive: as `wait_for_answers` takes it.
        jobs: empty; is filled with the images on their way.
        since_answer_s: as `ServedModel.refuse_a_long_wait` takes it.

    Raises:
        QueueFullError: the wait would be too long.
        RequestError: one of them failed, or the deadline passed; then the whole request has.
        ClientGoneError: the client has left.
    """
    loop = asyncio.get_running_loop()
    deadline = started + min(request.timeout_s or config.request_timeout_s, config.request_timeout_s)
    priority = priority_of(request)
    model.refuse_a_long_wait(priority, since_answer_s)
    for image in request.images_NHWC:
        job = Job(deadline=deadline, priority=priority, loop=loop)
        job.image = image
        job.width = job.height = image.shape[0]
        model.batcher.expect(priority)
        model.batcher.submit(job)
        jobs.append(job)

    answers: list[Answer] = []
    for outcome in await wait_for_answers(jobs, deadline=deadline, receive=receive):
        if isinstance(outcome, RequestError):
            raise outcome  # one image's error is the request's
        answers.append(outcome)
    return answers


def priority_of(request: InferRequest) -> Priority:
    """Triton's priority 0 is the default and 1 the highest; what is below it waits for people."""
    return "batch" if request.priority > 1 else "interactive"


def find_model(models: Models, name: str, version: str | None) -> ServedModel:
    """The model version in service; `Models.get`.

    Raises:
        ProtocolError: there is none, in the words that Triton uses.
    """
    with _as_triton_says(name, version):
        return models.get(name, version)


def pick_model(
    models: Models, name: str, version: str | None, *, before: ServedModel | None = None
) -> ServedModel:
    """The model version that answers an inference; `Models.pick`.

    Raises:
        ProtocolError: as `find_model`.
    """
    with _as_triton_says(name, version):
        return models.pick(name, version, before=before)


@contextlib.contextmanager
def _as_triton_says(name: str, version: str | None) -> Iterator[None]:
    try:
        yield
    except UnknownModelError:
        which = f"'{name[:80]}'" + (f" version {version[:20]}" if version is not None else "")
        raise ProtocolError(
            f"Request for unknown model: {which} is not found", 404, UnknownModelError.code
        ) from None


def interface_of(model: ServedModel, config: ServerConfig) -> Interface:
    """What the model takes and gives, as the protocol describes it."""
    info = model.info
    return Interface(
        name=info.name,
        side=model.input_side,
        classes=info.spec.architecture.classes,
        max_batch=config.max_images,
        labels=info.spec.labels,
    )


def note_answers(account: Account, model: ServedModel, answers: Sequence[Answer]) -> None:
    """Count the images of a request that was answered, and keep how long the slowest was in each stage."""
    for _ in answers:
        model.observer.image_ok()
    account.timings |= {
        "queue": max(answer.queue_s for answer in answers),
        "batch": max(answer.batch_s for answer in answers),
        "infer": max(answer.infer_s for answer in answers),
    }


def stack(answers: Sequence[Answer]) -> dict[str, NDArray[Any]]:
    """The answers as one array for each output."""
    return {
        "probabilities": np.stack([answer.probabilities_T for answer in answers]),
        "classes": np.stack([answer.classes_T for answer in answers]),
        "scores": np.stack([answer.scores_C for answer in answers]),
    }
