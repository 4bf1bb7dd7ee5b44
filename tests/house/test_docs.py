"""What the documents say exists, exists: commands and their options, make targets, files, statuses."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from cyclopts import CycloptsError

from topfive.cli._app import build_app
from topfive.cli._commands import COMMANDS
from topfive_training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").glob("*.md")])
ARCHITECTURE = ROOT / "docs" / "architecture.md"
README = ROOT / "README.md"


class Mention(NamedTuple):
    """One `topfive …` in a document."""

    document: str
    words: tuple[str, ...]
    """After `topfive`."""
    complete: bool
    """A line of a code block, to be typed as it is; usage patterns and inline mentions leave arguments out."""


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```(?:\w+)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    """Lines of the code blocks, continued ones joined, prompts and comments taken off."""
    lines = "\n".join(code_blocks(text)).replace("\\\n", " ").splitlines()
    return [
        re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in lines
    ]


def mentions() -> list[Mention]:
    found: list[Mention] = []
    for path in DOCUMENTS:
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        lines = [re.split(r"[|>&]", line)[0] for line in shell_lines(text) if re.match(r"topfive( |$)", line)]
        for words in (tuple(shlex.split(line)[1:]) for line in lines):
            pattern = any(re.fullmatch(r"\[.*\]|[A-Z_]+|--|…", word) for word in words)
            found.append(Mention(name, tuple(w for w in words if w[0] not in "[…"), not pattern))
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        codes = re.findall(r"`topfive ([a-z][^`]*)`", prose)
        found += [Mention(name, tuple(re.split(r"[\s=]+", code.replace("…", ""))), False) for code in codes]
    return found


def options_of(command: str) -> set[str]:
    words = command.split()
    app = build_app(words, COMMANDS)
    for word in words:
        app = app[word]
    names = {name for argument in app.assemble_argument_collection() for name in argument.names} | {"--help"}
    if "--[KEYWORD]" in names:  # `topfive train` takes any field of the recipe
        names |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Recipe)}
    return names


def test_documents_mention_commands_at_all() -> None:
    assert len([m for m in mentions() if m.complete]) >= 5


@pytest.mark.parametrize("mention", mentions(), ids=lambda m: f"{m.document}: {' '.join(m.words)}")
def test_mentioned_commands_and_options_exist(
    mention: Mention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [c for c in COMMANDS if c.is_named_by(mention.words)]
    groups = {c.name.split()[0] for c in COMMANDS if " " in c.name}
    if not commands:
        assert mention.words[0] in {*groups, "--help", "--version", "COMMAND"}
        return
    (command,) = commands
    known = options_of(command.name)
    for word in mention.words:
        if word.startswith("-") and not word.lstrip("-").isnumeric():
            name = word.split("=")[0]
            assert name in known, f"topfive {command.name} has no {name}"
    if mention.complete:
        monkeypatch.chdir(tmp_path)
        try:
            build_app(mention.words, COMMANDS).parse_args(
                mention.words, exit_on_error=False, print_error=False
            )
        except CycloptsError as error:
            pytest.fail(str(error))


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for command in COMMANDS:
        name = command.name.split()[0]
        if name != "completion":
            assert f"topfive {name}" in text, f"README.md does not mention topfive {name}"


def test_mentioned_make_targets_exist() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert {"demo", "test"} <= targets
    places = [*DOCUMENTS, ROOT / "pyproject.toml", ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*")]
    for path in filter(Path.is_file, places):
        for target in re.findall(
            r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE
        ):
            assert target in targets, f"{path.name}: there is no `make {target}`"


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|#", link):
                assert (path.parent / link.partition("#")[0]).exists(), f"{path.name}: {link}"


def test_documents_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, (
            f"docs/README.md does not list {path.name}"
        )


def test_tree_in_the_readme_is_the_tree() -> None:
    """Every path of the annotated tree exists, and every top-level folder is in it."""
    block = next(b for b in code_blocks(README.read_text(encoding="utf-8")) if "client/topfive/" in b)
    named = [line.split()[0] for line in block.splitlines() if line and not line.startswith(" ")]
    for path in named:
        assert (ROOT / path).exists(), path
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in listed.splitlines() if "/" in line and not line.startswith(".")}
    assert folders <= {path.split("/")[0] for path in named}


def statuses(path: Path) -> set[str]:
    """Status codes in the first column of the tables of a document."""
    return set(re.findall(r"^\| (\d{3})\b", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_readme_and_contract_list_the_same_statuses() -> None:
    assert statuses(README) == statuses(ARCHITECTURE)
