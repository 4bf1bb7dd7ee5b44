"""Servers for the clients' tests."""

import socket
from collections.abc import Iterator

import pytest
from tests.client.fake_server import FakeServer, listening


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' clients are configured by the tests."""
    for name in (
        "TOPFIVE_URL",
        "TOPFIVE_API_KEY",
        "TOPFIVE_CONFIG",
        "TOPFIVE_DEBUG",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake() -> FakeServer:
    """A server of the protocol in memory: give a client its `transport()`."""
    return FakeServer()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """The same on a free port of the loopback interface: give a client its `url`."""
    with listening(FakeServer()) as fake:
        yield fake


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
