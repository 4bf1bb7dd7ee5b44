"""The seam between the server and whatever computes: a list of equal-sized images in, predictions in order out.

Shapes: B images of a batch, H and W pixels (both `crop`), T top classes (at most 5), C classes.

Implementations: `onnx_engine.OnnxEngine` (in process, one per device), `triton_engine.TritonEngine` (a fleet).
An engine computes `info.parallel` batches at a time: the batcher calls `predict` beyond that only to prefetch, and an
engine that is given more queues them. It holds no policy: queueing, deadlines, bisecting a failed batch and
rebuilding a dead engine are its caller's.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from topfive.errors import TopfiveError
from topfive.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine serves, and where it runs; constant over the engine's life."""

    name: str
    """Name of the model, as in `?model=`."""
    version: str
    """Version of the model: the name of its folder, a positive integer in decimal."""
    spec: ModelSpec
    """The model's own description: classes, labels, preprocessing."""
    provider: str
    """What computes, e.g. `CPUExecutionProvider`, `CUDAExecutionProvider`, `triton`."""
    device: str
    """Where, e.g. `cpu`, `cuda:0`, `host:8001`."""
    max_batch: int
    """Most images that one call of `predict` may hold."""
    buckets: tuple[int, ...]
    """Batch sizes the device really runs, ascending (a batch is padded up to the next); empty: any size."""
    fingerprint: str
    """`ModelVersion.fingerprint`: SHA-256 of the model's files and its preprocessing."""
    graph: str = ""
    """Folder of the graph that computes, e.g. `alexnet_int8`."""
    precision: str = "fp32"
    """`fp32`, `fp16` or `int8`."""
    verified: bool = False
    """Whether the export's report vouches for this very file."""
    parallel: int = 1
    """Batches that it computes at the same time: 1 for one device, more for a fleet."""
    takes_turns: bool = False
    """Whether it computes on all the cores that decode, which wait meanwhile."""


class Predictions(NamedTuple):
    """Answers for one batch, row i for image i. The arrays belong to the caller; no engine writes to them again."""

    probabilities_BT: NDArray[np.float32]
    """Softmax probabilities of the T most likely classes, descending."""
    classes_BT: NDArray[np.int64]
    """Their class indices: `spec.labels[i]` names them."""
    scores_BC: NDArray[np.float32]
    """Softmax probabilities of all classes, in class order."""

    def check(self, count: int) -> None:
        """Believe no engine that answers another number of images than it was given, or with what is no number.

        Raises:
            EngineError: it does.
        """
        rows = {len(array) for array in self}
        if rows != {count}:
            raise EngineError(f"the engine answered {sorted(rows)} rows for {count} images")
        if not np.isfinite(self.probabilities_BT).all():
            raise EngineError("the engine's answer is not a number")


Decode: TypeAlias = Callable[[], NDArray[np.uint8] | None]
"""Makes an image, as `Engine.predict` takes it; None when there is none to compute."""


class EngineError(TopfiveError):
    """The engine failed on this batch; another batch may succeed. The message is a sentence for the log."""


class EngineOutOfMemory(EngineError):  # noqa: N818  named for what happened, as MemoryError is
    """The device has no memory for this batch; half of it may fit."""


class EngineDead(EngineError):  # noqa: N818
    """Nothing will succeed again (a CUDA error that sticks, a closed session): build a new engine."""


class Engine(Protocol):
    """Computes predictions for batches of images."""

    @property
    def info(self) -> EngineInfo:
        """What is served, and where; constant."""
        ...

    async def predict(self, images: Sequence[NDArray[np.uint8]]) -> Predictions:
        """Classify 1 to `info.max_batch` images, each uint8 RGB [crop, crop, 3]; row i answers image i.

        Cancelling the call abandons the answer; the device may finish the batch all the same.

        Raises:
            EngineError: this batch failed; `EngineOutOfMemory` and `EngineDead` say what the caller can do.
            ValueError: no image, too many, or one of another shape or type: a mistake of the caller.
        """
        ...

    async def warm_up(self) -> None:
        """Run every batch size once, so that no request pays for a first time.

        Raises:
            EngineError: the device cannot run the model.
        """
        ...

    async def close(self) -> None:
        """Finish what is running and release the device; idempotent. `predict` raises `EngineDead` afterwards."""
        ...


@runtime_checkable
class DecodingEngine(Engine, Protocol):
    """An engine whose own threads may decode what they compute."""

    def predict_lone(self, decode: Decode) -> Future[Predictions | None]:
        """Classify the one image that `decode` makes, in the thread that computes it; None when it makes none.

        `decode` raises nothing. The future raises what `predict` raises.

        Raises:
            EngineDead: the engine was closed, or its device failed earlier.
        """
        ...
