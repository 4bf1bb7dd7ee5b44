"""An image on its way through the server, its answer, and the queue in which it waits for the engine.

Everything here belongs to the event loop's thread (but for `lone`), and all times are on the monotonic clock.
Shapes: T top classes, C classes.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from topfive_server.errors import RequestError

Priority = Literal["interactive", "batch"]
PRIORITIES: Final[tuple[Priority, ...]] = ("interactive", "batch")
_AGING: Final = 8
"""After this many batches without one, a batch of `interactive` images takes the longest-waiting `batch` image along."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """One image's predictions and where its time went, in seconds."""

    probabilities_T: NDArray[np.float32]
    classes_T: NDArray[np.int64]
    scores_C: NDArray[np.float32]
    queue_s: float
    """From decoded until the engine was free for it."""
    batch_s: float
    """From then until its batch was complete."""
    infer_s: float
    """In the engine."""
    batch_size: int


class Job:
    """One image on its way through the server."""

    __slots__ = (
        "answer",
        "deadline",
        "decode_s",
        "height",
        "image",
        "priority",
        "queued_at",
        "ready_at",
        "width",
    )

    def __init__(self, *, deadline: float, priority: Priority, loop: asyncio.AbstractEventLoop) -> None:
        self.answer: asyncio.Future[Answer] = loop.create_future()
        """Resolved once; cancelled when the client has left or the deadline has passed."""
        self.deadline = deadline
        """On the monotonic clock, as every time here."""
        self.priority = priority
        self.image: NDArray[np.uint8] | None = None
        """RGB [crop, crop, 3], once decoded; dropped again with the answer."""
        self.width = self.height = 0
        """Pixels of the original, upright, once decoded."""
        self.decode_s = 0.0
        """From handed in until decoded, waiting for a decode thread included."""
        self.queued_at = self.ready_at = 0.0

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for the answer."""
        return not self.answer.done()

    @property
    def unwanted_because(self) -> str:
        """`client-gone` or `deadline`, when `wanted` is false before there was an answer."""
        return "client-gone" if self.answer.cancelled() else "deadline"

    def fail(self, error: RequestError) -> None:
        """Answer with an error, unless it was answered already."""
        self.image = None
        if not self.answer.done():
            self.answer.set_exception(error)

    def cancel(self) -> None:
        """Nobody waits for the answer any more; the pixels are not kept until their turn."""
        self.image = None
        self.answer.cancel()


class Observer(Protocol):
    """What the metrics are told of images and batches."""

    def batch_done(self, size: int, seconds: float) -> None:
        """A batch came back from the engine."""

    def batch_failed(self, kind: str) -> None:
        """The engine failed: `error`, `out-of-memory`, `dead` or `hung`."""

    def dropped(self, stage: str, reason: str) -> None:
        """An image was dropped before `decode` or before the `engine`; `client-gone` or `deadline`."""


class Queue:
    """Waiting images in two classes; people first, scoring fills up."""

    def __init__(self) -> None:
        self._lanes: dict[Priority, deque[Job]] = {priority: deque() for priority in PRIORITIES}
        self._passed_over = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def push(self, job: Job) -> None:
        """Queue a decoded image behind those of its class."""
        self._lanes[job.priority].append(job)

    def before(self, priority: Priority) -> int:
        """Images that go before one that is queued now."""
        return len(self._lanes["interactive"]) if priority == "interactive" else len(self)

    def oldest(self) -> float:
        """When the image that has waited longest was queued; infinitely long ago when none waits."""
        return min((lane[0].queued_at for lane in self._lanes.values() if lane), default=float("-inf"))

    def pop(self, count: int) -> list[Job]:
        """Take up to so many out, in the order in which they are to be computed."""
        people, scoring = self._lanes["interactive"], self._lanes["batch"]
        taken = [people.popleft() for _ in range(min(count, len(people)))]
        if scoring and len(taken) == count:
            self._passed_over += 1
            if self._passed_over >= _AGING:  # scoring yields, but never starves
                people.appendleft(taken.pop())
        if len(taken) < count and scoring:
            self._passed_over = 0
            taken += [scoring.popleft() for _ in range(min(count - len(taken), len(scoring)))]
        return taken
