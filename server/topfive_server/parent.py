"""`topfive serve --processes N`: the parent of N workers. It computes nothing and reads no request.

It binds, starts the workers, decides which versions are in service (`reload.Reloader`, once, for all of them), hands
out connections (`handover`), sums up what the workers say of themselves, starts again those that end, and drains.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Final

from topfive_server.channel import ChannelClosedError, ChannelError
from topfive_server.config import ServerConfig
from topfive_server.devices import DeviceError, resolve_all
from topfive_server.engine import EngineError
from topfive_server.handover import Handover, Line
from topfive_server.lifecycle import EXIT_LOST, admit_the_last, heeded_signals, start_listening, url_of
from topfive_server.metrics import Metrics
from topfive_server.metrics_sum import MetricsSum, Process, Snapshot, snapshot
from topfive_server.reload import ReloadPolicy
from topfive_server.replication import Replicator
from topfive_server.server_status import together
from topfive_server.serving import Offer, StartError, computing
from topfive_server.session import RuntimeOptions
from topfive_server.shares import Share, divide
from topfive_server.worker_process import WorkerProcess, wait_for_all

log = logging.getLogger(__name__)

EXIT_NO_WORKER: Final = 1
"""No worker serves, and none can be started."""
_PAUSES_S: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each attempt to start a worker again; the last one repeats."""
_SETTLED_S: Final = 60.0
"""A worker that has served for so long does not count as one that failed to start."""
_LAST_ATTEMPT: Final = 4
"""Attempts after which the parent gives up, when no other worker serves."""
_PATIENCE_S: Final = 3.0
"""Seconds that a worker has to say how it is."""
_HEARTBEAT_S: Final = 2.0
_CLOSING_S: Final = 10.0
"""Seconds beyond the drain time that a worker has to close its models."""


async def run_processes(
    models: Path, config: ServerConfig, runtime: RuntimeOptions, listener: socket.socket
) -> int:
    """Serve on a bound socket with `config.processes` workers until told to stop, and return the exit status.

    Raises:
        StartError: the models, the device, the keys or the certificate cannot be used.
    """
    try:
        devices = [] if runtime.triton else resolve_all(config.device)
        device, _, variant = computing(config, runtime, devices)
    except (DeviceError, ValueError) as error:
        raise StartError(str(error)) from error
    devices = devices or [device]
    log.info("device", extra={"device": ",".join(map(str, devices)), "reason": device.reason})
    with contextlib.ExitStack() as held:
        if config.grpc_port is not None:
            config = held.enter_context(_reserved(config))
        parent = Parent(
            models,
            config=config,
            shares=divide(config, runtime, devices),
            offer=Offer(models, device=device, variant=variant, config=config),
            listener=listener,
        )
        return await parent.run()


