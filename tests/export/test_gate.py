"""The gate refuses graphs that are wrong, each in its own way, and leaves nothing behind."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.export.conftest import make_classifier

from topfive.cli import main
from topfive_export import pipeline
from topfive_export.gate import (
    Answered,
    Comparison,
    Disagreement,
    accuracy,
    answer_onnx,
    compare,
    enforce,
    enforce_accuracy,
)
from topfive_export.graphs import ExportGraph, build_graph
from topfive_export.pipeline import ExportConfig, run_export
from topfive_export.variant import FP32_LIMITS, LIMITS, Graph, Limits, Precision, Variant
from topfive_training.checkpoint import Classifier, save_model


def _broken_mean(classifier: Classifier) -> None:
    classifier.mean += 8.0


def _swapped_channels(classifier: Classifier) -> None:
    classifier.network.conv1.weight.data = classifier.network.conv1.weight.data.flip(1)


def _dropped_norm(classifier: Classifier) -> None:
    classifier.network.norm2 = torch.nn.Identity()


def _shifted_mean_image(classifier: Classifier) -> None:
    # As if the crop of the mean image were taken two pixels off.
    classifier.mean = classifier.mean.roll(2, dims=2)


def _forgotten_dropout_factor(classifier: Classifier) -> None:
    classifier.network.dropout7.p = 0.0


BREAKAGES = [_broken_mean, _swapped_channels, _dropped_norm, _shifted_mean_image, _forgotten_dropout_factor]


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_graph_is_refused_and_nothing_is_left(
    breakage: Callable[[Classifier], None],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(classifier: Classifier, variant: Variant) -> ExportGraph:
        broken = copy.deepcopy(classifier)
        breakage(broken)
        return build_graph(broken, variant)

    monkeypatch.setattr(pipeline, "build_graph", build)
    with pytest.raises(Disagreement, match="does not answer as the trained network does") as caught:
        run_export(ExportConfig(run=checkpoint, out=tmp_path / "models"))
    assert "limit" in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_a_resize_that_is_off_is_refused_though_the_hot_graph_is_right(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(classifier: Classifier, variant: Variant) -> ExportGraph:
        graph = build_graph(classifier, variant)
        if graph.resize is not None:
            graph.resize.short_side = 250
        return graph

    monkeypatch.setattr(pipeline, "build_graph", build)
    with pytest.raises(Disagreement, match="image, fp32"):
        run_export(ExportConfig(run=checkpoint, out=tmp_path / "models"))
    assert not (tmp_path / "models").exists()


def test_the_command_fails_with_a_sentence_and_the_older_version_stays(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    before = sorted(str(path) for path in out.rglob("*"))
    capsys.readouterr()

    def build(classifier: Classifier, variant: Variant) -> ExportGraph:
        broken = copy.deepcopy(classifier)
        _broken_mean(broken)
        return build_graph(broken, variant)

    monkeypatch.setattr(pipeline, "build_graph", build)
    assert main(["export", str(checkpoint), "--out", str(out), "--version", "2"]) == 1
    said = capsys.readouterr()
    assert "does not answer as the trained network does" in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert sorted(str(path) for path in out.rglob("*")) == before


def test_a_network_that_answers_everything_alike_cannot_be_verified(tmp_path: Path) -> None:
    classifier = make_classifier()
    with torch.no_grad():
        classifier.network.fc8.weight.zero_()
    save_model(tmp_path / "run", classifier)
    with pytest.raises(Disagreement, match=r"run: the network gives the same answer .* has it been trained"):
        run_export(ExportConfig(run=tmp_path / "run", out=tmp_path / "models"))


def _answered(logits: np.ndarray) -> Answered:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    return Answered(scores, scores[:, :2].copy())


def test_one_wrong_image_in_one_batch_size_is_found_and_named() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 9))
    reference = _answered(logits)
    wrong = logits.copy()
    wrong[13] = logits[14]
    names = [f"image {index}" for index in range(20)]
    comparison = compare(reference, [reference, _answered(wrong), reference], names, FP32_LIMITS)
    with pytest.raises(Disagreement, match="image 13"):
        enforce(comparison, FP32_LIMITS, "the graph")
    enforce(compare(reference, [reference], names, FP32_LIMITS), FP32_LIMITS, "the graph")


def test_near_ties_are_counted_and_only_excused_where_the_limits_say_so() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(10, 6)) * 2
    logits[3, :2] = logits[3].max() + np.array([1.0, 1.0 + 1e-7])
    other = logits.copy()
    other[3, :2] = other[3, 1::-1]
    names = [str(index) for index in range(10)]
    comparison = compare(_answered(logits), [_answered(other)], names, FP32_LIMITS)
    assert comparison.decided_top1 == 9
    assert comparison.top1_agreement == 1.0
    assert comparison.top1_agreement_all == pytest.approx(0.9)
    enforce(comparison, FP32_LIMITS, "the graph")
    strict = Limits(
        probability_difference=None,
        relative_difference=1.0,
        features_difference=1.0,
        top1_agreement=1.0,
        top5_agreement=0.0,
        near_ties_excused=False,
        accuracy_drop=0.0,
    )
    with pytest.raises(Disagreement, match=r"top-1 answers agree on 90\.0% of the 10 images"):
        enforce(comparison, strict, "the graph")


def test_one_image_is_no_finding_also_where_few_are_decided() -> None:
    limits = dataclasses.replace(FP32_LIMITS, top1_agreement=0.9, top5_agreement=0.9)
    found = Comparison(
        images=100,
        decided_top1=2,
        decided_top5=100,
        top1_agreement=0.5,
        top5_agreement=1.0,
        top1_agreement_all=0.99,
        top5_agreement_all=1.0,
        probability_difference=0.0,
        relative_difference=0.0,
        features_difference=0.0,
        worst_image="w",
    )
    enforce(found, limits, "the graph")
    two = dataclasses.replace(found, decided_top1=4)
    with pytest.raises(Disagreement, match=r"top-1 answers agree on 50\.0% of the 4 images"):
        enforce(two, limits, "the graph")


def test_an_unsure_network_is_measured_as_strictly_as_a_sure_one() -> None:
    # Logits of an untrained network: no probability moves by more than 1e-4, and yet two images are mixed up.
    logits = np.random.default_rng(2).normal(size=(16, 1000)) * 0.01
    mixed = logits.copy()
    mixed[[4, 5]] = logits[[5, 4]]
    comparison = compare(_answered(logits), [_answered(mixed)], [str(i) for i in range(16)], FP32_LIMITS)
    assert comparison.probability_difference < 1e-4
    with pytest.raises(Disagreement, match="vary by between images"):
        enforce(comparison, FP32_LIMITS, "the graph")


def test_nan_never_passes() -> None:
    reference = _answered(np.random.default_rng(3).normal(size=(4, 3)))
    broken = Answered(np.full_like(reference.scores_MK, np.nan), reference.features_MF)
    with pytest.raises(Disagreement):
        enforce(compare(reference, [broken], list("abcd"), FP32_LIMITS), FP32_LIMITS, "the graph")


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_features_have_a_limit_too(kind: tuple[Graph, Precision]) -> None:
    reference = _answered(np.random.default_rng(4).normal(size=(8, 6)))
    names, limits = list("abcdefgh"), LIMITS[kind]
    nothing = Answered(reference.scores_MK, np.zeros_like(reference.features_MF))
    with pytest.raises(Disagreement, match="a feature differs by 1 of the largest"):
        enforce(compare(reference, [nothing], names, limits), limits, "the graph")
    broken = Answered(reference.scores_MK, np.full_like(reference.features_MF, np.nan))
    with pytest.raises(Disagreement, match="a feature differs by nan"):
        enforce(compare(reference, [reference, broken, reference], names, limits), limits, "the graph")
    narrow = Answered(reference.scores_MK, reference.features_MF[:, :1])
    with pytest.raises(Disagreement, match=r"the features are \(8, 1\); the network's are \(8, 2\)"):
        compare(reference, [narrow], names, limits)


def test_features_that_are_not_the_networks_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_features(session: Any, images_MHWC: Any, batch_size: int) -> Answered:
        answer = answer_onnx(session, images_MHWC, batch_size)
        return Answered(answer.scores_MK, answer.features_MF * 0)

    monkeypatch.setattr(pipeline, "answer_onnx", without_features)
    config = ExportConfig(run=checkpoint, out=tmp_path / "models", target="cuda")
    with pytest.raises(Disagreement, match="a feature differs by 1 of the largest"):
        run_export(config)


def test_a_network_that_is_too_large_for_fp16_is_told_so(tmp_path: Path) -> None:
    classifier = make_classifier()
    with torch.no_grad():
        # What the first dense layer gives is beyond 65,504; the scores are as they were.
        classifier.network.fc6.weight.mul_(1e6)
        classifier.network.fc6.bias.mul_(1e6)
        classifier.network.fc7.weight.div_(1e6)
    save_model(tmp_path / "run", classifier)
    config = ExportConfig(run=tmp_path / "run", out=tmp_path / "models", precision="fp16", target="cuda")
    with pytest.raises(Disagreement, match=r"not finite numbers: fp16 ends at 65,504, .*; export it in fp32"):
        run_export(config)


def test_accuracy_counts_labelled_images_and_a_fall_is_refused() -> None:
    scores = np.eye(6, dtype=np.float32)[[0, 1, 2, 3] * 10]
    labels: list[int | None] = [0, 1, 2, None] * 10
    right = accuracy(scores, labels)
    assert right is not None
    assert (right.images, right.top1, right.top5) == (30, 1.0, 1.0)
    worse = accuracy(scores[::-1].copy(), labels)
    with pytest.raises(Disagreement, match=r"is right \(top-1\)"):
        enforce_accuracy(right, worse, FP32_LIMITS, "the graph")
    enforce_accuracy(right, right, FP32_LIMITS, "the graph")
    assert accuracy(scores, [None] * 40) is None


def test_combinations_without_sense_are_usage_errors(checkpoint: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "models")
    assert main(["export", str(checkpoint), "--out", out, "--precision", "fp16"]) == 2
    assert main(["export", str(checkpoint), "--out", out, "--precision", "int8", "--target", "cuda"]) == 2
