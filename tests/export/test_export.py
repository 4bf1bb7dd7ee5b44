"""`topfive export` as a user runs it, and what it leaves in the repository."""

import io
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.export.conftest import make_classifier

from topfive.cli import main
from topfive.model_spec import ArchitectureName, ModelSpec
from topfive.preprocessing import decode
from topfive_export import onnx_file
from topfive_export.graphs import OUTPUT_NAMES, multiply_adds
from topfive_export.pipeline import ExportConfig, run_export
from topfive_export.repository import sha256
from topfive_training.checkpoint import load_model, save_model


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])


def _photograph(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 11, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((440, 320), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def _squares(run: Path, count: int) -> NDArray[np.uint8]:
    preprocessing = ModelSpec.read(run).preprocessing
    return np.stack([np.asarray(decode(_photograph(seed), preprocessing).image) for seed in range(count)])


def test_the_repository_has_the_layout_of_the_contract(exported: Path) -> None:
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
    assert files == [
        f"{name}/{file}"
        for name in ("alexnet", "alexnet_image")
        for file in ("1/model.onnx", "1/report.json", "config.pbtxt", "labels.txt")
    ]
    assert (exported / "alexnet" / "labels.txt").read_text() == "".join(f"kind {i}\n" for i in range(7))


def test_inputs_and_outputs_are_those_of_the_contract(exported: Path) -> None:
    hot, whole = _session(exported / "alexnet" / "1"), _session(exported / "alexnet_image" / "1")
    assert [(put.name, put.type, put.shape[1:]) for put in hot.get_inputs()] == [
        ("image", "tensor(uint8)", [227, 227, 3])
    ]
    assert [(put.name, put.type, put.shape[1:]) for put in hot.get_outputs()] == [
        ("probabilities", "tensor(float)", [5]),
        ("classes", "tensor(int64)", [5]),
        ("scores", "tensor(float)", [7]),
        ("features", "tensor(float)", [248]),
    ]
    assert [put.shape[-1] for put in whole.get_inputs()] == [3]
    assert not any(isinstance(side, int) for side in whole.get_inputs()[0].shape[:3])


def test_answers_to_new_photographs_are_the_networks(exported: Path, checkpoint: Path) -> None:
    squares = _squares(checkpoint, 3)
    classifier = load_model(checkpoint)
    with torch.no_grad():
        scores = classifier(torch.from_numpy(squares)).softmax(dim=1).numpy()
        features = classifier.network.features(classifier.normalize(torch.from_numpy(squares))).numpy()
    answers = dict(
        zip(
            OUTPUT_NAMES,
            _session(exported / "alexnet" / "1").run(OUTPUT_NAMES, {"image": squares}),
            strict=True,
        )
    )
    assert np.allclose(answers["scores"], scores, atol=1e-5)
    assert np.allclose(answers["features"], features, rtol=1e-4, atol=1e-4)
    assert np.array_equal(answers["classes"], np.argsort(-scores, axis=1)[:, :5])
    whole = _session(exported / "alexnet_image" / "1")
    for seed in range(3):
        pixels = np.asarray(Image.open(io.BytesIO(_photograph(seed))))
        assert np.allclose(whole.run(["scores"], {"image": pixels[None]})[0], scores[seed], atol=0.01)


def test_the_file_explains_itself_and_names_no_folder_of_this_machine(
    exported: Path, checkpoint: Path
) -> None:
    path = exported / "alexnet" / "1" / "model.onnx"
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    described, trained = ModelSpec.from_json(metadata["topfive"]), ModelSpec.read(checkpoint)
    assert described.labels == trained.labels
    assert described.architecture == trained.architecture
    assert trained.recipe["data"] == "/data/photographs"
    assert described.recipe == {"data": "photographs", "rate": 0.01}
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {20}
    data = path.read_bytes()
    for folder in (Path.cwd(), Path(torch.__file__).parents[1], checkpoint, exported):
        assert os.fsencode(folder) not in data
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_a_path_in_the_file_is_found() -> None:
    node = onnx.helper.make_node("Relu", ["a"], ["b"], doc_string=f"made in {Path.cwd()}")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("a", 1, [1])], [value("b", 1, [1])])
    model = onnx.helper.make_model(graph)
    assert str(Path.cwd()) in onnx_file.paths_inside(model)
    onnx_file.strip(model)
    assert onnx_file.paths_inside(model) == []


def test_the_report_says_what_was_verified(exported: Path) -> None:
    for name in ("alexnet", "alexnet_image"):
        report = json.loads((exported / name / "1" / "report.json").read_text())
        assert report["passed"] is True
        assert report["version"] == 1
        assert report["corpus"]["drawn"] >= 40
        assert report["agreement"]["images"] == report["corpus"]["drawn"]
        assert report["agreement"]["relative_difference"] <= report["limits"]["relative_difference"]
        assert report["file"]["sha256"] == sha256(exported / name / "1" / "model.onnx")
        assert set(report["latency_ms"]["batch"]) == {"1", "4", "16"}
        assert report["variant"]["family"] == "alexnet"


