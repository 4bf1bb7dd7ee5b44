"""scripts/environment.sh where something is missing: it installs it, or says one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "environment.sh"


def executable(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bin_(tmp_path: Path) -> Path:
    """A folder for stand-ins, first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "apt-get", f'echo "$@" >> {tmp_path}/apt\n')
    return folder


def run(bin_: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SCRIPT, bin_.parent / "venv", "nothing"],
        env=os.environ | {"PATH": f"{bin_}:/usr/bin:/bin"} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_python_that_is_named_but_too_old_is_refused(bin_: Path) -> None:
    old = executable(bin_ / "old-python", "exit 1\n")  # as for any question about its version
    result = run(bin_, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON is {old}, which is not Python 3.11 or newer." in result.stderr
    assert not (bin_.parent / "apt").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="as another user it would call sudo")
def test_missing_venv_module_is_installed_with_apt(bin_: Path) -> None:
    # Debian's python3 without python3-venv: everything works but `import ensurepip`; here, until apt has run.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    bare = executable(
        bin_ / "bare-python",
        f'case "$2" in *ensurepip*) exit 1;; esac\ntest "$2" != venv || exit 9\nexec {sys.executable} "$@"\n',
    )
    result = run(bin_, PYTHON=str(bare))
    assert result.returncode != 0  # the stand-in for apt installs nothing
    installed = (bin_.parent / "apt").read_text()
    assert f"install -qy --no-install-recommends python{version}-venv" in installed


def test_what_pip_cannot_install_is_one_sentence(bin_: Path) -> None:
    pip = executable(bin_.parent / "python", "exit 1\n")
    (bin_.parent / "venv" / "bin").mkdir(parents=True)
    pip.rename(bin_.parent / "venv" / "bin" / "python")
    result = run(bin_)
    assert result.returncode == 1
    assert "pip could not install nothing" in result.stderr
    assert "goes on from here" in result.stderr
