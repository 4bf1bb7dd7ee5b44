"""The norms of an int8 graph in a loop over the images: the same answers, whatever surrounds them."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tests.export.conftest import limits_up_to, make_classifier

from topfive.model_spec import ArchitectureName
from topfive_export import quantize
from topfive_export.corpus import decoded, drawn_pictures
from topfive_export.gate import answer_torch
from topfive_export.graphs import build_graph
from topfive_export.image_by_image import norms_image_by_image
from topfive_export.onnx_file import strip, trace
from topfive_export.quantize import Scheme
from topfive_export.variant import Variant
from topfive_training.checkpoint import Classifier

INT8 = Variant(precision="int8")


def make_batch(count: int, classifier: Classifier | None = None) -> NDArray[np.uint8]:
    spec = (classifier or make_classifier()).spec
    return decoded(drawn_pictures()[:count], spec.preprocessing, spec.preprocessing.crop)


def make_int8(
    monkeypatch: pytest.MonkeyPatch,
    name: ArchitectureName = "alexnet-2012",
    skipped: tuple[str, ...] = (),
    **options: Any,
) -> onnx.ModelProto:
    """An int8 graph whose norms compute whole batches, with norms strong enough to be seen in the answers."""
    monkeypatch.setattr(quantize, "norms_image_by_image", lambda _: 0)
    classifier = make_classifier(name, **options)
    with torch.no_grad():
        for layer in (classifier.network.conv1, classifier.network.conv2):
            layer.weight *= 20
    side = classifier.spec.preprocessing.crop
    model = trace(build_graph(classifier, INT8), variant=INT8, side=side)
    images = make_batch(8, classifier)
    scheme = Scheme(ranges="minmax", skipped=skipped)
    reference = answer_torch(classifier, images)
    return quantize.quantize(model, images, reference, limits_up_to(1e9), candidates=(scheme,)).model


def answers(model: onnx.ModelProto, images: NDArray[np.uint8]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": images}))


def bodies(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    """What the loops of a graph compute for each image; the very objects, not copies."""
    scans = [node for node in model.graph.node if node.op_type == "Scan"]
    return [attribute.g for scan in scans for attribute in scan.attribute if attribute.name == "body"]


def count(model: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("alexnet-2012", {}, 2),
        ("alexnet-2012", {"within_map_norm": True}, 2),
        ("alexnet-caffe", {}, 2),
        ("caffenet", {}, 2),
    ],
)
def test_no_answer_changes(
    name: ArchitectureName, options: dict[str, Any], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_int8(monkeypatch, name, **options)
    images = make_batch(5)
    before = {size: answers(model, images[:size]) for size in (1, 5)}
    assert norms_image_by_image(model) == found
    onnx.checker.check_model(model, full_check=True)
    assert count(model, "Scan") == found
    assert count(model, "Sqrt") == 0
    for size, expected in before.items():
        for one, other in zip(expected, answers(model, images[:size]), strict=True):
            np.testing.assert_array_equal(one, other)
    assert norms_image_by_image(model) == 0  # done is done


@pytest.mark.parametrize(("skipped", "found"), [("conv1", 1), ("conv2", 0), ("conv3", 1)])
def test_a_norm_beside_a_layer_in_fp32_stays_as_it_is(
    skipped: str, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_int8(monkeypatch, skipped=(skipped,))
    images = make_batch(3)
    before = answers(model, images)
    assert norms_image_by_image(model) == found
    onnx.checker.check_model(model, full_check=True)
    for one, other in zip(before, answers(model, images), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_norm_is_felt_in_these_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would not see a norm that is lost or done twice."""
    model = make_int8(monkeypatch)
    images = make_batch(3)
    before = answers(model, images)
    norms_image_by_image(model)
    root = next(node for node in bodies(model)[0].node if node.op_type == "Sqrt")
    root.op_type = "Identity"
    assert not np.array_equal(before[2], answers(model, images)[2])


def test_the_exporters_notes_are_removed_inside_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_int8(monkeypatch)
    norms_image_by_image(model)
    assert any(node.metadata_props or node.doc_string for body in bodies(model) for node in body.node)
    strip(model)
    assert not any(node.metadata_props or node.doc_string for body in bodies(model) for node in body.node)
