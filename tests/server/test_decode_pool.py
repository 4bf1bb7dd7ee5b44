import asyncio
import os
import sys
import threading

import pytest

from topfive_server.decode_pool import DecodePool


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_decoding_yields_to_the_engine_and_the_loop() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def run() -> tuple[int, int]:
        pool = DecodePool(threads=1, max_pixels=1_000_000)
        try:
            return niceness(), await pool.run(niceness)
        finally:
            pool.close()

    loop, decoding = asyncio.run(run())
    assert decoding == min(19, max(loop, 10))
