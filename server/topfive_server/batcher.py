"""One owner of the queue: gathers decoded images into batches, feeds the engine, hands each image its own answer.

A batch is committed as late as possible. While the engine works, images gather; when it is idle a lone image leaves
at once, unless others are arriving or being decoded at that moment: then it waits for them, for at most a window
counted from the first (or from when the engine became free, if the first had to wait for that anyway), which grows with
the batch. When the engine has just finished and some images wait, it lingers for a moment: those who have just been
answered tend to come back, and would else make batches of half the size for ever. Only a *full* batch is handed over
while another computes (one, prefetched): nothing could be gained by waiting, and the engine goes from one to the next
without a pause.

An image that is alone before it is even decoded is handed to the engine as it came (`lone`).

Everything here runs on the event loop's thread, and all timing is on the monotonic clock.
Shapes: B images of a batch, T top classes, C classes.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from time import monotonic
from typing import Final, Protocol

import numpy as np

from topfive_server.admission import Loops
from topfive_server.decode_pool import Outcome
from topfive_server.engine import (
    DecodingEngine,
    Engine,
    EngineDead,
    EngineError,
    EngineOutOfMemory,
    Predictions,
)
from topfive_server.errors import DeadlineExceededError, EngineFailedError, NotReadyError
from topfive_server.estimate import BatchTimes
from topfive_server.job import PRIORITIES, Answer, Job, Priority, Queue
from topfive_server.lone import LoneImage

log = logging.getLogger(__name__)

_LINGER_S: Final = 0.003
"""Most seconds that an engine that has just finished waits for those it has answered to come back."""
_SURELY: Final = 0.8
"""Share of the predicted time that a batch will surely take."""


class Observer(Protocol):
    """What the batcher tells the metrics."""

    def batch_done(self, size: int, seconds: float) -> None:
        """A batch came back from the engine."""

    def batch_failed(self, kind: str) -> None:
        """The engine failed: `error`, `out-of-memory`, `dead` or `hung`."""

    def dropped(self, stage: str, reason: str) -> None:
        """An image was dropped before `decode` or before the `engine`; `client-gone` or `deadline`."""


class Arrival:
    """A request whose body is arriving. Ends with the body, or by itself when that is slow."""

    __slots__ = ("_batcher", "_priority", "_timer")

    def __init__(
        self, batcher: "Batcher", priority: Priority, loop: asyncio.AbstractEventLoop, patience_s: float
    ) -> None:
        self._batcher: Batcher | None = batcher
        self._priority: Priority = priority
        self._timer = loop.call_later(patience_s, self.end)

    def counts_for(self, batcher: "Batcher") -> int:
        """Images that this batcher expects because of it: 1, or 0 after its end or of another model's."""
        return int(self._batcher is batcher)

    def end(self) -> None:
        """It is there, or no longer waited for."""
        if self._batcher is not None:
            self._timer.cancel()
            self._batcher.arrived(self._priority)
            self._batcher = None


