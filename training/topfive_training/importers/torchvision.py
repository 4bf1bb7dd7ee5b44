"""Reads torchvision's `alexnet`, without running anything that the file might hold.

The network of "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014); torchvision states
56.52 % top-1 and 79.07 % top-5 for its ImageNet weights.
"""

import pickle
import urllib.error
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from topfive.model_spec import Json, Preprocessing
from topfive_training.checkpoint import CheckpointError, load_tensors
from topfive_training.importers.common import Imported, WeightsError, architecture_of, sha256_of
from topfive_training.network import TORCHVISION_NAMES, AlexNet

PUBLISHED_URL: Final = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
"""`torchvision.models.AlexNet_Weights.IMAGENET1K_V1`."""
PREPROCESSING: Final = Preprocessing(
    short_side=256,
    crop=224,
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255),
    std=(0.229 * 255, 0.224 * 255, 0.225 * 255),
)
"""What torchvision's weights were trained with, on the 0-255 scale."""
_PUBLISHED_HASH: Final = "7be5be79"
_DROPOUT: Final = 0.5


def published_weights() -> Path:
    """Download the published ImageNet weights, or find them where PyTorch's hub keeps its files.

    Raises:
        WeightsError: they could not be fetched.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / PUBLISHED_URL.rsplit("/", 1)[-1]
    if file.exists():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(PUBLISHED_URL, str(file), hash_prefix=_PUBLISHED_HASH)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"{PUBLISHED_URL} could not be downloaded ({_reason(error)}); fetch it on a machine that can, "
            f"and name the file: topfive import torchvision {file.name} --out CHECKPOINT"
        ) from error
    return file


def _reason(error: Exception) -> str:
    return str(error.reason if isinstance(error, urllib.error.URLError) else error)


def read_state(file: Path) -> dict[str, Tensor]:
    """The state dict in a `.pth` or `.safetensors` file, torchvision's names to ours, as float32.

    A `.pth` is read with the restricted unpickler of `torch.load(weights_only=True)`, which makes tensors and nothing
    else.

    Raises:
        WeightsError: not readable, holds other things than tensors, or has not exactly torchvision's names.
    """
    state = _load(file)
    expected = {f"{theirs}.{kind}" for theirs in TORCHVISION_NAMES for kind in ("weight", "bias")}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        found = f"lacks {', '.join(missing[:3])}" if missing else f"also has {', '.join(unknown[:3])}"
        raise WeightsError(
            f"{file} is not the state dict of torchvision's alexnet (features.0.weight to classifier.6.bias): it {found}"
        )
    return {
        f"{ours}.{kind}": state[f"{theirs}.{kind}"].to(torch.float32)
        for theirs, ours in TORCHVISION_NAMES.items()
        for kind in ("weight", "bias")
    }


def _load(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_tensors(file)[0]
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file} holds more than tensors (or is no PyTorch file), and running what an unknown file holds is not "
            "safe; save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except (CheckpointError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{file} cannot be read as PyTorch weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{file} is not a state dict: it must map names to tensors and hold nothing else")
    return state


def read_torchvision(file: Path) -> Imported:
    """The network in the file.

    Raises:
        WeightsError: as `sha256_of` and `read_state`, or a shape that the network has at no width.
    """
    digest = sha256_of(file)
    tensors = read_state(file)
    architecture = architecture_of(
        "alexnet-2014", tensors, published_channels=64, dropout=_DROPOUT, source=str(file)
    )
    network = AlexNet(architecture)
    network.load_state_dict(tensors)
    origin: dict[str, Json] = {"imported_from": "torchvision", "file": file.name, "sha256": digest}
    return Imported(network=network, preprocessing=PREPROCESSING, mean_image=None, origin=origin)
