"""mosec: either two stages (decoding processes, then batches in one session), or one stage that does both.

With several workers (`COMPARE_WORKERS`) each is a process with a session of its own and both steps in it, so no pixels
travel between processes.
"""

import os
from typing import Any

import numpy as np
from benchmarks.servers.common import MAX_BATCH, Classifier, Decoder, port, threads, workers
from mosec import Server, Worker
from numpy.typing import NDArray

WAIT_MS = 2
"""From the first image of a batch; it delays a lone one by as much."""


class Decode(Worker):
    """First stage: bytes in, pixels out."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = Decoder()

    def deserialize(self, data: bytes) -> bytes:
        """The body is the image."""
        return data

    def forward(self, data: bytes) -> NDArray[np.uint8]:
        """One image."""
        return self._decoder.decode(data)


class Infer(Worker):
    """Second stage: pixels in, answers out."""

    def __init__(self) -> None:
        super().__init__()
        self._classifier = Classifier()

    def forward(self, data: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """One batch."""
        return self._classifier.classify(data)


class Both(Infer):
    """The only stage."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = Decoder()

    def deserialize(self, data: bytes) -> bytes:
        """The body is the image."""
        return data

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        """One batch."""
        return super().forward(self._decoder.decode_all(data))


def main() -> None:
    """Serve."""
    server = Server()
    if workers() == 1:
        server.append_worker(Decode, num=threads())
        server.append_worker(Infer, num=1, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    else:
        server.append_worker(Both, num=workers(), max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    server.run()


if __name__ == "__main__":
    # mosec is configured by its command line and environment.
    os.environ |= {"MOSEC_PORT": str(port()), "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_LOG_LEVEL": "warning"}
    main()
