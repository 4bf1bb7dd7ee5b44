"""`OnnxEngine`: ONNX Runtime in this process, on one device.

Two daemon threads take batches from one queue. Each owns a *lane*: buffers of its own, allocated once. A thread fills
its lane (and uploads it, on a GPU) while the other's batch computes, and a lock lets one batch at a time compute:
the copy of batch n + 1 is hidden behind the arithmetic of batch n, and so are the answers of batch n behind batch n + 1.
On a GPU copies run on CUDA's default stream and ONNX Runtime on a stream of its own that does not wait for it.

A third thread decodes and computes lone images. One and the same for all of them: where the two above took them in turn,
each found the caches full of what the other had left, and a lone image took 5 % longer (docs/lab-notes.md).
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, TypeAlias, TypeVar

import numpy as np

from topfive_server.buckets import make_buckets
from topfive_server.capture import GATE
from topfive_server.devices import Device, cores
from topfive_server.engine import Decode, EngineDead, EngineError, EngineInfo, Predictions
from topfive_server.lanes import DeviceLane, HostLane, Images, Lane
from topfive_server.network import open_network
from topfive_server.repository import ModelVersion
from topfive_server.session import RuntimeOptions, engine_error, open_session
from topfive_server.turns import TURNS

_LANES: Final = 2
"""For batches. One computes while the next is filled; a third would only wait."""


class _Job(Future[Predictions]):
    """A batch on its way through the engine; `images` None warms the lane up instead."""

    def __init__(self, images: Images | None) -> None:
        super().__init__()
        self.images = images


class _LoneJob(Future[Predictions | None]):
    """A lone image on its way, still to be decoded."""

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self.decode = decode


_AnyJob = TypeVar("_AnyJob", _Job, _LoneJob)
_Jobs: TypeAlias = "queue.SimpleQueue[_Job | _LoneJob | None]"


class OnnxEngine:
    """Runs one model version with ONNX Runtime on one device.

    Opening reads the model file, for a second or so: call it in a thread (`asyncio.to_thread`).

    Raises:
        DeviceError: the device cannot run the model.
        EngineError: ONNX Runtime cannot load the file.
        BrokenModelError: the file has gone, or is not the one that its report is about.
    """

    def __init__(self, model: ModelVersion, device: Device, options: RuntimeOptions | None = None) -> None:
        options = options or RuntimeOptions()
        side = model.input_side
        if side is None:
            raise EngineError(
                f"model {model.name} takes images of any size; an engine needs a graph that takes fixed squares"
            )
        max_batch = options.batch_limit(device)
        # Hashing 244 MB takes as long as a few batches; the session takes longer to open.
        with ThreadPoolExecutor(1, thread_name_prefix="fingerprint") as pool:
            fingerprint = pool.submit(model.fingerprint)
            open_lane = _open(model, device, options, side)
        self._device = device
        self._side = side
        self.info = EngineInfo(
            name=model.name,
            version=model.version,
            spec=model.spec,
            provider=options.provider(device),
            device=str(device),
            max_batch=max_batch,
            buckets=make_buckets(max_batch) if device.kind == "cuda" else (),
            fingerprint=fingerprint.result(),
            graph=model.graph,
            precision=model.precision,
            verified=model.verified,
            # With cores to spare, decoding has those.
            takes_turns=device.kind == "cpu" and (options.threads or cores()) >= cores(),
        )
        self._jobs: _Jobs = queue.SimpleQueue()
        self._lone_jobs: _Jobs = queue.SimpleQueue()
        self._queues = [*[self._jobs] * _LANES, self._lone_jobs]
        """Of each lane."""
        self._accepting = threading.Lock()
        self._computing = threading.Lock()
        self._dead = ""
        self._closed = False
        # One warm-up job for each lane, not two for the same one.
        self._all_lanes = threading.Barrier(len(self._queues))
        self._openers = {
            lane: partial(open_lane, lane, self._sizes(lane)) for lane in range(len(self._queues))
        }
        """Of each lane that may still be opened: with the last one the model leaves the device."""
        self._ended: list[Future[None]] = [Future() for _ in self._queues]
        for lane in range(len(self._queues)):
            # Daemons: a hung device must not keep the process from ending.
            threading.Thread(
                target=self._serve, args=(lane,), name=f"engine-{model.name}-{lane}", daemon=True
            ).start()

    async def predict(self, images: Images) -> Predictions:
        """Classify a batch; see `Engine.predict`. Safe from several event loops and threads."""
        return await asyncio.wrap_future(self.submit(images))

    def predict_lone(self, decode: Decode) -> Future[Predictions | None]:
        """Classify an image that is decoded in the same thread; see `DecodingEngine.predict_lone`."""
        return self._enqueue(_LoneJob(decode), self._lone_jobs)

    def submit(self, images: Images) -> Future[Predictions]:
        """`predict` for callers without an event loop; the future raises what `predict` raises.

        Raises:
            ValueError: no image, too many, or one of another shape or type.
            EngineDead: the engine was closed, or its device failed earlier.
        """
        if not 1 <= len(images) <= self.info.max_batch:
            raise ValueError(f"a batch has {len(images)} images; it must have 1 to {self.info.max_batch}")
        self._check(images)
        return self._enqueue(_Job(images), self._jobs)

    async def warm_up(self) -> None:
        """Run every bucket (on a CPU: the smallest and the largest batch) once in every lane, and check the answers."""
        jobs = [self._enqueue(_Job(None), lane) for lane in self._queues]
        # Shielded: lanes wait for each other, so either all warm up or none.
        await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(job)) for job in jobs))

    async def close(self) -> None:
        """Finish the batches already given, then release the device; see `Engine.close`."""
        await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(ended)) for ended in self.stop()))

    def stop(self) -> list[Future[None]]:
        """Take no more batches; the futures are done when those already given are answered."""
        with self._accepting:
            if not self._closed:
                self._closed = True
                for lane in self._queues:
                    lane.put(None)
        return self._ended

    def _check(self, images: Images) -> None:
        shape = (self._side, self._side, 3)
        for image in images:
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"an image is {image.dtype} {image.shape}; it must be uint8 {shape}")

    def _enqueue(self, job: _AnyJob, jobs: _Jobs) -> _AnyJob:
        with self._accepting:
            if self._dead or self._closed:
                raise EngineDead(
                    self._dead or f"the engine of {self.info.name}/{self.info.version} was closed"
                )
            jobs.put(job)
        return job

    def _serve(self, number: int) -> None:
        lane: Lane | None = None
        jobs = self._queues[number]
        while (job := jobs.get()) is not None:
            if not job.set_running_or_notify_cancel():
                continue
            try:
                if isinstance(job, _Job) and job.images is None:
                    self._all_lanes.wait()
                # Buffers and graphs are made in the thread that uses them: ONNX Runtime keeps CUDA graphs by thread.
                if lane is None:
                    with self._gate(captures=True):
                        lane = self._openers[number]()
                self._perform(number, lane, job)
            except Exception as error:  # noqa: BLE001  ONNX Runtime raises types of its own; the caller gets ours
                failure = engine_error(error)
                if isinstance(failure, EngineDead):
                    self._dead = str(failure)
                # Its frames would keep the lane, and with it the model, for as long as somebody keeps the error.
                job.set_exception(failure.with_traceback(None))
            # Nothing of this batch stays alive while the thread waits for the next.
            del job
        if lane is not None:
            lane.release()
        del lane, self._openers[number]
        self._ended[number].set_result(None)

    def _perform(self, number: int, lane: Lane, job: _Job | _LoneJob) -> None:
        if isinstance(job, _LoneJob):
            job.set_result(self._run_lone(lane, job.decode))
        elif job.images is None:
            job.set_result(self._warm(lane, self._sizes(number)))
        else:
            job.set_result(self._run(lane, job.images))

    def _sizes(self, number: int) -> tuple[int, ...]:
        """Batch sizes of a lane that are warmed up; on a GPU there are no others."""
        if number == _LANES:
            return (1,)
        return self.info.buckets or (1, self.info.max_batch)

    def _gate(self, *, captures: bool) -> contextlib.AbstractContextManager[None]:
        """What keeps a capture apart from everything else that this process does on GPUs."""
        if self._device.kind == "cpu":
            return contextlib.nullcontext()
        return GATE.alone() if captures else GATE.beside_others()

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """What keeps decoders off the cores that a batch computes on."""
        return TURNS.computing() if self.info.takes_turns else contextlib.nullcontext()

    def _run_lone(self, lane: Lane, decode: Decode) -> Predictions | None:
        image = decode()
        if image is None:
            return None
        self._check([image])
        return self._run(lane, [image])

    def _run(self, lane: Lane, images: Images) -> Predictions:
        with self._gate(captures=lane.captures(len(images))):
            lane.fill(images)
            with self._computing, self._turn():
                lane.compute()
            # Outside the lock: the other lane computes while this one's answers are copied.
            predictions = lane.read()
        if not np.isfinite(predictions.probabilities_BT).all():
            raise EngineError(f"model {self.info.name}/{self.info.version} gave answers that are not numbers")
        return predictions

    def _warm(self, lane: Lane, sizes: tuple[int, ...]) -> Predictions:
        images = [np.zeros((self._side, self._side, 3), np.uint8)] * sizes[-1]
        for batch in sizes:
            predictions = self._run(lane, images[:batch])
        return predictions


def _open(
    model: ModelVersion, device: Device, options: RuntimeOptions, side: int
) -> Callable[[int, tuple[int, ...]], Lane]:
    """Open a model; gives what opens a lane of it, by the lane's number and the sizes of its batches.

    Raises:
        DeviceError, EngineError: as `open_session`.
    """
    if device.kind == "cpu":
        network = open_network(model, device, options)
        return lambda _, sizes: HostLane(network, max_batch=sizes[-1], side=side)
    session = open_session(model, device, options)
    graphs = len(make_buckets(options.batch_limit(device)))
    return lambda number, sizes: DeviceLane(
        session,
        buckets=sizes,
        side=side,
        memory="cuda",
        index=device.index,
        first_graph=1 + number * graphs,
    )
