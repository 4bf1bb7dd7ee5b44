"""What the load test prints about its points."""

import pytest
from tests.client.test_loadtest import point_at

from topfive.cli.load_test import print_report
from topfive.loadtest import LoadTestConfig, Point

PLAIN = LoadTestConfig()
SEARCH = LoadTestConfig(p99_ms=60.0)


def printed(points: list[Point], config: LoadTestConfig, capsys: pytest.CaptureFixture[str]) -> str:
    print_report(points, config)
    return capsys.readouterr().out


def test_nothing_is_cut_off_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    slow = {"p90_ms": 13_999.9, "max_ms": 19_876.5, "lag_p99_ms": 14_986.0, "answered": 99}
    out = printed([point_at(2345.6, 14_375.2, errors={"429": 143, "timeout": 40}, **slow)], PLAIN, capsys)
    assert max(map(len, out.splitlines())) <= 80
    for number in ("open 2346/s", "(14375)", "14000", "19876", "14986", "143 x 429", "40 x timeout"):
        assert number in out


def test_a_late_generator_is_told_at_the_point(capsys: pytest.CaptureFixture[str]) -> None:
    late = point_at(600, 5500.0, lag_p99_ms=4986.0, generator_cpu=0.79)
    out = printed([point_at(100, 500.0, lag_p99_ms=3.0), late], PLAIN, capsys)
    assert [("generator late" in line) for line in out.splitlines() if "open" in line] == [False, True]
    assert "the numbers are its limit as much as the server's" in " ".join(out.split())


def test_a_limit_that_is_the_generators_is_not_called_the_servers(capsys: pytest.CaptureFixture[str]) -> None:
    sound, late = point_at(150, 40.0), point_at(170, 900.0, lag_p99_ms=860.0)
    out = " ".join(printed([sound, late], SEARCH, capsys).split())
    assert "highest rate with p99 within 60 ms: at least 150.0 requests/s" in out
    assert "at 170.0/s the generator was at its own limit" in out
    out = printed([sound, point_at(170, 900.0)], SEARCH, capsys)
    assert "highest rate with p99 within 60 ms: 150.0 requests/s" in out
    assert "generator" not in out


def test_a_percentile_of_a_few_answers_is_no_fact(capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(printed([point_at(19, 27.0, answered=19), point_at(500, 900.0)], SEARCH, capsys).split())
    assert "(27.0)" in out
    assert "(900.0)" not in out
    assert "19.0 requests/s (p99 27.0 ms, of only 19 answers)" in out
    assert "--duration-s" in out
    assert "(27.0)" not in printed([point_at(19, 27.0, answered=100)], PLAIN, capsys)
