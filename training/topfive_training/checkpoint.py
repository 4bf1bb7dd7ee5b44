"""A checkpoint is a folder with `model.safetensors` and `model.json`; nothing in it is pickled.

`Classifier` joins what belongs together: the description, the network and the arithmetic of the preprocessing, so that
whoever holds one can go from uint8 pixels to logits.

Shapes: B images, H rows, W columns, C colours, K classes, S the shorter side of preprocessing.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from topfive.errors import TopfiveError
from topfive.model_spec import ModelSpec
from topfive_training.network import AlexNet

WEIGHTS_FILE: Final = "model.safetensors"
SPEC_FILE: Final = "model.json"
MEAN_IMAGE: Final = "preprocessing.mean_image"
"""Name of the mean image's tensor, float32 [3, S, S], 0-255."""
COLOR_COMPONENTS: Final = "augmentation.color_components"
"""Name of the colour noise's tensor, float32 [3, 3]: column i is the i-th eigenvector times its standard deviation."""


class CheckpointError(TopfiveError, ValueError):
    """A checkpoint that is missing, damaged or inconsistent; the message is a sentence that names the file."""


class Classifier(nn.Module):
    """A network with its preprocessing: uint8 pixels in, logits out."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        network: AlexNet | None = None,
        mean_image: Tensor | None = None,
        color_components: Tensor | None = None,
    ) -> None:
        """Join the parts.

        Args:
            spec: the description; `spec.preprocessing` decides the arithmetic.
            network: freshly made from `spec.architecture` if not given.
            mean_image: float32 [3, S, S], 0-255; needed exactly where `spec.preprocessing.mean_image` says so.
            color_components: float32 [3, 3], kept for the record; nothing here uses it.

        Raises:
            ValueError: a mean image that is missing, unexpected or of another shape.
        """
        super().__init__()
        preprocessing = spec.preprocessing
        if (mean_image is not None) != preprocessing.mean_image:
            state = "missing" if mean_image is None else "given"
            raise ValueError(
                f"the mean image is {state}, but preprocessing.mean_image is {preprocessing.mean_image}"
            )
        side = preprocessing.short_side
        if mean_image is not None and tuple(mean_image.shape) != (3, side, side):
            raise ValueError(f"the mean image is {list(mean_image.shape)}; it must be [3, {side}, {side}]")
        self.spec = spec
        self.network = AlexNet(spec.architecture) if network is None else network
        # A product of matrices may round differently when one is stored by columns; from a file, none is.
        components_CC = None if color_components is None else color_components.contiguous()
        self.register_buffer("mean_image", mean_image, persistent=False)
        self.register_buffer("color_components", components_CC, persistent=False)
        self.register_buffer("mean", _crop_mean(spec, mean_image), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(3, 1, 1), persistent=False)
        self.mean: Tensor
        """What is subtracted: float32 [3, 1, 1], or with a mean image [3, crop, crop], its central crop."""
        self.std: Tensor
        self.mean_image: Tensor | None
        self.color_components: Tensor | None

    def normalize(self, images_BHWC: Tensor) -> Tensor:
        """uint8 [B, crop, crop, 3] to what the network takes, float32 [B, 3, crop, crop]."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32)
        return (images_BCHW - self.mean) / self.std

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Logits [B, K] of uint8 RGB images [B, crop, crop, 3]."""
        logits_BK: Tensor = self.network(self.normalize(images_BHWC))
        return logits_BK


def _crop_mean(spec: ModelSpec, mean_image: Tensor | None) -> Tensor:
    if mean_image is None:
        return torch.tensor(spec.preprocessing.mean).reshape(3, 1, 1)
    crop = spec.preprocessing.crop
    start = (spec.preprocessing.short_side - crop) // 2
    return mean_image.to(torch.float32)[:, start : start + crop, start : start + crop].contiguous()


def save_model(folder: Path, classifier: Classifier) -> None:
    """Write the checkpoint into `folder`, each file atomically: whoever reads sees the old one or the new one, whole.

    Raises:
        OSError: the folder cannot be written (disk full, say); what was there before stays.
    """
    extras = {MEAN_IMAGE: classifier.mean_image, COLOR_COMPONENTS: classifier.color_components}
    tensors = dict(classifier.network.state_dict())
    tensors |= {name: tensor for name, tensor in extras.items() if tensor is not None}
    save_tensors(folder / WEIGHTS_FILE, tensors)
    text = classifier.spec.to_json()
    write_atomically(folder / SPEC_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def link_model(folder: Path, other: Path) -> None:
    """Put the checkpoint of `folder` into `other` as well, each file atomically, without copying where links work.

    Raises:
        OSError: `other` cannot be written; what was there before stays.
    """
    other.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, SPEC_FILE):
        with _beside(other / name) as beside:
            beside.unlink()
            try:
                # Safe because nothing here ever writes into a file: each is replaced whole.
                beside.hardlink_to(folder / name)
            except OSError:
                shutil.copyfile(folder / name, beside)
            beside.replace(other / name)


def load_model(folder: Path) -> Classifier:
    """Read a checkpoint, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or weights and description do not fit each other.
        topfive.model_spec.ModelSpecError: `model.json` is malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a checkpoint holds {SPEC_FILE} and {WEIGHTS_FILE}")
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")
    spec = ModelSpec.read(folder)
    tensors, _ = load_tensors(folder / WEIGHTS_FILE)
    mean_image = tensors.pop(MEAN_IMAGE, None)
    color_components = tensors.pop(COLOR_COMPONENTS, None)
    with torch.device("meta"):
        network = AlexNet(spec.architecture)
    check_fit(network, tensors, source=str(folder / WEIGHTS_FILE))
    network.load_state_dict(tensors, assign=True)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    try:
        classifier = Classifier(
            spec, network=network, mean_image=mean_image, color_components=color_components
        )
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return classifier.eval()


def check_fit(network: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """See that `tensors` are exactly the state of `network`.

    Raises:
        CheckpointError: one is missing, unknown, of another shape, or not finite.
    """
    expected = network.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        details = [
            f"{what} {', '.join(names)}"
            for what, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise CheckpointError(
            f"{source} does not fit the network that {SPEC_FILE} describes: it {' and '.join(details)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: {name} is {list(tensor.shape)}; the network that {SPEC_FILE} describes "
                f"needs {list(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds values that are not finite")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(beside: Path) -> None:
        try:
            safetensors.torch.save_file(on_cpu, beside, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error

    write_atomically(path, write)


def load_tensors(path: Path, *, only_metadata: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is damaged, or cannot be read.
    """
    try:
        path.open("rb").close()  # the library says "no such file" whatever the reason
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = [] if only_metadata else file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as beside:
        write(beside)
        beside.chmod(0o644)  # mkstemp, and safetensors, keep a file to its owner
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)
