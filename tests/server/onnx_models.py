"""Builds small real ONNX models with the inputs, outputs and metadata of the contract, and known answers.

The network is softmax(mean colour x weights): `expected_scores` computes the same with numpy.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from topfive.model_spec import Architecture, ModelSpec, Preprocessing


def make_spec(classes: int = 7, crop: int = 12, short_side: int = 16) -> ModelSpec:
    return ModelSpec(
        architecture=Architecture(classes=classes, width=0.1),
        preprocessing=Preprocessing(short_side=short_side, crop=crop, mean=(120.0, 110.0, 100.0)),
        labels=tuple(f"class {i}" for i in range(classes)),
    )


def weights(classes: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.03, (3, classes)).astype(np.float32)


def expected_scores(images: NDArray[np.uint8], classes: int, seed: int = 0) -> NDArray[np.float64]:
    """`scores` of the model that `write_model` writes, for uint8 [B, H, W, 3], in double precision."""
    logits = images.astype(np.float64).mean(axis=(1, 2)) @ weights(classes, seed).astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def write_model(
    root: Path,
    name: str = "tiny",
    version: str = "1",
    *,
    spec: ModelSpec | None = None,
    metadata: str | None = "spec",
    side: int | str | None = None,
    seed: int = 0,
    fails_on_white: bool = False,
    drop_output: str | None = None,
    weight_scale: float = 1.0,
    report: dict[str, Any] | None = None,
) -> Path:
    """Write `<root>/<name>/<version>/model.onnx` and return its path.

    Args:
        root: the model repository.
        name: of the model.
        version: of the model.
        spec: the description; `make_spec()` when None.
        metadata: value of the `topfive` metadata: "spec" for the description itself, None for none.
        side: side of the input square, when it is not the spec's crop; a name for any size.
        seed: of the weights.
        fails_on_white: an image whose first byte is 255 makes the whole batch fail at run time, like a bad kernel.
        drop_output: leave this output out.
        weight_scale: factor on the weights; nan makes every answer not-a-number.
        report: content of `report.json`; one that says "passed" names the file as well, as export's does.
    """
    spec = spec or make_spec()
    classes, side = spec.architecture.classes, spec.preprocessing.crop if side is None else side
    top = min(5, classes)
    height, width = (side, side) if isinstance(side, int) else (f"{side}_height", f"{side}_width")
    constants = {
        "W": weights(classes, seed) * np.float32(weight_scale),
        "axes": np.array([1, 2], np.int64),
        "k": np.array([top], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["color"], keepdims=0),
    ]
    features = "color"
    if fails_on_white:
        # Looks the first byte up in a table of 255 entries: 255 is out of range, and ONNX Runtime fails the batch.
        constants |= {"starts": np.zeros(3, np.int64), "ends": np.ones(3, np.int64)}
        constants |= {"corner_axes": np.array([1, 2, 3], np.int64), "column": np.array([-1, 1], np.int64)}
        constants |= {"table": np.zeros(255, np.float32)}
        nodes += [
            helper.make_node("Slice", ["image", "starts", "ends", "corner_axes"], ["corner"]),
            helper.make_node("Cast", ["corner"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["nought"]),
            helper.make_node("Reshape", ["nought", "column"], ["nought_column"]),
            helper.make_node("Add", ["color", "nought_column"], ["checked"]),
        ]
        features = "checked"
    nodes += [
        helper.make_node("Identity", [features], ["features"]),
        helper.make_node("MatMul", [features, "W"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        helper.make_node("TopK", ["scores", "k"], ["probabilities", "classes"], axis=1),
    ]
    outputs = {
        "probabilities": helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", top]),
        "classes": helper.make_tensor_value_info("classes", TensorProto.INT64, ["N", top]),
        "scores": helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", classes]),
        "features": helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3]),
    }
    outputs.pop(drop_output or "", None)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", height, width, 3])],
        list(outputs.values()),
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    if metadata is not None:
        helper.set_model_props(model, {"topfive": spec.to_json() if metadata == "spec" else metadata})
    path = root / name / version / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())
    if report is not None:
        if report.get("passed"):
            report = {"file": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}} | report
        path.with_name("report.json").write_text(json.dumps(report), encoding="utf-8")
    return path


def random_images(count: int, side: int = 12, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Images of different average colour, so that their answers differ."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 255, (count, 1, 1, 3))
    noise = rng.integers(-20, 20, (count, side, side, 3))
    return list(np.clip(colors + noise, 0, 254).astype(np.uint8))
