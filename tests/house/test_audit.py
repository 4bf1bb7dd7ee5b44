"""scripts/audit_if_possible.sh: a known vulnerability fails the build, a missing network is one line."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "audit_if_possible.sh"
WRITE_REPORT = 'report=${2##* }\necho \'{"dependencies": [{"vulns": ["PYSEC-1"]}]}\' > "$report"\n'


def audit(folder: Path, make: str = "exit 0") -> "subprocess.CompletedProcess[str]":
    """The script with a stand-in for what asks the network."""
    (folder / "make").write_text(f"#!/bin/bash\n{make}\n")
    (folder / "make").chmod(0o755)
    return subprocess.run(
        [SCRIPT],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_nothing_found_is_said(tmp_path: Path) -> None:
    done = audit(tmp_path)
    assert (done.returncode, done.stderr) == (
        0,
        "topfive: no pinned version has a known vulnerability.\n",
    )


def test_a_known_vulnerability_fails_the_build_and_is_named(tmp_path: Path) -> None:
    done = audit(tmp_path, WRITE_REPORT + "exit 1")
    assert done.returncode == 1
    assert "PYSEC-1" in done.stderr
    assert "raise it in constraints.txt" in done.stderr


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("echo no route to host; echo 'make: *** Error 1'; exit 2", "NOT audited: no route to host."),
        ("exit 124", "longer than 60 seconds"),
    ],
)
def test_what_cannot_be_looked_up_is_one_line_and_no_failure(tmp_path: Path, make: str, reason: str) -> None:
    done = audit(tmp_path, make)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "NOT audited" in line
    assert reason in line


def test_ci_audits_after_the_tests() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert commands.index("\nmake test ") < commands.index(f"scripts/{SCRIPT.name}")
