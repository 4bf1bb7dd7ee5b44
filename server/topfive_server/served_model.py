"""One model version in service: its engine, its batcher, its supervision, and whether it is truly ready.

Ready means that an image has gone through the whole path (decode pool, batcher, engine) lately: a real one, or,
when nobody asks, the golden image, whose answer must not have changed since the engine was warmed up.
"""

import asyncio
import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from topfive.allocator import give_back_free_memory
from topfive_server.batcher import Batcher
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool, Outcome, Pixels
from topfive_server.engine import Engine, EngineError, EngineInfo, EngineOutOfMemory
from topfive_server.engine_life import EngineFactory, close_engine, open_engine
from topfive_server.errors import RequestError
from topfive_server.job import Answer, Job, Priority
from topfive_server.load_shedding import ClosedLoops, WaitLimit
from topfive_server.metrics import ModelObserver
from topfive_server.session import one_line
from topfive_server.tally import Tally

log = logging.getLogger(__name__)

FRESH_S: Final = 2.0
"""Seconds for which a batch's success proves readiness; after that a probe sends the golden image."""
GOLDEN_TOLERANCE: Final = 1e-3
"""Largest difference of a probability at which the golden image's answer counts as unchanged."""
_GOLDEN_DECODE_S: Final = 5.0
"""Seconds that the golden image may wait for a decode thread."""
_REBUILD_PAUSES_S: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each attempt to rebuild an engine; the last one repeats."""
_WARM_UP_BATCHES: Final = 10
"""A warm-up hangs that takes as many times `engine_timeout_s`: first times are slow, in more than one lane."""


def golden_image() -> bytes:
    """A drawn JPEG, small enough for any limit: smooth colour and sharp edges, the same in every process."""
    y, x = np.mgrid[0:120, 0:160]
    rgb = np.stack([x * 255 / 159, y * 255 / 119, 127 + 127 * np.sin(x / 7) * np.cos(y / 9)], axis=-1)
    rgb[(x - 80) ** 2 + (y - 60) ** 2 < 30**2] = (250, 200, 30)
    file = io.BytesIO()
    Image.fromarray(rgb.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclass(kw_only=True)
class Health:
    """What `/readyz` says of one model version."""

    ready: bool = False
    reason: str = "the engine has not been warmed up yet"
    golden: Answer | None = field(default=None, repr=False)
    """The golden image's first answer."""


