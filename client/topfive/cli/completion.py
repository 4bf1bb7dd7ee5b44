"""`topfive completion`: the shell's completion script."""

import importlib
import sys
from typing import Literal

from topfive.cli._app import build_app
from topfive.cli._commands import COMMANDS


def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print the script that completes `topfive` in a shell.

    For bash: `topfive completion bash > ~/.local/share/bash-completion/completions/topfive`. Only the commands whose
    extra is installed are completed; run it again after installing another.

    Args:
        shell: the shell to write for.
    """
    modules = {command.module for command in COMMANDS}
    loaded = {module for module in sorted(modules) if _loads(module)}
    commands = [command for command in COMMANDS if command.module in loaded]
    print(build_app([], commands).generate_completion(shell=shell))  # noqa: T201
    return 0


def _loads(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"topfive: left out {module}, which does not load here: {error}", file=sys.stderr)  # noqa: T201
        return False
    return True
