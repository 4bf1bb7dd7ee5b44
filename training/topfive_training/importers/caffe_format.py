"""Caffe's files as it writes them: `NetParameter` (.caffemodel) and `BlobProto` (.binaryproto).

Only the fields that AlexNet needs are declared; the numbers are those of Caffe's `caffe.proto`, and everything else in
a file is skipped by the protobuf library. Both generations of layers are read: `layer` (since 2014) and `layers` (V1).
"""

import dataclasses
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from topfive_training.importers.common import WeightsError

_Field: TypeAlias = tuple[str, int, str, Literal["optional", "repeated", "packed"]]
_OPTIONAL: Final = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
_REPEATED: Final = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED

_LAYER_OPTIONS: Final = (
    ("convolution_param", "ConvolutionParameter"),
    ("dropout_param", "DropoutParameter"),
    ("inner_product_param", "InnerProductParameter"),
    ("lrn_param", "LRNParameter"),
    ("pooling_param", "PoolingParameter"),
    ("relu_param", "ReLUParameter"),
    ("transform_param", "TransformationParameter"),
)


def _options(*numbers: int) -> tuple[_Field, ...]:
    return tuple(
        (name, number, kind, "optional") for (name, kind), number in zip(_LAYER_OPTIONS, numbers, strict=True)
    )


_MESSAGES: Final[dict[str, tuple[_Field, ...]]] = {
    "BlobShape": (("dim", 1, "int64", "packed"),),
    "BlobProto": (
        ("num", 1, "int64", "optional"),
        ("channels", 2, "int64", "optional"),
        ("height", 3, "int64", "optional"),
        ("width", 4, "int64", "optional"),
        ("data", 5, "float", "packed"),
        ("shape", 7, "BlobShape", "optional"),
        ("double_data", 8, "double", "packed"),
    ),
    "ConvolutionParameter": (
        ("pad", 3, "uint64", "repeated"),
        ("kernel_size", 4, "uint64", "repeated"),
        ("group", 5, "uint64", "optional"),
        ("stride", 6, "uint64", "repeated"),
        ("pad_h", 9, "uint64", "optional"),
        ("pad_w", 10, "uint64", "optional"),
        ("kernel_h", 11, "uint64", "optional"),
        ("kernel_w", 12, "uint64", "optional"),
        ("stride_h", 13, "uint64", "optional"),
        ("stride_w", 14, "uint64", "optional"),
        ("dilation", 18, "uint64", "repeated"),
    ),
    "DropoutParameter": (("dropout_ratio", 1, "float", "optional"),),
    "InnerProductParameter": (("axis", 5, "int64", "optional"), ("transpose", 6, "bool", "optional")),
    "LRNParameter": (
        ("local_size", 1, "uint64", "optional"),
        ("alpha", 2, "float", "optional"),
        ("beta", 3, "float", "optional"),
        ("norm_region", 4, "uint64", "optional"),
        ("k", 5, "float", "optional"),
    ),
    "PoolingParameter": (
        ("pool", 1, "uint64", "optional"),
        ("kernel_size", 2, "uint64", "repeated"),
        ("stride", 3, "uint64", "repeated"),
        ("pad", 4, "uint64", "repeated"),
        ("kernel_h", 5, "uint64", "optional"),
        ("kernel_w", 6, "uint64", "optional"),
        ("stride_h", 7, "uint64", "optional"),
        ("stride_w", 8, "uint64", "optional"),
        ("pad_h", 9, "uint64", "optional"),
        ("pad_w", 10, "uint64", "optional"),
        ("global_pooling", 12, "bool", "optional"),
    ),
    "ReLUParameter": (("negative_slope", 1, "float", "optional"),),
    "TransformationParameter": (
        ("scale", 1, "float", "optional"),
        ("crop_size", 3, "uint64", "optional"),
        ("mean_file", 4, "string", "optional"),
        ("mean_value", 5, "float", "repeated"),
    ),
    "LayerParameter": (
        ("name", 1, "string", "optional"),
        ("type", 2, "string", "optional"),
        ("bottom", 3, "string", "repeated"),
        ("top", 4, "string", "repeated"),
        ("blobs", 7, "BlobProto", "repeated"),
        *_options(106, 108, 117, 118, 121, 123, 100),
    ),
    "V0LayerParameter": (("name", 1, "string", "optional"),),
    "V1LayerParameter": (
        ("layer", 1, "V0LayerParameter", "optional"),
        ("bottom", 2, "string", "repeated"),
        ("top", 3, "string", "repeated"),
        ("name", 4, "string", "optional"),
        ("type", 5, "uint64", "optional"),
        ("blobs", 6, "BlobProto", "repeated"),
        *_options(10, 12, 17, 18, 19, 30, 36),
    ),
    "NetParameter": (
        ("name", 1, "string", "optional"),
        ("layers", 2, "V1LayerParameter", "repeated"),
        ("layer", 100, "LayerParameter", "repeated"),
    ),
}
"""Message -> its fields: name, number, type, multiplicity. Enumerations are read as their numbers."""

