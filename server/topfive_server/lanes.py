"""Lanes: the buffers that a batch travels through, allocated once, and the call that computes it.

Shapes: B images of the batch, H and W pixels (both `side`), T top classes, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from topfive_server.buckets import bucket_for
from topfive_server.engine import Predictions
from topfive_server.pinned import PageLocked

INPUT: Final = "image"
OUTPUTS: Final = ("probabilities", "classes", "scores")

Images: TypeAlias = Sequence[NDArray[np.uint8]]
Network: TypeAlias = Callable[[NDArray[np.uint8]], Predictions]
"""Computes images [B, H, W, 3]."""


class Lane(Protocol):
    """The buffers of one thread, and how a batch in them is computed."""

    def fill(self, images: Images) -> None:
        """Copy the images to where the device reads them."""

    def captures(self, count: int) -> bool:
        """Whether computing so many images will capture a graph, as the first batch of each size does."""

    def compute(self) -> None:
        """Compute the images filled in last; one lane of a device at a time."""

    def read(self) -> Predictions:
        """Their predictions, from the lane's own buffers: beside another lane's arithmetic."""

    def release(self) -> None:
        """Give the buffers back."""


class HostLane:
    """A lane in main memory: any batch size up to the limit, computed in place."""

    def __init__(self, network: Network, *, max_batch: int, side: int) -> None:
        self._network = network
        self._images_BHWC = np.zeros((max_batch, side, side, 3), np.uint8)
        self._count = 0
        self._computed: Predictions

    def fill(self, images: Images) -> None:
        """Copy the images into the lane's buffer."""
        np.stack(images, out=self._images_BHWC[: len(images)])
        self._count = len(images)

    def captures(self, count: int) -> bool:  # noqa: ARG002  as every lane
        """Never: a processor has no graphs."""
        return False

    def compute(self) -> None:
        """Compute the images filled in last."""
        self._computed = self._network(self._images_BHWC[: self._count])

    def read(self) -> Predictions:
        """Their predictions."""
        return self._computed

    def release(self) -> None:
        """Nothing beyond what Python frees by itself."""


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """Buffers of one bucket on the device, at addresses that never change, as a captured graph needs."""

    binding: Any
    run_options: Any
    image: Any
    outputs: list[Any]


class DeviceLane:
    """A lane with buffers on the device: a batch is padded up to a bucket, and each bucket has its own CUDA graph.

    The rows of the padding keep whatever images were there before: rows do not influence each other.

    `memory` is where the buffers live, as ONNX Runtime names it: `cuda`, or `cpu` to run all of this without a GPU.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        buckets: tuple[int, ...],
        side: int,
        memory: str,
        index: int,
        first_graph: int,
    ) -> None:
        self._session = session
        self._buckets = buckets
        self._count = 0
        widths = {output.name: int(output.shape[1]) for output in session.get_outputs()}
        types = {"probabilities": np.float32, "classes": np.int64, "scores": np.float32}
        self._bound: dict[int, _Bound] = {}
        self._captured: set[int] = set()
        """Buckets that have been computed once."""
        for number, bucket in enumerate(buckets):
            binding = session.io_binding()
            image = _device_array((bucket, side, side, 3), np.uint8, memory, index)
            binding.bind_ortvalue_input(INPUT, image)
            outputs = [_device_array((bucket, widths[name]), types[name], memory, index) for name in OUTPUTS]
            for name, output in zip(OUTPUTS, outputs, strict=True):
                binding.bind_ortvalue_output(name, output)
            run_options = onnxruntime.RunOptions()
            run_options.add_run_config_entry("gpu_graph_id", str(first_graph + number))
            self._bound[bucket] = _Bound(
                binding=binding, run_options=run_options, image=image, outputs=outputs
            )
        # Last: the arrays above have made the device's context current in this thread.
        self._host = PageLocked((buckets[-1], side, side, 3), enabled=memory == "cuda")

    def fill(self, images: Images) -> None:
        """Copy the images into page-locked memory, and from there to the device."""
        np.stack(images, out=self._host.array[: len(images)])
        self._count = len(images)
        bucket = bucket_for(self._count, self._buckets)
        self._bound[bucket].image.update_inplace(self._host.array[:bucket])

    def captures(self, count: int) -> bool:
        """True for the first batch of each bucket."""
        return bucket_for(count, self._buckets) not in self._captured

    def compute(self) -> None:
        """Compute the images filled in last. The call ends when the device has: its stream is waited for."""
        bucket = bucket_for(self._count, self._buckets)
        bound = self._bound[bucket]
        self._session.run_with_iobinding(bound.binding, bound.run_options)
        self._captured.add(bucket)

    def read(self) -> Predictions:
        """Their predictions; the padding's are dropped."""
        bound = self._bound[bucket_for(self._count, self._buckets)]
        return Predictions(*(output.numpy()[: self._count].copy() for output in bound.outputs))

    def release(self) -> None:
        """Unlock the host memory."""
        self._host.release()


def _device_array(shape: tuple[int, ...], dtype: Any, memory: str, index: int) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, memory, index)
