"""Which device computes, and if not the one that was asked for, why not and what to do about it.

ONNX Runtime falls back to the CPU without an error when a CUDA library is missing: a GPU paid for and not used. So
`resolve` looks for everything that CUDA needs *before* a session is opened and fails with a sentence that names the
missing library and the fix. The CPU is used when it is asked for, or when the machine has no NVIDIA GPU at all.

`describe` gives the same findings as a list for `topfive doctor`.
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import onnxruntime
from onnxruntime.capi import build_and_package_info

from topfive.errors import TopfiveError

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"

INSTALL_LIBRARIES: Final = "pip install 'topfive[server,cuda]'"
_NO_GPU: Final = "this machine has no NVIDIA GPU that this process can see"
_DRIVER_FOR_CUDA: Final = {12: 525, 13: 580}
"""CUDA major version -> oldest driver branch that runs it (CUDA release notes, table of minor version compatibility)."""


class DeviceError(TopfiveError):
    """The device asked for cannot be used; the message says what is missing and how to get it."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where an engine computes."""

    kind: Literal["cpu", "cuda"]
    index: int = 0
    """Which GPU; 0 for the CPU."""
    reason: str
    """Why this one: goes to the log and to `/readyz`."""

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the execution provider."""
        return CUDA_PROVIDER if self.kind == "cuda" else CPU_PROVIDER

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


class Check(NamedTuple):
    """One line of `topfive doctor`."""

    name: str
    ok: bool
    detail: str
    fix: str
    """What to do about it; empty when nothing needs doing."""


def resolve(asked: str) -> Device:
    """The device for `--device`: `auto`, `cpu`, `cuda` (the first GPU) or `cuda:N`.

    Raises:
        DeviceError: not one of these, or CUDA cannot be used here; the message says what to do.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::([0-9]{1,3}))?", asked)
    if match is None:
        raise DeviceError(f"device is {asked!r}; it must be auto, cpu, cuda or cuda:N")
    if asked == "cpu":
        return Device(kind="cpu", reason="the CPU was asked for")
    gpus, why_none = count_gpus()
    if asked == "auto" and gpus == 0 and not _gpu_files():
        return Device(kind="cpu", reason=f"auto: {_NO_GPU}")
    index = int(match[1] or 0)
    if gpus == 0:
        raise DeviceError(f"device {asked} cannot be used: {why_none} {_or_cpu()}")
    if index >= gpus:
        raise DeviceError(f"device {asked} cannot be used: there are {gpus} GPUs, numbered from 0")
    for check in cuda_checks():
        if not check.ok:
            raise DeviceError(f"device {asked} cannot be used: {check.detail}. {check.fix} {_or_cpu()}")
    reason = "CUDA was asked for" if asked != "auto" else f"auto: {gpus} GPU{'s' if gpus > 1 else ''} found"
    return Device(kind="cuda", index=index, reason=reason)


def resolve_all(asked: str) -> list[Device]:
    """Like `resolve`, but `auto` and `cuda` mean every GPU that the driver shows; never empty.

    Raises:
        DeviceError: as `resolve`.
    """
    first = resolve(asked)
    if first.kind == "cpu" or ":" in asked:
        return [first]
    gpus, _ = count_gpus()
    return [dataclasses.replace(first, index=index) for index in range(gpus)]


def count_gpus() -> tuple[int, str]:
    """NVIDIA GPUs that the driver shows this process, and a sentence on why when there is none."""
    try:
        driver = load_library("libcuda.so.1")
    except OSError as error:
        if _gpu_files():
            return 0, (
                f"there is an NVIDIA GPU, but its driver's library cannot be loaded ({error}); "
                "in a container, start it with --gpus all (NVIDIA container toolkit)."
            )
        return 0, f"{_NO_GPU} (libcuda.so.1, the driver's library, is not installed)."
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status == 0 and count.value > 0:
        return count.value, ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return 0, f"the driver shows no GPU, and CUDA_VISIBLE_DEVICES is {hidden!r}: unset it."
    return 0, (
        f"the NVIDIA driver is installed but shows no GPU (error {status}); "
        "`nvidia-smi` should list one, and a reboot is needed after a driver update."
    )


def cuda_checks() -> list[Check]:
    """What ONNX Runtime needs for CUDA, beyond a GPU: its own build, the driver's age, and the libraries."""
    return [_check_build(), _check_driver(), *_check_libraries()]


