"""What every importer needs: the error, the class names, and finding the width of a network from its weights."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from topfive._version import __version__
from topfive.errors import TopfiveError
from topfive.model_spec import Architecture, ArchitectureName, Json, ModelSpec, Preprocessing
from topfive_training.checkpoint import Classifier
from topfive_training.network import AlexNet

_HASH_IN_NAME: Final = re.compile(r"-([0-9a-f]{8,64})\.")
_SYNSET: Final = re.compile(r"^n\d{8}[\s,]+")


class WeightsError(TopfiveError, ValueError):
    """Weights that cannot be imported; the message says which file, what is wrong, and what would do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What an importer read: everything of a checkpoint but the names of the classes."""

    network: AlexNet
    preprocessing: Preprocessing
    mean_image: Tensor | None
    """float32 [3, short_side, short_side], RGB, 0-255."""
    origin: dict[str, Json]
    """Goes into the checkpoint's recipe: format, file name, SHA-256."""

    def classifier(self, labels: tuple[str, ...]) -> Classifier:
        """The whole, with its class names."""
        spec = ModelSpec(
            architecture=self.network.architecture,
            preprocessing=self.preprocessing,
            labels=labels,
            recipe=self.origin,
            code_fingerprint=f"topfive {__version__}",
        )
        return Classifier(spec, network=self.network, mean_image=self.mean_image).eval()


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal, checked against the start of it where the name carries one.

    Published files are named `alexnet-owt-7be5be79.pth`: the part after the dash begins the hash of the contents.

    Raises:
        WeightsError: not readable, or another hash.
    """
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    match = _HASH_IN_NAME.search(file.name)
    if match and not digest.startswith(match[1]):
        raise WeightsError(
            f"{file} is damaged or not what its name says: its SHA-256 begins with {digest[:8]}, not {match[1]}; "
            "fetch it again (or rename it, if it was changed on purpose)"
        )
    return digest


def read_labels(file: Path, classes: int) -> tuple[str, ...]:
    """Class names, in the order of the network's outputs.

    Takes one name on each line, as `synset_words.txt` and `LOC_synset_mapping.txt` have them too (a leading WordNet id
    such as `n01440764` is dropped), or JSON: a list of names, or `{"0": ["n01440764", "tench"], ...}`.

    Raises:
        WeightsError: not readable, or not `classes` names.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"the labels {file} cannot be read: {error}") from error
    if text.lstrip().startswith(("[", "{")):
        names = _from_json(file, text)
    else:
        names = [_SYNSET.sub("", line).strip() for line in text.splitlines() if line.strip()]
    if len(names) != classes:
        raise WeightsError(
            f"the labels {file} are {len(names):,} names; the weights have {classes:,} classes"
        )
    return tuple(names)


def _from_json(file: Path, text: str) -> list[str]:
    try:
        data: Json = json.loads(text)
        if isinstance(data, dict):
            data = [data[str(index)] for index in range(len(data))]
    except (ValueError, KeyError) as error:
        raise WeightsError(
            f"the labels {file} are not a JSON list, or an object with keys 0, 1, 2, ...: {error}"
        ) from error
    entries = data if isinstance(data, list) else []
    return [str(entry[-1]) if isinstance(entry, list) and entry else str(entry) for entry in entries]


def numbered_labels(classes: int) -> tuple[str, ...]:
    """`class 0`, `class 1`, ...: for weights whose class names are not known."""
    return tuple(f"class {index}" for index in range(classes))


def architecture_of(
    name: ArchitectureName,
    tensors: Mapping[str, Tensor],
    *,
    published_channels: int,
    dropout: float,
    source: str,
) -> Architecture:
    """The architecture that `tensors` (our names) are the state of, its width found from conv1.

    Args:
        name: which network.
        tensors: `conv1.weight` to `fc8.bias`, complete.
        published_channels: channels of conv1 at width 1.
        dropout: of the fully-connected layers.
        source: begins the sentence of an error.

    Raises:
        WeightsError: a tensor has a shape that the network has at no width.
    """
    architecture = Architecture(
        name=name,
        classes=tensors["fc8.bias"].shape[0],
        width=tensors["conv1.weight"].shape[0] / published_channels,
        dropout=dropout,
        dropout_scaling="training",
        normalization="none" if name == "alexnet-2014" else "lrn",
    )
    with torch.device("meta"):
        expected = AlexNet(architecture).state_dict()
    for layer, tensor in tensors.items():
        if tensor.shape != expected[layer].shape:
            raise WeightsError(
                f"{source}: {layer} is {list(tensor.shape)}; {name} at the width of its conv1 "
                f"({architecture.width:g}) needs {list(expected[layer].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{source}: {layer} holds values that are not finite")
    return architecture
