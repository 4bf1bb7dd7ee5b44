"""int8: calibrated on one half, judged on the other, with layers left in fp32 only where they have to be."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.export.conftest import limits_up_to, make_classifier

from topfive.cli import main
from topfive.model_spec import ArchitectureName
from topfive_export import pipeline, quantize
from topfive_export.corpus import decoded, drawn_pictures
from topfive_export.gate import Answered, Disagreement, answer_onnx, answer_torch, compare, enforce
from topfive_export.graphs import build_graph
from topfive_export.onnx_file import trace
from topfive_export.pipeline import ExportConfig, run_export
from topfive_export.quantize import LAYERS, Scheme, activate_before_pools, tidy, weight_nodes
from topfive_export.variant import ExportError, Variant

INT8 = Variant(precision="int8")


class Sample(NamedTuple):
    """An int8 graph, images, and what the network says of them."""

    model: onnx.ModelProto
    images: np.ndarray
    reference: Answered


def test_an_int8_version_is_smaller_and_reports_how_it_was_made(
    checkpoint: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "models"
    lines: list[str] = []
    config = ExportConfig(run=checkpoint, out=out, precision="int8", images=photographs)
    published = run_export(config, say=lines.append)
    report = json.loads((out / "alexnet_int8" / "1" / "report.json").read_text())
    assert json.loads(json.dumps(published[0].report)) == report
    assert report["corpus"]["given"] + len(report["quantization"]["calibration_sha256"]) == len(
        list(photographs.iterdir())
    )
    assert report["corpus"]["drawn"] == 0
    assert {"minmax", "percentile-99.99"} <= set(report["quantization"]["relative_difference_by_scheme"])
    agreement = report["agreement"]
    assert agreement["top1_agreement_all"] >= 0.9
    # What is said is what was judged by, and int8 excuses no near-tie.
    assert f"top-1 {agreement['top1_agreement_all']:.1%} of {agreement['images']})" in lines[-1]
    model = onnx.load(out / "alexnet_int8" / "1" / "model.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    quantized = [
        name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8 and "weight_quant" in name
    ]
    assert len(quantized) == len(LAYERS) - len(report["quantization"]["skipped"])
    assert "topfive" in {entry.key for entry in model.metadata_props}


@pytest.mark.parametrize(
    ("name", "options", "norms", "ranges"),
    [
        ("alexnet-2012", {}, 2, "minmax"),
        ("alexnet-2012", {"within_map_norm": True}, 3, "percentile-99.99"),
        ("alexnet-2012", {"normalization": "batch"}, 0, "minmax"),
        ("alexnet-2014", {}, 0, "minmax"),
        ("alexnet-caffe", {}, 2, "percentile-99.99"),
        ("caffenet", {}, 2, "minmax"),
    ],
)
def test_all_but_the_norms_is_computed_on_bytes(
    name: ArchitectureName, options: dict[str, Any], norms: int, ranges: str, tmp_path: Path
) -> None:
    classifier = make_classifier(name, **options)
    side = classifier.spec.preprocessing.crop
    images = decoded(drawn_pictures(), classifier.spec.preprocessing, side)
    model = trace(build_graph(classifier, INT8), variant=INT8, side=side)
    candidates = (Scheme(ranges=ranges),)
    reference = answer_torch(classifier, images)
    found = quantize.quantize(model, images, reference, limits_up_to(1e9), candidates=candidates)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        found.model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    computed = Counter(node.op_type for node in nodes)
    expected = {
        "Scan": min(norms, 2),  # for each layer that has norms, over the images
        "QLinearConv": 5,
        "NhwcMaxPool": 3,  # bytes, channels last; "MaxPool" would be fp32, or bytes at a tenth of the speed
        "QGemm": 3,
        "Transpose": 1,  # before the first fully-connected layer
        # One for what each dropout scales, one for each answer.
        "DequantizeLinear": (2 if name == "alexnet-2012" else 0) + 2,
    }
    # 2014 subtracts a mean and pads, so its pixels are normalised in fp32 first.
    assert computed["Cast"] == (1 if name == "alexnet-2014" else 0)
    assert {kind: computed[kind] for kind in expected} == expected
    floats = {"MaxPool", "Conv", "Relu", "Gemm", "ReorderInput", "ReorderOutput"}
    assert not {"Clip", "Sqrt", "MatMul", *floats} & computed.keys()
    bodies = [onnx.helper.get_node_attr_value(node, "body") for node in nodes if node.op_type == "Scan"]
    of_images = Counter(node.op_type for body in bodies for node in body.node)
    expected = {"Clip": norms, "DequantizeLinear": min(norms, 2), "QuantizeLinear": min(norms, 2)}
    assert {kind: of_images[kind] for kind in expected} == expected
    assert not {"Transpose", *floats} & of_images.keys()


@pytest.mark.parametrize("name", ["alexnet-2012", "caffenet"])
def test_a_relu_goes_before_its_pool_and_nothing_changes(name: ArchitectureName) -> None:
    model = trace(build_graph(make_classifier(name), INT8), variant=INT8, side=227)
    layers, norms = weight_nodes(model)
    assert list(layers) == list(LAYERS)
    assert len(norms) == 2
    images = np.random.default_rng(0).integers(0, 256, (2, 227, 227, 3), dtype=np.uint8)
    expected = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    before = [node.op_type for node in model.graph.node]
    activate_before_pools(model)
    onnx.checker.check_model(model, full_check=True)
    actual = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for one, other in zip(
        expected.run(None, {"image": images}), actual.run(None, {"image": images}), strict=True
    ):
        assert np.array_equal(one, other)
    after = [node.op_type for node in model.graph.node]
    assert sorted(before) == sorted(after)
    assert ("MaxPool", "Relu") in pairwise(before)
    assert ("MaxPool", "Relu") not in pairwise(after)


def test_a_pool_that_others_read_as_well_stays_before_its_relu() -> None:
    make, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("MaxPool", ["x"], ["pooled"], kernel_shape=[2, 2]),
        make("Relu", ["pooled"], ["y"]),
        make("Neg", ["pooled"], ["also"]),
    ]
    floats = onnx.TensorProto.FLOAT
    outputs = [tensor(name, floats, [1, 1, 3, 3]) for name in ("y", "also")]
    graph = onnx.helper.make_graph(nodes, "small", [tensor("x", floats, [1, 1, 4, 4])], outputs)
    model = onnx.helper.make_model(graph)
    before = model.SerializeToString()
    activate_before_pools(model)
    assert model.SerializeToString() == before


def test_removing_what_is_redundant_changes_no_answer(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "tidy", lambda _: None)
    model = trace(build_graph(make_classifier(), INT8), variant=INT8, side=227)
    candidates = (Scheme(ranges="minmax"),)
    untidy = quantize.quantize(model, sample.images, sample.reference, INT8.limits, candidates=candidates)
    kinds = [Counter(node.op_type for node in each.graph.node) for each in (untidy.model, sample.model)]
    assert kinds[0]["Cast"] == 1
    assert kinds[1]["Cast"] == 0
    answers = [
        answer_onnx(
            onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]),
            sample.images,
            8,
        )
        for each in (untidy.model, sample.model)
    ]
    assert np.array_equal(answers[0].scores_MK, answers[1].scores_MK)


def _small_graph(maker: str, scale: float, zero_point: int, *, read_twice: bool = False) -> onnx.ModelProto:
    """`maker`, and the quantisation of what it makes."""
    make, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    bytes_, floats = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    attributes: dict[str, Any] = {"to": floats} if maker == "Cast" else {}
    nodes = [
        make(maker, ["x"], ["made"], **attributes),
        make("QuantizeLinear", ["made", "scale", "zero"], ["q"]),
        make("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    outputs = [tensor("y", floats, [4])]
    if read_twice:
        nodes.append(make("Neg", ["made"], ["also"]))
        outputs.append(tensor("also", floats, [4]))
    constants = [
        onnx.numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        onnx.numpy_helper.from_array(np.array(zero_point, np.uint8), "zero"),
    ]
    inputs = [tensor("x", bytes_ if maker == "Cast" else floats, [4])]
    graph = onnx.helper.make_graph(nodes, "small", inputs, outputs, constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("maker", "scale", "zero_point", "read_twice", "left"),
    [
        ("Relu", 0.5, 0, False, ["QuantizeLinear", "DequantizeLinear"]),
        ("Relu", 0.5, 3, False, ["Relu", "QuantizeLinear", "DequantizeLinear"]),
        ("Relu", 0.5, 0, True, ["Relu", "QuantizeLinear", "DequantizeLinear", "Neg"]),
        ("Cast", 1.0, 0, False, ["DequantizeLinear"]),
        ("Cast", 1.0, 1, False, ["Cast", "QuantizeLinear", "DequantizeLinear"]),
        ("Cast", 0.5, 0, False, ["Cast", "QuantizeLinear", "DequantizeLinear"]),
        ("Cast", 1.0, 0, True, ["Cast", "QuantizeLinear", "DequantizeLinear", "Neg"]),
    ],
)
def test_only_what_is_redundant_is_removed(
    maker: str, scale: float, zero_point: int, read_twice: bool, left: list[str]
) -> None:
    model = _small_graph(maker, scale, zero_point, read_twice=read_twice)
    values = np.array([0, 1, 100, 255]) if maker == "Cast" else np.array([-3.0, 0.0, 1.0, 7.0])
    given = {"x": values.astype(np.uint8 if maker == "Cast" else np.float32)}
    before = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tidy(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == left
    after = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for one, other in zip(before.run(None, given), after.run(None, given), strict=True):
        assert np.array_equal(one, other)


def test_pixels_are_quantized_as_they_are_whatever_the_calibration_images_hold() -> None:
    classifier = make_classifier()
    images = np.random.default_rng(1).integers(60, 130, (8, 227, 227, 3), dtype=np.uint8)
    model = trace(build_graph(classifier, INT8), variant=INT8, side=227)
    found = quantize.quantize(model, images, answer_torch(classifier, images), limits_up_to(1e9))
    makers = {name: node for node in found.model.graph.node for name in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.model.graph.initializer}
    conv1 = next(node for node in found.model.graph.node if node.op_type == "Conv")
    read = makers[conv1.input[0]]
    assert read.op_type == "DequantizeLinear"
    assert constants[read.input[1]] == 1
    assert constants[read.input[2]] == 0
    assert makers[read.input[0]].op_type == "Transpose"
    assert makers[read.input[0]].input[0] == "image"


def test_the_layer_that_costs_accuracy_stays_in_fp32() -> None:
    classifier = make_classifier(width=0.1)
    images = np.random.default_rng(1).integers(0, 256, (16, 227, 227, 3), dtype=np.uint8)
    images[::2] = images[::2] // 4 + 90
    # Two columns of huge weights that cancel each other: 8 bits for what enters and leaves is too few.
    network = classifier.network
    with torch.no_grad():
        network.fc7.weight[1] = network.fc7.weight[0]
        network.fc7.bias[1] = network.fc7.bias[0]
        network.fc8.weight[:, 0] += 400
        network.fc8.weight[:, 1] -= 400
        network.fc7.weight[:2] *= 40
    reference = answer_torch(classifier, images)
    model = trace(build_graph(classifier, INT8), variant=INT8, side=227)
    said: list[str] = []
    candidates = (Scheme(ranges="minmax"),)
    free = quantize.quantize(model, images, reference, limits_up_to(1e9), candidates=candidates)
    assert free.scheme.skipped == ()
    everything = free.tried["minmax"]
    model = trace(build_graph(classifier, INT8), variant=INT8, side=227)
    limits = limits_up_to(everything)  # the search wants a fifth to spare
    found = quantize.quantize(model, images, reference, limits, candidates=candidates, say=said.append)
    assert "fc8" in found.scheme.skipped
    assert len(found.scheme.skipped) <= 3
    assert min(found.tried.values()) < 0.8 * everything
    # All layers in int8, each one alone in fp32, then two and three of them: none a second time.
    assert len(said) == len(set(said)) == 1 + len(LAYERS) + len(found.scheme.skipped) - 1


def test_the_graph_that_is_given_is_that_of_the_scheme_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_classifier()
    images = np.random.default_rng(1).integers(0, 256, (8, 227, 227, 3), dtype=np.uint8)
    reference = answer_torch(classifier, images)
    perfect = compare(reference, [reference], list(map(str, range(8))), INT8.limits)
    # One layer in fp32 is enough, and it is neither the first nor the last that is tried.
    off = {"": 1.0, "conv1": 0.6, "fc7": 0.1, "fc8": 0.7}
    tried: list[str] = []

    def marked(source: Path, target: Path, _: np.ndarray, scheme: Scheme, __: Any) -> onnx.ModelProto:
        tried.append(",".join(scheme.skipped))
        graph = onnx.load(source)
        graph.producer_version = tried[-1]
        onnx.save(graph, target)
        return graph

    monkeypatch.setattr(quantize, "LAYERS", ("conv1", "fc7", "fc8"))
    monkeypatch.setattr(quantize, "_quantize_static", marked)
    monkeypatch.setattr(
        quantize, "compare", lambda *_: dataclasses.replace(perfect, relative_difference=off[tried[-1]])
    )
    model = trace(build_graph(classifier, INT8), variant=INT8, side=227)
    candidates = (Scheme(ranges="minmax"),)
    found = quantize.quantize(model, images, reference, limits_up_to(0.2), candidates=candidates)
    assert found.scheme.skipped == ("fc7",)
    assert found.model.producer_version == "fc7"


def test_beyond_the_limits_even_so_is_refused() -> None:
    classifier = make_classifier()
    images = np.random.default_rng(1).integers(0, 256, (8, 227, 227, 3), dtype=np.uint8)
    model = trace(build_graph(classifier, INT8), variant=INT8, side=227)
    told = r"even with .* in fp32 .*worst on 'photo [0-7]\.jpg'.*; serve this checkpoint in fp32"
    with pytest.raises(ExportError, match=told):
        quantize.quantize(
            model,
            images,
            answer_torch(classifier, images),
            limits_up_to(1e-9),
            names=[f"photo {index}.jpg" for index in range(8)],
            candidates=(Scheme(ranges="minmax"),),
        )


@pytest.fixture(scope="module")
def sample() -> Sample:
    classifier = make_classifier()
    images = decoded(drawn_pictures(), classifier.spec.preprocessing, 227)
    reference = answer_torch(classifier, images)
    model = trace(build_graph(classifier, INT8), variant=INT8, side=227)
    found = quantize.quantize(model, images, reference, INT8.limits, candidates=(Scheme(ranges="minmax"),))
    assert found.scheme.skipped == ()
    return Sample(found.model, images, reference)


def _three_bits(name: str, values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values / 32) * 32, -127, 127) if name.endswith("weight_quantized") else values


def _wrong_scale(name: str, values: np.ndarray) -> np.ndarray:
    return values * 1.5 if name.endswith("fc6.weight_scale") else values


def _lost_biases(name: str, values: np.ndarray) -> np.ndarray:
    return values * 0 if name.endswith("bias_quantized") else values


def _unscathed(_: str, values: np.ndarray) -> np.ndarray:
    return values


@pytest.mark.parametrize("breakage", [_three_bits, _wrong_scale, _lost_biases, _unscathed])
def test_the_limits_of_int8_tell_a_broken_quantization_from_a_good_one(
    breakage: Callable[[str, np.ndarray], np.ndarray], sample: Sample
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(sample.model)
    changed = 0
    for tensor in model.graph.initializer:
        before = onnx.numpy_helper.to_array(tensor)
        after = breakage(tensor.name, before).astype(before.dtype)
        changed += not np.array_equal(before, after)
        tensor.CopyFrom(onnx.numpy_helper.from_array(after, tensor.name))
    assert (changed > 0) == (breakage is not _unscathed)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [str(index) for index in range(len(sample.images))]
    answer = answer_onnx(session, sample.images, 8)
    comparison = compare(sample.reference, [answer], names, INT8.limits)
    if breakage is _unscathed:
        enforce(comparison, INT8.limits, "the graph")
        return
    with pytest.raises(Disagreement):
        enforce(comparison, INT8.limits, "the graph")


def test_an_int8_graph_that_fails_on_unseen_images_is_refused(
    checkpoint: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = quantize.quantize

    def of_another_network(
        model: onnx.ModelProto, *arguments: object, **options: object
    ) -> quantize.Quantized:
        found = real(model, *arguments, **options)  # type: ignore[arg-type]
        for tensor in found.model.graph.initializer:
            if tensor.name.endswith("fc8.weight_scale"):
                scales = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(scales[::-1] * -3, tensor.name))
        return found

    monkeypatch.setattr(pipeline, "quantize", of_another_network)
    out = tmp_path / "models"
    arguments = [
        "export",
        str(checkpoint),
        "--out",
        str(out),
        "--precision",
        "int8",
        "--images",
        str(photographs),
    ]
    assert main(arguments) == 1
    assert "does not answer as the trained network does" in capsys.readouterr().err
    assert not out.exists()
