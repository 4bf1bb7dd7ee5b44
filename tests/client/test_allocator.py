"""Large buffers stay in the process, instead of a page fault for each page of each new one."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from topfive.allocator import keep_large_buffers

kept = keep_large_buffers() if sys.argv[1] == "keep" else None

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # Together more than glibc keeps by itself, each less than it gives to mmap once it has seen some.
    buffers = [bytearray(b"x" * (24 << 20)) for _ in range(4)]
    del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

[faults() for _ in range(3)]
print(kept, faults())
"""


def run(how: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept, faults = output.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_buffers_are_reused() -> None:
    pages = 4 * (24 << 20) // 4096
    _, left_alone = run("leave")
    kept, faults = run("keep")
    assert left_alone > pages / 2  # else there would be nothing to gain
    assert kept == "True"
    assert faults < pages / 20


HOLES = """
from topfive.allocator import give_back_free_memory, keep_large_buffers

def resident():
    return int(open("/proc/self/statm").read().split()[1])

keep_large_buffers()
buffers = [bytearray(b"x" * (1 << 20)) for _ in range(65)]
del buffers[:64]  # the last stands at the heap's end, in the way of what glibc would give back by itself
held = resident()
give_back_free_memory()
print(held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_free_below_something_in_use_is_given_back() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    output = subprocess.run(
        [sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert int(output) > (60 << 20) // 4096


def test_the_environment_s_own_settings_stay() -> None:
    kept, _ = run("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
