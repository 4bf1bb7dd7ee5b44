"""What is imported is declared, what is declared is pinned, and nothing else is pinned."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD_BACKEND = {"hatchling", "editables", "trove-classifiers"}
"""Installed into the throwaway environment in which pip builds topfive, not into the one that runs this."""
OWN = {"benchmarks", "scripts", "tests", "topfive", "topfive_export", "topfive_server", "topfive_training"}
ALLOWED_EXTRAS = {
    "client/topfive": ["scoring", "plot"],
    "server/topfive_server": ["server", "telemetry", "triton"],
    "export/topfive_export": ["export", "training"],
    "training/topfive_training": ["training", "imagenet"],
    "benchmarks": ["dev"],
    "tests": ["dev"],
}
"""Which of pyproject.toml's extras the code of a folder may count on, besides the base dependencies."""


ELSEWHERE = ROOT / "benchmarks" / "servers"
"""Run in environments of their own, with the requirements that lie beside them."""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def extras(*names: str) -> Iterator[Requirement]:
    """The requirements of the base package with these extras, extras of topfive itself followed."""
    groups: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    todo, seen = list(names), set[str]()
    for text in PROJECT["project"]["dependencies"]:
        yield Requirement(text)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for requirement in map(Requirement, groups.get(name, [])):
            if requirement.name == "topfive":
                todo += requirement.extras
            else:
                yield requirement


def closure(requirements: Iterator[Requirement]) -> set[str]:
    """Names of everything that these requirements bring into this environment, or into one that they are for."""
    todo = []
    seen: set[tuple[str, str]] = set()
    for r in requirements:
        found = [(r.name, extra) for extra in ("", *r.extras)]
        if r.marker is None or r.marker.evaluate():
            todo += found
        else:
            seen.update(found)
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(child.name), e) for e in ("", *child.extras)]
    return {canonicalize_name(name) for name, _ in seen}


def test_everything_that_ci_installs_is_pinned_and_nothing_else() -> None:
    # A CUDA build of torch brings its libraries, each with the one version that it was built for.
    cuda = re.compile(r"nvidia-.*|cuda-.*|triton")
    installed = {name for name in closure(extras("dev")) if not cuda.fullmatch(name)}
    pinned = pins().keys() - BUILD_BACKEND
    assert installed - pinned == set(), "add these to constraints.txt: `make lock`"
    assert pinned - installed == set(), "nothing installs these: `make lock`"


def test_pins_are_exact_and_satisfy_what_is_declared() -> None:
    pinned = pins()
    for requirement in extras("dev", *PROJECT["project"]["optional-dependencies"]):
        specifier = pinned[canonicalize_name(requirement.name)]
        assert re.fullmatch(r"==[\w.]+", specifier), requirement.name
        assert requirement.specifier.contains(specifier.removeprefix("==")), requirement
    for text in PROJECT["build-system"]["requires"]:
        requirement = Requirement(text)
        assert SpecifierSet(pinned[requirement.name]), f"{requirement.name} is not pinned"


def imported_distributions(folder: Path) -> dict[str, str]:
    """Top-level modules that the Python files of a folder import, each with one file that does."""
    found: dict[str, str] = {}
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    for file in files:
        if ELSEWHERE in file.parents and file != folder:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], str(file.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED_EXTRAS))
def test_what_is_imported_is_declared(folder: str) -> None:
    declared = {canonicalize_name(r.name) for r in extras(*ALLOWED_EXTRAS[folder])}
    providers = importlib.metadata.packages_distributions()
    imported = imported_distributions(ROOT / folder)
    assert imported, f"no Python files in {folder}"
    for module, file in imported.items():
        if module in sys.stdlib_module_names | OWN or any((ROOT / folder).rglob(f"{module}.py")):
            continue
        names = {canonicalize_name(name) for name in providers.get(module, [])}
        assert names & declared, (
            f"{file} imports {module}, which pyproject.toml does not declare for {folder}"
        )


@pytest.mark.parametrize("service", sorted(path.stem for path in ELSEWHERE.glob("with_*.py")))
def test_what_a_service_of_the_comparison_imports_is_in_its_requirements(service: str) -> None:
    lines = (ELSEWHERE / "requirements" / f"{service.removeprefix('with_')}.txt").read_text(encoding="utf-8")
    installed = {canonicalize_name(Requirement(line).name) for line in lines.splitlines()}
    provided_by = {"triton_python_backend_utils": "nvidia-pytriton", "PIL": "pillow"}
    # The part that all share is imported by each.
    imported = imported_distributions(ELSEWHERE / f"{service}.py") | imported_distributions(
        ELSEWHERE / "common.py"
    )
    for module in imported.keys() - sys.stdlib_module_names - OWN:
        names = {canonicalize_name(provided_by.get(module, module)), f"{module}-gpu"}
        assert names & installed, f"{service}.py imports {module}, which its requirements do not name"
