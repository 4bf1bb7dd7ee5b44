"""Who may come in: a bound on the images and on the bytes that are in flight in the whole server.

A body's bytes count as they arrive, its images once they are all here, so that a slow sender occupies only
the memory that it really uses, and never an image's place.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from topfive_server.errors import QueueFullError


class Admission:
    """Counts what is in flight; owned by the event loop's thread."""

    def __init__(self, *, max_images: int, max_bytes: int) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.images = 0
        self.bytes = 0

    def check(self, *, expected_bytes: int, retry_after_s: Callable[[], float]) -> None:
        """Refuse at once what could not be admitted anyway, before its body is read.

        Raises:
            QueueFullError: no place for one more image, or for `expected_bytes` more bytes.
        """
        if self.images >= self.max_images:
            raise self._full_of_images(1, retry_after_s())
        if self.bytes + expected_bytes > self.max_bytes:
            raise self._full_of_bytes(retry_after_s())

    def ticket(self, retry_after_s: Callable[[], float]) -> "Ticket":
        """What one request holds; a context manager that gives everything back."""
        return Ticket(self, retry_after_s)

    def _full_of_images(self, images: int, retry_after_s: float) -> QueueFullError:
        return QueueFullError(
            f"{self.images} images are in flight and {images} more would exceed the limit of {self.max_images}",
            retry_after_s=retry_after_s,
        )

    def _full_of_bytes(self, retry_after_s: float) -> QueueFullError:
        return QueueFullError(
            f"{self.bytes:,} bytes of images are in flight; the limit is {self.max_bytes:,}",
            retry_after_s=retry_after_s,
        )


class Ticket:
    """The images and bytes of one request."""

    __slots__ = ("_admission", "_bytes", "_images", "_retry_after_s")

    def __init__(self, admission: Admission, retry_after_s: Callable[[], float]) -> None:
        self._admission = admission
        self._retry_after_s = retry_after_s
        self._images = 0
        self._bytes = 0

    def add_bytes(self, count: int) -> None:
        """Take up memory, or raise `QueueFullError`."""
        admission = self._admission
        if admission.bytes + count > admission.max_bytes:
            raise admission._full_of_bytes(self._retry_after_s())
        admission.bytes += count
        self._bytes += count

    def add_images(self, count: int) -> None:
        """Take up places in the queue, all or none, or raise `QueueFullError`."""
        admission = self._admission
        if admission.images + count > admission.max_images:
            raise admission._full_of_images(count, self._retry_after_s())
        admission.images += count
        self._images += count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.images -= self._images
        self._admission.bytes -= self._bytes
