"""How long to look: moments, the same ones every time, in `make test`; minutes, other ones each time, in `make fuzz`."""

import os
import secrets

SECONDS = int(os.environ.get("TOPFIVE_FUZZ_SECONDS", "0"))
"""Seconds for each fuzzer; 0 for the fixed number of cases that CI tries."""
SEED = int(os.environ.get("TOPFIVE_FUZZ_SEED", str(secrets.randbelow(2**31) if SECONDS else 1)))
"""Of the pseudo-random numbers. A failure names it; give it back in the same variable to see the failure again."""
