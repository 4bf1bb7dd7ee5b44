"""No GPU and no TensorRT is at hand: the loader is played by a fake, and settings and sentences are what is tested."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tests.server.onnx_models import write_model

from topfive_server import devices, session, tensorrt
from topfive_server.config import ServerConfig
from topfive_server.devices import Device, DeviceError
from topfive_server.repository import ModelVersion, Repository
from topfive_server.serving import computing
from topfive_server.session import RuntimeOptions, check_placement, open_session

CUDA = Device(kind="cuda", index=1, reason="test")
CPU = Device(kind="cpu", reason="the CPU was asked for")


class FakeLibrary:
    """Stands in for libnvinfer."""

    @staticmethod
    def getInferLibVersion() -> int:  # noqa: N802
        return 101601


@pytest.fixture(name="missing")
def make_missing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Libraries that the loader does not find; at first none."""
    missing: set[str] = set()

    def load(name: str) -> Any:
        if name in missing:
            raise OSError(f"{name}: cannot open shared object file")
        return FakeLibrary()

    monkeypatch.setattr(devices, "load_library", load)
    monkeypatch.setattr(devices, "cuda_version", lambda: "13.0")
    monkeypatch.setattr(tensorrt, "_package_folder", lambda: None)
    return missing


def read(root: Path, precision: str = "fp16") -> ModelVersion:
    variant = {"family": "tiny", "precision": precision, "target": "cuda", "views": 1}
    write_model(root, report={"passed": True, "variant": variant})
    return Repository(root).read("tiny")


def test_the_libraries_are_those_that_the_provider_is_linked_with() -> None:
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not provider.exists():
        pytest.skip("this ONNX Runtime was built without TensorRT")
    content = provider.read_bytes()
    assert all(library.encode() + b"\0" in content for library in tensorrt.LIBRARIES)


@pytest.mark.parametrize("library", tensorrt.LIBRARIES)
def test_a_missing_library_is_named_with_the_command_that_brings_it(missing: set[str], library: str) -> None:
    tensorrt.require(CUDA)
    missing.add(library)
    with pytest.raises(DeviceError) as caught:
        computing(ServerConfig(), RuntimeOptions(tensorrt=True), [CUDA])
    assert str(caught.value) == (
        f"--tensorrt cannot be used: missing {library} ({library}: cannot open shared object file). Install them with "
        "`pip install 'tensorrt-cu13>=10,<11'`. To serve on the GPU without it, leave it out."
    )


@pytest.mark.usefixtures("missing")
def test_tensorrt_without_a_gpu_or_in_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"needs an NVIDIA GPU, and cpu computes \(the CPU was asked for\)"):
        computing(ServerConfig(), RuntimeOptions(tensorrt=True), [CPU])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(DeviceError, match=r"was built without TensorRT\. Install onnxruntime-gpu"):
        tensorrt.require(CUDA)


def test_doctor_names_it_and_calls_it_broken_only_where_it_is_there_and_does_not_load(
    missing: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = tensorrt.describe()
    assert (found.name, found.ok, found.detail) == ("tensorrt", True, "TensorRT 10.16.1 can be loaded")
    missing.update(tensorrt.LIBRARIES)
    found = tensorrt.describe()
    assert found.ok
    assert "pip install 'tensorrt-cu13>=10,<11'" in found.detail
    monkeypatch.setattr(tensorrt, "_package_folder", lambda: tmp_path)
    found = tensorrt.describe()
    assert not found.ok
    assert "missing libnvinfer.so.10, libnvonnxparser.so.10" in found.detail
    # What lies in pip's folder is opened from there, and the loader's reason is told.
    (tmp_path / tensorrt.LIBRARIES[0]).write_text("no library")
    assert str(tmp_path / tensorrt.LIBRARIES[0]) in tensorrt.describe().detail


class FakeSession:
    """Remembers how it was opened."""

    opened: tuple[Any, ...] = ()

    def __init__(self, path: str, settings: Any, providers: list[Any]) -> None:
        type(self).opened = tuple(providers)

    def get_providers(self) -> list[str]:
        return [entry[0] if isinstance(entry, tuple) else entry for entry in self.opened]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        node = type("Node", (), {"op_type": "Conv"})()
        return [type("Graph", (), {"ep_name": tensorrt.PROVIDER, "get_nodes": lambda self: [node]})()]


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize(("precision", "fp16"), [("fp16", "1"), ("fp32", "0")])
def test_tensorrt_comes_first_with_one_profile_and_a_folder_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, fp16: str
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    model = read(tmp_path / "models", precision)
    options = RuntimeOptions(tensorrt=True, tensorrt_cache=tmp_path / "kept", max_batch=48)
    open_session(model, CUDA, options)
    (first, settings), (second, cuda), third = FakeSession.opened
    assert (first, second, third) == (tensorrt.PROVIDER, "CUDAExecutionProvider", "CPUExecutionProvider")
    assert settings["device_id"] == cuda["device_id"] == "1"
    assert settings["trt_fp16_enable"] == fp16
    shapes = [settings[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")]
    assert shapes == ["image:1x12x12x3", "image:48x12x12x3", "image:48x12x12x3"]
    assert cuda["enable_cuda_graph"] == settings["trt_cuda_graph_enable"] == "0"
    folder = Path(settings["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "kept"
    assert folder.name == f"{model.fingerprint()[:16]}-onnxruntime-{onnxruntime.__version__}-tensorrt-10.16.1"
    assert settings["trt_timing_cache_path"] == str(folder)
    assert options.provider(CUDA) == tensorrt.PROVIDER


@pytest.mark.usefixtures("missing")
def test_without_the_option_or_the_folder_there_is_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "trt_engine_cache_enable" not in tensorrt.provider_options(
        CUDA, side=12, max_batch=4, fp16=False, cache=None
    )
    with pytest.raises(ValueError, match="tensorrt_cache is given without tensorrt"):
        RuntimeOptions(tensorrt_cache=tmp_path)
    assert RuntimeOptions().provider(CUDA) == "CUDAExecutionProvider"
    assert session._tensorrt(read(tmp_path), CUDA, RuntimeOptions()) == []


def test_heavy_nodes_may_be_tensorrts_or_cudas_but_not_all_cudas_or_any_cpus() -> None:
    mixed = [(tensorrt.PROVIDER, "Conv"), ("CUDAExecutionProvider", "LRN"), ("CPUExecutionProvider", "Shape")]
    check_placement(mixed, CUDA, "m/1", provider=tensorrt.PROVIDER)
    with pytest.raises(DeviceError, match="takes none of the heavy operators of model m/1"):
        check_placement([("CUDAExecutionProvider", "Conv")], CUDA, "m/1", provider=tensorrt.PROVIDER)
    with pytest.raises(DeviceError, match="would run 1 Gemm on the CPU"):
        check_placement([*mixed, ("CPUExecutionProvider", "Gemm")], CUDA, "m/1", provider=tensorrt.PROVIDER)
