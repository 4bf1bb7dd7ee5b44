"""The processes of one run: starting them, agreeing among them, and ending them together.

Started by ourselves (`launch`), one process for each GPU or as many as asked for on the CPU, or by `torchrun`, which
sets RANK, WORLD_SIZE and the rest.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Final, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from topfive.allocator import keep_large_buffers
from topfive.errors import TopfiveError

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks for a save and an orderly end."""
_GRACE_S: Final = 3.0
"""How long the other ranks' errors are waited for once one has failed."""
_ACTIVATIONS: Final = 2**31 - 1
"""Bytes that stay with the process between two steps, which need the same buffers."""
_COLLECTIVE_TIMEOUT: Final = timedelta(minutes=30)
"""Longest wait for another rank: the first pass over the images happens on one of them."""


class RankError(TopfiveError):
    """A rank failed; the message is its own error."""


class Interruption:
    """Remembers that a signal has arrived; the loop asks at its next step."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.signal = number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def highest(self, value: int) -> int:
        """The highest of the ranks' values; every rank must ask."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks; every rank must ask."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the other ranks' tensors with the first's; every rank must ask."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.highest(0)

    @contextlib.contextmanager
    def one_by_machine(self) -> Iterator[None]:
        """The first process of each machine runs the body alone; then the others do, finding its results."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


def started_by_torchrun() -> bool:
    """Whether `torchrun` (or whatever else speaks its environment) has started this process."""
    return all(
        name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    )


def default_processes() -> int:
    """One for each GPU, or one."""
    return max(1, torch.cuda.device_count())


def check_processes(processes: int) -> None:
    """See that so many can run here.

    Raises:
        RankError: less than one, or more than there are GPUs, where there are any.
    """
    gpus = torch.cuda.device_count()
    if processes < 1 or (gpus and processes > gpus):
        allowed = f"between 1 and {gpus}, the number of GPUs here" if gpus else "at least 1"
        raise RankError(f"--processes is {processes}; it must be {allowed}")


@contextlib.contextmanager
def joined(rank: int, size: int, local_rank: int, local_size: int, store: Store | None) -> Iterator[Ranks]:
    """Be a rank for a while: device chosen, process group made, and left again."""
    keep_large_buffers(_ACTIVATIONS)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(rank=rank, size=size, local_rank=local_rank, device=device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def under_torchrun(body: Callable[[Ranks], int]) -> int:
    """Run `body` as the rank that the environment says; returns its result.

    A failure is recorded for torchrun, whose summary then begins with the error of the rank that failed first, and ends
    this process at once: what waits for the dead must not hold it.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, "1")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    elastic = get_error_handler()
    elastic.initialize()
    with joined(rank, size, local_rank, local_size, store=None) as ranks:
        try:
            return body(ranks)
        except Exception as error:
            whose = f"rank {rank} of {size} on {socket.gethostname()}"
            secondary, text = _failure(error, whose)
            if secondary:
                # torchrun puts first what has failed first, and looks ten times a second: let it find the other's end.
                time.sleep(_GRACE_S)
            elastic.record_exception(error)
            if os.environ.get("TOPFIVE_DEBUG"):
                raise
            sys.stderr.write(f"topfive: {text if whose in text else f'{whose}: {text}'}\n")
            sys.stderr.flush()
            os._exit(getattr(error, "exit_code", 1))


def launch(processes: int, body: Callable[..., int], *arguments: Any) -> int:
    """Run `body(ranks, *arguments)` in so many processes of this machine; one alone runs in this one.

    Signals go on to every rank. When one fails, the others are ended and its own error is raised.

    Raises:
        RankError: a rank failed.
    """
    if processes == 1:
        with joined(0, 1, 0, 1, store=None) as ranks:
            return body(ranks, *arguments)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    children: list[Any] = []
    reports: list[Connection] = []
    with _forwarding(children) as asked:
        with _ctrl_c_waits():
            for rank in range(processes):
                ours, theirs = context.Pipe(duplex=False)
                child = context.Process(
                    target=_child,
                    args=(_Place(rank=rank, size=processes, port=store.port), theirs, body, arguments),
                    name=f"rank{rank}",
                )
                child.start()
                theirs.close()
                children.append(child)
                reports.append(ours)
        return _supervise(children, reports, asked)


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Hold SIGINT back, here and in the processes started meanwhile, which take it when they are ready for it.

    They import for seconds, in the terminal's group still, and each would end in a traceback of whatever it imported.
    """
    resource_tracker.ensure_running()  # which would let the signal through when the first process starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    rank: int
    size: int
    port: int


def _child(place: _Place, report: Connection, body: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    # Out of the terminal's group: Ctrl-C reaches the parent alone, which passes it on once.
    os.setpgid(0, 0)
    _end_with_parent()
    # Until the run takes the signals over there is nothing to save; what was held back ends this process here.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        store = TCPStore("127.0.0.1", place.port, is_master=False)
        with joined(place.rank, place.size, place.rank, place.size, store) as ranks:
            status = body(ranks, *arguments)
    except Exception as error:
        report.send(_failure(error, f"rank {place.rank} of {place.size}"))
        if os.environ.get("TOPFIVE_DEBUG"):
            raise
        # Without clean-up: a collective that waits for the dead would hang it.
        os._exit(1)
    sys.stdout.flush()
    os._exit(status)


def _failure(error: Exception, whose: str) -> tuple[bool, str]:
    """Whether it is a consequence of another rank's end; and what to say of it."""
    # A sentence for the user stands alone. What a rank sees when another has died is a consequence: RuntimeError, from a
    # collective; the other's own error is the one to show.
    if isinstance(error, TopfiveError | ValueError):
        return False, str(error)
    described = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError), f"{whose} failed: {described}"


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _forwarding(children: list[Any]) -> Iterator[list[int]]:
    """Pass signals on to every rank, the second one as SIGKILL; gives the list of those that have come."""
    asked: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number if len(asked) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(children: list[Any], reports: list[Connection], asked: list[int]) -> int:
    """Wait for all ranks; end all when one fails."""
    try:
        running = list(children)
        while running:
            wait([child.sentinel for child in running])
            running = [child for child in running if child.is_alive()]
            ended = {child.exitcode for child in children if child not in running}
            if asked and ended & {128 + asked[0], -asked[0], -signal.SIGKILL}:
                _wait_for(running)
                return 128 + asked[0]
            if not ended <= {0, *_ENDED_BY_SIGNAL}:
                raise RankError(_first_error(children, reports))
        return int(max(child.exitcode for child in children))
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()


_ENDED_BY_SIGNAL: Final = frozenset(128 + number for number in SIGNALS)


def _first_error(children: list[Any], reports: list[Connection]) -> str:
    """The error of the rank that failed by itself, rather than of one that missed it."""
    _wait_for(children)
    found: list[tuple[bool, str]] = []
    for rank, (child, report) in enumerate(zip(children, reports, strict=True)):
        whose = f"rank {rank} of {len(children)}"
        try:
            if report.poll():
                found.append(report.recv())
        except EOFError:  # it has ended without a word
            if child.exitcode is not None and child.exitcode < 0:
                name = signal.Signals(-child.exitcode).name
                hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
                found.append((False, f"{whose} was ended by {name}{hint}"))
            elif child.exitcode:
                found.append((False, f"{whose} ended with status {child.exitcode}"))
    found.sort(key=lambda item: item[0])
    return found[0][1] if found else "a rank ended without an error"


def _wait_for(children: list[Any]) -> None:
    """A moment, for those that are about to end by themselves."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(child.is_alive() for child in children):
        time.sleep(0.05)