class Parent:
    """See the module."""

    def __init__(
        self,
        models: Path,
        *,
        config: ServerConfig,
        shares: list[Share],
        offer: Offer,
        listener: socket.socket,
    ) -> None:
        self._models = models
        self._config = config
        self._shares = shares
        self._offer = offer
        self._listener = listener
        self._workers: dict[int, WorkerProcess] = {}
        """By number; the last process of each, dead or alive."""
        self._metrics = Metrics()
        self._metrics_sum = MetricsSum()
        self._handover = Handover(listener, self._lines)
        self._draining: asyncio.Task[None] | None = None
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The exit status, once there is one."""
        self._forced = asyncio.Event()
        """Told to stop a second time."""
        self._told: list[asyncio.Task[None]] = []
        self._replicator = Replicator(
            self._workers,
            find=offer.find,
            policy=ReloadPolicy(keep=config.versions, canary_share=config.canary_percent / 100),
            count=lambda result: self._metrics.reloads.labels(result).inc(),
            patience_s=config.engine_timeout_s,
        )

    async def run(self) -> int:
        """Start, serve, drain; the exit status.

        Raises:
            StartError: a worker cannot start.
        """
        tasks: list[asyncio.Task[Any]] = []
        try:
            await self._start()
            tasks += [asyncio.create_task(self._keep(worker)) for worker in [*self._workers.values()]]
            reloader = self._replicator.reloader
            tasks += [asyncio.create_task(self._heartbeat()), asyncio.create_task(reloader.guard_canaries())]
            if self._config.watch:
                tasks.append(asyncio.create_task(reloader.watch(self._config.watch_interval_s)))
            return await self._serve()
        finally:
            for task in tasks:
                task.cancel()
            for worker in self._workers.values():
                worker.kill()
            await asyncio.gather(*(worker.reap() for worker in self._workers.values()))

    async def _start(self) -> None:
        try:
            # All at once: importing is most of it.
            await wait_for_all(self._open(share) for share in self._shares)
            for version in await self._offer.start(self._replicator.load):
                self._replicator.reloader.adopt(version)
            await wait_for_all(self._let_serve(worker) for worker in self._workers.values())
        except ChannelError as error:
            raise StartError(str(error)) from error

    async def _serve(self) -> int:
        loop = asyncio.get_running_loop()
        heeded = heeded_signals()
        for number in heeded:
            loop.add_signal_handler(number, self._told_to_stop)
        start_listening(self._listener)
        self._handover.start()
        log.info(
            "serving",
            extra={
                "url": url_of(self._listener, self._config),
                "model": self._config.model or self._replicator.versions.names()[0],
                "processes": len(self._shares),
            },
        )
        try:
            return await self._over
        finally:
            for number in heeded:
                loop.remove_signal_handler(number)
            log.info("stopped")

    # ------------------------------------------------------------------ workers

    def _lines(self) -> list[Line]:
        return [worker.line for worker in self._workers.values() if worker.serving]

    async def _open(self, share: Share) -> WorkerProcess:
        handlers = (self.readiness, self.healthy, self.metrics, self.report, self.look, self.set_canary)
        worker = await WorkerProcess.start(share, self._models, {h.__name__: h for h in handlers})
        worker.line.on_return = self._handover.take_back
        self._workers[share.number] = worker
        await _asked(worker, "open")
        log.info(
            "worker started",
            extra={
                "worker": share.number,
                "pid": worker.pid,
                "device": ",".join(map(str, share.devices)),
                "threads": share.runtime.threads,
                "decode_threads": share.config.decode_threads,
            },
        )
        return worker

    async def _let_serve(self, worker: WorkerProcess) -> None:
        await _asked(worker, "serve")
        if self._draining is not None:
            raise ChannelError("the server is ending")
        worker.serving = True

    async def _keep(self, worker: WorkerProcess) -> None:
        """Start a worker again whenever it ends."""
        failures = 0
        while True:
            born = monotonic()
            await worker.reap()
            if self._draining is not None:
                return
            self._metrics_sum.departed(Process(worker.number, worker.pid))
            log.error(
                "worker %d has ended%s; its requests under way are lost", worker.number, _how_it_ended(worker)
            )
            failures = 0 if monotonic() - born > _SETTLED_S else failures + 1
            while True:
                await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S)) - 1] if failures else 0)
                if self._draining is not None:
                    return
                try:
                    worker = await self._bring_back(worker.share)
                except (ChannelError, EngineError, OSError) as error:
                    failures += 1
                    self._metrics.worker_restarts.labels("failed").inc()
                    log.error("worker %d could not be started again: %s", worker.number, error)  # noqa: TRY400
                    if failures >= _LAST_ATTEMPT and not self._lines() and not self._over.done():
                        log.error("no worker serves, and none can be started: the server ends")  # noqa: TRY400
                        self._over.set_result(EXIT_NO_WORKER)
                else:
                    self._metrics.worker_restarts.labels("ok").inc()
                    log.warning("worker %d serves again", worker.number)
                    break

    async def _bring_back(self, share: Share) -> WorkerProcess:
        """A new process in the place of one that has ended, with all that the others have.

        Raises:
            ChannelError, EngineError, OSError: it cannot; the process is gone.
        """
        try:
            async with asyncio.timeout(20 * self._config.engine_timeout_s):
                worker = await self._open(share)
                async with self._replicator.catching_up(worker):
                    await self._let_serve(worker)
        except (ChannelError, EngineError, OSError):
            self._workers[share.number].kill()
            await self._workers[share.number].reap()
            raise
        return worker

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            await self._replicator.ask_health()

    # ------------------------------------------------------------------ what workers ask

    async def readiness(self) -> dict[str, Any]:
        """The body of `/readyz`."""
        return together(await self._from_all("readiness"), draining=self._draining is not None)

    async def healthy(self) -> bool:
        """Whether every version is ready in every worker."""
        answers = await self._from_all("health")
        return self._draining is None and all(
            not isinstance(rows, str) and rows and all(ready for _, _, ready, *_ in rows)
            for rows in answers.values()
        )

    async def metrics(self) -> str:
        """The exposition text of all."""
        # Before they answer: one may end meanwhile, and another take its place.
        asked = {worker.number: Process(worker.number, worker.pid) for worker in self._workers.values()}
        answers = await self._from_all("metrics")
        snapshots: dict[Process, Snapshot] = {
            asked[number]: rows for number, rows in answers.items() if not isinstance(rows, str)
        }
        all_there = len(snapshots) == len(self._shares) and self._draining is None
        snapshots[Process(0, os.getpid())] = snapshot(self._metrics.registry)
        return self._metrics_sum.render(snapshots, all_there=all_there).decode()

    async def report(self) -> list[dict[str, Any]]:
        """See `admin.Operator`."""
        return self._replicator.reloader.status()

    async def look(self) -> list[dict[str, Any]]:
        """See `admin.Operator`."""
        return await self._replicator.reloader.look()

    async def set_canary(self, name: str, share: float) -> list[dict[str, Any]]:
        """See `admin.Operator`."""
        return await self._replicator.reloader.set_canary(name, share)

    async def _from_all(self, what: str) -> dict[int, Any]:
        """Each worker's answer, or a text that says why there is none."""

        async def ask(share: Share) -> Any:
            worker = self._workers[share.number]
            if not worker.serving:
                return "the process has ended and is being started again"
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    return await worker.channel.ask(what)
            except TimeoutError:
                return f"the process has not answered for {_PATIENCE_S:g} seconds"
            except ChannelError as error:
                return str(error)

        answers = await asyncio.gather(*map(ask, self._shares))
        return {share.number: answer for share, answer in zip(self._shares, answers, strict=True)}

    # ------------------------------------------------------------------ the end

    def _told_to_stop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._draining is None:
            log.info("draining", extra={"delay_s": self._config.drain_delay_s})
            self._draining = loop.create_task(self._drain())
        elif not self._forced.is_set():
            self._forced.set()
            self._told = [loop.create_task(worker.tell("stop")) for worker in self._workers.values()]
            for worker in self._workers.values():
                loop.call_later(_PATIENCE_S, worker.kill)  # it may hang

    async def _drain(self) -> None:
        serving = [worker for worker in self._workers.values() if worker.serving]
        await self._tell_all(serving, "drain")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_delay_s):
                await self._forced.wait()
        await admit_the_last([self._listener])
        await self._handover.finish(min(_PATIENCE_S, self._config.drain_timeout_s))
        for worker in serving:
            worker.line.finish()
        await self._tell_all(serving, "finish")
        ended = [asyncio.create_task(worker.ended.wait()) for worker in serving]
        if ended:
            await asyncio.wait(ended, timeout=self._config.drain_timeout_s + _CLOSING_S)
        for worker in serving:
            if not worker.ended.is_set():
                log.error("worker %d did not end in time; it is killed", worker.number)
                worker.kill()
            await worker.reap()
            if worker.exit_status:
                log.error("worker %d lost requests%s", worker.number, _how_it_ended(worker))
        lost = self._forced.is_set() or any(worker.exit_status for worker in serving)
        if not self._over.done():
            self._over.set_result(EXIT_LOST if lost else 0)

    async def _tell_all(self, workers: list[WorkerProcess], what: str) -> None:
        """Tell, without waiting for one that hangs."""
        if workers:
            told = [asyncio.create_task(worker.tell(what)) for worker in workers]
            await asyncio.wait(told, timeout=_PATIENCE_S)


