"""How long will a batch take? Admission, Retry-After and the patience of the batcher rest on it."""

import math
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from topfive_server.job import Priority, Queue


class BatchTimes:
    """`speed * (fixed + per_image * images)` seconds: the shape is measured at the start, the speed all the time.

    The shape belongs to the model and the device. The speed follows what else the machine is doing; it could not be
    told from the shape if both were fitted to a load that always makes batches of one size.
    """

    _NEW = 0.1
    """Weight of the latest batch: about the last twenty decide."""

    def __init__(self) -> None:
        self._fixed, self._per_image = 0.0, 1.0
        self._speed = 0.0

    def calibrate(self, measured: Sequence[tuple[int, float]]) -> None:
        """Take the shape and the speed from (images, seconds) of a small batch and a large one, or of one batch."""
        (few, short_s), (many, long_s) = measured[0], measured[-1]
        per_image = (long_s - short_s) / (many - few) if many > few else short_s / few
        per_image = min(max(per_image, 0.0), long_s / many)  # neither cost is negative, whatever the noise
        self._fixed, self._per_image, self._speed = long_s - per_image * many, per_image, 1.0

    def observe(self, images: int, seconds: float) -> None:
        """Take a measured batch into account."""
        speed = seconds / (self._fixed + self._per_image * images)
        self._speed += self._NEW * (speed - self._speed) if self._speed else speed

    def predict(self, images: int) -> float:
        """Seconds that a batch of this many images takes; 0 while nothing is known."""
        return self._speed * (self._fixed + self._per_image * images)

    @property
    def fixed(self) -> float:
        """Seconds that a batch costs whatever its size: what is saved when two become one."""
        return self._speed * self._fixed

    def predict_queue(self, images: int, max_batch: int) -> float:
        """Seconds that this many images take, in full batches and a rest."""
        full, rest = divmod(images, max_batch)
        return full * self.predict(max_batch) + (self.predict(rest) if rest else 0.0)


class Forecast:
    """How long images wait for an engine: what was measured, times what is before them. It looks, and changes nothing."""

    def __init__(
        self,
        times: BatchTimes,
        *,
        queue: Queue,
        expected: Mapping[Priority, int],
        computing: Mapping[Any, tuple[float, int]],
        max_batch: int,
        parallel: int,
        decode_s: Callable[[], float],
    ) -> None:
        """What is handed over stays the batcher's.

        Args:
            times: of batches.
            queue: decoded images that wait.
            expected: images that will be queued, by priority.
            computing: batches handed to the engine: when, and how many images.
            max_batch: most images of one.
            parallel: batches that the engine computes at a time.
            decode_s: seconds for which decoding an image keeps the engine from computing.
        """
        self._times = times
        self._queue = queue
        self._expected = expected
        self._computing = computing
        self._max_batch = max_batch
        self._parallel = parallel
        self._decode_s = decode_s

    def seconds_until_answered(self, images: int = 1) -> float:
        """For images that are handed in now: what is before them, then themselves."""
        return self._seconds(len(self._queue), sum(self._expected.values()) + images)

    def seconds_of_wait(self, priority: Priority) -> float:
        """What is before an image that is handed in now: the batches that must end first."""
        return self._seconds(self._queue.before(priority), self._expected_before(priority))

    def images_before(self, priority: Priority) -> int:
        """Images that are answered before one that is handed in now, those that are being computed included."""
        computing = sum(size for _, size in self._computing.values())
        return self._queue.before(priority) + self._expected_before(priority) + computing

    @property
    def full_batch_s(self) -> float:
        """A full batch, with the decoding of its images where nothing computes meanwhile."""
        return self._times.predict(self._max_batch) + self._max_batch * self._decode_s()

    def _expected_before(self, priority: Priority) -> int:
        people = self._expected["interactive"]
        return people if priority == "interactive" else sum(self._expected.values())

    def _seconds(self, decoded: int, undecoded: int) -> float:
        """Until the engine has computed what it has, and so many images more."""
        now = monotonic()
        running = sum(
            max(self._times.predict(size) - (now - since), 0) for since, size in self._computing.values()
        )
        more = self._times.predict_queue(decoded + undecoded, self._max_batch)
        return (running + more) / self._parallel + undecoded * self._decode_s()


class Average:
    """Exponentially weighted mean of a duration."""

    def __init__(self, weight: float = 0.05) -> None:
        self._new = weight
        self._value: float | None = None

    def observe(self, seconds: float) -> None:
        """Take a measurement into account."""
        old = seconds if self._value is None else self._value
        self._value = old + self._new * (seconds - old)

    def or_zero(self) -> float:
        """The mean, or 0 while nothing is known."""
        return self._value or 0.0


class Lateness:
    """How much longer than predicted an answer may take: a factor that nearly all answers keep, learned from them.

    A quantile, because half of all answers take longer than their mean, and a deadline would be promised to them in
    vain. It moves by small steps, up after an answer that took longer and down after one that did not, so that it
    stands still where 2 % take longer. With no answer to learn from it returns to 1: who refuses everything tries again.
    """

    _KEPT: Final = 0.98
    _STEP: Final = 0.02
    _FORGET_S: Final = 10.0
    _HIGHEST: Final = 4.0

    def __init__(self) -> None:
        self._factor = 1.0
        self._learned_at = monotonic()

    @property
    def factor(self) -> float:
        """By how much a prediction is to be multiplied, now."""
        age_s = monotonic() - self._learned_at
        return 1.0 + (self._factor - 1.0) * math.exp(-age_s / self._FORGET_S)

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Compare a prediction with what came of it; a lost deadline counts with the time until then."""
        factor = self.factor
        late = actual_s > factor * max(predicted_s, 0.001)
        factor *= 1 + self._STEP * self._KEPT if late else 1 - self._STEP * (1 - self._KEPT)
        self._factor = min(max(factor, 1.0), self._HIGHEST)
        self._learned_at = monotonic()
