"""TensorRT as ONNX Runtime's first choice on a GPU: what it needs, and how it is set.

It compiles a graph for one GPU, one TensorRT and one range of batch sizes, which takes minutes and is kept in a folder.
ONNX Runtime names the kept files by the graph's shape, not by its weights, so each version of a model gets a folder of
its own here, and each version of the libraries too.

Not tried on a GPU yet: the settings follow ONNX Runtime's documentation, and what is tested is that they are these.
"""

import ctypes
import importlib.util
from pathlib import Path
from typing import Final

import onnxruntime

from topfive_server import devices
from topfive_server.devices import Check, Device, DeviceError

PROVIDER: Final = "TensorrtExecutionProvider"
LIBRARIES: Final = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What ONNX Runtime's TensorRT provider is linked with, beyond CUDA's; a test compares them with the provider's file."""
_PACKAGE: Final = "tensorrt_libs"
"""Where `pip install tensorrt-cu13` puts them; the loader does not look there."""


def install_command() -> str:
    """What brings the libraries for the CUDA of this ONNX Runtime."""
    major = devices.cuda_version().partition(".")[0] or "13"
    return f"pip install 'tensorrt-cu{major}>=10,<11'"


def check() -> Check:
    """Whether this ONNX Runtime has the provider and its libraries load."""
    if PROVIDER not in onnxruntime.get_available_providers():
        detail = f"onnxruntime {onnxruntime.__version__} was built without TensorRT"
        return Check("tensorrt", ok=False, detail=detail, fix="Install onnxruntime-gpu.")
    missing = {}
    for library in LIBRARIES:
        try:
            _load(library)
        except OSError as error:
            missing[library] = str(error)
    if missing:
        detail = f"missing {', '.join(missing)} ({'; '.join(missing.values())})"
        return Check("tensorrt", ok=False, detail=detail, fix=f"Install them with `{install_command()}`.")
    return Check("tensorrt", ok=True, detail=f"TensorRT {version()} can be loaded", fix="")


def describe() -> Check:
    """A line of `topfive doctor`: who does not use TensorRT lacks nothing without it."""
    found = check()
    if found.ok or _package_folder() is not None:
        return found
    return found._replace(
        ok=True, detail=f"not installed, and only --tensorrt needs it: {install_command()}", fix=""
    )


def require(device: Device) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        DeviceError: no GPU, or a library is missing; the message says which and how to get it.
    """
    if device.kind != "cuda":
        raise DeviceError(f"--tensorrt needs an NVIDIA GPU, and {device} computes ({device.reason})")
    found = check()
    if not found.ok:
        raise DeviceError(
            f"--tensorrt cannot be used: {found.detail}. {found.fix} To serve on the GPU without it, leave it out."
        )


def version() -> str:
    """Of the library, e.g. `10.16.1`."""
    number = int(_load(LIBRARIES[0]).getInferLibVersion())
    # 10000 x major + 100 x minor + patch since TensorRT 10 (NvInferVersion.h).
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def provider_options(
    device: Device, *, side: int, max_batch: int, fp16: bool, cache: Path | None
) -> dict[str, str]:
    """Settings of the provider: one engine for every batch from 1 to `max_batch`, fastest at the largest."""
    settings = {
        "device_id": str(device.index),
        "trt_fp16_enable": str(int(fp16)),
        # Without a profile it would compile anew for every batch size that it has not seen.
        "trt_profile_min_shapes": f"image:1x{side}x{side}x3",
        "trt_profile_opt_shapes": f"image:{max_batch}x{side}x{side}x3",
        "trt_profile_max_shapes": f"image:{max_batch}x{side}x{side}x3",
        # It fuses the network into a few launches; a graph for each bucket of one engine is undocumented.
        "trt_cuda_graph_enable": "0",
    }
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        settings |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
        }
    return settings


def cache_folder(root: Path, fingerprint: str) -> Path:
    """Where the engines of one version of a model are kept, for these versions of the libraries."""
    return (
        root.expanduser() / f"{fingerprint[:16]}-onnxruntime-{onnxruntime.__version__}-tensorrt-{version()}"
    )


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return next((Path(place) for place in places), None)


def _load(library: str) -> ctypes.CDLL:
    """Open a library from where the loader looks, or else from pip's package.

    Raises:
        OSError: the loader's reason.
    """
    folder = _package_folder()
    if folder is not None and (folder / library).exists():
        # Once it is in the process, ONNX Runtime finds it by its name.
        return ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
    loaded: ctypes.CDLL = devices.load_library(library)
    return loaded
