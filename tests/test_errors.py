"""What can reach the user is a `TopfiveError`: a sentence and an exit status, never "internal error"."""

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from topfive.errors import TopfiveError

PARTS = ("topfive", "topfive_training", "topfive_export", "topfive_server")
INTERNAL = {
    # Answers of the server to a request, in the words of its protocol.
    "topfive_server.errors.RequestError",
    "topfive_server.oip_codec.ProtocolError",
    "topfive_server.receive.ClientGoneError",
    # Become another error, or a row of the results, where they are caught.
    "topfive_server.cut.CutError",
    "topfive_server.onnx_header.OnnxHeaderError",
    "topfive._file_limits.CostlyFileError",
    "topfive.scoring._sources.ReadError",
    "topfive_training.run._InterruptedError",
}
"""Classes, with those derived from them, that never leave the part that raises them."""


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _own_exceptions(part: str) -> list[type[Exception]]:
    package = importlib.import_module(part)
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(package.__path__, f"{part}.")
        if not found.name.endswith("__main__")
    ]
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == module.__name__
    ]


@pytest.mark.parametrize("part", PARTS)
def test_every_error_of_a_part_is_for_people_or_known_to_stay_inside(part: str) -> None:
    kinds = _own_exceptions(part)
    assert len(kinds) >= 3
    for kind in kinds:
        if INTERNAL.isdisjoint(map(_name, kind.__mro__)):
            assert issubclass(kind, TopfiveError), f"{_name(kind)} would reach the user as an internal error"
            assert kind.exit_code in {1, 2, 3, 4, 130}, _name(kind)
        else:
            assert not issubclass(kind, TopfiveError), f"{_name(kind)} need not be in INTERNAL"


def _half_checkpoint(folder: Path) -> None:
    (folder / "model.json").write_text("{}")


def _corrupt_model(folder: Path) -> None:
    version = folder / "alexnet" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(b"\x08\x08\x12\x40cut off")


def _nothing(_: Path) -> None:
    """Leaves the folder empty."""


@pytest.mark.parametrize(
    ("prepare", "words", "status", "sentence"),
    [
        pytest.param(
            _nothing, "train {0} --out {0}/run --batch-size -1", 2, "batch_size is -1", id="training"
        ),
        pytest.param(
            _half_checkpoint, "export {0} --out {0}/models", 1, "it has no model.safetensors", id="export"
        ),
        pytest.param(_corrupt_model, "serve {0} --port 0", 1, "alexnet/1/model.onnx is cut off", id="server"),
        pytest.param(
            _corrupt_model,
            "score {0} --output {0}/labels.csv --model {0}",
            2,
            "alexnet/1/model.onnx is cut off",
            id="scoring",
        ),
        pytest.param(_nothing, "classify {0}/missing.jpg --timeout 0", 2, "timeout is 0", id="client"),
    ],
)
def test_the_user_sees_a_sentence(
    tmp_path: Path, prepare: Callable[[Path], None], words: str, status: int, sentence: str
) -> None:
    prepare(tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOPFIVE_")}
    done = subprocess.run(
        [sys.executable, "-m", "topfive", *(word.format(tmp_path) for word in words.split())],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert sentence in done.stderr
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == status
