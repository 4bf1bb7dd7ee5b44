"""Several devices behind one queue: an engine for each, and every batch goes to the one with the least to do."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from topfive_server.engine import Engine, Predictions
from topfive_server.lanes import Images


class ManyEngines:
    """Engines of the same model on different devices, as one. The failure of one is the failure of all.

    A GPU that died takes the process's CUDA context with it more often than not, so nothing is gained by going on
    with the others; the owner rebuilds them together.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
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
        index = min(range(len(self._engines)), key=self._in_flight.__getitem__)
        self._in_flight[index] += 1
        try:
            return await self._engines[index].predict(images)
        finally:
            self._in_flight[index] -= 1

    async def warm_up(self) -> None:
        """Warm up one device after the other, so that their timings do not disturb each other."""
        for engine in self._engines:
            await engine.warm_up()

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.gather(*(engine.close() for engine in self._engines))
