"""The command line itself: registration, help, configuration, and how every kind of failure ends."""

import importlib
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from topfive import __version__
from topfive.cli import main
from topfive.cli._commands import COMMANDS, Command

FAKE = '''
"""A part of the kind that the command line loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from topfive.errors import TopfiveError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Config:
    rate: float = 0.5
    """Learning rate per step."""
    epochs: int = 3
    """Passes over the data."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be at least 1")


class Unreachable(TopfiveError):
    exit_code = 3


def work(place: Path, /, *, config: Config = Config(), resume: bool = False) -> int:
    """Do the work.

    The long description with the details.

    Args:
        place: the folder to work in.
        resume: go on where it stopped.
    """
    print(place, config.rate, config.epochs, resume)
    return 7 if resume else 0


def fail(kind: str, /) -> None:
    """Fail in one way."""
    errors = {
        "user": TopfiveError("the folder has no images; give one that has"),
        "three": Unreachable("nobody there"),
        "value": ValueError("epochs is 0; it must be at least 1"),
        "file": FileNotFoundError(2, "No such file or directory", "cat.jpg"),
        "full": OSError(28, "No space left on device", "run/model.safetensors"),
        "bug": ZeroDivisionError("division by zero"),
        "missing": ModuleNotFoundError("No module named 'torch'", name="torch"),
        "inner": ModuleNotFoundError("No module named 'topfive_server.nonsense'", name="topfive_server.nonsense"),
        "library": ImportError("libcudart.so.13: cannot open shared object file"),
        "interrupt": KeyboardInterrupt(),
        "exit": SystemExit(5),
    }
    raise errors[kind]
'''

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("work", …)`: the command line with two commands of a made-up part, in an empty directory."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "fake.py").write_text(FAKE)
    (tmp_path / "part" / "needs_extra.py").write_text(
        "import a_library_nobody_has\n\ndef go() -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for module in ("part", "part.fake", "part.needs_extra"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    commands = (
        Command(name="work", target="part.fake:work", summary="Work, in one line.", extra="training"),
        Command(name="hard-work", target="part.fake:work", summary="Work hard.", extra="training"),
        Command(name="fail", target="part.fake:fail", summary="Fail.", extra="training"),
        Command(name="extra", target="part.needs_extra:go", summary="Not here.", extra="server"),
        Command(name="import this", target="part.fake:fail", summary="This."),
    )
    return lambda *arguments: main(arguments, commands=commands)


def test_help_lists_summaries_without_loading_a_part(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "Work, in one line." in out
    assert "part.fake" not in sys.modules


def test_help_of_a_command_is_its_docstring(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("work", "--help") == 0
    out = capsys.readouterr().out
    for expected in (
        "The long description",
        "Passes over the data.",
        "go on where it stopped",
        "TOPFIVE_WORK_EPOCHS",
    ):
        assert expected in out


def test_no_command_prints_the_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "Work, in one line." in capsys.readouterr().out


def test_version(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_the_status_of_a_command_is_the_status_of_the_process(run: Run) -> None:
    assert run("work", "here") == 0
    assert run("work", "here", "--resume") == 7


def test_flags_beat_environment_beats_file_beats_default(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def epochs(*arguments: str) -> str:
        assert run("work", "here", *arguments) == 0
        return capsys.readouterr().out.split()[2]

    assert epochs() == "3"
    (tmp_path / "topfive.toml").write_text("[work]\nepochs = 4\n")
    assert epochs() == "4"
    monkeypatch.setenv("TOPFIVE_WORK_EPOCHS", "5")
    assert epochs() == "5"
    assert epochs("--epochs", "6") == "6"


def test_environment_of_a_hyphenated_command(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPFIVE_HARD_WORK_EPOCHS", "9")
    assert run("hard-work", "here") == 0
    assert capsys.readouterr().out.split()[2] == "9"


def test_a_variable_that_names_no_option_is_warned_of(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPFIVE_WORK_EPOCH", "9")
    monkeypatch.setenv("TOPFIVE_HARD_WORK_EPOCH", "9")  # another command's
    assert run("work", "here") == 0
    captured = capsys.readouterr()
    assert captured.out.split()[2] == "3"
    assert captured.err == (
        "topfive: TOPFIVE_WORK_EPOCH in the environment names no option of topfive work; "
        "did you mean TOPFIVE_WORK_EPOCHS?\n"
    )
    monkeypatch.delenv("TOPFIVE_WORK_EPOCH")
    monkeypatch.setenv("TOPFIVE_WORK_EPOCHS", "9")
    assert run("work", "here") == 0
    assert capsys.readouterr().err == ""


def test_a_named_configuration_file_must_exist(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other.toml").write_text("[work]\nepochs = 8\n")
    monkeypatch.setenv("TOPFIVE_CONFIG", str(tmp_path / "other.toml"))
    assert run("work", "here") == 0
    assert capsys.readouterr().out.split()[2] == "8"
    monkeypatch.setenv("TOPFIVE_CONFIG", str(tmp_path / "absent.toml"))
    assert run("work", "here") == 1
    assert "absent.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"[work]\nepochs = [", "is not TOML"), (b"\xff\xd8\xff", "is not TOML")],
    ids=["folder", "broken", "picture"],
)
def test_a_configuration_file_that_cannot_be_used_is_named(
    content: bytes | None,
    says: str,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.toml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    monkeypatch.setenv("TOPFIVE_CONFIG", str(file))
    monkeypatch.setenv("COLUMNS", "500")
    assert run("work", "here") == 2
    error = capsys.readouterr().err
    assert f"{file} {says}" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch"], "the commands are work, hard-work"),
        (["wrk"], 'did you mean "work"?'),
        (["work"], "PLACE"),
        (["work", "here", "--epoch", "3"], "--epochs"),
        (["work", "here", "--epochs", "three"], "three"),
        (["work", "here", "--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["import", "that"], 'did you mean "import this"?'),
    ],
)
def test_bad_usage_exits_2(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(*arguments) == 2
    assert says in capsys.readouterr().err


def test_bad_values_of_environment_and_file_exit_2(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOPFIVE_WORK_EPOCHS", "many")
    assert run("work", "here") == 2
    assert "TOPFIVE_WORK_EPOCHS" in capsys.readouterr().err
    monkeypatch.delenv("TOPFIVE_WORK_EPOCHS")
    (tmp_path / "topfive.toml").write_text("[work]\nepoch = 4\n")
    assert run("work", "here") == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("user", 1, "topfive: the folder has no images; give one that has\n"),
        ("three", 3, "topfive: nobody there\n"),
        ("value", 1, "topfive: epochs is 0; it must be at least 1\n"),
        ("file", 1, "topfive: cat.jpg: No such file or directory\n"),
        (
            "full",
            1,
            "topfive: run/model.safetensors: No space left on device; make room there and run it again\n",
        ),
        (
            "missing",
            1,
            "topfive: topfive fail needs torch, which is not installed: pip install 'topfive[training]'\n",
        ),
        ("interrupt", 130, ""),
        ("exit", 5, ""),
    ],
)
def test_errors_are_one_sentence(
    run: Run, capsys: pytest.CaptureFixture[str], kind: str, status: int, says: str
) -> None:
    assert run("fail", kind) == status
    assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("bug", 70, "ZeroDivisionError: division by zero"),
        ("library", 1, "libcudart.so.13"),
        ("inner", 1, "nonsense"),
    ],
)
def test_faults_name_themselves_and_no_extra(
    run: Run, capsys: pytest.CaptureFixture[str], kind: str, status: int, says: str
) -> None:
    assert run("fail", kind) == status
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert "is not installed" not in err


def test_debug_variable_adds_the_traceback(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPFIVE_DEBUG", "1")
    assert run("fail", "bug") == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run("extra", *arguments) == 1
    expected = (
        "topfive extra needs a_library_nobody_has, which is not installed: pip install 'topfive[server]'"
    )
    assert capsys.readouterr().err == f"topfive: {expected}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_is_a_plain_function_with_help(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    function = getattr(importlib.import_module(command.module), command.target.partition(":")[2])
    assert inspect.isfunction(function)
    assert not inspect.iscoroutinefunction(function)
    assert inspect.getdoc(function)
    assert main([*command.name.split(), "--help"]) == 0
    assert command.name in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "doctor" in capsys.readouterr().out


def test_the_bash_completion_is_valid_bash() -> None:
    script = subprocess.run(
        [sys.executable, "-m", "topfive", "completion", "bash"], capture_output=True, check=True
    )
    subprocess.run(["bash", "-n"], input=script.stdout, check=True)


def test_ctrl_c_of_the_real_process_exits_130_quietly(tmp_path: Path) -> None:
    # A shell's background job, as CI may be, hands down to its children that they ignore it.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from topfive.cli import main; from topfive.cli._commands import Command\n"
        "sys.exit(main(['wait'], commands=[Command(name='wait', target='waiting:wait', summary='')]))\n"
    )
    (tmp_path / "waiting.py").write_text(
        "import time\n\ndef wait() -> None:\n    print('up', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, b"")


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    program = (
        "import sys; from topfive.cli import main; from topfive.cli._commands import Command\n"
        "sys.exit(main(['talk'], commands=[Command(name='talk', target='talking:talk', summary='')]))\n"
    )
    (tmp_path / "talking.py").write_text("def talk() -> None:\n    print('x' * 10_000_000)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout
    assert process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141
