"""Cuts a network in two, before its first dense layer.

The convolutional layers have nearly all of the arithmetic and few weights, the dense layers nearly all of the weights and
little arithmetic (Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997, section 2).
So several cores are best used differently in the two (`network`).
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data
from onnx.helper import make_graph, make_model, tensor_dtype_to_np_dtype
from onnx.shape_inference import infer_shapes
from onnxruntime import OrtValue

from topfive_server.onnx_header import Field, fields
from topfive_server.session import Graph

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Fields of ModelProto, GraphProto and TensorProto (onnx.proto3)."""
_DENSE: Final = frozenset({"Gemm", "MatMul"})
_LARGE: Final = 1 << 20
"""Bytes from which on weights are handed to ONNX Runtime as they are, instead of within a serialised model."""


class CutError(ValueError):
    """The network cannot be cut; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A network in two, the first of which gives what the second takes."""

    convolutional: Graph
    dense: Graph
    tensor: str
    """Name of what goes from one to the other: a row for each image, or several."""
    item_bytes: int
    """Of one of its numbers: 1 in int8, 4 in fp32."""


def cut(path: Path, outputs: Iterable[str]) -> Halves:
    """Cut the network in a file.

    Args:
        path: of the ONNX file.
        outputs: the graph's outputs that are wanted; what is there only for others is left out.

    Raises:
        CutError: it has no dense layer, or what comes behind the first one reads more than that one does.
        OSError: it cannot be read.
        OnnxHeaderError,
        google.protobuf.message.DecodeError, onnx.shape_inference.InferenceError: it is no valid ONNX file.
    """
    model, weights = _read(path)
    if any(uses_external_data(one) for one in model.graph.initializer if one.name not in weights):
        raise CutError("its weights are in other files")
    tensor = _before_the_dense_layers(model.graph)
    images, wanted = list(model.graph.input), set(outputs)
    convolutional = infer_shapes(_part(model, images, [onnx.ValueInfoProto(name=tensor)]))
    between = convolutional.graph.output[0]
    dense = _part(model, [between], [output for output in model.graph.output if output.name in wanted])
    if not _reads(dense.graph.node).isdisjoint(given.name for given in images):
        raise CutError(f"what comes behind its first dense layer reads more than {tensor}")
    item = tensor_dtype_to_np_dtype(between.type.tensor_type.elem_type)
    return Halves(
        convolutional=_graph(convolutional, weights),
        dense=_graph(dense, weights),
        tensor=tensor,
        item_bytes=item.itemsize,
    )


def _before_the_dense_layers(graph: onnx.GraphProto) -> str:
    """Name of what the first dense layer takes; where that is 8 bits, of those, before they become floating-point."""
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in _DENSE:
            before = made_by.get(node.input[0], node)
            return str((before if before.op_type == "DequantizeLinear" else node).input[0])
    raise CutError("it has no dense layer")


def _read(path: Path) -> tuple[onnx.ModelProto, dict[str, OrtValue]]:
    """The model without its large weights, which are 200 MB and more and to which it refers by name, and these.

    They are read past the protobuf library: while it parses and copies them, no other thread of the interpreter runs, and
    a server answers nobody.
    """
    model, weights = onnx.ModelProto(), {}
    with path.open("rb") as file:
        for field in fields(file, 0, os.fstat(file.fileno()).st_size):
            if field.number != _GRAPH:
                model.MergeFromString(_bytes(file, field))
                continue
            for part in fields(file, field.start, field.stop):
                if part.number == _INITIALIZER and part.stop - part.start >= _LARGE:
                    tensor = model.graph.initializer.add()
                    weight = _read_tensor(file, part, tensor)
                    if weight is not None:
                        weights[tensor.name] = OrtValue.ortvalue_from_numpy(weight)
                else:
                    model.graph.MergeFromString(_bytes(file, part))
    return model, weights


def _read_tensor(file: BinaryIO, part: Field, tensor: onnx.TensorProto) -> NDArray[Any] | None:
    """Read all but the numbers into `tensor`, and these, where they are many, into an array."""
    raw = None
    for field in fields(file, part.start, part.stop):
        if field.number == _RAW_DATA and field.stop - field.start >= _LARGE:
            raw = field
        else:
            tensor.MergeFromString(_bytes(file, field))
    if raw is None:
        return None
    numbers = np.empty(math.prod(tensor.dims), tensor_dtype_to_np_dtype(tensor.data_type))
    file.seek(raw.start)
    if numbers.nbytes != raw.stop - raw.start or file.readinto(numbers.view(np.uint8)) != numbers.nbytes:  # type: ignore[attr-defined]
        raise CutError(f"{tensor.name} is not as long as its shape says")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="in memory")
    return numbers.reshape(tensor.dims)


def _bytes(file: BinaryIO, field: Field) -> bytes:
    """A field as it is in the file, tag and all."""
    file.seek(field.begin)
    return file.read(field.stop - field.begin)


def _part(
    model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """What computes the outputs from the inputs."""
    given, names = {one.name for one in inputs}, {one.name for one in outputs}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if not names.isdisjoint({*node.output} - given):
            nodes.insert(0, node)
            names |= _reads([node])
    initializers = [one for one in model.graph.initializer if one.name in names]
    return make_model(
        make_graph(nodes, model.graph.name, inputs, outputs, initializers),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=model.functions,
    )


def _reads(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of what nodes read, those in the bodies of loops included."""
    names: set[str] = set()
    for node in nodes:
        names.update(node.input)
        for attribute in node.attribute:
            names |= _reads(attribute.g.node)
    return names


def _graph(model: onnx.ModelProto, weights: dict[str, OrtValue]) -> Graph:
    names = {one.name for one in model.graph.initializer} & weights.keys()
    return Graph(model=model.SerializeToString(), weights={name: weights[name] for name in names})