_V1_KINDS: Final = {
    1: "Accuracy",
    4: "Convolution",
    5: "Data",
    6: "Dropout",
    8: "Flatten",
    10: "HDF5Data",
    12: "ImageData",
    14: "InnerProduct",
    15: "LRN",
    17: "Pooling",
    18: "ReLU",
    20: "Softmax",
    21: "SoftmaxWithLoss",
    22: "Split",
    24: "WindowData",
    29: "MemoryData",
    32: "DummyData",
    36: "Silence",
}
"""Number of a V1 layer's type -> today's name."""


def _message_classes() -> dict[str, Any]:
    types = {
        name: getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name.upper()}")
        for name in ("bool", "double", "float", "int64", "string", "uint64")
    }
    file = descriptor_pb2.FileDescriptorProto(name="topfive/caffe.proto", package="caffe", syntax="proto2")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, multiplicity in fields:
            field = message.field.add(
                name=name, number=number, label=_OPTIONAL if multiplicity == "optional" else _REPEATED
            )
            if kind in types:
                field.type = types[kind]
                field.options.packed = multiplicity == "packed"
            else:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
                field.type_name = f".caffe.{kind}"
    # A pool of its own: another library in the process may have registered the real caffe.proto.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))
        for name in _MESSAGES
    }


MESSAGES: Final = _message_classes()
"""Message name -> its class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaffeLayer:
    """One layer of either generation."""

    name: str
    kind: str
    """Today's type name, e.g. `Convolution`; for an unknown V1 type, `V1 type 39`."""
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    blobs: tuple[Any, ...]
    """`BlobProto`; see `blob_array`."""
    options: Any
    """The message, for its `*_param` fields."""


def read_net(file: Path) -> list[CaffeLayer]:
    """The layers of a `.caffemodel`, in the order of the file.

    Raises:
        WeightsError: not readable, no NetParameter, or of the V0 generation.
    """
    net = _parse(file, "NetParameter")
    if any(layer.HasField("layer") for layer in net.layers):
        raise WeightsError(
            f"{file} is of Caffe's first format (V0); convert it with Caffe's own upgrade_net_proto_binary first"
        )
    old = [_layer(layer, _V1_KINDS.get(layer.type, f"V1 type {layer.type}")) for layer in net.layers]
    layers = old + [_layer(layer, layer.type) for layer in net.layer]
    if not layers:
        raise WeightsError(f"{file} is not a .caffemodel: it holds no layers")
    return layers


def _layer(message: Any, kind: str) -> CaffeLayer:
    return CaffeLayer(
        name=message.name,
        kind=kind,
        bottoms=tuple(message.bottom),
        tops=tuple(message.top),
        blobs=tuple(message.blobs),
        options=message,
    )


def read_blob(file: Path) -> NDArray[np.float32]:
    """The array in a `.binaryproto`.

    Raises:
        WeightsError: not readable, or no BlobProto.
    """
    return blob_array(_parse(file, "BlobProto"), source=str(file))


def blob_array(blob: Any, *, source: str) -> NDArray[np.float32]:
    """The numbers of a `BlobProto`, in its shape (four-dimensional in old files).

    Raises:
        WeightsError: another number of values than its shape says; `source` begins the sentence.
    """
    values = blob.data or blob.double_data
    dims = blob.shape.dim if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    shape = tuple(int(dim) for dim in dims)
    if len(values) != np.prod(shape, dtype=object) or not values:
        raise WeightsError(f"{source} holds {len(values):,} values, but says that its shape is {list(shape)}")
    return np.fromiter(values, np.float32, len(values)).reshape(shape)


def _parse(file: Path, message: str) -> Any:
    try:
        parsed = MESSAGES[message].FromString(file.read_bytes())
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise WeightsError(f"{file} is damaged or not a Caffe {message}: {error}") from error
    return parsed
