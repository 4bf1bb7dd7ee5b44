"""A model on a processor: how its cores share the work for a batch.

Threads that share an operator wait for each other at every layer, and whatever interrupts one of them keeps them all. So
of a large enough batch each core computes pieces of its own through all convolutional layers: an image at a time in fp32,
whose numbers stay in the core's caches from one layer to the next. The dense layers take all images at once, on all cores,
since reading their weights takes longer than using them (`cut`). In ratio to all cores sharing every layer, on two of them:
0.93 to 0.97 of the time for batches of 16 and 32, and 1.05 to 1.09 times as many images a second while photographs are
decoded as well (`benchmarks/engine.py`).

Shapes: B images of the batch, H and W pixels.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from topfive_server.devices import Device, cores
from topfive_server.engine import EngineError, Predictions
from topfive_server.lanes import INPUT, OUTPUTS, Network
from topfive_server.repository import ModelVersion
from topfive_server.session import RuntimeOptions, one_line, open_session

if TYPE_CHECKING:
    from topfive_server.cut import Halves

log = logging.getLogger(__name__)

_LEAST: Final = 2
"""Images for each thread, from which on a batch is dealt out."""
_PIECE_BYTES: Final = 4
"""Most images of a piece, times the bytes of a number: four in int8, one in fp32."""
_MOST_IDLE: Final = 0.06
"""Share of the threads' time that may be lost where the images cannot be dealt out evenly: what pieces gain."""


def open_network(model: ModelVersion, device: Device, options: RuntimeOptions) -> Network:
    """Open a model on a processor; in two halves if it can be cut, and batches are large enough for its threads.

    Raises:
        DeviceError, EngineError: as `open_session`.
    """
    threads = options.threads or cores()
    if 1 < threads <= options.batch_limit(device) // _LEAST:
        # It imports `onnx`: 0.1 s and 12 MiB that a GPU, and a process of one thread, do without.
        from topfive_server.cut import cut  # noqa: PLC0415

        try:
            return TwoHalves(model, device, replace(options, threads=threads), cut(model.path, OUTPUTS))
        except Exception as error:  # noqa: BLE001  where the file is at fault, opening it says so better
            log.warning("%s/%s is computed as a whole: %s", model.name, model.version, one_line(error))
    return Whole(open_session(model, device, options))


class Whole:
    """All threads share every layer."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> Predictions:
        """Compute a batch."""
        return Predictions(*self._session.run(OUTPUTS, {INPUT: images_BHWC}))


class TwoHalves:
    """The convolutional layers in pieces of the batch, a thread for each; the dense layers as `Whole`."""

    def __init__(
        self, model: ModelVersion, device: Device, options: RuntimeOptions, halves: "Halves"
    ) -> None:
        """Open both halves.

        Raises:
            EngineError: pieces do not give what the batch gives as a whole; or as `open_session`.
            DeviceError: as `open_session`.
        """
        self._threads = options.threads
        self._most = max(_PIECE_BYTES // halves.item_bytes, 1)
        self._tensor = halves.tensor
        self._together = open_session(model, device, options, graph=halves.convolutional)
        self._alone = open_session(model, device, replace(options, threads=1), graph=halves.convolutional)
        self._dense = open_session(model, device, options, graph=halves.dense)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix=f"pieces-{model.name}")
        self._check_pieces()

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> Predictions:
        """Compute a batch; `Predictions` of its images in their order."""
        return Predictions(*self._dense.run(OUTPUTS, {self._tensor: self._convolve(images_BHWC)}))

    def _convolve(self, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        pieces = split(images_BHWC, threads=self._threads, most=self._most)
        if len(pieces) == 1:
            return self._run(self._together, images_BHWC)
        computing = [self._pool.submit(self._run, self._alone, piece) for piece in pieces]
        wait(computing)  # whatever becomes of one: the others read the lane's buffer
        return np.concatenate([piece.result() for piece in computing])

    def _run(self, session: onnxruntime.InferenceSession, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        rows: NDArray[Any] = session.run([self._tensor], {INPUT: images_BHWC})[0]
        return rows

    def _check_pieces(self) -> None:
        """Compare pieces with a whole batch: a graph may mix its images, or put the rows of one apart."""
        _, height, width, _ = self._together.get_inputs()[0].shape
        random = np.random.default_rng(0)
        # No two of them alike, even on average.
        highest = random.integers(8, 256, (_LEAST * self._threads, 1, 1, 1))
        images = random.integers(0, highest, (_LEAST * self._threads, height, width, 3), np.uint8)
        whole, pieces = self._run(self._together, images), self._convolve(images)
        rounding = 1 if whole.dtype.kind in "iu" else 1e-3 * np.abs(whole).max()
        if whole.shape != pieces.shape or not np.allclose(whole, pieces, rtol=0, atol=rounding):
            raise EngineError("its images are not computed independently of each other")


def split(images_BHWC: NDArray[np.uint8], *, threads: int, most: int) -> Sequence[NDArray[np.uint8]]:
    """The pieces of a batch in order: as many for each thread, the larger ones first, of `most` images at most.

    The batch itself where it is too small, or where threads would have nothing to do for too long at the end.
    """
    count = len(images_BHWC)
    busiest = -(-count // threads)
    if busiest < _LEAST or 1 - count / (threads * busiest) > _MOST_IDLE:
        return [images_BHWC]
    number = min(threads * -(-busiest // most), count)
    return np.array_split(images_BHWC, number)
