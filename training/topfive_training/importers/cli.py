"""`topfive import torchvision` and `topfive import caffe`."""

from pathlib import Path

from topfive_training.checkpoint import save_model
from topfive_training.importers.caffe import read_caffe
from topfive_training.importers.common import Imported, WeightsError, numbered_labels, read_labels
from topfive_training.importers.torchvision import published_weights, read_torchvision


def import_torchvision(
    file: Path | None = None,
    *,
    out: Path,
    labels: Path | None = None,
    download: bool = False,
    unnamed_classes: bool = False,
) -> None:
    """Make a checkpoint of the weights of torchvision's alexnet.

    The file is the state dict as torchvision publishes it (features.0.weight to classifier.6.bias), as .pth or
    .safetensors. Nothing in it is executed, and a hash in its name is checked.

    Args:
        file: alexnet-owt-7be5be79.pth, say.
        out: Checkpoint folder to make.
        labels: Class names in the order of the outputs, one on a line (synset_words.txt and LOC_synset_mapping.txt
            will do) or as JSON.
        download: Fetch the published ImageNet weights instead of naming a file.
        unnamed_classes: Do without names: the classes are called "class 0", "class 1", ...

    Raises:
        WeightsError: what is wrong with the file, and what would do.
    """
    if (file is None) != download:
        raise WeightsError("name the file of weights, or give --download, and not both")
    _check_destination(out)
    _check_names(labels, unnamed_classes=unnamed_classes)
    _save(read_torchvision(published_weights() if file is None else file), out, labels)


def import_caffe(
    file: Path,
    *,
    out: Path,
    mean: Path | None = None,
    mean_bgr: tuple[float, float, float] | None = None,
    labels: Path | None = None,
    unnamed_classes: bool = False,
) -> None:
    """Make a checkpoint of a .caffemodel: bvlc_alexnet, bvlc_reference_caffenet, or one fine-tuned from them.

    Args:
        file: bvlc_alexnet.caffemodel, say.
        out: Checkpoint folder to make.
        mean: Caffe's mean file, imagenet_mean.binaryproto, say.
        mean_bgr: Instead of a mean file, the mean of each channel, 0-255, in Caffe's order: blue, green, red.
        labels: Class names in the order of the outputs, one on a line (synset_words.txt will do) or as JSON.
        unnamed_classes: Do without names: the classes are called "class 0", "class 1", ...

    Raises:
        WeightsError: what is wrong with the file, and what would do.
    """
    if mean is not None and mean_bgr is not None:
        raise WeightsError("give --mean or --mean-bgr, not both")
    if mean_bgr is not None and not all(0 <= value <= 255 for value in mean_bgr):
        raise WeightsError(f"mean_bgr is {mean_bgr}; each value must be within 0-255")
    _check_destination(out)
    _check_names(labels, unnamed_classes=unnamed_classes)
    _save(read_caffe(file, mean_file=mean, mean_bgr=mean_bgr), out, labels)


def _check_destination(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(
            f"{out} already exists and is not an empty folder; name another, or remove it first"
        )


def _check_names(labels: Path | None, *, unnamed_classes: bool) -> None:
    if (labels is None) != unnamed_classes:
        raise WeightsError(
            "the weights do not carry the names of their classes: give --labels FILE with one on each line, or "
            "--unnamed-classes to do without (and not both)"
        )


def _save(imported: Imported, out: Path, labels: Path | None) -> None:
    classes = imported.network.architecture.classes
    names = numbered_labels(classes) if labels is None else read_labels(labels, classes)
    save_model(out, imported.classifier(names))
    architecture = imported.network.architecture
    parameters = sum(parameter.numel() for parameter in imported.network.parameters())
    print(  # noqa: T201  the command's answer
        f"{out} holds {architecture.name} with {parameters:,} parameters and {classes:,} classes; "
        f"sha256 of the source {imported.origin['sha256']}"
    )
