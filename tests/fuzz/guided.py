"""The coverage-guided fuzzer's process:   python -m tests.fuzz.guided TARGET [libFuzzer's options] CORPUS...

Run by `test_guided.py`; by hand with a single file instead of a corpus it replays a finding.
"""

import sys

import atheris

# The names of what is instrumented must be imported within, for the first time.
with atheris.instrument_imports(include=["PIL", "python_multipart", "topfive", "topfive_server"]):
    from tests.fuzz import targets

TARGETS = {"decode": targets.decode_one, "unpack": targets.unpack_one, "infer": targets.infer_one}


def main() -> None:
    """Never returns: libFuzzer ends the process, with a status other than 0 when something was found."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
