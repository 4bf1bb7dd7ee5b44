"""The cyclopts application made of the commands."""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection, CycloptsError, CycloptsPanel, Parameter, UnknownCommandError
from cyclopts.config import Env, Toml

from topfive._version import __version__
from topfive.cli._commands import GROUPS, Command

CONFIG_VARIABLE = "TOPFIVE_CONFIG"
"""Names the configuration file to read instead of `topfive.toml` in the current directory."""


def _transform(name: str) -> str:
    return name.lstrip("-").upper().replace("-", "_").replace(".", "_")


class _Environment(Env):
    """`TOPFIVE_<COMMAND>_<OPTION>`, with underscores for hyphens in both (cyclopts leaves the command's).

    A variable that begins with a command's name and names none of its options is warned of.
    """

    def _prefix(self, commands: tuple[str, ...]) -> str:
        return super()._prefix(commands).replace("-", "_")

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        super().__call__(app, commands, arguments)
        if not commands or not len(arguments):
            return  # `TOPFIVE_` alone begins the variables of every command
        prefix = self._prefix(commands)
        for variable in sorted(name for name in os.environ if name.startswith(prefix)):
            try:
                arguments.match(variable.removeprefix(prefix), transform=_transform, delimiter="_")
            except ValueError:
                known = [prefix + _transform(argument.name) for argument in arguments]
                close = difflib.get_close_matches(variable, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                print(  # noqa: T201
                    f"topfive: {variable} in the environment names no option of topfive {' '.join(commands)}{hint}",
                    file=sys.stderr,
                )


class _File(Toml):
    """A configuration file; one that cannot be read is named (cyclopts says only why, and fails on some reasons)."""

    def _load_config(self, path: Path) -> dict[str, Any]:
        try:
            return super()._load_config(path)
        except OSError as error:
            raise CycloptsError(
                msg=f"The configuration file {path} cannot be read: {error.strerror}"
            ) from error
        except ValueError as error:
            raise CycloptsError(msg=f"The configuration file {path} is not TOML: {error}") from error


def build_app(tokens: Sequence[str], commands: Sequence[Command]) -> App:
    """The application with `commands`, ready to run `tokens`.

    A summary given to cyclopts with a lazy command replaces the function's docstring on the command's own help page;
    so the command that `tokens` name is registered without one.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    app = App(
        name="topfive",
        help="An image in, five labels out: train AlexNet, export it to one ONNX file, serve it, ask it.",
        help_format="markdown",
        default_parameter=Parameter(negative_iterable=()),  # no --empty-… beside every list
        version=__version__,
        config=(
            _Environment("TOPFIVE_"),
            _File(named or "topfive.toml", must_exist=named is not None, allow_unknown=False),
        ),
        exit_on_error=False,
        error_formatter=lambda error: _format_error(error, commands),
    )
    groups = {name: App(name=name, help=text, sort_key=len(commands)) for name, text in GROUPS.items()}
    for position, command in enumerate(commands):
        group, _, name = command.name.rpartition(" ")
        parent = app
        if group:
            parent = groups[group]
            if group not in app:
                app.command(parent)
        summary = None if command.is_named_by(tokens) else command.summary
        usage = f"Usage: topfive {command.name} {command.usage}" if command.usage else None
        parent.command(command.target, name=name, help=summary, usage=usage, sort_key=position)
    return app


def _format_error(error: CycloptsError, commands: Sequence[Command]) -> Any:
    """As cyclopts says it, but for an unknown command: there cyclopts would import every part to list them."""
    if not isinstance(error, UnknownCommandError):
        return CycloptsPanel(error)
    group = f"{' '.join(error.command_chain)} " if error.command_chain else ""
    wrong = group + (error.unused_tokens or [""])[0]
    names = [command.name for command in commands if command.name.startswith(group)]
    close = difflib.get_close_matches(wrong, names, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"the commands are {', '.join(names)}."
    return CycloptsPanel(f'There is no command "{wrong}"; {hint}')
