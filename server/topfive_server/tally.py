"""How the engine of a version fares, and whether that of a version on trial fares clearly worse."""

from dataclasses import dataclass
from typing import Final

LEAST_FAILED: Final = 5
"""Images: fewer failures say nothing."""
TIMES_WORSE: Final = 5
"""A trial fails by a share of failures this many times as large as that of the stable version."""
_PRIOR_IMAGES: Final = 100
"""The stable version counts as if it had once failed one in so many images, however few it has been sent."""


@dataclass
class Tally:
    """Images since a version is in service, by how they fared in its engine. Refusals and bad images are in neither."""

    answered: int = 0
    failed: int = 0
    """Answered with 500, `engine-failed`."""

    def __str__(self) -> str:
        return f"{self.failed} of {self.answered + self.failed} images"

    def clearly_worse_than(self, stable: "Tally") -> bool:
        """Whether a version on trial that has this tally is to be taken back."""
        images, stable_images = self.answered + self.failed, stable.answered + stable.failed
        stable_share = (stable.failed + 1) / (stable_images + _PRIOR_IMAGES)
        return self.failed >= LEAST_FAILED and self.failed > TIMES_WORSE * stable_share * images
