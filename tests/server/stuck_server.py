"""`topfive serve` whose decoder never comes back from a picture of `STUCK_WIDTH`; for tests, in a process of its own."""

import sys
import threading
from typing import Any, Final

from topfive.cli import main
from topfive.preprocessing import decode
from topfive_server import decode_pool

STUCK_WIDTH: Final = 77
"""Pixels."""


def stuck_decode(data: bytes, *arguments: Any, **options: Any) -> Any:
    """As `decode`, but for those pictures."""
    decoded = decode(data, *arguments, **options)
    if decoded.width == STUCK_WIDTH:
        threading.Event().wait()
    return decoded


# Here, not below: what is spawned imports this file, too.
setattr(decode_pool, "decode", stuck_decode)  # noqa: B010

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
