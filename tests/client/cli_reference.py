"""The reference part of docs/cli.md, made from the commands: `python -m tests.client.cli_reference` rewrites it."""

import re
from pathlib import Path

from topfive.cli._app import build_app
from topfive.cli._commands import COMMANDS, Command

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
HEADING = "## Commands\n"


def section_of(command: Command) -> str:
    """One command: usage, help and every option."""
    words = command.name.split()
    app = build_app(words, [command])
    app.config = ()  # the rule for names of variables is told once, above
    for word in words:
        app = app[word]
    text = app.generate_docs(heading_level=3, recursive=False)
    lines = [line.rstrip() for line in text.splitlines()]
    lines[0] = f"### topfive {command.name}"
    usage = next(index for index, line in enumerate(lines) if line.startswith("```console")) + 1
    lines[usage] = f"topfive {command.name} {lines[usage].partition(words[-1])[2].strip()}".strip()
    needed_for = f" for {command.extra_for}" if command.extra_for else ""
    extra = f"\nNeeds `pip install 'topfive[{command.extra}]'`{needed_for}.\n" if command.extra else ""
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return f"{body}\n{extra}"


def reference() -> str:
    """All commands."""
    sections = [section_of(command) for command in COMMANDS]
    return f"{HEADING}\n" + "\n".join(sections)


def written() -> tuple[str, str]:
    """The document's hand-written part and its reference."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, after = text.partition(HEADING)
    return before, found + after


if __name__ == "__main__":
    DOCUMENT.write_text(written()[0] + reference(), encoding="utf-8")
