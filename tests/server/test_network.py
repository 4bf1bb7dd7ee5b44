"""A network in two halves, its first in pieces of the batch: the same answers, from all threads at the same time."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tests.server.onnx_models import random_images, write_model
from tests.server.test_onnx_engine import check, open_engine

from topfive_server import cut as cut_module
from topfive_server import network
from topfive_server.cut import CutError, cut
from topfive_server.devices import Device
from topfive_server.engine import EngineError
from topfive_server.lanes import OUTPUTS
from topfive_server.network import TwoHalves, Whole, open_network, split
from topfive_server.repository import Repository
from topfive_server.session import RuntimeOptions

CPU = Device(kind="cpu", reason="test")
TWO = RuntimeOptions(threads=2)


# ---------------------------------------------------------------------- pieces


@given(count=st.integers(1, 200), threads=st.integers(1, 64), most=st.sampled_from([1, 2, 4]))
def test_pieces_are_the_batch_in_order_and_keep_every_thread_busy(
    count: int, threads: int, most: int
) -> None:
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    pieces = split(images, threads=threads, most=most)
    np.testing.assert_array_equal(np.concatenate(pieces), images)
    if len(pieces) == 1:
        return
    sizes = [len(piece) for piece in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= most
    assert sizes[-1] >= max(sizes[0] - 1, 1)
    busy = [0] * threads
    for size in sizes:  # the next piece goes to whoever is done
        busy[busy.index(min(busy))] += size
    assert max(busy) == -(-count // threads)
    assert 1 - count / (threads * max(busy)) <= 0.06


@pytest.mark.parametrize(
    ("count", "threads", "most", "sizes"),
    [
        (32, 2, 1, [1] * 32),
        (32, 2, 4, [4] * 8),
        (10, 2, 4, [3, 3, 2, 2]),
        (31, 2, 4, [4] * 7 + [3]),
        (4, 2, 4, [2, 2]),
        (3, 2, 1, [3]),  # too few
        (2, 2, 1, [2]),
        (9, 2, 1, [9]),  # one of two threads would have nothing to do for a tenth of the time
        (32, 16, 1, [1] * 32),
        (33, 16, 1, [33]),
        (32, 64, 1, [32]),
        (32, 32, 1, [32]),
        (32, 1, 1, [1] * 32),
    ],
)
def test_sizes_of_pieces(count: int, threads: int, most: int, sizes: list[int]) -> None:
    images = np.zeros((count, 1, 1, 1), np.uint8)
    assert [len(piece) for piece in split(images, threads=threads, most=most)] == sizes


# ---------------------------------------------------------------------- graphs that cannot be cut


def rewrite(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def without_dense_layers(model: onnx.ModelProto) -> None:
    """A mean over the colours' axis instead of the product with weights."""
    [product] = [node for node in model.graph.node if node.op_type == "MatMul"]
    product.op_type = "Conv"
    product.input[0] = "column"
    weights = next(one for one in model.graph.initializer if one.name == "W")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights).T[:, :, None], "W"))
    where = list(model.graph.node).index(product)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "last"))
    model.graph.node.insert(where, helper.make_node("Unsqueeze", ["color", "last"], ["column"]))
    product.output[0] = "logits_column"
    model.graph.node.insert(where + 2, helper.make_node("Squeeze", ["logits_column", "last"], ["logits"]))


def read_images_twice(model: onnx.ModelProto) -> None:
    """The darkest pixel is added to what the dense layer gives."""
    [softmax] = [node for node in model.graph.node if node.op_type == "Softmax"]
    softmax.input[0] = "both"
    where = list(model.graph.node).index(softmax)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "all"))
    for node in (
        helper.make_node("ReduceMin", ["image", "all"], ["darkest"], keepdims=0),
        helper.make_node("Cast", ["darkest"], ["dark"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["dark", "one"], ["dark_column"]),
        helper.make_node("Add", ["logits", "dark_column"], ["both"]),
    ):
        model.graph.node.insert(where, node)
        where += 1
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))


def mix_images(model: onnx.ModelProto) -> None:
    """The batch's mean is taken off every image."""
    [product] = [node for node in model.graph.node if node.op_type == "MatMul"]
    where = list(model.graph.node).index(product)
    product.input[0] = "centred"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "rows"))
    model.graph.node.insert(where, helper.make_node("Sub", ["color", "mean_color"], ["centred"]))
    model.graph.node.insert(where, helper.make_node("ReduceMean", ["color", "rows"], ["mean_color"]))


