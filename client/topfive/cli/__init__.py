"""The one command line, `topfive`: see `main`."""

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from topfive.cli._commands import COMMANDS, Command
from topfive.errors import TopfiveError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERNAL = 70
"""`EX_SOFTWARE` of sysexits.h: a fault of this program."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as a shell reports a program that Ctrl-C ended."""
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: the reader of our output has gone (`topfive … | head`)."""
DEBUG_VARIABLE = "TOPFIVE_DEBUG"
"""Set to anything to see the traceback of an error as well."""

_OWN_PACKAGES = {"topfive", "topfive_training", "topfive_export", "topfive_server"}


def main(arguments: Sequence[str] | None = None, *, commands: Sequence[Command] = COMMANDS) -> int:
    """Run one command; every error ends as a sentence on stderr, never as a traceback.

    Args:
        arguments: the words after `topfive`; the process's own by default.
        commands: what can be run.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad usage, 3 server unreachable, 70 a fault of this program, 130 Ctrl-C,
        141 broken pipe; a command's documentation names what else it returns.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        return _run(tokens, commands)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED if stop.code else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would complain while flushing at exit; there is nobody left to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  the last stop before the user
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        named = next((command for command in commands if command.is_named_by(tokens)), None)
        sentence, status = explain(error, named)
        _complain(sentence)
        return status


def _run(tokens: list[str], commands: Sequence[Command]) -> int:
    from cyclopts import CycloptsError  # noqa: PLC0415  a tenth of a second that nothing else here needs

    from topfive.cli._app import build_app  # noqa: PLC0415

    try:
        function, bound, _ = build_app(tokens, commands).parse_args(tokens)
    except CycloptsError:
        return EXIT_USAGE  # cyclopts has printed what is wrong
    except ValueError as error:
        # A configuration dataclass has refused a value that is of the right type.
        _complain(str(error))
        return EXIT_USAGE
    status = function(*bound.args, **bound.kwargs)
    sys.stdout.flush()  # here, where a broken pipe is still handled
    return status if isinstance(status, int) else 0


_WAYS_OUT: Final = {
    errno.ENOSPC: "; make room there and run it again",
    errno.EDQUOT: "; make room there and run it again",
    errno.EMFILE: "; allow more open files (`ulimit -n`)",
}
"""What to do about an error of the system that does not say so itself."""


def explain(error: Exception, command: Command | None) -> tuple[str, int]:
    """The sentence for the user and the exit status."""
    if isinstance(error, TopfiveError):
        return str(error), error.exit_code
    if isinstance(error, ImportError):
        return _explain_import(error, command)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        way_out = _WAYS_OUT.get(error.errno or 0, "")
        return f"{place}{error.strerror or error}{way_out}", EXIT_FAILED
    if isinstance(error, ValueError):
        return str(error) or repr(error), EXIT_FAILED
    what = f"internal error, {type(error).__name__}: {error}"
    return f"{what}; please report it with what {DEBUG_VARIABLE}=1 and the same command print", EXIT_INTERNAL


def _complain(sentence: str) -> None:
    print(f"topfive: {sentence}", file=sys.stderr)  # noqa: T201


def _explain_import(error: ImportError, command: Command | None) -> tuple[str, int]:
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    missing = (cause.name or "").partition(".")[0]
    name = f"topfive {command.name}" if command else "topfive"
    package = f"topfive[{command.extra}]" if command and command.extra else "topfive"
    if isinstance(cause, ModuleNotFoundError) and missing and missing not in _OWN_PACKAGES:
        return f"{name} needs {missing}, which is not installed: pip install '{package}'", EXIT_FAILED
    return (
        f"{name} could not load a library ({cause}): try pip install --force-reinstall '{package}'",
        EXIT_FAILED,
    )
