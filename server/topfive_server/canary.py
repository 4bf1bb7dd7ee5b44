"""A share of the requests for a model goes to its newest version: the canary."""

from typing import Final

_GOLDEN_RATIO: Final = 0.6180339887498949


class Canary:
    """Sends `share` of the requests that name no version to `version`, the others to `stable`.

    The n-th request goes by the fractional part of n times the golden ratio, which spreads more evenly than chance:
    after any number of requests the count is within about one of its share.
    """

    def __init__(self, *, version: str, stable: str, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"the canary's share is {share}; it must be between 0 and 1")
        self.version = version
        self.stable = stable
        self.share = share
        self._requests = 0

    def pick(self) -> str:
        """The version for the next request."""
        self._requests += 1
        return self.version if self._requests * _GOLDEN_RATIO % 1 < self.share else self.stable
