"""Opens an ONNX Runtime session that really runs on the device asked for, and reads its errors.

CPU settings are measured (`benchmarks/engine.py`, two cores, AlexNet at width 1): threads spin while a batch runs,
which makes a lone image 10 % faster, and stop spinning when it ends, which leaves the cores to the decoders.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import onnxruntime

from topfive_server import tensorrt
from topfive_server.devices import CPU_PROVIDER, Device, DeviceError, cores
from topfive_server.engine import EngineDead, EngineError, EngineOutOfMemory
from topfive_server.repository import ModelVersion
from topfive_server.variants import Wanted

log = logging.getLogger(__name__)

HEAVY: Final = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "Gemm", "FusedGemm"}
) | {
    *("MatMul", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "LRN"),
    *("DynamicQuantizeMatMul", "MatMulNBits"),
}
"""Operators that do nearly all of the arithmetic: one of them on the CPU makes a GPU pointless."""

_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|failed to allocate|bad_alloc|available memory of|ALLOC_FAILED|CUDA failure 2\b",
    re.IGNORECASE,
)
_DEVICE_LOST: Final = re.compile(
    r"CUDA failure \d+|CUDA error|CU(?:DNN|BLAS)_STATUS_|cudaError", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """What computes, and how; the defaults are the measured best."""

    variant: Wanted = "auto"
    """Precision to serve: `auto` takes each model's fastest that passed its limits on this device; `all` serves every one."""
    triton: tuple[str, ...] = ()
    """Triton servers (`host:port` of their gRPC service) that compute instead of this process; needs the `triton` extra."""

    threads: int = 0
    """CPU threads that share one batch; 0 takes the physical cores this process may use."""
    max_batch: int = 0
    """Most images in one batch; 0 takes 32 on a CPU, where larger ones only wait longer, and 64 on a GPU."""
    cuda_graphs: bool = True
    """Capture a CUDA graph for each batch size: one launch instead of one for each layer."""
    tf32: bool = True
    """Let float32 matrix products use TF32 (10-bit mantissas) on GPUs that have it; off for parity with the CPU."""
    tensorrt: bool = False
    """Compile each graph with TensorRT on the GPU, which takes minutes at the first start; `topfive doctor` says what it needs."""
    tensorrt_cache: Path | None = None
    """Folder that keeps what TensorRT compiled; none: every start compiles again."""
    convolution_search: Literal["HEURISTIC", "EXHAUSTIVE", "DEFAULT"] = "HEURISTIC"
    """How cuDNN picks an algorithm for each shape; `EXHAUSTIVE` times them all during warm-up."""
    gpu_memory_bytes: int = 0
    """Most device memory that ONNX Runtime may hold; 0 sets no limit."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        for field, low, high in (
            ("threads", 0, 1024),
            ("max_batch", 0, 4096),
            ("gpu_memory_bytes", 0, 2**50),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field} is {value}; it must be between {low} and {high}")
        if self.tensorrt_cache is not None and not self.tensorrt:
            raise ValueError("tensorrt_cache is given without tensorrt; nothing would be kept in it")

    def batch_limit(self, device: Device) -> int:
        """`max_batch`, or the device's default."""
        return self.max_batch or (64 if device.kind == "cuda" else 32)

    def provider(self, device: Device) -> str:
        """ONNX Runtime's name of what does the arithmetic on this device."""
        return tensorrt.PROVIDER if self.tensorrt and device.kind == "cuda" else device.provider


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph in memory."""

    model: bytes
    """Serialised, without its large weights."""
    weights: dict[str, onnxruntime.OrtValue]
    """Those, by name."""


def open_session(
    model: ModelVersion, device: Device, options: RuntimeOptions, *, graph: Graph | None = None
) -> onnxruntime.InferenceSession:
    """Open the model on the device, or a `graph` that was made of it, and check that its heavy nodes run there.

    Raises:
        DeviceError: the provider did not load, or heavy nodes fell back to the CPU.
        EngineError: ONNX Runtime cannot load the file.
    """
    # A graph is captured only where one provider runs all of it.
    graphs = device.kind == "cuda" and options.cuda_graphs and not options.tensorrt
    try:
        session = _open(model, device, options, cuda_graphs=graphs, graph=graph)
    except Exception as error:
        if not (graphs and "graph capture" in str(error)):
            raise EngineError(f"{model.name}/{model.version} cannot be loaded: {one_line(error)}") from error
        log.warning("%s/%s runs without CUDA graphs: %s", model.name, model.version, one_line(error))
        session = _open(model, device, options, cuda_graphs=False, graph=graph)
    provider = options.provider(device)
    if provider not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime could not start {provider} and offers only {', '.join(session.get_providers())}; "
            "run `topfive doctor` for what is missing, or say --device cpu"
        )
    placed = (
        (graph.ep_name, node.op_type)
        for graph in session.get_provider_graph_assignment_info()
        for node in graph.get_nodes()
    )
    check_placement(placed, device, f"{model.name}/{model.version}", provider=provider)
    return session


def check_placement(
    placed: Iterable[tuple[str, str]], device: Device, model: str, *, provider: str = ""
) -> None:
    """Check pairs of provider and operator: every heavy operator must be on the device.

    Of a `provider` beside the device's own (TensorRT's, which leaves to CUDA what it cannot do) there must be some.

    Raises:
        DeviceError: heavy operators run elsewhere, or nothing at all was placed.
    """
    placed = list(placed)
    provider = provider or device.provider
    heavy = [(where, op) for where, op in placed if op in HEAVY]
    elsewhere = Counter(op for where, op in heavy if where not in {provider, device.provider})
    if not placed:
        raise DeviceError(
            f"ONNX Runtime does not say where it runs the nodes of {model}; update onnxruntime-gpu"
        )
    if elsewhere:
        found = ", ".join(f"{count} {op}" for op, count in sorted(elsewhere.items()))
        raise DeviceError(
            f"model {model} would run {found} on the CPU although {device} was asked for: this graph is not made "
            "for a GPU (int8 is not); serve its fp32 or fp16 variant, or say --device cpu"
        )
    if heavy and all(where != provider for where, _ in heavy):
        raise DeviceError(
            f"{provider} takes none of the heavy operators of model {model}; leave out --tensorrt"
        )


def _open(
    model: ModelVersion, device: Device, options: RuntimeOptions, *, cuda_graphs: bool, graph: Graph | None
) -> Any:
    settings = session_options(device, options)
    if graph is not None:
        settings.add_external_initializers([*graph.weights], [*graph.weights.values()])
    return onnxruntime.InferenceSession(
        str(model.path) if graph is None else graph.model,
        settings,
        providers=[
            *_tensorrt(model, device, options),
            *provider_options(device, options, cuda_graphs=cuda_graphs),
        ],
    )


def _tensorrt(
    model: ModelVersion, device: Device, options: RuntimeOptions
) -> list[str | tuple[str, dict[str, str]]]:
    """TensorRT's part of the `providers` argument: first where it was asked for, else nothing."""
    if options.provider(device) != tensorrt.PROVIDER:
        return []
    assert model.input_side is not None  # noqa: S101  an engine refuses graphs that take any size
    cache = None
    if options.tensorrt_cache is not None:
        cache = tensorrt.cache_folder(options.tensorrt_cache, model.fingerprint())
    settings = tensorrt.provider_options(
        device,
        side=model.input_side,
        max_batch=options.batch_limit(device),
        fp16=model.precision == "fp16",
        cache=cache,
    )
    return [(tensorrt.PROVIDER, settings)]


