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
from typing import Final

from topfive_server.arrival import Arrival
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
from topfive_server.estimate import BatchTimes, Forecast
from topfive_server.job import PRIORITIES, Answer, Job, Observer, Priority, Queue
from topfive_server.load_shedding import ClosedLoops
from topfive_server.lone import LoneImage
from topfive_server.tally import Tally
from topfive_server.wakeups import Wakeups

log = logging.getLogger(__name__)

_LINGER_S: Final = 0.003
"""Most seconds that an engine that has just finished waits for those it has answered to come back."""
_SURELY: Final = 0.8
"""Share of the predicted time that a batch will surely take."""


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
        self.dead_because, self.tally = "", Tally()
        self._engine = engine
        self._observer = observer
        self._on_dead = on_dead
        # Asked once: a protocol with many members takes its time to tell.
        self._decoding_engine = engine if isinstance(engine, DecodingEngine) else None
        # Elsewhere an image is decoded while others are computed.
        self._decode_s = decode_s if engine.info.takes_turns else lambda: 0.0
        self.counts_decoding = engine.info.takes_turns
        """Whether the forecast includes the decoding."""
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
        self.forecast = Forecast(
            self.times,
            queue=self._queue,
            expected=self._expected,
            computing=self._computing,
            max_batch=self.max_batch,
            parallel=self._parallel,
            decode_s=self._decode_s,
        )
        self._wakeups = Wakeups()
        self._task = self._loop.create_task(self._run(), name="batcher")

    # ------------------------------------------------------------------ what the request path calls

    def arriving(self, priority: Priority) -> Arrival:
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
        self._wakeups.look()

    @property
    def expected(self) -> int:
        """Images arriving or being decoded, which will be submitted (or withdrawn) soon."""
        return sum(self._expected.values())

    def is_alone(self, arrival: Arrival) -> bool:
        """Whether the engine has nothing to do but for what has arrived, nobody else is coming, and it can decode."""
        others = self.expected - arrival.counts_for(self)
        idle = not others and not self._queue and not self._computing and not self.dead_because
        # Of several who have just been answered, the first to ask again is followed by the others.
        follow = self._answered > 1 and monotonic() - self._free_since < ClosedLoops.PROMPT_S
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
        lone.watch(self._loop, self._engine_timeout_s, partial(self._lone_failed, lone, TimeoutError()))
        try:
            answer = self._decoding_engine.predict_lone(lone)
        except EngineError as error:
            self._lone_failed(lone, error)
        else:
            # Not a task: what would be run for it is part of what this way saves.
            done = partial(self._lone_done, lone)
            answer.add_done_callback(partial(self._loop.call_soon_threadsafe, done))

    def submit(self, job: Job) -> None:
        """An expected image is decoded; its answer will come to `job.answer`."""
        self._expected[job.priority] -= 1
        job.queued_at = monotonic()
        if self.dead_because:
            job.fail(NotReadyError(self.dead_because, retry_after_s=5))
        else:
            self._queue.push(job)
            self._come += 1
        self._wakeups.look()

    @property
    def depth(self) -> int:
        """Decoded images that wait for the engine."""
        return len(self._queue)

    async def close(self, patience_s: float = 3600.0) -> None:
        """Answer everything that was expected or submitted, then end; the engine stays open.

        After `patience_s` seconds what still waits is refused. Nothing is waited for where the engine is gone.
        """
        if not self.dead_because:
            await self._wakeups.until(
                lambda: not (self._queue or self.expected or self._computing),
                deadline=monotonic() + patience_s,
            )
        self._refuse(self.dead_because or "the model was taken out of service", [])
        self._task.cancel()
        await asyncio.wait([self._task])

    # ------------------------------------------------------------------ the loop

    async def _run(self) -> None:
        """The batching loop, step by step."""
        while True:
            # Something waits, and the engine is idle, or has one batch and a full one follows.
            await self._wakeups.until(self._may_start)
            free_at = monotonic()
            if len(self._computing) < self._parallel:
                await self._wakeups.until(self._joined, deadline=self._free_since + self._linger_s())
                await self._gather()
            batch = self._take(free_at)
            if batch:
                compute = self._loop.create_task(self._compute(batch))
                self._computing[compute] = monotonic(), len(batch)
                compute.add_done_callback(self._finished)
            else:
                self._wakeups.look()  # the queue is empty now, which `close` may be waiting for

    async def _gather(self) -> None:
        """Wait for those on their way, until none is, there is no room, or it is no longer worth it."""
        begin = max(self._queue.oldest(), self._free_since)
        while not self._complete():
            size = len(self._queue)
            deadline = begin + self._window_s(size)
            if deadline <= monotonic():
                return
            await self._wakeups.until(partial(self._grown, size), deadline=deadline)

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
                if self._keep(job):
                    job.ready_at = max(job.queued_at, free_at)
                    batch.append(job)
        return batch

    def _keep(self, job: Job) -> bool:
        """Whether somebody still waits for it; else it is dropped."""
        if job.wanted:
            return True
        job.image = None
        self._observer.dropped("engine", job.unwanted_because)
        return False

    async def _compute(self, batch: list[Job]) -> None:
        """Run a batch; when it fails, halve it until only the guilty images fail."""
        # Between taking a batch and this, or in the other half of one that failed, deadlines pass and clients leave.
        batch = [job for job in batch if self._keep(job)]
        if not batch:
            return
        started = monotonic()
        images = [job.image for job in batch if job.image is not None]
        try:
            async with asyncio.timeout(self._engine_timeout_s):
                predictions = await self._engine.predict(images)
            predictions.check(len(batch))
        except Exception as error:  # noqa: BLE001  whatever an engine raises must not end the loop
            for half in self._failed(batch, error):
                await self._compute(half)
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
                predictions.check(1)
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
        self.tally.failed += 1
        unforeseen = None if isinstance(error, EngineError) else error
        log.error("the engine failed on an image: %s", error, exc_info=unforeseen)
        batch[0].fail(EngineFailedError("the engine failed on this image; other images are not affected"))
        return ()

    def _deliver(self, batch: list[Job], predictions: Predictions, started: float) -> None:
        now = self.last_success = monotonic()
        self.tally.answered += len(batch)
        self.times.observe(len(batch), now - started)
        self._observer.batch_done(len(batch), now - started)
        for row, job in enumerate(batch):
            job.image = None
            if job.wanted:
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
        if not self.dead_because:
            self._on_dead(because)
        self._refuse(f"{because}; it is being rebuilt", batch)

    def _refuse(self, because: str, batch: list[Job]) -> None:
        """Answer a batch, all that waits, and all that comes from now on, with the reason why nothing is computed."""
        self.dead_because = because
        for job in [*batch, *self._queue.pop(len(self._queue))]:
            job.fail(NotReadyError(because, retry_after_s=5))

    def _finished(self, computed: asyncio.Task[None] | LoneImage) -> None:
        if self._lone is computed:
            self._lone = None
        _, self._answered = self._computing.pop(computed)
        self._free_since, self._come = monotonic(), 0
        self._wakeups.look()
