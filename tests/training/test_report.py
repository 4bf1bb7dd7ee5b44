import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from topfive.errors import TopfiveError
from topfive.model_spec import Architecture, ModelSpec, Preprocessing
from topfive_training import report_figures
from topfive_training.checkpoint import Classifier, save_model
from topfive_training.evaluate import ClassAccuracy, wilson
from topfive_training.prepare import prepare
from topfive_training.report import nearest_rows, read_log, report

LABELS = ("ant", "bee <script>alert(1)</script>", "cat & dog")
FOLDERS = ("ant", "bee", "cat")


def make_run(folder: Path, labels: tuple[str, ...] = FOLDERS) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(
        architecture=Architecture(classes=len(labels), width=0.05),
        preprocessing=Preprocessing(mean=(120.0, 120.0, 120.0)),
        labels=labels,
        recipe={"rate": 0.01, "epochs": 2},
        code_fingerprint="topfive test",
    )
    save_model(folder, Classifier(spec))
    lines = []
    for epoch in (1, 2):
        lines.append({"kind": "step", "step": 5 * epoch, "rate": 0.01})
        lines.append({
            "kind": "epoch", "step": 5 * epoch, "epoch": epoch, "rate": 0.01, "train_loss": 1.0 / epoch, "train_top1": 0.5,
            "train_top5": 1.0, "val_loss": 1.1 / epoch, "val_top1": 0.4, "val_top5": 0.9,
        })  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_data(folder: Path, *, split: bool = True) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(FOLDERS):
        for part, count in (("train/", 4), ("val/", 3)) if split else (("", 6),):
            (folder / f"{part}{name}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 9, 3)).astype(np.uint8)
                pixels[..., number] = 255
                Image.fromarray(pixels).resize((270, 260)).save(folder / f"{part}{name}" / f"{i}.jpg")
    return folder


def pictures(page: Path) -> dict[str, Image.Image]:
    """The pictures in a page by their alternative text, decoded whole."""
    found: dict[str, Image.Image] = {}
    for source, text in re.findall(r'<img src="([^"]*)" alt="([^"]*)"', page.read_text()):
        assert source.startswith("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        image.load()
        found[text] = image
    return found


EVERYTHING = {
    "Loss, error and learning rate over the run",
    "First-layer filters of tower a",
    "First-layer filters of tower b",
    "Test images and the five likeliest classes of each",
    "Test images and the six training images nearest to each",
    "Accuracy of each class",
}


def test_everything_is_on_one_page(tmp_path: Path) -> None:
    run, data = make_run(tmp_path / "run"), make_data(tmp_path / "data")
    (data / "val" / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff not really")
    report(run, str(data))
    page = run / "report.html"
    assert set(pictures(page)) == EVERYTHING
    text = page.read_text()
    assert "9</b>test images" in text
    assert "1 images were left out" in text
    assert "guessing 66.7 %" in text
    assert "among\n12" in text
    outside = re.findall(r'(?:src|href)="(?!data:)([^"]*)"', text)
    assert not outside, "the page needs other files"


def test_images_set_aside_are_not_among_the_neighbours(tmp_path: Path) -> None:
    run, data = make_run(tmp_path / "run"), make_data(tmp_path / "data", split=False)
    (run / "validation.txt").write_text("ant/0.jpg\nbee/1.jpg\ncat/2.jpg\n")
    report(run, str(data), out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "3</b>test images" in text
    assert "among\n15" in text


def test_shards_serve_as_well_as_folders(tmp_path: Path) -> None:
    run, data = make_run(tmp_path / "run"), make_data(tmp_path / "data")
    prepare(data, tmp_path / "shards", processes=1)
    report(run, str(tmp_path / "shards"), neighbours_among=7)
    assert set(pictures(run / "report.html")) == EVERYTHING
    assert "among\n7" in (run / "report.html").read_text()


def test_without_images_it_says_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS)
    (run / "train.jsonl").unlink()
    report(run)
    text = (run / "report.html").read_text()
    assert set(pictures(run / "report.html")) == {name for name in EVERYTHING if "filters" in name}
    assert "no log beside this checkpoint" in text
    assert "topfive report RUN DATA" in text
    assert "<script>" not in text


def test_names_of_classes_are_escaped(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train", "val"):
        for number, name in enumerate(("<b>ant", "$x^2")):
            (data / part / name).mkdir(parents=True)
            color = (0, 0, 100 * number)
            Image.new("RGB", (260, 260), color).save(data / part / name / "0.png")
    report(make_run(tmp_path / "run", ("$x^2", "<b>ant")), str(data))
    text = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;b&gt;ant" in text
    assert "<b>ant" not in text


def test_nearest_rows_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    queries, known = rng.standard_normal((3, 20)), rng.standard_normal((50, 20))
    expected = [np.argsort(((query - known) ** 2).sum(1))[:6].tolist() for query in queries]
    assert nearest_rows(torch.from_numpy(queries), torch.from_numpy(known)) == expected
    assert len(nearest_rows(torch.from_numpy(queries), torch.from_numpy(known[:4]))[0]) == 4


def test_filters_show_the_weights() -> None:
    weights_OCHW = torch.zeros(4, 3, 11, 11)
    weights_OCHW[0, 0, 0, 0] = 2.0  # filter 0: its top left is as red as can be
    weights_OCHW[3, 2, 10, 10] = -0.5  # filter 3, in tower b: no blue at its bottom right
    a, b = (np.asarray(Image.open(io.BytesIO(data))) for data in report_figures.filters(weights_OCHW, 2))
    assert a.shape == b.shape == (4 * 13, 4 * 25, 3)
    assert a[4, 4].tolist() == [255, 128, 128]
    assert a[4 * 5, 4 * 5].tolist() == [128, 128, 128]
    assert b[4 * 11, 4 * 23].tolist() == [128, 128, 0]


def test_of_many_classes_the_ends_are_drawn() -> None:
    rows = [
        ClassAccuracy(label=f"class {i}", top1=wilson(i, 200), top5=wilson(min(200, 2 * i), 200))
        for i in range(100)
    ]
    few = Image.open(io.BytesIO(report_figures.classes(rows[:40])))
    many = Image.open(io.BytesIO(report_figures.classes(rows)))
    assert abs(many.height - few.height) < 20


@pytest.mark.parametrize(("line", "number"), [("nonsense", 5), ('{"step": 1}', 5), ("[]", 5)])
def test_a_damaged_log_is_named(tmp_path: Path, line: str, number: int) -> None:
    run = make_run(tmp_path / "run")
    with (run / "train.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(TopfiveError, match=rf"train\.jsonl, line {number} is no record of a run"):
        read_log(run)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"neighbours_among": 0}, "neighbours_among is 0; it must be at least 1"),
        ({"data": "/nowhere/at/all"}, "/nowhere/at/all is not a folder"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TopfiveError, match=sentence):
        report(make_run(tmp_path / "run"), **arguments)
    assert not (tmp_path / "run" / "report.html").exists()
