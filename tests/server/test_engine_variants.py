from pathlib import Path
from typing import Any

import pytest
from tests.server.onnx_models import write_model

from topfive import _processor
from topfive_server.devices import Device
from topfive_server.repository import ModelVersion, Repository
from topfive_server.variants import Chosen, choose

CPU = Device(kind="cpu", reason="test")
CUDA = Device(kind="cuda", reason="test")


def add(
    root: Path,
    name: str,
    version: str = "1",
    *,
    passed: bool | None = True,
    side: Any = None,
    dot_products: bool = True,
    **variant: Any,
) -> None:
    record = {"family": "alexnet", "precision": "fp32", "target": "cpu", "views": 1} | variant
    report = {"variant": record, "made_with": {"int8_dot_products": dot_products}}
    write_model(
        root, name, version, side=side, report=report if passed is None else {**report, "passed": passed}
    )


@pytest.fixture(autouse=True)
def processor_with_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processor, "int8_dot_products", lambda: True)


@pytest.fixture(name="family")
def make_family(tmp_path: Path) -> list[ModelVersion]:
    add(tmp_path, "alexnet")
    add(tmp_path, "alexnet_image", side="image")
    add(tmp_path, "alexnet_cuda", target="cuda")
    add(tmp_path, "alexnet_fp16", precision="fp16", target="cuda")
    add(tmp_path, "alexnet_int8", precision="int8")
    return Repository(tmp_path).read_all()[0]


def chosen(found: Chosen) -> list[tuple[str, str, str]]:
    return [(choice.version.name, choice.version.version, choice.graph) for choice in found.choices]


def test_the_fastest_graph_of_the_device_answers_under_the_familys_name(family: list[ModelVersion]) -> None:
    assert chosen(choose(family, CPU)) == [("alexnet", "1", "alexnet_int8")]
    assert chosen(choose(family, CUDA)) == [("alexnet", "1", "alexnet_fp16")]
    choice = choose(family, CPU).choices[0]
    assert choice.version.path.parent.parent.name == "alexnet_int8"
    assert choice.reason.startswith(
        "int8 cpu: the fastest kind for cpu that passed its limits (beside alexnet, "
    )


def test_a_precision_can_be_asked_for(family: list[ModelVersion]) -> None:
    assert chosen(choose(family, CPU, "fp32")) == [("alexnet", "1", "alexnet")]
    assert chosen(choose(family, CUDA, "fp32")) == [("alexnet", "1", "alexnet_cuda")]
    choices, refused = choose(family, CUDA, "int8")
    assert choices == []
    assert refused[0][:2] == ("alexnet", "1")
    assert refused[0].reason.startswith(
        "alexnet version 1 has no int8 graph for cuda:0 that passed its limits; it has"
    )
    assert refused[0].reason.endswith("; serve with --variant auto, or remove that version's folders")
    without = [version for version in family if version.precision != "int8"]
    assert (
        choose(without, CPU, "int8")
        .refused[0]
        .reason.endswith(
            "; export one with --precision int8, serve with --variant auto, or remove that version's folders"
        )
    )


def test_all_serves_every_graph_but_the_whole_one_under_its_own_name(family: list[ModelVersion]) -> None:
    names = [name for name, _, _ in chosen(choose(family, CPU, "all"))]
    assert names == ["alexnet", "alexnet_cuda", "alexnet_fp16", "alexnet_int8"]


def test_what_did_not_pass_is_not_chosen(tmp_path: Path) -> None:
    add(tmp_path, "alexnet")
    add(tmp_path, "alexnet_int8", precision="int8", passed=False)
    assert chosen(choose(Repository(tmp_path).read_all()[0], CPU)) == [("alexnet", "1", "alexnet")]


def test_what_nobody_has_verified_is_not_said_to_have_passed(tmp_path: Path) -> None:
    write_model(tmp_path, "mine")
    add(tmp_path, "alexnet", passed=None)
    add(tmp_path, "net", family="net")
    reasons = {
        choice.graph: choice.reason for choice in choose(Repository(tmp_path).read_all()[0], CPU).choices
    }
    for name in ("mine", "alexnet"):
        assert "unverified: no report.json says that this file passed its limits" in reasons[name]
    assert reasons["net"] == "fp32 cpu: the fastest kind for cpu that passed its limits (beside no other)"


def test_what_was_verified_goes_before_what_was_not(tmp_path: Path) -> None:
    add(tmp_path, "alexnet")
    add(tmp_path, "alexnet_int8", precision="int8", passed=None)
    found = choose(Repository(tmp_path).read_all()[0], CPU)
    assert chosen(found) == [("alexnet", "1", "alexnet")]


def test_a_processor_on_which_int8_saturates_gets_fp32(
    family: list[ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processor, "int8_dot_products", lambda: False)
    choice = choose(family, CPU).choices[0]
    assert choice.graph == "alexnet"
    assert "; int8 was passed over, which saturates on this processor" in choice.reason
    asked = choose(family, CPU, "int8").choices[0]
    assert asked.graph == "alexnet_int8"
    assert "int8 was asked for; it saturates on this processor without int8 dot products" in asked.reason
    monkeypatch.setattr(_processor, "int8_dot_products", lambda: None)
    assert choose(family, CPU).choices[0].graph == "alexnet_int8"


def test_int8_that_was_verified_while_it_saturated_is_as_good_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processor, "int8_dot_products", lambda: False)
    add(tmp_path, "alexnet")
    add(tmp_path, "alexnet_int8", precision="int8", dot_products=False)
    assert chosen(choose(Repository(tmp_path).read_all()[0], CPU)) == [("alexnet", "1", "alexnet_int8")]


def test_each_version_number_is_chosen_for_by_itself(tmp_path: Path) -> None:
    add(tmp_path, "alexnet", "9")
    add(tmp_path, "alexnet_int8", "9", precision="int8")
    add(tmp_path, "alexnet", "10")
    versions = Repository(tmp_path).read_all()[0]
    assert chosen(choose(versions, CPU)) == [("alexnet", "9", "alexnet_int8"), ("alexnet", "10", "alexnet")]


def test_ten_views_are_a_model_of_their_own(tmp_path: Path) -> None:
    add(tmp_path, "alexnet")
    add(tmp_path, "alexnet_views10", side=16, views=10)
    add(tmp_path, "alexnet_views10_int8", side=16, views=10, precision="int8")
    versions = Repository(tmp_path).read_all()[0]
    assert chosen(choose(versions, CPU)) == [
        ("alexnet", "1", "alexnet"),
        ("alexnet_views10", "1", "alexnet_views10_int8"),
    ]


def test_a_model_without_a_report_is_served_under_its_folders_name(tmp_path: Path) -> None:
    write_model(tmp_path, "mine")
    assert chosen(choose(Repository(tmp_path).read_all()[0], CPU)) == [("mine", "1", "mine")]


def test_only_whole_graphs_are_nothing_to_serve(tmp_path: Path) -> None:
    add(tmp_path, "alexnet_image", side="image")
    assert choose(Repository(tmp_path).read_all()[0], CPU) == ([], [])