def test_versions_join_and_count_up_and_nothing_is_overwritten(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models"

    def command(run: Path, *options: str) -> int:
        return main(["export", str(run), "--out", str(out), "--name", "net", *options])

    assert command(checkpoint) == 0
    assert command(checkpoint, "--target", "cuda") == 0  # the same weights: version 1 as well
    assert command(checkpoint) == 1  # the same again would be the newest version, without the other variants
    said = capsys.readouterr()
    assert said.out.split() == [str(out / name) for name in ("net_image/1", "net/1", "net_cuda/1")]
    assert f"to make it anew, remove {out}/net_image and {out}/net first" in said.err
    assert command(checkpoint, "--version", "2") == 0
    assert command(checkpoint, "--version", "2") == 1
    assert "never overwritten" in capsys.readouterr().err
    save_model(tmp_path / "other", make_classifier(seed=5, classes=9))
    assert command(tmp_path / "other") == 1
    assert "choose another --name" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "net").iterdir()) == ["1", "2", "config.pbtxt", "labels.txt"]


@pytest.mark.parametrize("name", ["alexnet-2014", "caffenet"])
def test_other_architectures_export_too(name: ArchitectureName, tmp_path: Path) -> None:
    save_model(tmp_path / "run", make_classifier(name, classes=3))
    published = run_export(ExportConfig(run=tmp_path / "run", out=tmp_path / "models"))
    session = _session(published[-1].path)
    crop = 224 if name == "alexnet-2014" else 227
    probabilities, classes = session.run(
        ["probabilities", "classes"], {"image": np.zeros((2, crop, crop, 3), np.uint8)}
    )
    assert probabilities.shape == classes.shape == (2, 3)  # fewer columns than five: fewer classes


@pytest.mark.parametrize(
    ("options", "name", "side"),
    [
        ({"views": 10}, "alexnet_views10", 256),
        ({"precision": "fp16", "target": "cuda"}, "alexnet_fp16", 227),
    ],
)
def test_variants_for_other_uses(
    options: dict[str, object], name: str, side: int, checkpoint: Path, tmp_path: Path
) -> None:
    published = run_export(ExportConfig(run=checkpoint, out=tmp_path / "models", **options))  # type: ignore[arg-type]
    assert [entry.path for entry in published] == [tmp_path / "models" / name / "1"]
    session = _session(published[0].path)
    assert session.get_inputs()[0].shape[1:] == [side, side, 3]
    operators = {node.op_type for node in onnx.load(published[0].path / "model.onnx").graph.node}
    assert ("LRN" in operators) == (options.get("target") == "cuda")


def test_weights_beyond_protobufs_limit_lie_beside_the_graph(
    checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 10_000)
    published = run_export(ExportConfig(run=checkpoint, out=tmp_path / "models", target="cuda"))
    folder = published[0].path
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data", "report.json"]
    assert published[0].report["file"]["bytes"] > 100 * (folder / "model.onnx").stat().st_size
    squares = _squares(checkpoint, 2)
    scores = _session(folder).run(["scores"], {"image": squares})[0]
    expected = _session(exported / "alexnet" / "1").run(["scores"], {"image": squares})[0]
    assert np.allclose(scores, expected, atol=1e-5)


@pytest.mark.data
def test_real_photographs_are_part_of_the_corpus(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "ilsvrc_samples"
    if not folder.is_dir():
        pytest.skip("the photographs are not beside the checkout (../shared/data)")
    published = run_export(
        ExportConfig(run=checkpoint, out=tmp_path / "models", images=folder, max_images=40)
    )
    for entry in published:
        assert entry.report["corpus"]["given"] == 40
        assert entry.report["agreement"]["top1_agreement"] == 1.0


def test_multiply_adds_are_the_published_count() -> None:
    assert multiply_adds(make_classifier(classes=1000, width=1.0)) == 724_406_816
    assert multiply_adds(make_classifier("alexnet-2014", classes=1000, width=1.0)) == 714_188_480


def test_bad_input_is_answered_with_a_sentence(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "models")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().err
    assert "file is not a folder" in said
    assert "verifying" not in said
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "models"), "--name", "../up"]) == 2
    assert "--name is '../up'" in capsys.readouterr().err
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "models"), "--precision", "int8"]) == 1
    said = capsys.readouterr().err
    assert "int8 needs at least 32 photographs" in said
    assert "exporting" not in said
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "options", [("--views", "3"), ("--max-images", "0"), ("--version", "0"), ("--name", "../x")]
)
def test_a_value_that_is_not_allowed_is_bad_usage(
    options: tuple[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "models"), *options]) == 2


def test_a_repository_that_cannot_be_written_is_found_out_before_the_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "file" / "models")]) == 1
    said = capsys.readouterr().err
    assert "Not a directory" in said
    assert "verifying" not in said
