"""Several devices behind one queue: an engine for each, and every batch goes to the one with the least to do."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from topfive_server.engine import Decode, DecodingEngine, Predictions
from topfive_server.lanes import Images


class ManyEngines:
    """Engines of the same model on different devices, as one. The failure of one is the failure of all.

    A GPU that died takes the process's CUDA context with it more often than not, so nothing is gained by going on
    with the others; the owner rebuilds them together.
    """

    def __init__(self, engines: Sequence[DecodingEngine]) -> None:
        """`engines`: at least one."""
        first = engines[0].info
        self.info = replace(
            first,
            device=",".join(engine.info.device for engine in engines),
            max_batch=min(engine.info.max_batch for engine in engines),
            parallel=sum(engine.info.parallel for engine in engines),
        )
        self._engines = engines
        self._in_flight = [0] * len(engines)

    async def predict(self, images: Images) -> Predictions:
        """See `Engine.predict`."""
        index = self._least_busy()
        self._in_flight[index] += 1
        try:
            return await self._engines[index].predict(images)
        finally:
            self._in_flight[index] -= 1

    def predict_lone(self, decode: Decode) -> Future[Predictions | None]:
        """See `DecodingEngine.predict_lone`."""
        index, loop = self._least_busy(), asyncio.get_running_loop()
        running = self._engines[index].predict_lone(decode)
        self._in_flight[index] += 1
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._landed, index))
        return running

    async def warm_up(self) -> None:
        """Warm up one device after the other, so that their timings do not disturb each other."""
        for engine in self._engines:
            await engine.warm_up()

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _landed(self, index: int) -> None:
        self._in_flight[index] -= 1

    def _least_busy(self) -> int:
        return min(range(len(self._engines)), key=self._in_flight.__getitem__)
