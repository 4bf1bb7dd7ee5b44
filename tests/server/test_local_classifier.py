import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.server.harness import eventually
from tests.server.onnx_models import expected_scores, make_spec, random_images, write_model

from topfive_server import local
from topfive_server.local import LocalClassifier, LocalClassifierError
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import Repository


def squares(count: int, seed: int = 0) -> list[Image.Image]:
    return [Image.fromarray(image) for image in random_images(count, seed=seed)]


def open_local(root: Path, **kwargs: Any) -> LocalClassifier:
    return LocalClassifier(root, device="cpu", threads=1, **kwargs)


def test_classifies_more_images_than_a_batch_holds_in_order(tmp_path: Path) -> None:
    write_model(tmp_path)
    classifier = open_local(tmp_path)
    images = squares(2 * classifier.max_batch + 5)
    rows = classifier.classify_batch(images, top_k=3)
    scores = expected_scores(np.stack([np.asarray(image) for image in images]), 7)
    assert [[index for _, index, _ in row] for row in rows] == np.argsort(-scores, axis=1)[:, :3].tolist()
    for row, probabilities in zip(rows, scores, strict=True):
        assert [label for label, _, _ in row] == [f"class {index}" for _, index, _ in row]
        assert [p for _, _, p in row] == pytest.approx(sorted(probabilities, reverse=True)[:3], abs=1e-5)
    assert classifier.classify_batch([]) == []
    classifier.close()


@pytest.mark.parametrize(("top_k", "length"), [(1, 1), (5, 5), (6, 6), (7, 7), (1000, 7)])
def test_top_k_beyond_what_the_graph_sorts(tmp_path: Path, top_k: int, length: int) -> None:
    write_model(tmp_path)
    row = open_local(tmp_path).classify_batch(squares(1), top_k=top_k)[0]
    probabilities = [p for _, _, p in row]
    assert len(row) == length
    assert probabilities == sorted(probabilities, reverse=True)


def test_describes_its_model(tmp_path: Path) -> None:
    write_model(tmp_path, version="4")
    classifier = open_local(tmp_path)
    assert (classifier.name, classifier.version, classifier.spec) == ("tiny", "4", make_spec())
    assert classifier.fingerprint == Repository(tmp_path).read("tiny").fingerprint()


def test_takes_the_newest_version_or_the_one_that_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, version="9")
    write_model(tmp_path, version="10", seed=1)
    assert open_local(tmp_path).version == "10"
    assert open_local(tmp_path, version="9").version == "9"
    with pytest.raises(LocalClassifierError, match="with version '11'; it holds tiny"):
        open_local(tmp_path, version="11")


def test_a_broken_newest_version_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    write_model(tmp_path, version="1")
    path = write_model(tmp_path, version="2")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LocalClassifierError, match=r"tiny/2/model.onnx is cut off"):
        open_local(tmp_path)
    assert open_local(tmp_path, version="1").version == "1"


def test_several_models_need_a_name_and_variants_of_one_do_not(tmp_path: Path) -> None:
    fp32 = {"family": "a", "precision": "fp32", "target": "cpu"}
    write_model(tmp_path, "a", report={"passed": True, "variant": fp32})
    write_model(tmp_path, "a_int8", report={"passed": True, "variant": fp32 | {"precision": "int8"}}, seed=1)
    write_model(tmp_path, "a_image", side="image", report={"passed": True, "variant": fp32})
    assert open_local(tmp_path).name == "a"
    int8 = Repository(tmp_path).read("a_int8").fingerprint()
    assert open_local(tmp_path).fingerprint == int8
    assert open_local(tmp_path, model="a").fingerprint == int8
    assert open_local(tmp_path, model="a_int8").name == "a_int8"
    write_model(tmp_path, "b")
    with pytest.raises(LocalClassifierError, match="several models; name one of a, b"):
        open_local(tmp_path)
    assert open_local(tmp_path, model="b").name == "b"
    with pytest.raises(LocalClassifierError, match="holds no 'c'; it holds a, a_image, a_int8, b"):
        open_local(tmp_path, model="c")
    with pytest.raises(LocalClassifierError, match="holds no 'a_image'"):
        open_local(tmp_path, model="a_image")


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    write_model(tmp_path)
    classifier = open_local(tmp_path)
    with pytest.raises(ValueError, match="an image is L 12 x 12; it must be RGB 12 x 12"):
        classifier.classify_batch([Image.new("L", (12, 12))])
    with pytest.raises(ValueError, match="top_k is 0"):
        classifier.classify_batch(squares(1), top_k=0)
    with pytest.raises(LocalClassifierError, match="device is 'tpu'; it must be auto, cpu, cuda or cuda:N"):
        LocalClassifier(tmp_path, device="tpu")
    with pytest.raises(LocalClassifierError, match="cannot be read"):
        open_local(tmp_path / "nowhere")
    classifier.close()
    classifier.close()
    with pytest.raises(LocalClassifierError, match="was closed"):
        classifier.classify_batch(squares(1))


def test_a_failing_batch_is_one_of_our_errors(tmp_path: Path) -> None:
    write_model(tmp_path, fails_on_white=True)
    classifier = open_local(tmp_path)
    with pytest.raises(LocalClassifierError, match="Gather"):
        classifier.classify_batch([Image.new("RGB", (12, 12), "white")])
    assert len(classifier.classify_batch(squares(2))) == 2


def test_an_engine_that_hangs_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path)
    classifier = open_local(tmp_path)
    free = threading.Event()
    perform = OnnxEngine._perform

    def hang(self: OnnxEngine, *arguments: Any) -> None:
        free.wait(30)
        perform(self, *arguments)

    monkeypatch.setattr(OnnxEngine, "_perform", hang)
    monkeypatch.setattr(local, "CLOSE_TIMEOUT_S", 0.1)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(classifier.classify_batch, squares(1))
        try:
            eventually(classifier._engine._jobs.empty)
            threads.submit(classifier.close).result(10)
            assert not answer.done()
            assert "left to itself" in caplog.text
        finally:
            free.set()
    assert len(answer.result()) == 1