def session_options(device: Device, options: RuntimeOptions) -> onnxruntime.SessionOptions:
    """Settings that do not depend on the provider, and the CPU's."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Of a GPU session only the bookkeeping runs on the CPU.
    settings.intra_op_num_threads = 1 if device.kind == "cuda" else options.threads or cores()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1")
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return settings


def provider_options(
    device: Device, options: RuntimeOptions, *, cuda_graphs: bool
) -> list[str | tuple[str, dict[str, str]]]:
    """The `providers` argument of a session on this device."""
    if device.kind == "cpu":
        return [CPU_PROVIDER]
    cuda = {
        "device_id": str(device.index),
        "use_tf32": str(int(options.tf32)),
        "cudnn_conv_algo_search": options.convolution_search,
        "cudnn_conv_use_max_workspace": "1",
        "enable_cuda_graph": str(int(cuda_graphs)),
        # Grow by what is asked for: the default doubles, and takes memory that other processes need.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if options.gpu_memory_bytes:
        cuda["gpu_mem_limit"] = str(options.gpu_memory_bytes)
    # The CPU provider takes shape arithmetic; `check_placement` sees to it that it takes nothing heavy.
    return [(device.provider, cuda), CPU_PROVIDER]


def engine_error(error: BaseException) -> EngineError:
    """What an exception of ONNX Runtime means for the caller: split the batch, rebuild the engine, or neither.

    A CUDA error other than out-of-memory sticks to the process's context. Rebuilding the engine helps where the
    library lost its state; where the context itself is broken, the rebuild fails and the process must be restarted.
    """
    if isinstance(error, EngineError):
        return error
    text = one_line(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return EngineOutOfMemory(f"out of memory: {text}")
    if _DEVICE_LOST.search(str(error)):
        return EngineDead(f"the device failed: {text}")
    return EngineError(text)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's text without line breaks, cut to `limit` characters; its type when it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
