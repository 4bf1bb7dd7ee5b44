"""`topfive serve`."""

import asyncio
import contextlib
import logging
import resource
import socket
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from topfive_server import logs
from topfive_server.app import Application
from topfive_server.config import ServerConfig
from topfive_server.decode_pool import DecodePool
from topfive_server.devices import DeviceError, resolve
from topfive_server.lifecycle import Server, listen
from topfive_server.metrics import Metrics
from topfive_server.models import Models
from topfive_server.serving import Loader, StartError, onnx_engines
from topfive_server.session import RuntimeOptions

log = logging.getLogger(__name__)

EXIT_LOST = 1
"""The drain time was over before the last request was answered."""
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
        listener = listen(config.host, config.port)
    except (OSError, OverflowError) as error:
        raise StartError(_why_not_listening(config, error)) from error
    _allow_many_connections()
    with listener, asyncio.Runner(loop_factory=_event_loop()) as runner:
        return runner.run(run(models, config, runtime, listener))


async def run(
    models_folder: Path, config: ServerConfig, runtime: RuntimeOptions, listener: socket.socket
) -> int:
    """Load the models, serve on a bound socket until told to stop, and return the exit status.

    Raises:
        StartError: the models, the device, the keys or the certificate cannot be used.
    """
    try:
        device = resolve(config.device)
    except DeviceError as error:
        raise StartError(str(error)) from error
    log.info("device", extra={"device": str(device), "reason": device.reason})
    pool = DecodePool(threads=config.resolved_decode_threads, max_pixels=config.max_pixels)
    models, metrics = Models(config.model), Metrics()
    loader = Loader(
        models_folder,
        engines=onnx_engines(device, runtime),
        config=config,
        models=models,
        pool=pool,
        metrics=metrics,
    )
    try:
        application = Application(config, models=models, pool=pool, metrics=metrics)
        server = Server(application, config)
        await loader.start()
        host, port = listener.getsockname()[:2]
        scheme = "https" if config.tls_certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        log.info("serving", extra={"url": f"{scheme}://{shown}:{port}", "model": models.default_name()})
        await server.serve(sockets=[listener])
        log.info("stopped")
        return EXIT_LOST if server.lost_requests else 0
    finally:
        for model in list(models):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(model.close(), 5)
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