async def _asked(worker: WorkerProcess, what: str) -> None:
    """Ask for a step of the start.

    Raises:
        ChannelError: it failed; the message says which worker, and how it ended where it did.
    """
    try:
        await worker.channel.ask(what)
    except ChannelError as error:
        if isinstance(error, ChannelClosedError):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.ended.wait(), _PATIENCE_S)
        raise ChannelError(f"worker {worker.number} cannot start: {error}{_how_it_ended(worker)}") from error


def _how_it_ended(worker: WorkerProcess) -> str:
    status = worker.exit_status
    if status is None:
        return ""
    return f" ({signal.Signals(-status).name})" if status < 0 else f" (status {status})"


@contextlib.contextmanager
def _reserved(config: ServerConfig) -> Iterator[ServerConfig]:
    """Keep the gRPC port, on which each worker will listen with `SO_REUSEPORT`; a free one where it is 0.

    Raises:
        StartError: it cannot be had.
    """
    found = socket.getaddrinfo(config.host, config.grpc_port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as alone:
            # Without SO_REUSEPORT: another server's port is not shared with it.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            port = alone.getsockname()[1]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        place.bind((address[0], port, *address[2:]))
    except OSError as error:
        raise StartError(
            f"cannot listen on {config.host} port {config.grpc_port} for gRPC; give another --grpc-port"
        ) from error
    with place:
        yield dataclasses.replace(config, grpc_port=port)
