"""`topfive serve`."""

import asyncio
import gc
import logging
import resource
import socket
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from topfive.allocator import keep_large_buffers
from topfive.errors import TopfiveError
from topfive_server import logs
from topfive_server.access import check_certificate
from topfive_server.app import Application
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import DeviceError
from topfive_server.lifecycle import EXIT_LOST, Server, listen, url_of
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.parent import run_processes
from topfive_server.reload import Reloader, ReloadPolicy
from topfive_server.served_model import close_all
from topfive_server.serving import Loader, Offer, StartError, computing, make_traces
from topfive_server.session import RuntimeOptions

log = logging.getLogger(__name__)

_DEFAULT_CONFIG = ServerConfig()
_DEFAULT_RUNTIME = RuntimeOptions()


def serve(
    models: Path,
    *,
    config: Annotated[ServerConfig, Parameter(name="*")] = _DEFAULT_CONFIG,
    runtime: Annotated[RuntimeOptions, Parameter(name="*")] = _DEFAULT_RUNTIME,
) -> int:
    """Serve a model repository over HTTP: an image in, five labels out.

    Answers once every model is warmed up and has classified a test image. SIGTERM drains: every accepted request is
    answered, then the exit status is 0; 1 when `drain_timeout_s` was too short for that.

    Args:
        models: folder that `topfive export` wrote.
        config: how to listen, what to accept, how to batch and how to end.
        runtime: how ONNX Runtime runs the models.
    """
    logs.configure(config.log_format)
    try:
        return _serve(models, config, runtime)
    except TopfiveError as error:
        if config.log_format == "text":
            raise  # the command line says it to a person
        log.error(str(error))  # noqa: TRY400  whoever reads the stream expects JSON
        return error.exit_code


def _serve(models: Path, config: ServerConfig, runtime: RuntimeOptions) -> int:
    if config.tls_certificate is not None and config.tls_key is not None:
        check_certificate(config.tls_certificate, config.tls_key)
    keep_large_buffers()
    gc.freeze()  # what was imported stays; the collector need not look through it again and again
    try:
        listener = listen(config.host, config.port)
    except (OSError, OverflowError) as error:
        raise StartError(_why_not_listening(config, error)) from error
    _allow_many_connections()
    with listener, asyncio.Runner(loop_factory=_event_loop()) as runner:
        if config.processes > 1:
            return runner.run(run_processes(models, config, runtime, listener))
        return runner.run(run(models, config, runtime, listener))


async def run(
    models_folder: Path, config: ServerConfig, runtime: RuntimeOptions, listener: socket.socket
) -> int:
    """Load the models, serve on a bound socket until told to stop, and return the exit status.

    Raises:
        StartError: the models, the device, the keys or the certificate cannot be used.
    """
    try:
        device, engines, variant = computing(config, runtime)
    except (DeviceError, ValueError) as error:
        raise StartError(str(error)) from error
    log.info("device", extra={"device": str(device), "reason": device.reason})
    pool = DecodePool(threads=config.resolved_decode_threads, max_pixels=config.max_pixels)
    models, metrics = Models(config.model), Metrics()
    offer = Offer(models_folder, device=device, variant=variant, config=config)
    loader = Loader(engines=engines, config=config, models=models, pool=pool, metrics=metrics)
    reloader = Reloader(
        find=offer.find,
        load=loader.load,
        models=models,
        policy=ReloadPolicy(keep=config.versions, canary_share=config.canary_percent / 100),
        count=lambda result: metrics.reloads.labels(result).inc(),
    )
    tasks: list[asyncio.Task[None]] = []
    traces = make_traces() if config.traces else None
    try:
        application = Application(
            config,
            models=models,
            pool=pool,
            metrics=metrics,
            reloader=reloader if config.admin else None,
            traces=traces,
        )
        url = url_of(listener, config)
        server = Server(
            application,
            config,
            on_listening=lambda: log.info("serving", extra={"url": url, "model": models.default_name()}),
        )
        for version in await offer.start(loader.load):
            reloader.adopt(version)
        tasks.append(asyncio.create_task(reloader.guard_canaries()))
        if config.watch:
            tasks.append(asyncio.create_task(reloader.watch(config.watch_interval_s)))
        await server.serve(sockets=[listener])
        if traces is not None:
            await traces.close(server.drain_left_s)
        log.info("stopped")
        return EXIT_LOST if server.lost_requests else 0
    finally:
        for task in tasks:
            task.cancel()
        await close_all(models)
        pool.close()


def _event_loop() -> type[asyncio.AbstractEventLoop]:
    import uvloop  # noqa: PLC0415  only a server needs it

    return uvloop.Loop


def _allow_many_connections() -> None:
    """Thousands of idle connections need as many file descriptors; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _why_not_listening(config: ServerConfig, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    way_out = "stop what listens there, or give another --port (0 takes a free one)"
    if isinstance(error, socket.gaierror):
        way_out = "give an address of this machine as --host"
    elif isinstance(error, PermissionError):
        way_out = "ports below 1024 need privileges; give another --port"
    return f"cannot listen on {config.host} port {config.port}: {reason}; {way_out}"
