"""glibc's allocator, told to keep large buffers.

Left alone, it takes large buffers from the kernel and gives them back as soon as they are free, page by page: whoever
decodes photographs or trains on a processor then pays a page fault for every 4 KiB of every image and every
activation. Kept, they are reused (docs/lab-notes.md has what that is worth).
"""

import ctypes
import os
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_FROM_HEAP: Final = 32 * 2**20
"""Bytes; the highest that glibc accepts (mallopt(3))."""


def keep_large_buffers(at_most: int = 256 * 2**20) -> bool:
    """Serve buffers of up to 32 MiB from the heap, and keep up to `at_most` free bytes at its end.

    For the whole process and from now on. The environment's own settings (`MALLOC_MMAP_THRESHOLD_`,
    `MALLOC_TRIM_THRESHOLD_`) go first; where the C library is not glibc, nothing happens.

    Args:
        at_most: bytes, below 2 GiB.

    Returns:
        Whether it was done here.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has none; Windows has no such library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP) and mallopt(_M_TRIM_THRESHOLD, at_most))


def give_back_free_memory() -> None:
    """Give to the kernel what is free in every thread's heap: for when something large is gone for good.

    Takes up to a tenth of a second after a model of 244 MB. Where the C library is not glibc, nothing happens.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # as above
        return
    malloc_trim(0)
