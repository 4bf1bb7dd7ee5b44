"""Images into requests of bounded size."""

from dataclasses import dataclass, field

from topfive._images import ImageSource, Upload, load, name_of
from topfive._results import Failure
from topfive._settings import ClientError
from topfive.errors import TopfiveError


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How `classify_many` cuts its images into requests, and how many of those are under way at once."""

    images: int = 16
    """Images of one request at most."""
    total_bytes: int = 8 * 1024 * 1024
    """Bytes of one request at most; a larger image goes alone."""
    concurrency: int = 4
    """Requests under way at once; as many again may be waiting in memory."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        for name in ("images", "total_bytes", "concurrency"):
            if getattr(self, name) < 1:
                raise ClientError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(kw_only=True)
class Batcher:
    """Collects images until a request is full."""

    limits: BatchLimits
    _items: list[Upload | Failure] = field(default_factory=list)
    _bytes: int = 0

    def add(self, item: Upload | Failure) -> list[Upload | Failure] | None:
        """Take one more; a batch that is full now, if any."""
        size = len(item.data) if isinstance(item, Upload) else 0
        full = self.rest() if self._items and self._bytes + size > self.limits.total_bytes else None
        self._items.append(item)
        self._bytes += size
        if full is None and len(self._items) >= self.limits.images:
            full = self.rest()
        return full

    def rest(self) -> list[Upload | Failure] | None:
        """What has been collected, if anything."""
        items, self._items, self._bytes = self._items, [], 0
        return items or None


def load_or_fail(image: ImageSource) -> Upload | Failure:
    """The image, or why it cannot be sent."""
    try:
        return load(image)
    except (OSError, TopfiveError) as error:
        return Failure(filename=name_of(image), error=error)