def put_weights_elsewhere(model: onnx.ModelProto) -> None:
    [weights] = [one for one in model.graph.initializer if one.name == "W"]
    onnx.external_data_helper.set_external_data(weights, "weights.bin")


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (without_dense_layers, "it has no dense layer"),
        (read_images_twice, "what comes behind its first dense layer reads more than color"),
        (mix_images, "its images are not computed independently of each other"),
    ],
)
def test_what_cannot_be_cut_is_computed_as_a_whole(
    change: Callable[[onnx.ModelProto], None],
    because: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_model(tmp_path)
    rewrite(path, change)
    model = Repository(tmp_path).read("tiny")
    whole = open_network(model, CPU, TWO)
    assert isinstance(whole, Whole)
    assert caplog.messages == [f"tiny/1 is computed as a whole: {because}"]
    assert len(whole(np.stack(random_images(6))).classes_BT) == 6


def test_large_weights_are_handed_over_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_module, "_LARGE", 64)
    path = write_model(tmp_path)
    halves = cut(path, OUTPUTS)
    assert ([*halves.convolutional.weights], [*halves.dense.weights]) == ([], ["W"])
    assert len(halves.dense.model) < path.stat().st_size
    opened = open_network(Repository(tmp_path).read("tiny"), CPU, TWO)
    assert isinstance(opened, TwoHalves)
    images = random_images(5)
    check(opened(np.stack(images)), images)


def test_large_weights_do_not_go_through_the_protobuf_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the interpreter, and with it a server's event loop, while it copies them."""
    monkeypatch.setattr(cut_module, "_LARGE", 64)
    model, weights = cut_module._read(write_model(tmp_path))
    large = [one for one in model.graph.initializer if one.name in weights]
    assert large
    for tensor in large:
        assert not tensor.raw_data
    originals = {one.name: one for one in onnx.load(tmp_path / "tiny" / "1" / "model.onnx").graph.initializer}
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.numpy(), numpy_helper.to_array(originals[name]))


def test_a_weight_that_is_shorter_than_its_shape_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_module, "_LARGE", 64)
    path = write_model(tmp_path)
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    largest.dims[0] += 1
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CutError, match=f"{largest.name} is not as long as its shape says"):
        cut(path, OUTPUTS)


def test_a_network_whose_weights_are_in_other_files_is_not_cut(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    model = onnx.load(path)
    put_weights_elsewhere(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CutError, match="other files"):
        cut(path, OUTPUTS)


def test_a_file_that_is_broken_is_reported_by_what_opens_it(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    model = Repository(tmp_path).read("tiny")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EngineError, match="tiny/1 cannot be loaded"):
        open_network(model, CPU, TWO)


# ---------------------------------------------------------------------- threads and memory


def test_one_thread_or_many_for_small_batches_compute_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path)
    model = Repository(tmp_path).read("tiny")
    assert isinstance(open_network(model, CPU, RuntimeOptions(threads=1)), Whole)
    monkeypatch.setattr(network, "cores", lambda: 1)
    assert isinstance(open_network(model, CPU, RuntimeOptions()), Whole)
    monkeypatch.setattr(network, "cores", lambda: 3)
    assert isinstance(open_network(model, CPU, RuntimeOptions(max_batch=5)), Whole)
    halves = open_network(model, CPU, RuntimeOptions(max_batch=6))
    assert isinstance(halves, TwoHalves)
    sessions = (halves._together, halves._alone, halves._dense)
    assert [each.get_session_options().intra_op_num_threads for each in sessions] == [3, 1, 3]


def test_pieces_are_computed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    halves = open_network(Repository(tmp_path).read("tiny"), CPU, TWO)
    assert isinstance(halves, TwoHalves)
    both = threading.Barrier(2)
    run = TwoHalves._run
    sizes: list[int] = []

    def meeting(self: TwoHalves, session: Any, images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        if len(images) == 1:
            both.wait(20)  # breaks where one piece waits for the other
        return run(self, session, images)

    monkeypatch.setattr(TwoHalves, "_run", meeting)
    images = random_images(8)
    check(halves(np.stack(images)), images)
    check(halves(np.stack(images[:3])), images[:3])
    assert sizes == [1] * 8 + [3]


def test_a_failed_piece_fails_the_batch_once_the_others_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, fails_on_white=True)
    halves = open_network(Repository(tmp_path).read("tiny"), CPU, TWO)
    run, ended = TwoHalves._run, []

    def noting(self: TwoHalves, session: Any, images: np.ndarray) -> np.ndarray:
        rows = run(self, session, images)
        ended.append(len(rows))
        return rows

    monkeypatch.setattr(TwoHalves, "_run", noting)
    images = random_images(8)
    bad = [np.full((12, 12, 3), 255, np.uint8), *images[1:]]
    with pytest.raises(Exception, match="Gather"):
        halves(np.stack(bad))
    assert len(ended) == 7
    check(halves(np.stack(images)), images)


def test_the_engine_answers_every_batch_size_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        engine = open_engine(tmp_path, max_batch=32, threads=2)
        assert isinstance(engine._openers[0]()._network, TwoHalves)  # type: ignore[attr-defined]  # a HostLane
        await engine.warm_up()
        for batch in (1, 2, 4, 9, 31, 32):
            images = random_images(batch, seed=batch)
            check(await engine.predict(images), images)
        many = [random_images(batch, seed=batch) for batch in range(1, 33)]
        for images, answer in zip(many, await asyncio.gather(*map(engine.predict, many)), strict=True):
            check(answer, images)
        await engine.close()

    asyncio.run(run())
