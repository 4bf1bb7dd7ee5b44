"""BentoML with adaptive batching: a batchable API takes lists of files, and each request brings a list of one."""

from pathlib import Path
from typing import Any

import bentoml
from benchmarks.servers.common import MAX_BATCH, Classifier, Decoder, workers


@bentoml.service(workers=workers(), traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Service:
    """One service: decoding and inference."""

    def __init__(self) -> None:
        self._decoder, self._classifier = Decoder(), Classifier()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def classify(self, images: list[Path]) -> list[dict[str, Any]]:
        """The files of one batch, which BentoML has written to disk."""
        return self._classifier.classify(self._decoder.decode_all([path.read_bytes() for path in images]))