def describe() -> list[Check]:
    """The state of this machine's devices, for `topfive doctor`."""
    gpus, why_none = count_gpus()
    runtime = _check_build()
    checks = [Check("cpu", ok=True, detail=f"{cores()} cores usable", fix="")]
    if gpus == 0 and not _gpu_files():
        # Nothing is broken: there is only nothing to compute on but the CPU.
        checks.append(Check("gpu", ok=True, detail=f"{_NO_GPU}; the CPU serves", fix=""))
    else:
        detail = f"{gpus} NVIDIA GPU{'s' if gpus != 1 else ''}" if gpus else why_none
        fix = "" if gpus else "Make `nvidia-smi` list the GPU."
        checks.append(Check("gpu", ok=gpus > 0, detail=detail, fix=fix))
        checks += cuda_checks()[1:]
        from topfive_server import tensorrt  # noqa: PLC0415  it builds on this module

        checks.append(tensorrt.describe())
    return [runtime, *checks]


def cores(*, hyper_threads: bool = False) -> int:
    """Cores that this process may use: its affinity, within its container's quota.

    Physical ones, for the threads of an engine; with `hyper_threads` each of theirs counts, for work as mixed as decoding.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    count = len(usable if hyper_threads else {_siblings(cpu) for cpu in usable})
    with contextlib.suppress(OSError, ValueError):
        # cgroup v2: "<microseconds> <period>" or "max <period>". More threads than the quota are stalled in turns.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


def _siblings(cpu: int) -> str:
    """The hyper-threads of the physical core that a logical one belongs to."""
    try:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return topology.read_text(encoding="ascii").strip()
    except OSError:  # not on Linux, or hidden
        return str(cpu)


def load_library(name: str) -> Any:
    """Open a shared library, or raise OSError with the loader's reason."""
    return ctypes.CDLL(name)


def preload() -> str:
    """Load the CUDA and cuDNN libraries that pip installed, where ONNX Runtime will find them; returns what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    return said.getvalue()


def cuda_version() -> str:
    """CUDA version that the installed ONNX Runtime was built for, e.g. `13.0`; empty for a build without CUDA."""
    return str(getattr(build_and_package_info, "cuda_version", ""))


def _check_build() -> Check:
    # Both distributions install the same package: the one installed last overwrites files of the other.
    installed = {d for d in ("onnxruntime", "onnxruntime-gpu") if _version(d)}
    name = f"onnxruntime {onnxruntime.__version__}"
    repair = "Run `pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install 'topfive[server]'`."
    if len(installed) > 1:
        return Check("onnxruntime", ok=False, detail=f"{name}: two packages overwrite each other", fix=repair)
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return Check("onnxruntime", ok=False, detail=f"{name} was built without CUDA", fix=repair)
    return Check("onnxruntime", ok=True, detail=f"{name}, built for CUDA {cuda_version()}", fix="")


def _check_driver() -> Check:
    wanted = cuda_version()
    major = int(wanted.split(".")[0] or 0) if wanted else 0
    version = ctypes.c_int(0)
    try:
        load_library("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError as error:
        return Check(
            "driver",
            ok=False,
            detail=f"the driver's library cannot be loaded ({error})",
            fix="Install the NVIDIA driver.",
        )
    has = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if version.value // 1000 < major:
        detail = f"the NVIDIA driver supports CUDA up to {has}, and onnxruntime-gpu needs {wanted}"
        branch = _DRIVER_FOR_CUDA.get(major)
        newer = f"driver {branch} or newer" if branch else "a newer driver"
        return Check("driver", ok=False, detail=detail, fix=f"Install {newer}.")
    return Check("driver", ok=True, detail=f"supports CUDA {has}", fix="")


def _check_libraries() -> list[Check]:
    try:
        said = preload()
    except Exception as error:  # noqa: BLE001  whatever stops preloading, the libraries themselves are looked for next
        said = str(error)
    missing = {}
    for library in required_libraries(cuda_version()):
        try:
            load_library(library)
        except OSError as error:
            missing[library] = str(error)
    if not missing:
        return [Check("cuda libraries", ok=True, detail="CUDA and cuDNN can be loaded", fix="")]
    reasons = "; ".join(missing.values())
    detail = f"missing {', '.join(missing)} ({reasons})"
    fix = f"Install them with `{INSTALL_LIBRARIES}`."
    if other := re.findall(r"Failed to load (/\S+): (.+)", said):
        detail += f"; {other[0][0]} is there but does not load: {other[0][1]}"
    return [Check("cuda libraries", ok=False, detail=detail, fix=fix)]


def required_libraries(cuda: str) -> list[str]:
    """Libraries that ONNX Runtime's CUDA provider, built for that CUDA version, opens to run a convolution."""
    major = cuda.partition(".")[0] or "13"
    return [f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcurand.so.10", "libcudnn.so.9"]


def _gpu_files() -> list[str]:
    """Traces that a GPU's kernel driver leaves even where its library is not installed (in a container, say)."""
    return [str(p) for p in (*Path("/dev").glob("nvidia[0-9]*"), *Path("/proc/driver/nvidia/gpus").glob("*"))]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _or_cpu() -> str:
    return "To serve on the CPU instead, say --device cpu."
