"""A torch module becomes an ONNX file: traced, stripped of everything that tells of the machine, checked, written."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from onnx import AttributeProto, GraphProto, ModelProto

from topfive._version import __version__
from topfive.model_spec import ModelSpec
from topfive_export.graphs import INPUT_NAME, OUTPUT_NAMES, ExportGraph
from topfive_export.repository import MODEL_FILE
from topfive_export.variant import ExportError, Variant

OPSET: Final = 20
METADATA_KEY: Final = "topfive"
"""Key of `metadata_props` under which an exported file carries its `model.json`."""
VARIANT_KEY: Final = "topfive.variant"
EXTERNAL_BYTES: Final = 2**31 - 2**20
"""Protobuf files end at 2 GiB; from here on the weights go into `model.onnx.data`."""


def trace(graph: ExportGraph, *, variant: Variant, side: int) -> ModelProto:
    """Export `graph` with a free batch size (and height and width, for the whole graph).

    Args:
        graph: from `topfive_export.graphs.build_graph`.
        variant: decides which axes are free.
        side: height and width of the input, in pixels, where they are fixed.
    """
    batch = torch.export.Dim("N")
    free: dict[int, torch.export.Dim] = {0: batch}
    height, width = side, side
    if variant.graph == "image":
        # Unequal, so that no size is taken for another one.
        free |= {1: torch.export.Dim("H"), 2: torch.export.Dim("W")}
        height, width = side + 3, side + 70
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=[INPUT_NAME],
            output_names=list(OUTPUT_NAMES),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes={"image": free},
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    return program.model_proto


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of itself: torchvision's absence, and deprecations inside torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def finish(model: ModelProto, *, spec: ModelSpec, variant: Variant, family: str) -> ModelProto:
    """Strip, name and describe the model in place: no machine's paths, `model.json` inside."""
    strip(model)
    model.producer_name = "topfive"
    model.producer_version = __version__
    model.graph.name = variant.model_name(family)
    del model.metadata_props[:]
    onnx.helper.set_model_props(
        model, {METADATA_KEY: spec.to_json(), VARIANT_KEY: variant.model_name(family)}
    )
    return model


def strip(model: ModelProto) -> None:
    """Remove the exporter's notes (stack traces with the paths of its machine) and stale intermediate shapes."""
    model.doc_string = ""
    _strip_graph(model.graph)


def _strip_graph(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    parts: list[Any] = [*graph.node, *graph.initializer, *graph.input, *graph.output]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _strip_graph(attribute.g)


def write(model: ModelProto, folder: Path) -> Path:
    """Write `model.onnx` (and `model.onnx.data` from 2 GiB on) into `folder`."""
    path = folder / MODEL_FILE
    large = model.ByteSize() >= EXTERNAL_BYTES
    onnx.save_model(
        model,
        path,
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        location=f"{MODEL_FILE}.data",
    )
    return path


def check(path: Path) -> None:
    """See that the file is valid ONNX, that its shapes follow, and that it holds no path of this machine.

    Raises:
        ExportError: it is not so.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported file: {error}") from error
    model = onnx.load(path, load_external_data=False)
    found = paths_inside(model)
    if found:
        raise ExportError(f"the exported file holds paths of this machine: {', '.join(found)}")


def paths_inside(model: ModelProto) -> list[str]:
    """Folders of this machine that are named anywhere in the file, weights aside."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        tensor.ClearField("raw_data")
    for node in bare.graph.node:
        for attribute in node.attribute:
            attribute.t.ClearField("raw_data")
    data = bare.SerializeToString()
    here = {
        Path.cwd(),
        Path.home(),
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(torch.__file__).parent.parent,
    }
    here |= {Path(__file__).resolve().parents[2]}
    return sorted(str(path) for path in here if len(path.parts) > 1 and os.fsencode(path) in data)


def load(path: Path, *, threads: int = 0, providers: list[str] | None = None) -> onnxruntime.InferenceSession:
    """Load in ONNX Runtime, at the default optimisation level, as a server does.

    Raises:
        ExportError: it does not load.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers or ["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime raises classes of its own that derive from nothing closer.
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} does not load the exported file: {error}"
        ) from error
