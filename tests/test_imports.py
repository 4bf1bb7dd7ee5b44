"""Who may import whom (docs/architecture.md), and that the light kernel is light."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "topfive": "client",
    "topfive_training": "training",
    "topfive_export": "export",
    "topfive_server": "server",
}
ALLOWED = {
    "topfive": set[str](),
    "topfive_training": {"topfive"},
    "topfive_export": {"topfive", "topfive_training"},
    "topfive_server": {"topfive"},
}
"""Package -> what it may import besides itself."""
SEAMS = {
    "topfive/cli/__init__.py",
    "topfive/cli/_commands.py",
    "topfive/cli/doctor.py",
    "topfive/scoring/_local.py",
}
"""The files that may name another part in a string, to load it when it is needed."""
HEAVY = {"fastapi", "matplotlib", "numpy", "onnx", "onnxruntime", "pyarrow", "torch", "uvicorn"}

_TARGET = re.compile(r"(topfive\w*)(\.\w+)*(:\w+)?")


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / FOLDERS[package] / package).rglob("*.py"))
    assert files, f"{package} has no files"
    return files


def imported_by(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def named_by(tree: ast.AST) -> Iterator[str]:
    """Our packages that are named by a string such as "topfive_server.cli:serve", docstrings excepted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = _TARGET.fullmatch(node.value)
            if match and match[1] in FOLDERS:
                yield match[1]


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_between_the_parts(package: str) -> None:
    for path in files_of(package):
        name = path.relative_to(ROOT / FOLDERS[package]).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong = (set(imported_by(tree)) & FOLDERS.keys()) - {package} - ALLOWED[package]
        assert not wrong, (
            f"{name} imports {wrong}; {package} may import {ALLOWED[package] or 'no other part'}"
        )
        if name not in SEAMS:
            hidden = set(named_by(tree)) - {package} - ALLOWED[package]
            assert not hidden, f"{name} names {hidden} in a string; only {sorted(SEAMS)} load other parts so"


def test_relative_imports_stay_at_home() -> None:
    for package in FOLDERS:
        for path in files_of(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"


def test_the_rules_see_what_they_forbid() -> None:
    source = 'def f():\n    import topfive_server.cli\n    from topfive_export import x\n    load("topfive_training.cli:train")\n'
    tree = ast.parse(source)
    assert set(imported_by(tree)) == {"topfive_server", "topfive_export"}
    assert set(named_by(tree)) == {"topfive_training"}


def test_the_wheel_holds_exactly_these_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(packages) == sorted(f"{folder}/{package}" for package, folder in FOLDERS.items())
    for package, folder in FOLDERS.items():
        assert (ROOT / folder / package / "py.typed").is_file(), f"{package} does not say that it is typed"


def modules_after(program: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `program`."""
    script = f"{program}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_import_topfive_loads_the_standard_library_only() -> None:
    before = modules_after("")
    loaded = modules_after("import topfive") - before - set(sys.stdlib_module_names)
    assert loaded == {"topfive"}


@pytest.mark.parametrize(
    "program",
    [
        "from topfive.cli import main; main(['--help'])",
        "from topfive.cli import main; main(['no-such-command'])",
        "from topfive.cli import main; main(['classify', '--help'])",
        "from topfive import Client, AsyncClient, Classification",
        "import topfive.model_spec, topfive.preprocessing",
    ],
)
def test_light_paths_load_nothing_heavy(program: str) -> None:
    loaded = modules_after(program)
    assert not loaded & HEAVY
    assert not loaded & (FOLDERS.keys() - {"topfive"})
