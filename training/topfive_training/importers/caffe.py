"""Reads Caffe's two published AlexNets: `bvlc_alexnet` and `bvlc_reference_caffenet`, and what was fine-tuned from them.

A file is imported only if its layers are, one by one and in order, those of a network that we compute exactly.
Everything else is refused with the first difference: almost the same network gives plausible, wrong answers.

Caffe's inputs are BGR on the 0-255 scale minus a mean; conv1 and the mean are turned to RGB. Caffe squeezed photographs
to 256 x 256 where we keep their proportions, which is a matter of the photographs, not of the weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from topfive.model_spec import Architecture, ArchitectureName, Json, Preprocessing
from topfive_training.importers.caffe_format import CaffeLayer, blob_array, read_blob, read_net
from topfive_training.importers.common import Imported, WeightsError, architecture_of, sha256_of
from topfive_training.network import LAYERS, AlexNet

_IGNORED: Final = frozenset({
    "Accuracy", "Data", "DummyData", "Flatten", "HDF5Data", "ImageData", "Input", "MemoryData", "Silence", "Softmax",
    "SoftmaxWithLoss", "Split", "WindowData",
})  # fmt: skip
"""Layers before the first convolution, after the last inner product, or that change no number."""
_PASSING: Final = frozenset({"Dropout", "Flatten", "Split"})
"""Layers whose tops carry, at evaluation, the same numbers as their bottom."""
_TAIL: Final = ("Convolution", "ReLU") * 3
_FULLY_CONNECTED: Final = ("InnerProduct", "ReLU", "InnerProduct", "ReLU", "InnerProduct")
_ORDERS: Final[dict[ArchitectureName, tuple[str, ...]]] = {
    "alexnet-caffe": (
        *("Convolution", "ReLU", "LRN", "Pooling") * 2, *_TAIL, "Pooling", *_FULLY_CONNECTED,
    ),
    "caffenet": (
        *("Convolution", "ReLU", "Pooling", "LRN") * 2, *_TAIL, "Pooling", *_FULLY_CONNECTED,
    ),
}  # fmt: skip
_CONVOLUTIONS: Final = ((11, 4, 0, 1), (5, 1, 2, 2), (3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 1, 2))
"""Kernel, stride, padding, groups of conv1 to conv5."""
_SHORT_SIDE: Final = 256
_CROP: Final = 227


def read_caffe(
    file: Path, *, mean_file: Path | None = None, mean_bgr: tuple[float, float, float] | None = None
) -> Imported:
    """The network in a `.caffemodel`.

    Args:
        file: binary `NetParameter`.
        mean_file: mean image (256 x 256) or channel means as `.binaryproto`, BGR.
        mean_bgr: channel means instead, 0-255, in Caffe's order. With neither, those that the file itself records.

    Raises:
        WeightsError: not readable, damaged, another network, or no mean to be had.
    """
    digest = sha256_of(file)
    layers = read_net(file)
    chain = _chain(file, layers)
    name = _check_order(file, chain)
    _check_options(file, chain)
    tensors = _tensors(file, chain)
    architecture = architecture_of(
        name, tensors, published_channels=96, dropout=_dropout(file, layers), source=str(file)
    )
    network = AlexNet(architecture)
    network.load_state_dict(tensors)
    preprocessing, mean_image = _preprocessing(file, layers, mean_file, mean_bgr)
    origin: dict[str, Json] = {"imported_from": "caffe", "file": file.name, "sha256": digest}
    return Imported(network=network, preprocessing=preprocessing, mean_image=mean_image, origin=origin)


def _chain(file: Path, layers: list[CaffeLayer]) -> list[CaffeLayer]:
    """The layers that compute, checked to follow one another without branches."""
    chain: list[CaffeLayer] = []
    same: dict[str, str] = {}
    last = ""
    for layer in layers:
        if layer.kind in _PASSING and layer.bottoms:
            bottom = same.get(layer.bottoms[0], layer.bottoms[0])
            same |= dict.fromkeys(layer.tops, bottom)
        if layer.kind in _IGNORED or layer.kind == "Dropout":
            continue
        bottoms = [same.get(bottom, bottom) for bottom in layer.bottoms]
        if len(bottoms) != 1 or len(layer.tops) != 1 or (chain and bottoms[0] != last):
            raise WeightsError(
                f"{file}: layer {layer.name} ({layer.kind}) does not follow {chain[-1].name if chain else 'the data'} "
                "alone; only a network without branches can be imported"
            )
        last = layer.tops[0]
        same.pop(last, None)
        chain.append(layer)
    return chain


def _check_order(file: Path, chain: list[CaffeLayer]) -> ArchitectureName:
    kinds = [layer.kind for layer in chain]
    # The order of the last ReLU and pooling does not matter; CaffeNet-likes have either.
    position = len(_ORDERS["caffenet"]) - len(_FULLY_CONNECTED) - 2
    if kinds[position : position + 2] == ["Pooling", "ReLU"]:
        kinds[position : position + 2] = ["ReLU", "Pooling"]
    for name, order in _ORDERS.items():
        if tuple(kinds) == order:
            return name
    differences = [_first_difference(kinds, order) for order in _ORDERS.values()]
    index, expected = max(differences)
    found = f"{chain[index].name} ({kinds[index]})" if index < len(chain) else "the end"
    raise WeightsError(
        f"{file} is not bvlc_alexnet (convolution, ReLU, norm, pooling) or bvlc_reference_caffenet (convolution, ReLU, "
        f"pooling, norm): layer {index + 1} of those that compute is {found}, where {expected} belongs"
    )


def _first_difference(kinds: list[str], order: tuple[str, ...]) -> tuple[int, str]:
    for index, expected in enumerate(order):
        if index >= len(kinds) or kinds[index] != expected:
            return index, expected
    return len(order), "the end"


def _check_options(file: Path, chain: list[CaffeLayer]) -> None:
    convolutions = iter(_CONVOLUTIONS)
    for layer in chain:
        expected = next(convolutions) if layer.kind == "Convolution" else None
        for what, found, needed in _options(layer, expected):
            if found != needed:
                raise WeightsError(
                    f"{file}: {what} of layer {layer.name} is {found}; AlexNet's is {needed}, and other networks "
                    "cannot be imported"
                )


def _options(
    layer: CaffeLayer, convolution: tuple[int, int, int, int] | None
) -> Iterator[tuple[str, object, object]]:
    """What must be so: name, value found, value needed."""
    options = layer.options
    if convolution is not None:
        o, (kernel, stride, pad, group) = options.convolution_param, convolution
        yield "kernel size", _pair(o, "kernel_size", "kernel", 0), (kernel, kernel)
        yield "stride", _pair(o, "stride", "stride", 1), (stride, stride)
        yield "padding", _pair(o, "pad", "pad", 0), (pad, pad)
        yield "group", (o.group if o.HasField("group") else 1), group
        yield "dilation", set(o.dilation) | {1}, {1}
        yield "number of blobs", len(layer.blobs), 2
    elif layer.kind == "Pooling":
        o = options.pooling_param
        yield "method (0 is the maximum)", o.pool, 0
        yield "kernel size", _pair(o, "kernel_size", "kernel", 0), (3, 3)
        yield "stride", _pair(o, "stride", "stride", 1), (2, 2)
        yield "padding", _pair(o, "pad", "pad", 0), (0, 0)
        yield "global pooling", o.global_pooling, False
    elif layer.kind == "LRN":
        o = options.lrn_param
        yield "region (0 is across channels)", o.norm_region, 0
        yield "local size", (o.local_size if o.HasField("local_size") else 5), 5
        yield "alpha", _rounded(o, "alpha", 1.0), 1e-4
        yield "beta", _rounded(o, "beta", 0.75), 0.75
        yield "k", _rounded(o, "k", 1.0), 1.0
    elif layer.kind == "ReLU":
        yield "negative slope", options.relu_param.negative_slope, 0.0
    elif layer.kind == "InnerProduct":
        o = options.inner_product_param
        yield "transpose", o.transpose, False
        yield "axis", (o.axis if o.HasField("axis") else 1), 1
        yield "number of blobs", len(layer.blobs), 2


def _pair(options: Any, both: str, each: str, default: int) -> tuple[int, int]:
    """Height and width of an option that Caffe lets one write three ways."""
    if options.HasField(f"{each}_h") or options.HasField(f"{each}_w"):
        return getattr(options, f"{each}_h"), getattr(options, f"{each}_w")
    values = tuple(getattr(options, both)) or (default,)
    return values[0], values[-1]


def _rounded(options: Any, field: str, default: float) -> float:
    """The float32 on the wire as the decimal number that was meant."""
    return float(f"{getattr(options, field):.6g}") if options.HasField(field) else default


def _tensors(file: Path, chain: list[CaffeLayer]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with_weights = [layer for layer in chain if layer.kind in {"Convolution", "InnerProduct"}]
    for ours, layer in zip(LAYERS, with_weights, strict=True):
        weight, bias = (blob_array(blob, source=f"{file}: layer {layer.name}") for blob in layer.blobs)
        if layer.kind == "InnerProduct":
            weight = weight.reshape(weight.shape[-2:])  # old files write 1 x 1 x outputs x inputs
        if ours == "conv1" and weight.ndim == 4 and weight.shape[1] == 3:
            weight = weight[:, ::-1]
        tensors[f"{ours}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
        tensors[f"{ours}.bias"] = torch.from_numpy(bias.reshape(-1))
    return tensors


def _dropout(file: Path, layers: list[CaffeLayer]) -> float:
    rates = set()
    for layer in layers:
        if layer.kind == "Dropout":
            options = layer.options.dropout_param
            rates.add(_rounded(options, "dropout_ratio", Architecture.dropout))
    if len(rates) > 1:
        raise WeightsError(
            f"{file} has dropout layers of different rates ({sorted(rates)}); they must be equal"
        )
    return rates.pop() if rates else 0.0


def _preprocessing(
    file: Path, layers: list[CaffeLayer], mean_file: Path | None, mean_bgr: tuple[float, float, float] | None
) -> tuple[Preprocessing, Tensor | None]:
    for layer in layers:
        transform = layer.options.transform_param
        if transform.HasField("scale") and transform.scale != 1:
            raise WeightsError(
                f"{file}: layer {layer.name} scales its input by {transform.scale:g}; only inputs of 0-255 can be imported"
            )
        if transform.crop_size not in {0, _CROP}:
            raise WeightsError(
                f"{file}: layer {layer.name} crops to {transform.crop_size} pixels; the networks known here see {_CROP}"
            )
        if mean_bgr is None and len(transform.mean_value) == 3:
            blue, green, red = transform.mean_value
            mean_bgr = blue, green, red
    if mean_file is not None:
        return _preprocessing_of(mean_file)
    if mean_bgr is None:
        raise WeightsError(
            f"{file} does not record the mean that was subtracted; give Caffe's mean file with --mean "
            "imagenet_mean.binaryproto, or its average over each channel, for Caffe's ImageNet networks: "
            "--mean-bgr 104.007 116.669 122.679"
        )
    blue, green, red = mean_bgr
    return Preprocessing(short_side=_SHORT_SIDE, crop=_CROP, mean=(red, green, blue)), None


def _preprocessing_of(mean_file: Path) -> tuple[Preprocessing, Tensor | None]:
    blob = read_blob(mean_file)
    mean_bgr = blob.reshape(blob.shape[-3:]) if blob.ndim == 4 and blob.shape[0] == 1 else blob
    if mean_bgr.shape not in {(3, 1, 1), (3, _SHORT_SIDE, _SHORT_SIDE)}:
        raise WeightsError(
            f"the mean {mean_file} is {list(blob.shape)}; it must be [1, 3, {_SHORT_SIDE}, {_SHORT_SIDE}] or [1, 3, 1, 1]"
        )
    mean_image = torch.from_numpy(np.ascontiguousarray(mean_bgr[::-1]))
    red, green, blue = (float(channel.mean()) for channel in mean_image.double())
    whole = mean_bgr.shape[1] > 1
    preprocessing = Preprocessing(
        short_side=_SHORT_SIDE, crop=_CROP, mean=(red, green, blue), mean_image=whole
    )
    return preprocessing, mean_image if whole else None
