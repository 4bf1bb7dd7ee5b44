"""Where the time of a request that has ended went: the stages of its slowest image, on the monotonic clock.

For what is looked at afterwards, the slow request's line in the log and the traces; nothing is kept for it on the way.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from topfive_server.job import Answer, Job


class Stage(NamedTuple):
    """One stage and when it was."""

    name: str
    """`receive`, `decode`, `queue`, `batch` or `infer`, as in Server-Timing."""
    begun: float
    ended: float
    batch_size: int = 0
    """Images in the batch, of `infer` when it came back."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.begun


def stages(timings: Mapping[str, float], jobs: Sequence[Job], *, started: float, ended: float) -> list[Stage]:
    """In order. A request that failed ends in the stage in which it was then; without a body there is none."""
    if "receive" not in timings:
        return []
    received = min(started + timings["receive"], ended)
    ways = [_way(job, received, ended) for job in jobs]
    slowest = max(ways, key=lambda way: way[-1].ended, default=[])
    return [Stage("receive", started, received), *slowest]


def slowest(found: Sequence[Stage], *, ended: float) -> str:
    """The stage that took longest, or `answer` for what came after all of them."""
    if not found:
        return "answer"
    longest = max(found, key=lambda stage: stage.seconds)
    return "answer" if ended - found[-1].ended > longest.seconds else longest.name


def waits(job: Job, *, received: float, ended: float) -> tuple[float | None, float | None]:
    """Seconds that one image was decoded, and then waited for the engine and its batch, answered or not.

    None for what it never came to. One whose request ended meanwhile has waited until then: that it was given up does
    not make the wait shorter.
    """
    decode_s = job.decode_s or (None if job.queued_at else ended - received)
    if not job.queued_at:
        return decode_s, None
    answer = _answer(job)
    if answer is not None:
        return decode_s, answer.queue_s + answer.batch_s
    return decode_s, max((job.ready_at or ended) - job.queued_at, 0.0)


def _way(job: Job, received: float, ended: float) -> list[Stage]:
    """The stages of one image; the last one is not over when it never was answered."""
    if not job.queued_at:
        return [Stage("decode", received, received + job.decode_s if job.decode_s else ended)]
    way = [Stage("decode", received, job.queued_at)] if job.decode_s else []  # squares come decoded
    if not job.ready_at:
        return [*way, Stage("queue", job.queued_at, ended)]
    way.append(Stage("queue", job.queued_at, job.ready_at))
    answer = _answer(job)
    if answer is None:
        return [*way, Stage("infer", job.ready_at, ended)]
    complete = job.ready_at + answer.batch_s
    return [
        *way,
        Stage("batch", job.ready_at, complete),
        Stage("infer", complete, complete + answer.infer_s, answer.batch_size),
    ]


def _answer(job: Job) -> Answer | None:
    future = job.answer
    if not future.done() or future.cancelled() or future.exception() is not None:
        return None
    return future.result()
