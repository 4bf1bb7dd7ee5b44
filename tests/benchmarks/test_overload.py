"""The judgement of the overload and memory benchmarks, and the generator that their figures rest on."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from benchmarks import memory
from benchmarks.load_generator import Generator, Phase, Record
from benchmarks.overload import judge, seconds_until_normal, untruthful_retry_after
from benchmarks.process import growth_mib_per_s


def phase(records: Sequence[Record], *, seconds: float = 10.0) -> Phase:
    return Phase(
        name="", rate=10.0, seconds=seconds, timeout_ms=0, records=records, lag_p99_ms=0.0, generator_cpu=0.0
    )


def answered(due_s: float, latency_s: float = 0.05) -> Record:
    return Record(due_s=due_s, latency_s=latency_s, status=200)


def refused(due_s: float, retry_after: str | None = "1") -> Record:
    return Record(due_s=due_s, latency_s=0.001, status=429, retry_after=retry_after)


QUIET = phase([answered(n / 10, 0.05 + 0.001 * (n % 10)) for n in range(100)])


def failed(phases: list[Phase], *, best: float = 10.0, growth: float = 0.0) -> set[str]:
    samples = [(float(second), 100.0 + growth * second) for second in range(60)]
    return {limit.name for limit in judge(phases, best, samples) if not limit.kept}


def test_a_server_that_keeps_its_word_passes() -> None:
    overload = phase([*QUIET.records, *(refused(n / 10) for n in range(100))])
    assert failed([QUIET, QUIET, overload, QUIET]) == set()


def test_each_breach_is_named() -> None:
    slow = phase([answered(n / 10, 0.2) for n in range(100)])
    p99 = {"accepted p99 at 200 % / p99 at 80 %", "the same, without the first 5 s"}
    assert failed([QUIET, QUIET, slow, QUIET]) == p99
    burst = phase([*QUIET.records, *(answered(1 + n / 10, 0.2) for n in range(3))])
    assert failed([QUIET, QUIET, burst, QUIET]) == {"accepted p99 at 200 % / p99 at 80 %"}
    assert failed([QUIET] * 4, best=12.0) == {"goodput at 200 % / best"}
    assert failed([QUIET] * 4, growth=0.1) == {"memory growth per minute at 200 %, share"}
    lost = phase([*QUIET.records, Record(due_s=1.0, latency_s=0.01, status=0)])
    assert failed([QUIET, QUIET, lost, QUIET]) == {"answers other than 200, 429 and 504"}
    late = phase([*QUIET.records, *(Record(due_s=n, latency_s=0.1, status=504) for n in range(6))])
    assert failed([QUIET, QUIET, late, QUIET]) == {"accepted and then too late (504), share"}
    assert failed([QUIET, QUIET, QUIET, slow]) == {"seconds until normal"}


def test_late_answers_count_among_the_accepted_and_refusals_do_not() -> None:
    records = [answered(0.0)] * 98 + [Record(due_s=0.0, latency_s=9.0, status=504)] * 2
    assert phase([*records, *[refused(0.0)] * 1000]).accepted_ms(0.99) == pytest.approx(9000)
    assert phase([*records, *[refused(0.0)] * 1000], seconds=2.0).goodput == 49


def test_normal_is_when_the_typical_answer_is_quick_again_and_nobody_is_refused() -> None:
    assert seconds_until_normal(QUIET, QUIET) == 0
    one_slow = phase([*QUIET.records, answered(7.01, 2.0)])
    assert seconds_until_normal(one_slow, QUIET) == 0
    slow_at_first = phase([answered(n / 10, 0.5 if n < 13 else 0.05) for n in range(100)])
    assert seconds_until_normal(slow_at_first, QUIET) == 1.5
    assert seconds_until_normal(phase([*QUIET.records, refused(3.1)]), QUIET) == 3.5


@pytest.mark.parametrize("value", [None, "0", "soon", "-1", "1.5", "60"])
def test_a_retry_after_that_no_client_could_rely_on_is_counted(value: str | None) -> None:
    during = phase([answered(0.0), refused(1.0), refused(2.0, value)])
    assert untruthful_retry_after(during, QUIET) == 1


def test_a_refusal_after_the_announced_time_makes_it_a_lie() -> None:
    during = phase([answered(0.0, 0.8), refused(1.0, "1"), refused(2.0, "2")])
    assert untruthful_retry_after(during, phase([refused(1.9)])) == 0
    assert untruthful_retry_after(during, phase([refused(2.1)])) == 1


def test_growth_is_the_slope_and_not_moved_by_a_jump() -> None:
    rising = [(float(second), 100 + 0.5 * second) for second in range(100)]
    assert growth_mib_per_s(rising) == pytest.approx(0.5)
    jumps = [(float(second), 300.0 if second == 50 else 100.0) for second in range(100)]
    assert growth_mib_per_s(jumps) == 0
    assert math.isnan(growth_mib_per_s([]))


def test_memory_fails_on_a_leak_and_on_a_peak() -> None:
    flat = [(float(second), 100.0 + second % 2) for second in range(100)]
    assert memory.judge(flat)["growth_kept"]
    assert memory.judge(flat)["peak_kept"]
    leak = [(float(second), 100 + 0.1 * second) for second in range(100)]
    assert not memory.judge(leak)["growth_kept"]
    assert not memory.judge([*flat, (100.0, 140.0)])["peak_kept"]


def test_the_mix_has_all_kinds() -> None:
    photographs = [b"\xff\xd8" + bytes(1000)]
    bodies = memory.mix(photographs)
    assert len(bodies) == 400
    assert sum(body in memory.bad_bodies(photographs[0]) for body in bodies) == 100
    starts = {body[:2] for body in bodies}
    assert {b"\xff\xd8", b"\x89P", b"RI", b"GI", b"BM", b""} <= starts


def test_the_generator_sends_on_schedule_and_records_what_came() -> None:
    """Against a real socket: every third answer a refusal, every fifth closes the connection."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append(head)
                body = await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
                assert body in {b"first", b"second image"}
                if len(seen) % 5 == 0:
                    break
                if len(seen) % 3 == 0:
                    answer = (
                        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno"
                    )
                else:
                    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
                writer.write(answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def run() -> Phase:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            generator = Generator(f"http://127.0.0.1:{port}", [b"first", b"second image"])
            result = await generator.phase("x", 200.0, 0.5, timeout_ms=123)
            generator.close()
            return result

    result = asyncio.run(run())
    count = len(result.records)
    assert count == len(seen) > 50
    assert all(b"X-Timeout-Ms: 123\r\n" in head for head in seen)
    assert result.statuses[0] == count // 5
    assert result.statuses[429] == count // 3 - count // 15
    assert {r.retry_after for r in result.records if r.status == 429} == {"7"}
    assert [r.due_s for r in result.records] == sorted(r.due_s for r in result.records)
    assert 0 < max(r.due_s for r in result.records) < 0.5
