"""Under a real torchrun: a rank that fails is named, with its own error, and nobody waits for it."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from topfive.errors import TopfiveError
from topfive_training.ranks import Ranks, under_torchrun

def body(ranks: Ranks) -> int:
    ranks.wait()
    if ranks.rank == 1:
        match sys.argv[1]:
            case "mistake":
                raise KeyError("a mistake of ours")
            case "sentence":
                raise TopfiveError("the disk is full; make room")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait()  # for one that never comes
    return 0

sys.exit(under_torchrun(body))
"""


@pytest.mark.parametrize(
    ("how", "said", "cause"),
    [
        (
            "mistake",
            f"topfive: rank 1 of 2 on {re.escape(socket.gethostname())} failed: KeyError: 'a mistake of ours'",
            "KeyError: 'a mistake of ours'",
        ),
        (
            "sentence",
            f"topfive: rank 1 of 2 on {re.escape(socket.gethostname())}: the disk is full; make room",
            "TopfiveError: the disk is full; make room",
        ),
        ("kill", "", r"Signal 9 \(SIGKILL\) received"),
    ],
)
def test_the_guilty_rank_comes_first_in_the_summary(tmp_path: Path, how: str, said: str, cause: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(script), how],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert time.monotonic() - started < 60, "not within a minute"
    assert re.search(said, output), output
    _, _, root = output.partition("Root Cause")
    assert re.search(r"rank +: 1 ", root), output
    assert re.search(cause, root), output
