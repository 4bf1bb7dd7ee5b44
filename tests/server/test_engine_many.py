"""Several engines behind one queue."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.server.fakes import FakeEngine, make_info, picture, pixels
from tests.server.harness import eventually, serving

from topfive_server.engine import Engine, EngineDead
from topfive_server.many_engines import ManyEngines


def make(count: int) -> list[FakeEngine]:
    return [
        FakeEngine(replace(make_info(), device=f"cuda:{index}", max_batch=8 - index))
        for index in range(count)
    ]


def test_batches_go_to_the_engine_with_the_least_to_do() -> None:
    async def run() -> None:
        engines = make(3)
        many: Engine = ManyEngines(engines)
        assert (many.info.device, many.info.max_batch, many.info.parallel) == ("cuda:0,cuda:1,cuda:2", 6, 3)
        await many.warm_up()
        assert all(engine.warmed for engine in engines)
        for engine in engines:
            engine.gate.clear()
        tasks = [asyncio.create_task(many.predict([pixels(red)])) for red in range(6)]
        await asyncio.sleep(0)
        assert [engine.seen for engine in engines] == [[0, 3], [1, 4], [2, 5]]
        for engine in engines:
            engine.gate.set()
        assert [int((await task).classes_BT[0, 0]) for task in tasks] == list(range(6))
        await many.predict([pixels(9)])
        assert engines[0].seen == [0, 3, 9]
        await many.close()
        assert all(engine.closed for engine in engines)

    asyncio.run(run())


def test_a_dead_engine_is_reported() -> None:
    async def run() -> None:
        engines = make(2)
        engines[0].dead = True
        with pytest.raises(EngineDead):
            await ManyEngines(engines).predict([pixels(1)])

    asyncio.run(run())


def test_a_lone_image_counts_until_it_is_answered() -> None:
    async def run() -> None:
        engines = make(2)
        many = ManyEngines(engines)
        engines[0].gate.clear()
        lone = asyncio.wrap_future(many.predict_lone(lambda: pixels(1)))
        await many.predict([pixels(2)])
        assert engines[1].seen == [2]  # the first has the lone image
        engines[0].gate.set()
        await lone
        await asyncio.sleep(0.01)
        for red in (3, 4):
            await asyncio.wrap_future(many.predict_lone(lambda red=red: pixels(red)))  # type: ignore[misc]
            await asyncio.sleep(0.01)
        assert engines[0].seen == [1, 3, 4]

    asyncio.run(run())


def test_the_batcher_keeps_all_of_them_busy() -> None:
    engines = make(2)
    many = ManyEngines(engines)

    class Both(FakeEngine):
        predict = staticmethod(many.predict)
        predict_lone = staticmethod(many.predict_lone)

    with serving(Both(many.info), max_delay_ms=0) as server:
        for engine in engines:
            engine.batches.clear()
            server.on_loop(engine.gate.clear)
        with ThreadPoolExecutor(2) as clients:
            try:
                # One after the other: two that arrive in the same moment are rightly one batch, for one engine.
                replies = [clients.submit(server.classify, picture(1))]
                eventually(lambda: any(engine.seen for engine in engines))
                replies.append(clients.submit(server.classify, picture(2)))
                eventually(lambda: all(engine.seen for engine in engines))
            finally:
                for engine in engines:
                    server.on_loop(engine.gate.set)
            assert sorted(reply.result().classes[0] for reply in replies) == [1, 2]
