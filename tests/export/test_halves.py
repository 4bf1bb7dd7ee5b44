"""The server computes a graph in two halves: the graphs that export writes give the same so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.conftest import make_classifier

from topfive.model_spec import Preprocessing
from topfive_export.corpus import decoded, drawn_pictures
from topfive_export.pipeline import ExportConfig, run_export
from topfive_server.cut import cut
from topfive_server.devices import Device
from topfive_server.lanes import OUTPUTS
from topfive_server.network import TwoHalves, Whole, open_network, split
from topfive_server.repository import Repository
from topfive_server.session import RuntimeOptions, open_session
from topfive_training.checkpoint import save_model

CPU = Device(kind="cpu", reason="test")
OPTIONS = RuntimeOptions(threads=2)


@pytest.mark.parametrize(
    ("architecture", "variant", "item_bytes"),
    [
        ({"within_map_norm": True, "mean_image": True}, {}, 4),
        ({}, {"target": "cuda"}, 4),
        ({}, {"precision": "int8"}, 1),
        ({}, {"views": 10}, 4),
        ({"name": "alexnet-2014", "normalization": "batch"}, {}, 4),
    ],
)
def test_an_exported_graph_gives_in_two_halves_what_it_gives_as_a_whole(
    architecture: dict[str, Any],
    variant: dict[str, Any],
    item_bytes: int,
    photographs: Path,
    tmp_path: Path,
) -> None:
    save_model(tmp_path / "run", make_classifier(**architecture))
    config = ExportConfig(run=tmp_path / "run", out=tmp_path / "models", images=photographs, **variant)
    *_, published = run_export(config)
    model = Repository(tmp_path / "models").read(published.path.parent.name)
    assert cut(model.path, OUTPUTS).item_bytes == item_bytes
    halves, whole = open_network(model, CPU, OPTIONS), Whole(open_session(model, CPU, OPTIONS))
    assert isinstance(halves, TwoHalves)
    assert model.input_side is not None
    images = decoded(drawn_pictures()[:12], Preprocessing(), model.input_side)
    pieces = split(images, threads=2, most=4 // item_bytes)
    assert len(pieces) == (12 if item_bytes == 4 else 4)
    for size in (12, 5, 1):
        pairs: Any = zip(halves(images[:size]), whole(images[:size]), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
