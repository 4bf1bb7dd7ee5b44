"""An engine that computes several batches at a time, as a fleet does, is kept busy."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.server.fakes import FakeEngine, make_info, picture
from tests.server.harness import eventually, serving


@pytest.mark.parametrize("parallel", [1, 3])
def test_as_many_batches_compute_as_the_engine_can(parallel: int) -> None:
    engine = FakeEngine(replace(make_info(), parallel=parallel))
    with serving(engine, max_delay_ms=0) as server, ThreadPoolExecutor(5) as clients:
        server.hold()
        replies = []
        for red in range(5):
            replies.append(clients.submit(server.classify, picture(red)))
            eventually(lambda: len(engine.seen) + server.model.batcher.depth == len(replies))
        assert len(engine.batches) == parallel
        server.release()
        assert [reply.result().classes for reply in replies] == [[red] for red in range(5)]
