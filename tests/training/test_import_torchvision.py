import functools
import hashlib
import http.server
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from topfive_training.checkpoint import load_model
from topfive_training.importers import torchvision
from topfive_training.importers.cli import import_torchvision
from topfive_training.importers.common import WeightsError, read_labels


class PublishedAlexNet(nn.Module):
    """The modules and their order as torchvision's source has them, so that the names are the published ones."""

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        c1, c2, c3, c4, c5, units = (int(n * width) for n in (64, 192, 384, 256, 256, 4096))
        self.features = nn.Sequential(
            nn.Conv2d(3, c1, kernel_size=11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(c1, c2, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(c2, c3, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(c3, c4, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(c4, c5, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(c5 * 36, units), nn.ReLU(),
            nn.Dropout(), nn.Linear(units, units), nn.ReLU(),
            nn.Linear(units, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return result


@functools.cache
def published(classes: int = 7, width: float = 1 / 8) -> PublishedAlexNet:
    torch.manual_seed(0)
    return PublishedAlexNet(classes, width).eval()


def save(folder: Path, state: Any, *, suffix: str = ".pth", **options: Any) -> Path:
    """A file named as torchvision names them: the start of its own hash in the name."""
    file = folder / f"draft{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file, **options)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return file.rename(folder / f"alexnet-owt-{digest[:8]}{suffix}")


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".pth", {}), (".pth", {"_use_new_zipfile_serialization": False}), (".safetensors", {})],
)
def test_answers_are_those_of_torchvision(tmp_path: Path, suffix: str, options: dict[str, bool]) -> None:
    model = published()
    file = save(tmp_path, model.state_dict(), suffix=suffix, **options)
    import_torchvision(file, out=tmp_path / "run", unnamed_classes=True)
    classifier = load_model(tmp_path / "run")

    images_BHWC = torch.randint(0, 256, (3, 224, 224, 3), generator=torch.Generator().manual_seed(1)).byte()
    # What torchvision's transforms do: ToTensor, then Normalize.
    x = images_BHWC.permute(0, 3, 1, 2).double() / 255
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).reshape(3, 1, 1)
    with torch.no_grad():
        expected = model.double()((x - mean) / std)
        model.float()
        torch.testing.assert_close(classifier(images_BHWC).double(), expected, rtol=1e-4, atol=1e-5)
    spec = classifier.spec
    assert spec.architecture.name == "alexnet-2014"
    assert (spec.preprocessing.crop, spec.preprocessing.short_side) == (224, 256)
    assert spec.recipe["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert spec.labels[6] == "class 6"


def test_the_published_shapes_at_full_width(tmp_path: Path) -> None:
    model = PublishedAlexNet(1000, 1.0)
    file = save(tmp_path, model.state_dict())
    labels = {str(i): [f"n{i:08d}", f"thing {i}"] for i in range(1000)}
    (tmp_path / "imagenet_class_index.json").write_text(json.dumps(labels))
    import_torchvision(file, out=tmp_path / "run", labels=tmp_path / "imagenet_class_index.json")
    classifier = load_model(tmp_path / "run")
    assert sum(p.numel() for p in classifier.network.parameters()) == 61_100_840
    assert classifier.spec.architecture.width == 1.0
    assert classifier.spec.labels[123] == "thing 123"
    torch.testing.assert_close(classifier.network.fc6.weight.data, model.state_dict()["classifier.1.weight"])


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, published().state_dict())
    renamed = file.rename(tmp_path / "alexnet-owt-7be5be79.pth")
    with pytest.raises(WeightsError, match=r"its SHA-256 begins with \w{8}, not 7be5be79"):
        import_torchvision(renamed, out=tmp_path / "run", unnamed_classes=True)


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("wrapped", [True, False])
def test_nothing_in_the_file_is_executed(tmp_path: Path, wrapped: bool) -> None:
    bomb = Bomb(tmp_path / "canary")
    file = save(tmp_path, {**published().state_dict(), "bomb": bomb} if wrapped else bomb)
    with pytest.raises(WeightsError, match="holds more than tensors"):
        import_torchvision(file, out=tmp_path / "run", unnamed_classes=True)
    assert not (tmp_path / "canary").exists()


def test_other_contents_are_refused_with_the_reason(tmp_path: Path) -> None:
    state = published().state_dict()

    def complaint(contents: Any, **options: Any) -> str:
        file = save(tmp_path, contents, **options)
        with pytest.raises(WeightsError) as caught:
            import_torchvision(file, out=tmp_path / "run", unnamed_classes=True)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    lacking = {name: value for name, value in state.items() if name != "features.3.bias"}
    assert "it lacks features.3.bias" in complaint(lacking)
    assert "it also has extra" in complaint({**state, "extra": torch.zeros(1)})
    assert "must map names to tensors" in complaint({"epoch": 3, "state_dict": state})
    assert "must map names to tensors" in complaint([torch.zeros(1)])
    narrow = {**state, "classifier.4.weight": torch.zeros(504, 512)}
    assert (
        "fc7.weight is [504, 512]; alexnet-2014 at the width of its conv1 (0.125) needs [512, 512]"
        in complaint(narrow)
    )
    broken = {**state, "features.0.bias": torch.full((8,), torch.nan)}
    assert "conv1.bias holds values that are not finite" in complaint(broken)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path, published().state_dict(), suffix=suffix).read_bytes()
    for contents in (b"", b"not weights", whole[:-5000], whole[:100]):
        (tmp_path / f"weights{suffix}").write_bytes(contents)
        with pytest.raises(WeightsError, match=re.escape(f"weights{suffix}")):
            import_torchvision(tmp_path / f"weights{suffix}", out=tmp_path / "run", unnamed_classes=True)
    with pytest.raises(WeightsError, match="No such file"):
        import_torchvision(tmp_path / f"nowhere{suffix}", out=tmp_path / "run", unnamed_classes=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download(tmp_path: Path, hub: Path, site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = site
    file = save(folder, published().state_dict())
    monkeypatch.setattr(torchvision, "PUBLISHED_URL", f"{address}/{file.name}")
    monkeypatch.setattr(torchvision, "_PUBLISHED_HASH", file.stem.rsplit("-", 1)[1])
    import_torchvision(out=tmp_path / "run", download=True, unnamed_classes=True)
    assert load_model(tmp_path / "run").spec.recipe["file"] == file.name
    assert (hub / file.name).read_bytes() == file.read_bytes()
    # The second time it is at hand.
    file.unlink()
    import_torchvision(out=tmp_path / "again", download=True, unnamed_classes=True)


def test_a_download_with_another_hash_is_refused(
    tmp_path: Path, hub: Path, site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = site
    save(folder, published().state_dict()).rename(folder / "alexnet-owt-7be5be79.pth")
    monkeypatch.setattr(torchvision, "PUBLISHED_URL", f"{address}/alexnet-owt-7be5be79.pth")
    with pytest.raises(WeightsError, match="invalid hash value"):
        import_torchvision(out=tmp_path / "run", download=True, unnamed_classes=True)
    assert not list(hub.iterdir())


def test_without_a_network_it_says_what_to_do(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(torchvision, "PUBLISHED_URL", f"http://127.0.0.1:{port}/alexnet-owt-7be5be79.pth")
    with pytest.raises(
        WeightsError,
        match=r"Connection refused.*name the file: topfive import torchvision alexnet-owt-7be5be79\.pth",
    ):
        import_torchvision(out=tmp_path / "run", download=True, unnamed_classes=True)


def test_file_or_download(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="name the file of weights, or give --download"):
        import_torchvision(out=tmp_path / "run", unnamed_classes=True)
    with pytest.raises(WeightsError, match="and not both"):
        import_torchvision(tmp_path / "x.pth", out=tmp_path / "run", download=True, unnamed_classes=True)


@pytest.mark.parametrize(
    "text",
    ["tench\nred fox, fox\n", "n01440764 tench\nn02119022 red fox, fox\n\n", '["tench", "red fox, fox"]',
     '{"1": ["n02119022", "red fox, fox"], "0": ["n01440764", "tench"]}'],
)  # fmt: skip
def test_labels_in_every_usual_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    assert read_labels(tmp_path / "labels", 2) == ("tench", "red fox, fox")


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    for text, sentence in (
        ('{"a": 1}', "keys 0, 1, 2"), ("[1,", "not a JSON list"), ("one\n", "1 names; the weights have 2 classes"),
    ):  # fmt: skip
        (tmp_path / "labels").write_text(text)
        with pytest.raises(WeightsError, match=sentence):
            read_labels(tmp_path / "labels", 2)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_labels(tmp_path / "nowhere", 2)
