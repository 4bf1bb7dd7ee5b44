"""Settings of different parts that only work when they agree."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from topfive._settings import DEFAULT_URL
from topfive_server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]


def test_client_asks_where_the_server_listens() -> None:
    url = urlsplit(DEFAULT_URL)
    assert (url.hostname, url.port) == (ServerConfig().host, ServerConfig().port)


def test_image_exposes_the_port_that_it_serves_and_checks() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    ports = re.findall(r"(?:EXPOSE |TOPFIVE_SERVE_PORT=|'127.0.0.1', |-p )(\d+)", text)
    assert len(ports) >= 4
    assert len(set(ports)) == 1


def test_compose_and_kubernetes_run_the_image_that_the_dockerfile_builds() -> None:
    (built,) = set(re.findall(r"docker build -t (\S+) \.", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    for name in ("compose.yaml", "kubernetes.yaml"):
        text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
        assert re.findall(r"^ +image: ([^\s:]+)", text, re.MULTILINE) == [built], name


def test_containers_are_given_longer_than_the_server_takes_to_drain() -> None:
    drain_s = ServerConfig().drain_delay_s + ServerConfig().drain_timeout_s
    compose = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    kubernetes = (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
    (grace,) = re.findall(r"stop_grace_period: (\d+)s", compose)
    (period,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", kubernetes)
    assert drain_s < int(grace)
    assert drain_s < int(period)
