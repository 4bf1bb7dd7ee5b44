"""How long will a batch take? Fitted to the batches that went before; admission and Retry-After rest on it."""

import math


class BatchTimes:
    """Least-squares fit of `seconds = fixed + per_image * images`, in which older batches count for less."""

    _FORGET = 0.97
    """Weight of the past at each new batch: about the last 30 batches decide."""

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def observe(self, images: int, seconds: float) -> None:
        """Take a measured batch into account."""
        keep = self._FORGET
        self._weight = self._weight * keep + 1
        self._n = self._n * keep + images
        self._t = self._t * keep + seconds
        self._nn = self._nn * keep + images * images
        self._nt = self._nt * keep + images * seconds

    @property
    def known(self) -> bool:
        """Whether any batch has been measured."""
        return self._weight > 0

    def predict(self, images: int) -> float:
        """Seconds that a batch of this many images takes; 0 while nothing is known."""
        if not self.known:
            return 0.0
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n**2
        covariance = self._nt / self._weight - mean_n * mean_t
        # Batches of nearly one size say nothing of the slope; then the time is taken as proportional above the mean.
        slope = covariance / variance if variance > 0.25 else mean_t / mean_n
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return max(mean_t + slope * (images - mean_n), 0.0)

    def predict_queue(self, images: int, max_batch: int) -> float:
        """Seconds that this many images take, in full batches and a rest."""
        full, rest = divmod(images, max_batch)
        return full * self.predict(max_batch) + (self.predict(rest) if rest else 0.0)


class Average:
    """Exponentially weighted mean of a duration."""

    def __init__(self, weight: float = 0.05) -> None:
        self._new = weight
        self.value = math.nan

    def observe(self, seconds: float) -> None:
        """Take a measurement into account."""
        old = self.value
        self.value = seconds if math.isnan(old) else old + self._new * (seconds - old)

    def or_zero(self) -> float:
        """The mean, or 0 while nothing is known."""
        return 0.0 if math.isnan(self.value) else self.value
