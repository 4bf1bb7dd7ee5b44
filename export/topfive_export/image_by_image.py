"""The norms of a quantised graph, computed one image after the other.

A response norm is ten operators on floats, each of which reads and writes all maps: of 32 images 37 MB, far more than
the caches next to the cores hold. Of one image they stay there, and the whole graph takes a fifth less
(docs/export.md). ONNX's `Scan` runs the norm's nodes image by image; what goes in and comes out are bytes.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_MAPS_LAST: Final = [0, 2, 3, 1]
_MAPS_FIRST: Final = [0, 3, 1, 2]
_AXIS: Final = "image_axis"
"""Name of the constant that says where an image of a batch is made a batch of one."""


@dataclass(frozen=True)
class _Norm:
    """A norm, or several on each other's heels, and the ReLU after them."""

    dequantize: NodeProto
    nodes: list[NodeProto]
    """In the order of computation, transpositions included."""
    pool: NodeProto | None
    quantize: NodeProto


def norms_image_by_image(model: ModelProto) -> int:
    """Put each norm of an int8 graph into a `Scan` over the images, in place, and count them; no answer changes.

    A norm with a neighbour that was left in fp32 stays as it is: floats would go in or come out.
    """
    found = 0
    while (norm := _next_norm(model.graph)) is not None:
        _wrap(model.graph, norm)
        found += 1
    if found:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), _AXIS))
        del model.graph.value_info[:]  # the shapes of what lies between have changed
    return found


def _next_norm(graph: GraphProto) -> _Norm | None:
    norms = (_norm_after(graph, node) for node in graph.node if node.op_type == "DequantizeLinear")
    return next((norm for norm in norms if norm is not None), None)


def _norm_after(graph: GraphProto, dequantize: NodeProto) -> _Norm | None:
    """What follows a dequantisation, where it is a norm as `topfive_export.norms` writes them for int8."""
    nodes: list[NodeProto] = []
    made = {dequantize.output[0]}
    maps_last = False
    end: NodeProto | None = None
    for node in graph.node:
        if not made & set(node.input):
            continue
        if node.op_type in {"MaxPool", "QuantizeLinear"}:
            end = node
            break
        permutation = _permutation(node)
        if permutation is not None:
            if permutation != (_MAPS_FIRST if maps_last else _MAPS_LAST):
                return None
            maps_last = not maps_last
        elif not maps_last and node.op_type not in {"Clip", "Relu"}:
            return None
        nodes.append(node)
        made |= set(node.output)
    if end is None or maps_last or all(_permutation(node) is None for node in nodes):
        return None
    pool = end if end.op_type == "MaxPool" else None
    quantize = end if pool is None else _only_reader(graph, pool.output[0])
    if quantize is None or quantize.op_type != "QuantizeLinear" or not _is_closed(graph, dequantize, nodes):
        return None
    return _Norm(dequantize, nodes, pool, quantize)


def _is_closed(graph: GraphProto, dequantize: NodeProto, nodes: list[NodeProto]) -> bool:
    """Whether the nodes need nothing else that is computed, and only the last one's result is needed elsewhere."""
    inner = [dequantize, *nodes]
    made = {name for node in inner for name in node.output}
    constants = {tensor.name for tensor in graph.initializer} | {""}
    needed = {name for node in nodes for name in node.input}
    elsewhere = {
        name for node in graph.node if node.output[0] not in made for name in node.input if name in made
    }
    return needed <= made | constants and elsewhere == {nodes[-1].output[0]}


def _wrap(graph: GraphProto, norm: _Norm) -> None:
    prefix = norm.nodes[-1].output[0]
    bytes_in, scale = norm.dequantize.input[0], list(norm.quantize.input[1:])
    into, out_of = f"{prefix}_image", f"{prefix}_normed"
    renamed = {bytes_in: into}

    def inside(node: NodeProto) -> NodeProto:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        return copy

    # Transposed are the bytes, outside; or nothing, for 8-bit convolutions and pools have the maps last anyway.
    # A ReLU before bytes that begin at zero does nothing that rounding does not.
    zero_point = next(tensor for tensor in graph.initializer if tensor.name == scale[1])
    idle = norm.nodes[-1] if not numpy_helper.to_array(zero_point).any() else None
    body = [inside(norm.dequantize)]
    for node in norm.nodes:
        if _permutation(node) is not None or (node is idle and node.op_type == "Relu"):
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        else:
            body.append(inside(node))
    body.append(helper.make_node("QuantizeLinear", [renamed.get(prefix, prefix), *scale], [out_of]))
    scan = helper.make_node(
        "Scan",
        [f"{prefix}_batches"],
        [f"{prefix}_normed_batches"],
        f"{prefix}_image_by_image",
        num_scan_inputs=1,
        body=helper.make_graph(
            body,
            f"{prefix}_of_one_image",
            [helper.make_tensor_value_info(into, TensorProto.UINT8, None)],
            [helper.make_tensor_value_info(out_of, TensorProto.UINT8, None)],
        ),
    )
    result = norm.quantize.output[0] if norm.pool is None else f"{prefix}_bytes"
    around = [
        helper.make_node("Transpose", [bytes_in], [f"{prefix}_maps_last"], perm=_MAPS_LAST),
        helper.make_node("Unsqueeze", [f"{prefix}_maps_last", _AXIS], list(scan.input)),
        scan,
        helper.make_node("Squeeze", [*scan.output, _AXIS], [f"{prefix}_normed_maps_last"]),
        helper.make_node("Transpose", [f"{prefix}_normed_maps_last"], [result], perm=_MAPS_FIRST),
    ]
    replaced = [norm.dequantize, *norm.nodes]
    if norm.pool is None:
        replaced.append(norm.quantize)
    else:
        # What is quantised before the pool is the same after it: rounding keeps the order.
        around.append(helper.make_node("DequantizeLinear", [result, *scale], [f"{prefix}_dequantized"]))
        norm.pool.input[0] = f"{prefix}_dequantized"
    gone = {node.output[0] for node in replaced}
    last = replaced[-1].output[0]
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] == last:  # what it needs is computed by here, what needs it is not
            nodes += around
        elif node.output[0] not in gone:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _only_reader(graph: GraphProto, name: str) -> NodeProto | None:
    readers = [node for node in graph.node if name in node.input]
    return readers[0] if len(readers) == 1 else None


def _permutation(node: NodeProto) -> list[int] | None:
    """Of a transposition."""
    if node.op_type != "Transpose":
        return None
    return list(helper.get_node_attr_value(node, "perm"))
