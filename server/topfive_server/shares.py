"""What each of several server processes gets: its GPUs, and its part of the threads, the queue and the memory.

Every limit is that of the whole server: the parts add up to it. One process has everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from topfive_server.config import ServerConfig
from topfive_server.devices import Device, cores
from topfive_server.session import RuntimeOptions


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's part."""

    number: int
    """Of the process, from 1: in its log lines, in `/readyz`, in its metrics."""
    devices: tuple[Device, ...]
    """What it computes on; with as many processes as GPUs, or more, one."""
    config: ServerConfig
    runtime: RuntimeOptions


def divide(config: ServerConfig, runtime: RuntimeOptions, devices: Sequence[Device]) -> list[Share]:
    """The parts of `config.processes` processes.

    Process i computes on GPU i modulo their number, so several may feed one GPU; fewer processes than GPUs deal
    the GPUs out among them. On a CPU its cores are divided.
    """
    count = config.processes
    return [_share(config, runtime, devices, index, count) for index in range(count)]


def part(total: int, count: int, index: int) -> int:
    """The index-th of `count` whole parts, as equal as can be, that add up to `total`."""
    return total // count + (index < total % count)


def _share(
    config: ServerConfig, runtime: RuntimeOptions, devices: Sequence[Device], index: int, count: int
) -> Share:
    own = tuple(devices[index::count]) or (devices[index % len(devices)],)
    # The processes that feed the same GPU, this one among them.
    beside = len(range(index % len(devices), count, len(devices))) if count > len(devices) else 1
    rank = index // len(devices) if count > len(devices) else 0
    memory = part(runtime.gpu_memory_bytes, beside, rank)
    threads = part(runtime.threads or cores(), count, index)
    return Share(
        number=index + 1,
        devices=own,
        config=replace(
            config,
            processes=1,
            decode_threads=max(1, part(config.resolved_decode_threads, count, index)),
            max_queue_images=part(config.max_queue_images, count, index),
            max_queue_bytes=part(config.max_queue_bytes, count, index),
            # The parent waits, and then tells them all at once.
            drain_delay_s=0.0,
            watch=False,
        ),
        runtime=replace(runtime, threads=max(1, threads), gpu_memory_bytes=memory),
    )
