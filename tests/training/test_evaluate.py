"""Accuracy against counts made by hand: ten views, intervals, confusions, ensembles."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tests.training.train_runs import CLASSES, paint_photographs

from topfive.cli import main
from topfive.model_spec import Architecture, ModelSpec, Preprocessing
from topfive.preprocessing import decode
from topfive_training.checkpoint import CheckpointError, Classifier, save_model
from topfive_training.dataset import scan_known
from topfive_training.evaluate import evaluate, probabilities, summarize, ten_views, wilson


def classifier(seed: int = 0, labels: tuple[str, ...] = CLASSES) -> Classifier:
    torch.manual_seed(seed)
    spec = ModelSpec(
        architecture=Architecture(classes=len(labels), width=0.02),
        preprocessing=Preprocessing(mean=(120, 110, 100), std=(50, 50, 50)),
        labels=labels,
    )
    return Classifier(spec).eval()


def test_ten_views_by_hand() -> None:
    square = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    views = ten_views(torch.from_numpy(square)[None], 227)[0].numpy()
    expected = [
        square[:227, :227],
        square[:227, 29:],
        square[29:, :227],
        square[29:, 29:],
        square[14:241, 14:241],
    ]
    for view, mirrored, by_hand in zip(views[:5], views[5:], expected, strict=True):
        assert np.array_equal(view, by_hand)
        assert np.array_equal(mirrored, by_hand[:, ::-1])


def test_ten_views_average_softmax_not_logits() -> None:
    model = classifier()
    squares = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for y, x in ((0, 0), (0, 29), (29, 0), (29, 29), (14, 14)):
        for step in (1, -1):
            crop = squares[:, y : y + 227, x : x + 227].numpy()[:, :, ::step].copy()
            logits = model(torch.from_numpy(crop)).double()
            total += logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(probabilities(model, squares, 10).double(), total / 10, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    # R: binom::binom.confint(x, n, methods = "wilson")
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (81, 263, 0.2552929, 0.3662076)],
)
def test_wilson(count: int, of: int, low: float, high: float) -> None:
    share = wilson(count, of)
    assert (share.low, share.high) == pytest.approx((low, high), abs=2e-5)


def test_counts_by_hand() -> None:
    labels = tuple("abcdefg")
    probabilities_NK = torch.tensor(
        [
            [0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04],  # a: right
            [0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04],  # b: among five
            [0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04],  # g: wrong
            [0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04],  # g: wrong
        ]
    )
    result = summarize(
        probabilities_NK, torch.tensor([0, 1, 6, 6]), labels, views=1, models=1, worst=1, unreadable={}
    )
    assert (result.top1_error.share, result.top5_error.share) == (0.75, 0.5)
    assert [(c.label, c.top1.share, c.top5.share) for c in result.classes] == [
        ("a", 1.0, 1.0),
        ("b", 0.0, 1.0),
        ("g", 0.0, 0.0),
    ]
    assert [(c.label, c.taken_for, c.count) for c in result.confusions] == [("g", "a", 2)]


@pytest.mark.parametrize("views", [1, 10])
def test_an_ensemble_averages_probabilities(photographs: Path, tmp_path: Path, views: Literal[1, 10]) -> None:
    models = [classifier(seed) for seed in (1, 2)]
    images = scan_known(photographs, CLASSES, tmp_path)[0].subset(range(3, 30, 5))
    result = evaluate(
        models, images, views=views, batch_size=4, workers=2, worst=3, progress=lambda done, total: None
    )
    wrong = 0
    for index, class_ in enumerate(images.classes):
        data = images.path(index).read_bytes()
        total = torch.zeros(3)
        for model in models:
            preprocessing = model.spec.preprocessing
            side = preprocessing.crop if views == 1 else preprocessing.short_side
            square = torch.from_numpy(np.asarray(decode(data, preprocessing, crop=side).image).copy())[None]
            total += probabilities(model, square, views)[0]
        wrong += int(total.argmax()) != class_
    assert (result.top1_error.count, result.images, result.models) == (wrong, 6, 2)


def test_models_of_other_classes_are_no_ensemble(photographs: Path, tmp_path: Path) -> None:
    images, _ = scan_known(photographs, CLASSES, tmp_path)
    models = [classifier(), classifier(labels=("blue", "red", "green"))]
    with pytest.raises(CheckpointError, match="different classes"):
        evaluate(models, images, views=1, batch_size=7, workers=2, worst=3, progress=lambda done, total: None)


def test_the_command_prints_json_and_names_the_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = paint_photographs(tmp_path / "photographs", 2)
    (folder / "red" / "notes.txt").write_text("no image")
    save_model(tmp_path / "run", classifier())
    assert main(["evaluate", str(tmp_path / "run"), str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6
    assert result["unreadable"].keys() == {"red/notes.txt"}
    assert main(["evaluate", str(tmp_path / "run"), str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "top-1 error" in printed
    assert "skipped red/notes.txt" in printed


def test_a_class_is_one_line_of_a_terminal_with_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ("a checkerboard", "plain")
    folder = paint_photographs(tmp_path / "photographs", 2, classes=labels)
    monkeypatch.setenv("COLUMNS", "80")
    save_model(tmp_path / "run", classifier(labels=labels))
    assert main(["evaluate", str(tmp_path / "run"), str(folder)]) == 0
    # Two shares a class, each with its interval.
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.count(")") == 2]
    assert [name for name in labels for row in rows if name in row] == list(labels), printed
