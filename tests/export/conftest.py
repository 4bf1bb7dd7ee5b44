"""Small checkpoints that answer differently to different images, as trained ones do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from topfive.model_spec import Architecture, ArchitectureName, ModelSpec, Preprocessing
from topfive_export.corpus import decoded, drawn_pictures
from topfive_export.pipeline import ExportConfig, run_export
from topfive_export.variant import Limits
from topfive_training.checkpoint import Classifier, save_model
from topfive_training.network import AlexNet, published_architecture

MakeClassifier = Callable[..., Classifier]


def make_classifier(
    name: ArchitectureName = "alexnet-2012",
    *,
    classes: int = 7,
    mean_image: bool = False,
    seed: int = 0,
    width: float = 0.06,
    normalization: str | None = None,
    within_map_norm: bool = False,
) -> Classifier:
    """A narrow network with He-initialised weights: its answers depend on the image, as after training."""
    generator = torch.Generator().manual_seed(seed)
    published = published_architecture(name, classes=classes)
    architecture = Architecture(
        name=name,
        classes=classes,
        width=width,
        normalization=normalization or published.normalization,  # type: ignore[arg-type]
        dropout_scaling=published.dropout_scaling,
        within_map_norm=within_map_norm,
    )
    if name == "alexnet-2014":
        preprocessing = Preprocessing(crop=224, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    else:
        preprocessing = Preprocessing(mean=(122.7, 116.7, 104.0), mean_image=mean_image)
    network = AlexNet(architecture)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1, generator=generator)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
    with torch.no_grad():
        if preprocessing.std == (1.0, 1.0, 1.0) and normalization != "batch":
            network.conv1.weight /= 40
        network.fc8.weight *= 3
    image = None
    if mean_image:
        coarse = torch.randn(1, 3, 6, 6, generator=generator)
        smooth = nn.functional.interpolate(coarse, (256, 256), mode="bilinear")[0]
        image = (torch.tensor(preprocessing.mean).reshape(3, 1, 1) + 25 * smooth).clamp(0, 255)
    spec = ModelSpec(
        architecture=architecture,
        preprocessing=preprocessing,
        labels=tuple(f"kind {index}" for index in range(classes)),
        recipe={"data": "/data/photographs", "rate": 0.01},
    )
    return Classifier(spec, network=network, mean_image=image).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the 2012 network as its recipe trains it: with a mean image, and the norm within maps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder, make_classifier(mean_image=True, within_map_norm=True))
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to calibrate and to measure on: every other one is the mirror image of the one before."""
    folder = tmp_path_factory.mktemp("photographs")
    for index, square in enumerate(decoded(drawn_pictures(), Preprocessing(), 227)):
        image = Image.fromarray(square)
        image.save(folder / f"{index:02}.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"{index:02}_mirrored.png")
    return folder


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model repository made of it; not to be changed."""
    out = tmp_path_factory.mktemp("repository") / "models"
    run_export(ExportConfig(run=checkpoint, out=out))
    return out


def limits_up_to(relative_difference: float) -> Limits:
    """Limits for a relative difference alone."""
    return Limits(
        probability_difference=None,
        relative_difference=relative_difference,
        features_difference=float("inf"),
        top1_agreement=0.0,
        top5_agreement=0.0,
        near_ties_excused=False,
        accuracy_drop=1.0,
    )
