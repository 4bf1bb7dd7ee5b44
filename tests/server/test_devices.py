"""No GPU is at hand: the loader and the driver are played by fakes, and the sentences are what is tested."""

import ctypes
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import onnxruntime
import pytest

from topfive_server import devices
from topfive_server.config import ServerConfig
from topfive_server.devices import (
    Device,
    DeviceError,
    cores,
    describe,
    required_libraries,
    resolve,
    resolve_all,
)


class FakeMachine:
    """A machine with these GPUs, libraries and driver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = 1
        self.driver = 13010
        self.missing: set[str] = set()
        self.device_files = ["/dev/nvidia0"]
        self.preload_says = ""
        monkeypatch.setattr(devices, "load_library", self.load)
        monkeypatch.setattr(devices, "_gpu_files", lambda: self.device_files)
        monkeypatch.setattr(devices, "preload", lambda: self.preload_says)
        monkeypatch.setattr(devices, "cuda_version", lambda: "13.0")

    def load(self, name: str) -> Any:
        if name in self.missing:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return self

    def getInferLibVersion(self) -> int:  # noqa: N802
        return 101601

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self.gpus else 100

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self.gpus
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = self.driver
        return 0


@pytest.fixture(name="machine")
def make_machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return FakeMachine(monkeypatch)


@pytest.fixture(name="bare")
def make_bare_machine(machine: FakeMachine) -> FakeMachine:
    """No GPU at all."""
    machine.gpus, machine.device_files = 0, []
    machine.missing = {"libcuda.so.1", *required_libraries("13.0")}
    return machine


def refusal(asked: str) -> str:
    with pytest.raises(DeviceError) as caught:
        resolve(asked)
    return str(caught.value)


def test_a_gpu_is_used_when_everything_is_there(machine: FakeMachine) -> None:
    machine.gpus = 2
    assert str(resolve("cuda")) == "cuda:0"
    assert resolve("cuda:1") == Device(kind="cuda", index=1, reason="CUDA was asked for")
    assert resolve("auto").reason == "auto: 2 GPUs found"
    assert resolve("auto").provider == "CUDAExecutionProvider"


def test_all_gpus_are_used_unless_one_is_named(machine: FakeMachine) -> None:
    machine.gpus = 3
    for asked in ("auto", "cuda"):
        assert [str(device) for device in resolve_all(asked)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(device) for device in resolve_all("cuda:1")] == ["cuda:1"]
    assert [str(device) for device in resolve_all("cpu")] == ["cpu"]


def test_the_cpu_is_used_when_asked_for_or_when_there_is_no_gpu_at_all(bare: FakeMachine) -> None:
    assert resolve("cpu").reason == "the CPU was asked for"
    auto = resolve("auto")
    assert (auto.kind, auto.provider, str(auto)) == ("cpu", "CPUExecutionProvider", "cpu")
    assert auto.reason == "auto: this machine has no NVIDIA GPU that this process can see"


@pytest.mark.usefixtures("bare")
def test_cuda_without_a_gpu_fails_and_says_so() -> None:
    assert refusal("cuda") == (
        "device cuda cannot be used: this machine has no NVIDIA GPU that this process can see "
        "(libcuda.so.1, the driver's library, is not installed). To serve on the CPU instead, say --device cpu."
    )


@pytest.mark.parametrize("asked", ["auto", "cuda"])
@pytest.mark.parametrize("library", required_libraries("13.0"))
def test_a_missing_library_is_named_with_the_fix_and_is_no_reason_for_the_cpu(
    machine: FakeMachine, asked: str, library: str
) -> None:
    machine.missing = {library}
    sentence = refusal(asked)
    assert f"missing {library} ({library}: cannot open shared object file" in sentence
    assert "pip install 'topfive[server,cuda]'" in sentence
    assert sentence.endswith("say --device cpu.")


def test_a_library_that_is_there_but_does_not_load_is_named(machine: FakeMachine) -> None:
    machine.missing = {"libcudnn.so.9"}
    machine.preload_says = "Failed to load /site/nvidia/cudnn/lib/libcudnn.so.9: file too short\n"
    assert "/site/nvidia/cudnn/lib/libcudnn.so.9 is there but does not load: file too short" in refusal(
        "cuda"
    )


def test_an_old_driver_is_named_with_the_one_that_would_do(machine: FakeMachine) -> None:
    machine.driver = 12080
    sentence = refusal("auto")
    assert "the NVIDIA driver supports CUDA up to 12.8, and onnxruntime-gpu needs 13.0" in sentence
    assert "Install driver 580 or newer." in sentence


def test_a_container_without_the_toolkit_is_told_apart_from_a_machine_without_gpu(
    machine: FakeMachine,
) -> None:
    machine.missing = {"libcuda.so.1"}
    for asked in ("auto", "cuda"):
        assert "start it with --gpus all" in refusal(asked)


def test_a_driver_that_shows_no_gpu_is_a_sentence(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpus = 0
    assert "shows no GPU (error 100); `nvidia-smi` should list one" in refusal("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is '': unset it" in refusal("cuda")


def test_a_gpu_number_that_does_not_exist(machine: FakeMachine) -> None:
    machine.gpus = 2
    assert "there are 2 GPUs, numbered from 0" in refusal("cuda:2")


def test_a_build_without_cuda_and_two_builds_at_once(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        assert "was built without CUDA. Run `pip uninstall -y onnxruntime onnxruntime-gpu`" in refusal("cuda")
    monkeypatch.setattr(devices, "_version", lambda distribution: "1.0")
    assert "two packages overwrite each other" in refusal("cuda")


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "CPU", "cuda:9999"])
def test_other_words_are_refused(asked: str) -> None:
    assert refusal(asked) == f"device is {asked!r}; it must be auto, cpu, cuda or cuda:N"


def test_doctor_finds_nothing_wrong_without_a_gpu(bare: FakeMachine) -> None:
    checks = describe()
    assert [check.name for check in checks] == ["onnxruntime", "cpu", "gpu"]
    assert all(check.ok and check.detail and not check.fix for check in checks)


def test_doctor_lists_what_a_gpu_lacks(machine: FakeMachine) -> None:
    machine.missing = {"libcudnn.so.9", "libcublas.so.13"}
    checks = {check.name: check for check in describe()}
    assert list(checks) == ["onnxruntime", "cpu", "gpu", "driver", "cuda libraries", "tensorrt"]
    assert not checks["cuda libraries"].ok
    assert "missing libcublas.so.13, libcudnn.so.9" in checks["cuda libraries"].detail
    assert "topfive[server,cuda]" in checks["cuda libraries"].fix
    machine.missing = set()
    assert all(check.ok for check in describe())


def test_on_this_machine_the_real_checks_run() -> None:
    """Whatever this machine is: no exception, and a fix beside every fault."""
    for check in [*describe(), *devices.cuda_checks()]:
        assert check.ok or check.fix, check


@pytest.mark.parametrize(
    ("quota", "physical", "logical"),
    [("max 100000", 4, 8), ("500000 100000", 4, 5), ("150000 100000", 2, 2), ("10000 100000", 1, 1)],
)
def test_neither_the_engine_nor_decoding_has_more_threads_than_a_containers_quota(
    monkeypatch: pytest.MonkeyPatch, quota: str, physical: int, logical: int
) -> None:
    def read(path: Path, **kwargs: Any) -> str:
        if path.name == "cpu.max":
            return quota
        cpu = int(path.parts[-3].removeprefix("cpu"))
        return f"{cpu % 4},{cpu % 4 + 4}\n"

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", read)
    assert cores() == physical
    assert ServerConfig().resolved_decode_threads == logical


def test_cores_are_known_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=FileNotFoundError))
    assert (cores(), cores(hyper_threads=True)) == (3, 3)