class Batcher:
    """Feeds one engine. `expect` and `submit` images, `await job.answer`; `close` when nothing more will come."""

    def __init__(
        self,
        engine: Engine,
        *,
        observer: Observer,
        on_dead: Callable[[str], None],
        decode_s: Callable[[], float] = lambda: 0.0,
        max_delay_s: float = 0.05,
        engine_timeout_s: float = 30.0,
    ) -> None:
        """Start the loop; `on_dead` is called once, with the reason, when the engine has to be rebuilt.

        `decode_s`: measured seconds for which an image's decoding occupies the cores.
        """
        self.max_batch = engine.info.max_batch
        self._parallel = engine.info.parallel
        self.times = BatchTimes()
        self.last_success = float("-inf")
        """When a batch last came back whole, on the monotonic clock."""
        self.dead_because = ""
        self._engine = engine
        self._observer = observer
        self._on_dead = on_dead
        # Asked once: a protocol with many members takes its time to tell.
        self._decoding_engine = engine if isinstance(engine, DecodingEngine) else None
        # Elsewhere an image is decoded while others are computed.
        self._decode_s = decode_s if engine.info.takes_turns else lambda: 0.0
        self.counts_decoding = engine.info.takes_turns
        """Whether the estimates below include the decoding."""
        self._max_delay_s = max_delay_s
        self._engine_timeout_s = engine_timeout_s
        self._shares_cores = engine.info.device == "cpu"
        self._free_since = float("-inf")
        """When the engine last finished a batch."""
        self._answered = self._come = 0
        """Images of that batch, and those that have been handed in since."""
        self._arriving = 0
        """Requests; each is expected as one image."""
        self._lone: LoneImage | None = None
        """The image that has the engine to itself, unless others come while it is decoded."""
        self._loop = asyncio.get_running_loop()
        self._queue = Queue()
        self._expected: dict[Priority, int] = dict.fromkeys(PRIORITIES, 0)
        self._computing: dict[asyncio.Task[None] | LoneImage, tuple[float, int]] = {}
        """Batches handed to the engine: when, and how many images."""
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._task = self._loop.create_task(self._run(), name="batcher")

    # ------------------------------------------------------------------ what the request path calls

    def arriving(self, priority: Priority) -> "Arrival":
        """A request has begun to arrive; it is waited for like an image being decoded, but not if it is slow."""
        self._arriving += 1
        self.expect(priority)
        return Arrival(self, priority, self._loop, self._max_delay_s)

    def arrived(self, priority: Priority) -> None:
        """It has; each of its images is expected by itself by now."""
        self._arriving -= 1
        self.withdraw(priority)

    def expect(self, priority: Priority) -> None:
        """An image is going to be decoded."""
        self._expected[priority] += 1
        self._share()

    def withdraw(self, priority: Priority) -> None:
        """An expected image does not come: it did not decode, or nobody wants it any more."""
        self._expected[priority] -= 1
        self._wake()

    @property
    def expected(self) -> int:
        """Images arriving or being decoded, which will be submitted (or withdrawn) soon."""
        return sum(self._expected.values())

    def is_alone(self, arrival: Arrival) -> bool:
        """Whether the engine has nothing to do but for what has arrived, nobody else is coming, and it can decode."""
        others = self.expected - arrival.counts_for(self)
        idle = not others and not self._queue and not self._computing and not self.dead_because
        # Of several who have just been answered, the first to ask again is followed by the others.
        follow = self._answered > 1 and monotonic() - self._free_since < Loops.PROMPT_S
        return idle and not follow and self._decoding_engine is not None

    def compute_lone(
        self, job: Job, decode: Callable[[], Outcome], decoded: Callable[[Job, Outcome], None]
    ) -> None:
        """Decode and compute an expected image that `is_alone` in one go; its answer will come to `job.answer`.

        Where nothing is computed, because it does not decode, is not wanted any more or others have come meanwhile,
        `decoded` is called: to `submit` or `withdraw` the image, which is expected again.
        """
        assert self._decoding_engine is not None  # noqa: S101  `is_alone` has looked
        not_after = job.deadline - _SURELY * self.times.predict(1)
        lone = LoneImage(job, decode, decoded, not_after=not_after)
        self._expected[job.priority] -= 1
        self._lone, self._computing[lone] = lone, (monotonic() + self._decode_s(), 1)
        lone.timer = self._loop.call_later(self._engine_timeout_s, self._lone_overdue, lone)
        try:
            running = self._decoding_engine.predict_lone(lone)
        except EngineError as error:
            self._lone_failed(lone, error)
        else:
            # Not a task: what would be run for it is part of what this way saves.
            running.add_done_callback(
                lambda done: self._loop.call_soon_threadsafe(self._lone_done, lone, done)
            )

    def submit(self, job: Job) -> None:
        """An expected image is decoded; its answer will come to `job.answer`."""
        self._expected[job.priority] -= 1
        job.queued_at = monotonic()
        if self.dead_because:
            job.fail(NotReadyError(self.dead_because, retry_after_s=5))
        else:
            self._queue.push(job)
            self._come += 1
        self._wake()

    @property
    def depth(self) -> int:
        """Decoded images that wait for the engine."""
        return len(self._queue)

    def seconds_until_answered(self, images: int = 1) -> float:
        """Measured estimate for images that are handed in now: what is before them, then themselves."""
        return self._seconds(self.depth, self.expected + images)

    def seconds_of_wait(self, priority: Priority) -> float:
        """Measured estimate of what is before an image that is handed in now: the batches that must end first."""
        return self._seconds(self._queue.before(priority), self._expected_before(priority))

    def images_before(self, priority: Priority) -> int:
        """Images that are answered before one that is handed in now, those that are being computed included."""
        computing = sum(size for _, size in self._computing.values())
        return self._queue.before(priority) + self._expected_before(priority) + computing

    def _expected_before(self, priority: Priority) -> int:
        return self._expected["interactive"] if priority == "interactive" else self.expected

    @property
    def full_batch_s(self) -> float:
        """Measured estimate for a full batch, with the decoding of its images where nothing computes meanwhile."""
        return self.times.predict(self.max_batch) + self.max_batch * self._decode_s()

    def _seconds(self, decoded: int, undecoded: int) -> float:
        """Until the engine has computed what it has, and so many images more."""
        now = monotonic()
        running = sum(
            max(self.times.predict(size) - (now - since), 0) for since, size in self._computing.values()
        )
        more = self.times.predict_queue(decoded + undecoded, self.max_batch)
        return (running + more) / self._parallel + undecoded * self._decode_s()

    async def close(self) -> None:
        """Answer everything that was expected or submitted, then end; the engine stays open."""
        await self._until(lambda: not self._queue and not self.expected and not self._computing)
        self._task.cancel()
        await asyncio.wait([self._task])

    # ------------------------------------------------------------------ the loop

    async def _run(self) -> None:
        """The batching loop, step by step."""
        while True:
            # Something waits, and the engine is idle, or has one batch and a full one follows.
            await self._until(self._may_start)
            free_at = monotonic()
            if len(self._computing) < self._parallel:
                await self._until(self._joined, deadline=self._free_since + self._linger_s())
                await self._gather()
            batch = self._take(free_at)
            if batch:
                compute = self._loop.create_task(self._compute(batch))
                self._computing[compute] = monotonic(), len(batch)
                compute.add_done_callback(self._finished)
            else:
                self._wake()  # the queue is empty now, which `close` may be waiting for

    async def _gather(self) -> None:
        """Wait for those on their way, until none is, there is no room, or it is no longer worth it."""
        begin = max(self._queue.oldest(), self._free_since)
        while not self._complete():
            size = len(self._queue)
            deadline = begin + self._window_s(size)
            if deadline <= monotonic():
                return
            await self._until(partial(self._grown, size), deadline=deadline)

    def _may_start(self) -> bool:
        waiting, computing = len(self._queue), len(self._computing)
        return (waiting > 0 and computing < self._parallel) or (
            waiting >= self.max_batch and computing == self._parallel
        )

    def _complete(self) -> bool:
        """Nobody else is about to join the batch, or there is no room."""
        return self.expected == 0 or len(self._queue) >= self.max_batch

    def _grown(self, size: int) -> bool:
        """There is more to compute than so many images, or nobody else is about to come."""
        return self._complete() or len(self._queue) != size

    def _joined(self) -> bool:
        """Somebody is about to join the batch, there is no room, or all are back who were just answered."""
        back = self._come >= self._answered
        return self.expected > 0 or back or len(self._queue) >= self.max_batch

    def _linger_s(self) -> float:
        """How long an engine that has just finished waits for somebody to come: less than a saved batch is worth."""
        return min(_LINGER_S, self.times.fixed / 2)

    def _window_s(self, images: int) -> float:
        """How long a batch of so many images waits for others that are on their way.

        Where the engine and the decoders share the cores, waiting takes nothing from the throughput: the cores are busy
        decoding. Somebody who just misses the batch waits until it is done, so that is as long as the batch may be
        kept for him. A device of its own would idle, which pays only for as long as one batch less saves.

        What decoding takes is not waiting, where nothing is decoded while a batch computes: neither for those who have come
        since the last one nor for those who are still to be decoded.
        """
        decode_s = self._decode_s()
        undecoded = self.expected - self._arriving
        decoding_s = min(self._come + undecoded, self.max_batch) * decode_s
        worth_s = self.times.predict(images) if self._shares_cores else self.times.fixed
        return min(decoding_s + worth_s, self.max_batch * decode_s + self._max_delay_s)

    def _take(self, free_at: float) -> list[Job]:
        """Up to `max_batch` images that somebody still waits for."""
        batch: list[Job] = []
        # An answer that would come too late is not worth the engine's time, which others can use.
        now = monotonic()
        back = now + _SURELY * self.times.predict(min(len(self._queue), self.max_batch))
        while len(batch) < self.max_batch and len(self._queue):
            for job in self._queue.pop(self.max_batch - len(batch)):
                if job.wanted and back >= job.deadline:
                    job.fail(DeadlineExceededError("the deadline was too near when the engine became free"))
                if not job.wanted:
                    job.image = None
                    self._observer.dropped("engine", job.unwanted_because)
                else:
                    job.ready_at = max(job.queued_at, free_at)
                    batch.append(job)
        return batch

    async def _compute(self, batch: list[Job]) -> None:
        """Run a batch; when it fails, halve it until only the guilty images fail."""
        started = monotonic()
        images = [job.image for job in batch if job.image is not None]
        try:
            async with asyncio.timeout(self._engine_timeout_s):
                predictions = await self._engine.predict(images)
            self._check(predictions, len(batch))
        except Exception as error:  # noqa: BLE001  whatever an engine raises must not end the loop
            for half in self._failed(batch, error):
                if alive := [job for job in half if job.wanted]:
                    await self._compute(alive)
        else:
            self._deliver(batch, predictions, started)

    # ------------------------------------------------------------------ the ends of it

    def _share(self) -> None:
        """Others have come: the image that has the engine to itself joins them, unless it is being computed by now."""
        lone, self._lone = self._lone, None
        if lone is not None and lone.share():
            del self._computing[lone]
            self._expected[lone.job.priority] += 1

    def _lone_done(self, lone: LoneImage, running: Future[Predictions | None]) -> None:
        lone.timer.cancel()
        if lone.given_up:
            return
        try:
            predictions = running.result()
            if predictions is not None:
                self._check(predictions, 1)
        except Exception as error:  # noqa: BLE001  as of a batch
            self._lone_failed(lone, error)
            return
        if predictions is not None:
            self._deliver([lone.job], predictions, lone.begun)
            self._finished(lone)
        else:
            self._share()  # where it is not wanted or does not decode, nobody else has
            lone.decoded(lone.job, lone.outcome)

    def _lone_failed(self, lone: LoneImage, error: Exception) -> None:
        lone.timer.cancel()
        self._failed([lone.job], error)
        if lone.shared:
            self.withdraw(lone.job.priority)
        else:
            self._finished(lone)

    def _lone_overdue(self, lone: LoneImage) -> None:
        """It has taken long: the engine does not answer, unless it was the decoding."""
        left_s = (lone.begun or monotonic()) + self._engine_timeout_s - monotonic()
        if left_s > 0:
            lone.timer = self._loop.call_later(left_s, self._lone_overdue, lone)
        else:
            lone.given_up = True
            self._lone_failed(lone, TimeoutError())

    def _failed(self, batch: list[Job], error: Exception) -> tuple[list[Job], ...]:
        """Tell whom it concerns that a batch failed; what is worth another try: of more than one image the halves."""
        if isinstance(error, TimeoutError):
            self._die("hung", f"the engine did not answer within {self._engine_timeout_s:g} s", batch)
            return ()
        if isinstance(error, EngineDead):
            self._die("dead", f"the engine is gone ({error})", batch)
            return ()
        self._observer.batch_failed("out-of-memory" if isinstance(error, EngineOutOfMemory) else "error")
        if len(batch) > 1:
            log.warning("a batch of %d failed and is halved: %s", len(batch), error)
            return batch[: len(batch) // 2], batch[len(batch) // 2 :]
        unexpected = not isinstance(error, EngineError)
        log.error("the engine failed on an image: %s", error, exc_info=error if unexpected else None)
        batch[0].fail(EngineFailedError("the engine failed on this image; other images are not affected"))
        return ()

    @staticmethod
    def _check(predictions: Predictions, count: int) -> None:
        rows = {len(array) for array in predictions}
        if rows != {count}:
            raise EngineError(f"the engine answered {sorted(rows)} rows for {count} images")
        if not np.isfinite(predictions.probabilities_BT).all():
            raise EngineError("the engine's answer is not a number")

    def _deliver(self, batch: list[Job], predictions: Predictions, started: float) -> None:
        now = monotonic()
        self.last_success = now
        self.times.observe(len(batch), now - started)
        self._observer.batch_done(len(batch), now - started)
        for row, job in enumerate(batch):
            job.image = None
            if not job.wanted:
                continue
            job.answer.set_result(
                Answer(
                    probabilities_T=predictions.probabilities_BT[row],
                    classes_T=predictions.classes_BT[row],
                    scores_C=predictions.scores_BC[row],
                    queue_s=job.ready_at - job.queued_at,
                    batch_s=started - job.ready_at,
                    infer_s=now - started,
                    batch_size=len(batch),
                )
            )

    def _die(self, kind: str, because: str, batch: list[Job]) -> None:
        """Fail everything that waits, refuse what comes, and say so once."""
        self._observer.batch_failed(kind)
        first, self.dead_because = not self.dead_because, f"{because}; it is being rebuilt"
        for job in [*batch, *self._queue.pop(len(self._queue))]:
            job.fail(NotReadyError(self.dead_because, retry_after_s=5))
        if first:
            self._on_dead(because)

    def _finished(self, computed: asyncio.Task[None] | LoneImage) -> None:
        if self._lone is computed:
            self._lone = None
        _, self._answered = self._computing.pop(computed)
        self._free_since, self._come = monotonic(), 0
        self._wake()

    async def _until(self, condition: Callable[[], bool], *, deadline: float | None = None) -> None:
        """Wait until the condition holds or the deadline passes; looked at whenever something changes."""
        if condition() or (deadline is not None and deadline <= monotonic()):
            return
        wakeup = self._loop.create_future()
        timer = None if deadline is None else self._loop.call_later(deadline - monotonic(), self._set, wakeup)
        waiter = (condition, wakeup)
        self._waiters.append(waiter)
        try:
            await wakeup
        finally:
            self._waiters.remove(waiter)
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        for condition, wakeup in self._waiters:
            if condition():
                self._set(wakeup)

    @staticmethod
    def _set(wakeup: asyncio.Future[None]) -> None:
        if not wakeup.done():
            wakeup.set_result(None)
