"""int8 for processors: static quantisation (QDQ), calibrated on photographs, by ONNX Runtime's own quantiser.

Activations are uint8 per tensor, weights int8 per channel. The response norm stays in fp32: its squares span too much. It
is computed one image after the other, so that its floats stay in the cores' caches.
The graph is made so that ONNX Runtime computes all else on bytes, channels last, from the pixels to the last pool.
How the ranges are found is chosen by measurement on the calibration images; a layer is left in fp32 only where the
graph is beyond its limits otherwise. The verdict is the gate's, on images that the calibration has not seen.
"""

import contextlib
import dataclasses
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from topfive_export import onnx_file
from topfive_export.gate import Answered, Comparison, Disagreement, answer_onnx, compare, enforce
from topfive_export.graphs import INPUT_NAME
from topfive_export.image_by_image import norms_image_by_image
from topfive_export.variant import ExportError, Limits

LAYERS: Final = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
MINIMUM_IMAGES: Final = 32
"""Fewest images that are worth calibrating and measuring on, half each."""
MAX_SKIPPED: Final = 3
"""Most layers that may stay in fp32; beyond that int8 has nothing left to give."""
_BATCH: Final = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantise."""

    ranges: str
    """`minmax`, or `percentile-P`: the share of activations, in percent, that the range of a tensor covers."""
    skipped: tuple[str, ...] = ()
    """Layers left in fp32."""

    def options(self) -> dict[str, Any]:
        """For `quantize_static`."""
        if self.ranges == "minmax":
            return {"calibrate_method": CalibrationMethod.MinMax}
        percentile = float(self.ranges.removeprefix("percentile-"))
        return {
            "calibrate_method": CalibrationMethod.Percentile,
            "extra_options": {"CalibPercentile": percentile},
        }


CANDIDATES: Final = (Scheme(ranges="minmax"), Scheme(ranges="percentile-99.99"))
"""Tried in this order. Entropy gave the same ranges as minmax on every network, in twice the time (docs/export.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantised model and how it was chosen."""

    model: ModelProto
    scheme: Scheme
    tried: dict[str, float]
    """Relative difference on the calibration images, by scheme."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library is untyped
    def __init__(self, images_MHWC: NDArray[np.uint8]) -> None:
        # Full batches only, the last one filled up from the beginning: the quantiser stacks what it collects.
        count = -(-len(images_MHWC) // _BATCH) * _BATCH
        rows = np.arange(count).reshape(-1, _BATCH) % len(images_MHWC)
        self._batches = (images_MHWC[batch] for batch in rows)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def quantize(
    model: ModelProto,
    images_MHWC: NDArray[np.uint8],
    reference: Answered,
    limits: Limits,
    *,
    names: Sequence[str] = (),
    candidates: Sequence[Scheme] = CANDIDATES,
    say: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Quantise with the best of `candidates`; leave layers in fp32 only if that is not within the limits.

    Args:
        model: the fp32 graph.
        images_MHWC: calibration images, uint8 [M, H, W, C].
        reference: what the network answers to them.
        limits: decide whether layers have to be skipped; the final verdict is not given here.
        names: of the images, for messages; by default their numbers.
        candidates: ways of finding ranges.
        say: gets a line for every scheme tried.

    Raises:
        ExportError: beyond the limits even with `MAX_SKIPPED` layers left in fp32.
    """
    activate_before_pools(model)
    names = names or [f"calibration image {index}" for index in range(len(images_MHWC))]
    tried: dict[str, float] = {}

    with tempfile.TemporaryDirectory(prefix="topfive-int8-") as scratch:
        source = onnx_file.write(model, Path(scratch))

        def attempt(scheme: Scheme) -> tuple[ModelProto, Comparison]:
            path = Path(scratch) / "quantized.onnx"
            quantized = _quantize_static(source, path, images_MHWC, scheme, model)
            answer = answer_onnx(onnx_file.load(path), images_MHWC, _BATCH)
            comparison = compare(reference, [answer], names, limits)
            label = scheme.ranges + "".join(f", {layer} in fp32" for layer in scheme.skipped)
            tried[label] = comparison.relative_difference
            say(f"int8, {label}: answers off by {comparison.relative_difference:.3f} of their spread")
            return quantized, comparison

        attempts = {scheme: attempt(scheme) for scheme in candidates}
        best = _best({scheme: found[1].relative_difference for scheme, found in attempts.items()})
        quantized, comparison = attempts[best]
        if not _beyond(comparison, limits):
            return Quantized(model=quantized, scheme=best, tried=tried)
        alone: dict[str, float] = {}
        for layer in LAYERS:
            found = attempt(dataclasses.replace(best, skipped=(layer,)))
            if found[1].relative_difference < min(alone.values(), default=float("inf")):
                quantized, comparison = found
            alone[layer] = found[1].relative_difference
        order = sorted(LAYERS, key=lambda layer: alone[layer])
        for count in range(1, MAX_SKIPPED + 1):
            scheme = dataclasses.replace(best, skipped=tuple(sorted(order[:count])))
            if count > 1:
                quantized, comparison = attempt(scheme)
            if not (reason := _beyond(comparison, limits)):
                return Quantized(model=quantized, scheme=scheme, tried=tried)
    raise ExportError(
        f"int8 is beyond its limits even with {', '.join(scheme.skipped)} in fp32 ({reason}); serve this checkpoint in "
        "fp32, or give more --images like those it is for"
    )


def _best(differences: Mapping[Scheme, float]) -> Scheme:
    """The scheme that is least off; minmax unless another is better by a fifth, for it never clips what is to come."""
    return min(
        differences, key=lambda scheme: differences[scheme] * (0.8 if scheme.ranges == "minmax" else 1.0)
    )


def _beyond(comparison: Comparison, limits: Limits) -> str:
    """Why it is not within the limits with something to spare, or empty: unseen images are a little further off."""
    probability = limits.probability_difference
    stricter = dataclasses.replace(
        limits,
        probability_difference=None if probability is None else 0.8 * probability,
        relative_difference=0.8 * limits.relative_difference,
        features_difference=0.8 * limits.features_difference,
    )
    try:
        enforce(comparison, stricter, "it")
    except Disagreement as error:
        return str(error)
    return ""


def activate_before_pools(model: ModelProto) -> None:
    """Let a ReLU that follows a max-pool go before it, in place, which gives the same values.

    What the convolution before them gives is then quantised from zero on, with all 8 bits for what the ReLU leaves, and
    the pool reads the bytes as they are.
    """
    makers, readers = _links(model)
    for relu in model.graph.node:
        pool = makers.get(relu.input[0]) if relu.op_type == "Relu" else None
        if pool is None or pool.op_type != "MaxPool" or readers[pool.output[0]] > 1:
            continue
        # They change places, and what they read and write stays: the order of the nodes, too.
        pool.op_type, relu.op_type = relu.op_type, pool.op_type
        pool.name, relu.name = relu.name, pool.name
        relu.attribute.extend(pool.attribute)
        del pool.attribute[:]
    del model.graph.value_info[:]  # the shapes of what lies between have changed


def _links(model: ModelProto) -> tuple[dict[str, NodeProto], Counter[str]]:
    """The node that makes each tensor, and by how many each is read."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    return makers, readers


def weight_nodes(model: ModelProto) -> tuple[dict[str, str], list[str]]:
    """Names of the nodes of each layer with weights, and of the response norms' matrix products.

    Raises:
        ExportError: the graph is not an AlexNet's.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    layers: list[str] = []
    norms: list[str] = []
    for node in model.graph.node:
        if node.op_type in {"Conv", "Gemm", "MatMul"}:
            # What a norm multiplies by is named after it, or was computed for one within maps.
            is_layer = node.input[1] in weights and "norm" not in node.input[1]
            (layers if is_layer else norms).append(node.name)
    if len(layers) != len(LAYERS):
        raise ExportError(f"the graph has {len(layers)} layers with weights; AlexNet has {len(LAYERS)}")
    return dict(zip(LAYERS, layers, strict=True)), norms


def _quantize_static(
    source: Path, target: Path, images_MHWC: NDArray[np.uint8], scheme: Scheme, model: ModelProto
) -> ModelProto:
    layers, norms = weight_nodes(model)
    options = scheme.options()
    if pixels := _bare_pixels(model, layers["conv1"]):
        exact = {
            "quant_type": QuantType.QUInt8,
            "scale": np.array(1, np.float32),
            "zero_point": np.array(0, np.uint8),
        }
        options.setdefault("extra_options", {})["TensorQuantOverrides"] = {pixels: [exact]}
    with _quiet_quantizer():
        quantize_static(
            source,
            target,
            _Reader(images_MHWC),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Relu", "MaxPool", "Reshape"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*norms, *(layers[layer] for layer in scheme.skipped)],
            **options,
        )
    quantized = onnx.load(target)
    tidy(quantized)
    norms_image_by_image(quantized)
    onnx.save(quantized, target)
    return quantized


def _bare_pixels(model: ModelProto, conv1: str) -> str:
    """Name of what the first convolution reads, if that is the pixels themselves and not yet normalised."""
    pixels = next(node.input[0] for node in model.graph.node if node.name == conv1)
    cast = any(node.op_type == "Cast" and node.output[0] == pixels for node in model.graph.node)
    return pixels if cast else ""


def tidy(model: ModelProto) -> None:
    """Remove, in place, what quantisation has made redundant but ONNX Runtime would compute; the answers stay the same.

    * A ReLU whose result is quantised from zero on: rounding to such a range cuts off what is negative as well. Between
      a pool and its quantisation it would keep the pool in fp32.
    * The way of the pixels from bytes to floats and back to the same bytes.
    """
    graph = model.graph
    makers, readers = _links(model)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    redundant: dict[str, str] = {}
    gone: list[NodeProto] = []
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if maker is None or readers[maker.output[0]] > 1:
            continue
        scale, zero_point = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:])
        if maker.op_type == "Relu" and zero_point == 0:
            node.input[0] = maker.input[0]
            gone.append(maker)
        elif maker.op_type == "Cast" and scale == 1 and zero_point == 0:
            redundant[node.output[0]] = maker.input[0]
            gone += [maker, node]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = redundant.get(name, name)
    for node in gone:
        graph.node.remove(node)


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """The quantiser prints its progress and warns of a pre-processing that the export has done already."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
