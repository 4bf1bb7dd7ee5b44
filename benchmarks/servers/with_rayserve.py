"""Ray Serve with its batching decorator: one replica, decoding and inference in a thread."""

import asyncio
from typing import Any

import ray
from benchmarks.servers.common import MAX_BATCH, Classifier, Decoder, port, threads
from ray import serve
from starlette.requests import Request

BATCH_WAIT_S = 0.002


@serve.deployment(num_replicas=1, max_ongoing_requests=128)
class Service:
    """The deployment."""

    def __init__(self) -> None:
        self._decoder, self._classifier = Decoder(), Classifier()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def classify(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """One batch."""
        return await asyncio.to_thread(lambda: self._classifier.classify(self._decoder.decode_all(bodies)))

    async def __call__(self, request: Request) -> Any:
        """One request."""
        return await self.classify(await request.body())


if __name__ == "__main__":
    ray.init(num_cpus=threads(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port()})
    serve.run(Service.bind(), blocking=True)  # type: ignore[attr-defined]  # the decorator made it a deployment
