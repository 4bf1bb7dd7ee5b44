"""Page-locked memory, which a GPU reads by itself at the full speed of the bus.

ONNX Runtime's Python API cannot allocate it, so ordinary memory is registered with the CUDA driver.
"""

import ctypes
import logging
import mmap

import numpy as np

from topfive_server.devices import load_library

log = logging.getLogger(__name__)

_PORTABLE = 1
"""`CU_MEMHOSTREGISTER_PORTABLE`: page-locked for every context."""


class PageLocked:
    """A zeroed uint8 array, page-locked when `enabled` and the driver allows it.

    Without page-locking, copies to the GPU work all the same and are slower; the log says so. The calling thread must
    have the device's context current: allocate something on the device with ONNX Runtime first.
    """

    def __init__(self, shape: tuple[int, ...], *, enabled: bool) -> None:
        size = int(np.prod(shape))
        # Whole pages of its own: locking a page that other objects share would lock them, too.
        self._memory = mmap.mmap(-1, size)
        self.array = np.frombuffer(self._memory, np.uint8, size).reshape(shape)
        self._address = self.array.ctypes.data
        self._registered = False
        if enabled:
            try:
                self._call("cuMemHostRegister_v2", ctypes.c_size_t(size), ctypes.c_uint(_PORTABLE))
                self._registered = True
            except OSError as error:
                log.warning("copies to the GPU are slower: memory could not be page-locked (%s)", error)

    def release(self) -> None:
        """Undo the registration, before the memory is freed; idempotent."""
        if self._registered:
            self._registered = False
            try:
                self._call("cuMemHostUnregister")
            except OSError as error:
                log.warning("page-locked memory could not be released (%s)", error)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(load_library("libcuda.so.1"), function)(ctypes.c_void_p(self._address), *arguments)
        if status != 0:
            raise OSError(f"{function}: CUDA driver error {status}")
