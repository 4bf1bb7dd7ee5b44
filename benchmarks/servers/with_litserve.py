"""LitServe with batching; the batch is decoded on threads in `batch`, the hook that makes a batch of requests."""

from collections.abc import Sequence
from typing import Annotated, Any

import litserve
from benchmarks.servers.common import MAX_BATCH, Classifier, Decoder, port, workers
from fastapi import Body

BATCH_TIMEOUT_S = 0.002
"""From the first request; at 0 its worker spins for want of work and takes a core from the rest."""


class Service(litserve.LitAPI):
    """The four hooks."""

    def setup(self, device: str) -> None:  # noqa: ARG002  the hook's signature
        """In the worker process."""
        self._decoder, self._classifier = Decoder(), Classifier()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        """The body is the image."""
        return request

    def batch(self, inputs: Sequence[bytes]) -> Any:
        """Decode."""
        return self._decoder.decode_all(inputs)

    def predict(self, x: Any) -> list[dict[str, Any]]:
        """Infer."""
        return self._classifier.classify(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer each."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """As it is: JSON."""
        return output


if __name__ == "__main__":
    service = Service(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S, api_path="/classify")
    server = litserve.LitServer(service, accelerator="cpu", devices=1, workers_per_device=workers())
    server.run(
        host="127.0.0.1", port=port(), log_level="warning", access_log=False, generate_client_file=False
    )
