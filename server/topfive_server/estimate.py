"""How long will a batch take? Admission, Retry-After and the patience of the batcher rest on it."""

from collections.abc import Sequence


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


class Bias:
    """How much longer answers take than was predicted: what the model of batches leaves out, learned from answers."""

    _NEW = 0.05
    _RELAX = 0.01

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Compare a prediction with what came of it; a lost deadline counts with the time until then."""
        ratio = min(max(actual_s / max(predicted_s, 0.001), 0.5), 10.0)
        self.factor += self._NEW * (ratio - self.factor)

    def relax(self) -> None:
        """Forget a little with every refusal, so that a server that refuses everything tries again."""
        self.factor += self._RELAX * (1.0 - self.factor)
