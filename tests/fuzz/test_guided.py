"""Atheris (libFuzzer for Python): what `decode` and the parsers do with bytes that are steered to where nobody has been.

A process of its own for each: the fuzzer instruments what it imports, ends its process, and watches over its memory
and over the time that one input takes.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.fuzz import seeds
from tests.fuzz.budget import SECONDS, SEED

from topfive.model_spec import Preprocessing
from topfive.preprocessing import FORMATS, ImageError, decode

pytest.importorskip("atheris", reason="atheris has no wheel for this platform")

ROOT = Path(__file__).parents[2]
# By way of a shell that stays: the peak of memory that libFuzzer looks at begins, across an exec, with that of the
# process that forked, and pytest has long been larger than the limit when all tests run.
FUZZER = ("sh", "-c", '"$@"; exit "$?"', "sh", sys.executable, "-m", "tests.fuzz.guided")
SLOWEST_S = 10
"""An input that takes longer is a hang; they take milliseconds, and the machine may be busy."""
MEMORY_MB = 1024
"""A process that takes more has decoded what it should have refused by its header."""


@pytest.mark.timeout(300 + SECONDS)
@pytest.mark.parametrize(
    ("target", "corpus", "runs", "longest"),
    [
        ("decode", seeds.images, 8_000, 65_536),
        ("unpack", seeds.request_bodies, 12_000, 8192),
        ("infer", seeds.inference_requests, 12_000, 8192),
    ],
    ids=["decode", "unpack", "infer"],
)
def test_no_bytes_crash_hang_or_surprise(
    target: str, corpus: Callable[[], Iterator[bytes]], runs: int, longest: int, tmp_path: Path
) -> None:
    seeds.write(corpus(), tmp_path / "seeds")
    found, findings = tmp_path / "found", tmp_path / "findings"
    found.mkdir()
    findings.mkdir()
    limit = f"-max_total_time={SECONDS}" if SECONDS else f"-runs={runs}"
    options = [f"-seed={SEED}", f"-max_len={longest}", f"-timeout={SLOWEST_S}", f"-rss_limit_mb={MEMORY_MB}"]
    run = subprocess.run(
        [*FUZZER, target, limit, *options, f"-artifact_prefix={findings}/", found, tmp_path / "seeds"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    log = run.stderr.decode("utf-8", "replace")[-6000:] + run.stdout.decode("utf-8", "replace")[-3000:]
    kept = list(findings.iterdir())
    assert run.returncode == 0, (
        f"replay: python -m tests.fuzz.guided {target} {' '.join(map(str, kept))}\n{log}"
    )
    assert "Done" in log, log
    assert any(found.iterdir()), "no input reached anything that the seeds do not: the instrumentation is off"


def test_the_seeds_are_images_of_every_format() -> None:
    read: set[str] = set()
    refused = []
    for data in seeds.images():
        try:
            read.add(decode(data, Preprocessing(short_side=20, crop=16)).format)
        except ImageError as error:
            refused.append(str(error))
    assert read == set(FORMATS)
    assert sum("floating-point" in message for message in refused) == 1