class ServedModel:
    """Decodes, batches and infers for one version; rebuilds its engine when that has died."""

    def __init__(
        self,
        build: EngineFactory,
        *,
        input_side: int,
        config: ServerConfig,
        pool: DecodePool,
        observer: Callable[[EngineInfo], ModelObserver],
    ) -> None:
        """Nothing runs until `start`.

        Args:
            build: makes an engine, cold; called again when the engine has died.
            input_side: side of the square that the graph takes, in pixels.
            config: the server's.
            pool: the server's.
            observer: makes the metrics' view of the model.
        """
        self.health = Health()
        self.info: EngineInfo
        self.observer: ModelObserver
        self.batcher: Batcher
        self._engine: Engine
        self._build = build
        self._input_side = input_side
        self._config = config
        self._pool = pool
        self._make_observer = observer
        self._loop = asyncio.get_running_loop()
        self._golden = golden_image()
        self._probe: asyncio.Task[bool] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._loops = ClosedLoops()
        self._wait_limit = WaitLimit(
            max_wait_s=config.max_wait_ms / 1000, overload_wait_s=config.overload_wait_ms / 1000
        )

    @property
    def input_side(self) -> int:
        """Side of the square that the graph takes, in pixels."""
        return self._input_side

    @property
    def tally(self) -> Tally:
        """How its engine has fared since it was last built."""
        return self.batcher.tally

    async def start(self) -> None:
        """Build the engine, warm it up and send the golden image through the whole path.

        Raises:
            EngineError, RequestError: it does not work; the message says why.
        """
        engine = await open_engine(
            self._build, warm_up_timeout_s=_WARM_UP_BATCHES * self._config.engine_timeout_s
        )
        self._engine = engine
        self.info = engine.info
        self.observer = self._make_observer(engine.info)
        self.batcher = Batcher(
            engine,
            observer=self.observer,
            on_dead=self._engine_died,
            decode_s=lambda: self._pool.seconds_per_image,
            max_delay_s=self._config.max_delay_ms / 1000,
            engine_timeout_s=self._config.engine_timeout_s,
        )
        try:
            self.batcher.times.calibrate(await self._time_batches())
            await self._send_golden()
        except BaseException:
            await self._release(patience_s=0)
            raise
        self.health.ready, self.health.reason = True, ""

    def classify(
        self, data: bytes | memoryview, *, deadline: float, priority: Priority, alone: bool = False
    ) -> Job:
        """Start decoding an image; `job.answer` will hold its predictions or a `RequestError`.

        `alone`: `batcher.is_alone`, and no other image comes with it.
        """
        job = Job(deadline=deadline, priority=priority, loop=self._loop)
        batcher = self.batcher
        batcher.expect(priority)
        started = monotonic()

        def decoded(job: Job, outcome: Outcome) -> None:
            job.decode_s = monotonic() - started
            if isinstance(outcome, Pixels) and job.wanted:
                job.image, job.width, job.height = outcome
                batcher.submit(job)
                return
            batcher.withdraw(priority)
            if isinstance(outcome, RequestError):
                job.fail(outcome)
            else:
                self.observer.dropped("decode" if outcome is None else "engine", job.unwanted_because)

        what = data, self.info.spec.preprocessing, self.input_side, job
        if alone:
            batcher.compute_lone(job, partial(self._pool.decode_here, *what), decoded)
        else:
            self._pool.decode(*what, decoded)
        return job

    def refuse_a_long_wait(self, priority: Priority, since_answer_s: float | None = None) -> None:
        """Refuse a request that would wait too long; scoring (`batch`) waits as long as the queue is.

        Args:
            priority: of the request.
            since_answer_s: since its connection got an answer that `remember_answer` told it to remember.

        Raises:
            QueueFullError: it would.
        """
        loops = self._loops.asked(since_answer_s)
        if priority == "interactive":
            batcher = self.batcher
            self._wait_limit.check(
                batcher.forecast.seconds_of_wait(priority),
                batcher.forecast.images_before(priority),
                full_batch_s=batcher.forecast.full_batch_s,
                max_batch=batcher.max_batch,
                loops=loops,
            )

    def remember_answer(self, priority: Priority, answers: Iterable[Answer | RequestError]) -> bool:
        """Whether the connection is to remember when it was answered, for `refuse_a_long_wait`.

        Args:
            priority: of the request that is answered; scoring asks in a loop, whatever people do.
            answers: to its images.
        """
        large = any(isinstance(one, Answer) and one.batch_size >= ClosedLoops.LEAST_BATCH for one in answers)
        remember = large and priority == "interactive"
        if remember:
            self._loops.answered()
        return remember

    async def ready(self) -> bool:
        """Whether an image gets through now; sends the golden image unless a batch has just succeeded."""
        if not self.health.ready:
            return False
        if monotonic() - self.batcher.last_success < FRESH_S:
            return True
        if self._probe is None or self._probe.done():
            self._probe = self._loop.create_task(self._probe_golden())
        return await asyncio.shield(self._probe)

    async def close(self, *, patience_s: float | None = None) -> None:
        """Answer what has been accepted, then release the device. Takes bounded time, whatever hangs.

        `patience_s`: after so many seconds what still waits is refused; by default after as many as a request may take.
        """
        self.health.ready, self.health.reason = False, "the model is being taken out of service"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        await self._release(patience_s=self._config.request_timeout_s if patience_s is None else patience_s)
        # Else every version that is replaced leaves holes, up to hundreds of megabytes (docs/lab-notes.md).
        await asyncio.to_thread(give_back_free_memory)

    async def _release(self, *, patience_s: float) -> None:
        try:
            await self.batcher.close(patience_s)
        finally:
            await close_engine(self._engine)

    async def _probe_golden(self) -> bool:
        try:
            await self._send_golden()
        except (RequestError, EngineError) as error:
            log.error("the golden image did not come through: %s", error)  # noqa: TRY400  a state, not a fault of the code
            return False
        return True

    async def _send_golden(self) -> None:
        """Send the golden image through the whole path.

        Raises:
            RequestError: it was refused, or failed.
            EngineError: it was not answered in time, or otherwise than at first.
        """
        timeout_s = self._config.engine_timeout_s + _GOLDEN_DECODE_S
        job = self.classify(self._golden, deadline=monotonic() + timeout_s, priority="interactive")
        try:
            answer = await asyncio.wait_for(job.answer, timeout_s)
        except TimeoutError:
            raise EngineError(f"the golden image was not answered within {timeout_s:g} s") from None
        first = self.health.golden
        if first is None:
            self.health.golden = answer
        elif not np.allclose(first.scores_C, answer.scores_C, rtol=0, atol=GOLDEN_TOLERANCE):
            difference = float(np.abs(first.scores_C - answer.scores_C).max())
            raise EngineError(
                f"the golden image's probabilities have moved by {difference:.3g}; at most {GOLDEN_TOLERANCE} is rounding"
            )

    async def _time_batches(self) -> list[tuple[int, float]]:
        """Seconds of a lone image and of a full batch (or the largest that fits), the better of two runs each."""
        image = np.zeros((self.input_side, self.input_side, 3), np.uint8)
        measured = [(1, await self._time_batch([image]))]
        size = self.info.max_batch
        while size > 1:
            try:
                return [*measured, (size, await self._time_batch([image] * size))]
            except EngineOutOfMemory as error:
                log.warning("a batch of %d does not fit; larger ones will be halved: %s", size, error)
                size //= 2
        return measured

    async def _time_batch(self, images: list[NDArray[np.uint8]]) -> float:
        limit_s = self._config.engine_timeout_s
        best = float("inf")
        for _ in range(2):
            started = monotonic()
            try:
                async with asyncio.timeout(limit_s):
                    await self._engine.predict(images)
            except TimeoutError:
                raise EngineError(
                    f"a batch of {len(images)} did not come back within {limit_s:g} s (engine_timeout_s)"
                ) from None
            best = min(best, monotonic() - started)
        return best

    def _engine_died(self, reason: str) -> None:
        served, self.health.ready, self.health.reason = self.health.ready, False, reason
        log.error("model %s version %s: %s", self.info.name, self.info.version, reason)
        if served:  # else whoever starts it, or closes it, has the last word
            self._supervisor = self._loop.create_task(self._rebuild())

    async def _rebuild(self) -> None:
        """Replace a dead engine, trying until it works."""
        await self._release(patience_s=0)
        for attempt in range(1_000_000):
            await asyncio.sleep(_REBUILD_PAUSES_S[min(attempt, len(_REBUILD_PAUSES_S) - 1)])
            try:
                await self.start()
            except Exception as error:  # noqa: BLE001  whatever it is, the next attempt may succeed
                self.health.reason = f"rebuilding the engine failed: {one_line(error)}"
                self.observer.rebuilt("failed")
                log.error("model %s: %s", self.info.name, self.health.reason)  # noqa: TRY400
            else:
                self.observer.rebuilt("ok")
                log.warning("model %s version %s: the engine was rebuilt", self.info.name, self.info.version)
                return


async def close_all(models: Iterable[ServedModel]) -> None:
    """Close models at the end of the process, all at once: nobody waits for an answer any more."""
    await asyncio.gather(*(model.close(patience_s=0) for model in models))
