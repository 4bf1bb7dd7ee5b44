"""Checkpoints: back as they went, whole or not at all, and refused in a sentence when they are damaged."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from topfive.model_spec import Architecture, ModelSpec, Preprocessing
from topfive_training import checkpoint
from topfive_training.checkpoint import CheckpointError, Classifier, link_model, load_model, save_model


def classifier(*, mean_image: bool = True) -> Classifier:
    spec = ModelSpec(
        architecture=Architecture(classes=3, width=0.02),
        preprocessing=Preprocessing(mean=(1, 2, 3), mean_image=mean_image),
        labels=("a", "b", "c"),
    )
    image = torch.rand(3, 256, 256) * 255 if mean_image else None
    return Classifier(spec, mean_image=image, color_components=torch.rand(3, 3).T).eval()


@pytest.mark.parametrize("mean_image", [True, False])
def test_a_checkpoint_comes_back_as_it_went(tmp_path: Path, mean_image: bool) -> None:
    model = classifier(mean_image=mean_image)
    save_model(tmp_path / "run", model)
    again = load_model(tmp_path / "run")
    images = torch.randint(0, 256, (2, 227, 227, 3), dtype=torch.uint8)
    assert torch.equal(again(images), model(images))
    assert again.spec == model.spec
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert again.color_components is not None
    # In memory as well as in value: a product with a matrix stored by columns may round differently after a resume.
    assert model.color_components is not None
    assert torch.equal(again.color_components, model.color_components)
    assert again.color_components.stride() == model.color_components.stride()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.json", "model.safetensors"]


def test_the_mean_is_the_central_crop_of_the_mean_image() -> None:
    model = classifier()
    assert model.mean_image is not None
    images = torch.randint(0, 256, (1, 227, 227, 3), dtype=torch.uint8)
    expected = images[0].permute(2, 0, 1).double() - model.mean_image[:, 14:241, 14:241].double()
    torch.testing.assert_close(model.normalize(images)[0].double(), expected)


def test_a_failing_write_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier()
    save_model(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_tensors: object, path: Path, _metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with torch.no_grad():
        model.network.fc8.bias.add_(1)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path, model)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_linked_checkpoint_does_not_follow_its_original(tmp_path: Path) -> None:
    model = classifier()
    save_model(tmp_path, model)
    link_model(tmp_path, tmp_path / "best")
    best = load_model(tmp_path / "best")
    with torch.no_grad():
        model.network.fc8.bias.add_(1)
    save_model(tmp_path, model)
    assert torch.equal(load_model(tmp_path / "best").network.fc8.bias, best.network.fc8.bias)
    assert not torch.equal(load_model(tmp_path).network.fc8.bias, best.network.fc8.bias)


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle?")


def other_width(folder: Path) -> None:
    record = json.loads((folder / "model.json").read_text())
    record["architecture"]["width"] = 0.1
    (folder / "model.json").write_text(json.dumps(record))


def lose_a_layer(folder: Path) -> None:
    tensors, _ = checkpoint.load_tensors(folder / "model.safetensors")
    del tensors["fc7.bias"]
    checkpoint.save_tensors(folder / "model.safetensors", tensors)


def lose_the_mean(folder: Path) -> None:
    tensors, _ = checkpoint.load_tensors(folder / "model.safetensors")
    del tensors[checkpoint.MEAN_IMAGE]
    checkpoint.save_tensors(folder / "model.safetensors", tensors)


def spoil_a_weight(folder: Path) -> None:
    tensors, _ = checkpoint.load_tensors(folder / "model.safetensors")
    tensors["fc6.bias"][0] = torch.nan
    checkpoint.save_tensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (damage_weights, "model.safetensors cannot be read as safetensors"),
        (other_width, r"conv\d.\w+ is .* needs"),
        (lose_a_layer, "lacks fc7.bias"),
        (lose_the_mean, "the mean image is missing"),
        (spoil_a_weight, "fc6.bias holds values that are not finite"),
        (lambda folder: (folder / "model.json").unlink(), "it has no model.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, spoil, sentence: str) -> None:  # type: ignore[no-untyped-def]
    save_model(tmp_path, classifier())
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        load_model(tmp_path)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        checkpoint.load_tensors(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: No such file or directory"):
        checkpoint.load_tensors(tmp_path / "model.safetensors")
