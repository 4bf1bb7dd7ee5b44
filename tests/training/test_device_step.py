"""The step on a device: what of it can be seen without one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topfive.model_spec import ModelSpec, Preprocessing
from topfive_training.batches import Batch
from topfive_training.checkpoint import Classifier
from topfive_training.device import on_device
from topfive_training.journal import Journal
from topfive_training.ranks import Interruption, Ranks
from topfive_training.recipe import RECIPES, Recipe, make_recipe
from topfive_training.run import Options
from topfive_training.schedule import Phase
from topfive_training.trainer import Trainer

if TYPE_CHECKING:
    from topfive_training.squares import Squares

NOW = Phase(rate=0.01, first_rate=0.01, color_noise=0.1)


def make_trainer(recipe: Recipe, out: Path, device: str, *, compiled: bool = False) -> Trainer:
    preprocessing = Preprocessing(short_side=256, crop=227, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 1.0))
    spec = ModelSpec(architecture=recipe.network(3), preprocessing=preprocessing, labels=("a", "b", "c"))
    torch.manual_seed(0)
    images = cast("Squares", range(40))  # only counted
    return Trainer(
        classifier=Classifier(spec, color_components=torch.eye(3)),
        recipe=recipe,
        training=images,
        validation=images,
        ranks=Ranks(device=torch.device(device)),
        journal=Journal(out, enabled=False),
        interruption=Interruption(),
        out=out,
        workers=1,
        save_every_s=60,
        compiled=compiled,
    )


def make_batch(device: str) -> Batch:
    images_BHWC = torch.arange(4 * 227 * 227 * 3).reshape(4, 227, 227, 3).remainder(251).to(torch.uint8)
    batch = Batch(images_BHWC, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    return Batch(*(tensor.to(device) for tensor in batch))


class _Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations with tensors of two devices, or of the host alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if {tensor.device.type for tensor in tensors} - {"meta"}:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("name", RECIPES)
def test_in_a_step_the_host_neither_reads_from_the_device_nor_copies_to_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's device without data, reading a value raises, and what is copied from the host is seen."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    trainer = make_trainer(make_recipe(name, {"width": 0.02, "batch_size": 4}), tmp_path, "meta")
    monkeypatch.setattr(
        trainer.optimizer, "_move", lambda *_: None
    )  # a kernel that this device does not have
    batch = make_batch("meta")

    def tensor(*values: object, **_: object) -> None:
        pytest.fail(f"torch.tensor{values} copies from the host, unseen by the recorder")

    monkeypatch.setattr(torch, "tensor", tensor)
    with _Crossings() as crossings:
        trainer.position.sums += trainer.step(batch, NOW)
    assert crossings.found == []
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.position.sums.tolist()


def test_batches_arrive_in_order_and_are_not_made_before_they_are_wanted() -> None:
    made = []

    def batches() -> Iterator[Batch]:
        for number in range(3):
            made.append(number)
            yield make_batch("cpu")._replace(keys_B=torch.full((4,), number))

    for number, batch in enumerate(on_device(batches(), torch.device("cpu"))):
        assert batch.keys_B.tolist() == [number] * 4
        assert len(made) == number + 1
    assert len(made) == 3


# Both from within torch's compiler, about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_compiled_network_trains_as_the_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured and differentiated by torch.compile; left to run operation by operation, so that no compiler is needed."""
    compile_ = torch.compile
    captured = []

    def without_compiler(model: torch.nn.Module) -> Any:
        captured.append(model)
        return compile_(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_compiler)
    recipe = make_recipe("2012", {"width": 0.02, "batch_size": 4})
    trainers = [make_trainer(recipe, tmp_path, "cpu", compiled=compiled) for compiled in (False, True)]
    for _ in range(3):
        plain, translated = (trainer.step(make_batch("cpu"), NOW) for trainer in trainers)
        torch.testing.assert_close(translated, plain)
    assert len(captured) == 1
    states = [trainer.classifier.network.state_dict() for trainer in trainers]
    torch.testing.assert_close(states[1], states[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself, differently in every version
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a processor")
@pytest.mark.parametrize("name", RECIPES)
def test_inductor_translates_the_step_into_code_that_trains_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `--compile` does, C++ and all: its arithmetic on indices overflows in dropout's hash if it may see it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    recipe = make_recipe(name, {"width": 0.02, "batch_size": 4})
    trainers = [make_trainer(recipe, tmp_path, "cpu", compiled=compiled) for compiled in (False, True)]
    for step in range(3):
        plain, translated = (trainer.step(make_batch("cpu"), NOW) for trainer in trainers)
        torch.testing.assert_close(translated, plain, rtol=1e-4, atol=1e-4)
        states = [trainer.classifier.network.state_dict() for trainer in trainers]
        if step == 0:
            torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
        elif (
            name == "2012"
        ):  # batch norm over four images magnifies rounding a thousandfold with each further step
            torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-3)
    assert any((tmp_path / "cache").rglob("*.cpp")), "nothing was translated"


def test_only_whole_networks_are_compiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compiled is True; it must be left out with parallel hybrid"):
        Options(data="photos", out=tmp_path, compiled=True, parallel="hybrid")
