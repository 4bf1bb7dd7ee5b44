"""Caffe's files, encoded by hand from the wire format and the field numbers of its caffe.proto.

Nothing here knows the code under test; the layer lists are those of the published train_val.prototxt files.
"""

import functools
import struct
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Generation = Literal["layer", "layers"]
Array = NDArray[np.float32]

V1_TYPES = {
    "Data": 5,
    "Convolution": 4,
    "ReLU": 18,
    "LRN": 15,
    "Pooling": 17,
    "InnerProduct": 14,
    "Dropout": 6,
    "SoftmaxWithLoss": 21,
    "Split": 22,
    "Concat": 3,
}
# Layer type -> its option field in LayerParameter, and in V1LayerParameter.
_PARAM = {
    "Data": (100, 36),
    "Convolution": (106, 10),
    "ReLU": (123, 30),
    "LRN": (118, 18),
    "Pooling": (121, 19),
    "InnerProduct": (117, 17),
    "Dropout": (108, 12),
}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field_bytes(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def field_int(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def field_float(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


def blob(values: Array, *, old: bool = False) -> bytes:
    """A BlobProto: with `shape` as since 2015, or with num, channels, height and width as before."""
    data = field_bytes(5, values.astype("<f4").tobytes())
    if old:
        four = (1,) * (4 - values.ndim) + values.shape
        return b"".join(field_int(i + 1, n) for i, n in enumerate(four)) + data
    return data + field_bytes(7, field_bytes(1, b"".join(map(varint, values.shape))))


class Layer(NamedTuple):
    name: str
    kind: str
    bottom: str
    top: str
    options: bytes = b""


def convolution(outputs: int, kernel: int, stride: int = 1, pad: int = 0, group: int = 1) -> bytes:
    parts = [field_int(1, outputs), field_int(4, kernel)]
    parts += [field_int(3, pad)] if pad else []
    parts += [field_int(5, group)] if group > 1 else []
    parts += [field_int(6, stride)] if stride > 1 else []
    return b"".join(parts)


POOLING = field_int(1, 0) + field_int(2, 3) + field_int(3, 2)
LRN = field_int(1, 5) + field_float(2, 1e-4) + field_float(3, 0.75)


def published_layers(network: Literal["bvlc_alexnet", "bvlc_reference_caffenet"]) -> list[Layer]:
    """Layer by layer, as models/<network>/train_val.prototxt in Caffe's repository has them."""
    data = field_int(2, 1) + field_int(3, 227) + field_bytes(4, b"data/ilsvrc12/imagenet_mean.binaryproto")
    layers = [Layer("data", "Data", "", "data", data)]
    bottom = "data"
    for number, options in ((1, convolution(96, 11, stride=4)), (2, convolution(256, 5, pad=2, group=2))):
        layers.append(Layer(f"conv{number}", "Convolution", bottom, f"conv{number}", options))
        layers.append(Layer(f"relu{number}", "ReLU", f"conv{number}", f"conv{number}"))
        if network == "bvlc_alexnet":
            layers.append(Layer(f"norm{number}", "LRN", f"conv{number}", f"norm{number}", LRN))
            layers.append(Layer(f"pool{number}", "Pooling", f"norm{number}", f"pool{number}", POOLING))
            bottom = f"pool{number}"
        else:
            layers.append(Layer(f"pool{number}", "Pooling", f"conv{number}", f"pool{number}", POOLING))
            layers.append(Layer(f"norm{number}", "LRN", f"pool{number}", f"norm{number}", LRN))
            bottom = f"norm{number}"
    for number, options in (
        (3, convolution(384, 3, pad=1)),
        (4, convolution(384, 3, pad=1, group=2)),
        (5, convolution(256, 3, pad=1, group=2)),
    ):
        layers.append(Layer(f"conv{number}", "Convolution", bottom, f"conv{number}", options))
        layers.append(Layer(f"relu{number}", "ReLU", f"conv{number}", f"conv{number}"))
        bottom = f"conv{number}"
    layers.append(Layer("pool5", "Pooling", "conv5", "pool5", POOLING))
    bottom = "pool5"
    for number in (6, 7):
        layers.append(Layer(f"fc{number}", "InnerProduct", bottom, f"fc{number}", field_int(1, 4096)))
        layers.append(Layer(f"relu{number}", "ReLU", f"fc{number}", f"fc{number}"))
        layers.append(Layer(f"drop{number}", "Dropout", f"fc{number}", f"fc{number}", field_float(1, 0.5)))
        bottom = f"fc{number}"
    layers.append(Layer("fc8", "InnerProduct", "fc7", "fc8", field_int(1, 1000)))
    return [*layers, Layer("loss", "SoftmaxWithLoss", "fc8", "loss")]


def encode_layer(layer: Layer, blobs: tuple[Array, ...], generation: Generation) -> bytes:
    old = generation == "layers"
    param = _PARAM.get(layer.kind)
    options = field_bytes(param[1 if old else 0], layer.options) if layer.options and param else b""
    encoded = [field_bytes(6 if old else 7, blob(values, old=old)) for values in blobs]
    if old:
        names = field_bytes(4, layer.name.encode()) + field_int(5, V1_TYPES[layer.kind])
        names += field_bytes(2, layer.bottom.encode()) + field_bytes(3, layer.top.encode())
    else:
        names = field_bytes(1, layer.name.encode()) + field_bytes(2, layer.kind.encode())
        names += field_bytes(3, layer.bottom.encode()) + field_bytes(4, layer.top.encode())
    # A field that the reader does not declare (blobs_lr, param), as real files are full of them.
    unknown = field_float(7, 1.0) if old else field_bytes(6, field_float(3, 1.0))
    return names + unknown + b"".join(encoded) + options


def net(
    layers: list[Layer], weights: Mapping[str, tuple[Array, ...]], generation: Generation = "layer"
) -> bytes:
    """A NetParameter."""
    number = 2 if generation == "layers" else 100
    body = [
        field_bytes(number, encode_layer(layer, weights.get(layer.name, ()), generation)) for layer in layers
    ]
    return field_bytes(1, b"AlexNet") + b"".join(body)


@functools.cache
def random_weights(width: float = 1.0, classes: int = 1000, seed: int = 0) -> dict[str, tuple[Any, ...]]:
    """Weights and biases of the eight layers, conv1 for BGR input, large enough for every non-linearity to matter."""
    rng = np.random.default_rng(seed)
    c1, c2, c3, c4, c5, f = (int(n * width) for n in (96, 256, 384, 384, 256, 4096))
    shapes = {
        "conv1": (c1, 3, 11, 11), "conv2": (c2, c1 // 2, 5, 5), "conv3": (c3, c2, 3, 3),
        "conv4": (c4, c3 // 2, 3, 3), "conv5": (c5, c4 // 2, 3, 3),
        "fc6": (f, c5 * 36), "fc7": (f, f), "fc8": (classes, f),
    }  # fmt: skip
    weights = {}
    for name, shape in shapes.items():
        fan_in = int(np.prod(shape[1:]))
        weight = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / fan_in) ** 0.5)
        bias = rng.standard_normal(shape[:1], dtype=np.float32) * np.float32(0.1)
        weights[name] = (weight, bias)
    return weights
