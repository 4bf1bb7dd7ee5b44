"""API keys and TLS."""

import hashlib
import re
import ssl
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from tests.server.fakes import make_certificate, picture
from tests.server.harness import serving

import topfive
from topfive.errors import TopfiveError
from topfive_server.access import CertificateError, KeyFileError, KeyRing, check_certificate

KEY = "correct-horse-battery-staple"


def key_file(folder: Path, *lines: str) -> Path:
    path = folder / "keys.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def line(key: str, name: str = "alice") -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()}  {name}"


def test_a_key_opens_and_nothing_else_does(tmp_path: Path) -> None:
    keys = key_file(tmp_path, "# comment", "", line("other"), line(KEY))
    with serving(api_keys=keys) as server:
        for headers in (
            {"Authorization": f"Bearer {KEY}"},
            {"X-API-Key": KEY},
            {"authorization": f"bearer {KEY}"},
        ):
            assert server.request("POST", "/v1/classify", picture(1), headers).status == 200
            assert server.request("GET", "/metrics", headers=headers).status == 200
        for headers in ({}, {"X-API-Key": ""}, {"X-API-Key": KEY[:-1]}, {"Authorization": f"Basic {KEY}"}):
            for method, path in (
                ("POST", "/v1/classify"),
                ("GET", "/metrics"),
                ("GET", "/v1/models"),
                ("GET", "/x"),
            ):
                reply = server.request(method, path, headers=headers)
                assert (reply.status, reply.code) == (401, "unauthorized")
                assert reply.headers["www-authenticate"].startswith("Bearer")
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
            assert server.request("GET", path).status == 200
        assert len(server.engine.seen) == 3  # nothing was computed without a key


def test_the_file_holds_no_key_in_the_clear(tmp_path: Path) -> None:
    assert KEY not in key_file(tmp_path, line(KEY)).read_text()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["# nobody"], "holds no API key"),
        ([line(KEY), KEY], "line 2 is not a key"),
        ([line(KEY)[:-20]], "line 1 is not a key"),
    ],
)
def test_a_key_file_that_cannot_be_used_says_why(tmp_path: Path, lines: list[str], sentence: str) -> None:
    with pytest.raises(KeyFileError, match=sentence) as caught:
        KeyRing.read(key_file(tmp_path, *lines))
    assert isinstance(caught.value, TopfiveError)
    assert KEY not in str(caught.value)


def test_a_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read: No such file"):
        KeyRing.read(tmp_path / "none")


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "one", "-nodes")
    other, locked = make_certificate(tmp_path, "other", "-passout", "pass:secret")
    check_certificate(certificate, key)
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for pair, sentence in (
        ((tmp_path / "none.pem", key), f"--tls-certificate {tmp_path}/none.pem cannot be read: No such file"),
        ((certificate, tmp_path), f"--tls-key {tmp_path} cannot be read: Is a directory"),
        ((text, key), f"{text} and --tls-key {key} cannot be used"),
        ((other, key), "they must be a certificate and its key"),
        ((other, locked), "without a password"),
    ):
        with pytest.raises(CertificateError, match=re.escape(sentence)):
            check_certificate(*pair)


def test_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server", "-nodes")
    with serving(tls_certificate=certificate, tls_key=key) as server:
        trust = ssl.create_default_context(cafile=str(certificate))
        with urlopen(f"https://127.0.0.1:{server.port}/readyz", context=trust) as answer:
            assert answer.status == 200
        with server.connect() as plain:
            plain.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")


def test_a_connection_that_never_says_hello_is_closed_as_one_that_sends_no_headers(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server", "-nodes")
    tls = {"tls_certificate": certificate, "tls_key": key}
    with serving(**tls, header_timeout_s=0.2) as server, server.connect() as silent:
        assert silent.recv(1) == b""


def test_a_certificate_that_the_client_does_not_trust_is_no_missing_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_certificate(tmp_path, "server", "-nodes")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with serving(tls_certificate=certificate, tls_key=key) as server:
        url = f"https://127.0.0.1:{server.port}"
        waits: list[float] = []
        monkeypatch.setattr("topfive._client.time", SimpleNamespace(sleep=waits.append))
        with (
            topfive.Client(url) as client,
            pytest.raises(topfive.ApiConnectionError, match=r"not trusted.*SSL_CERT_FILE") as caught,
        ):
            client.models()
        assert "topfive serve" not in str(caught.value)
        assert waits == []  # it would be the same certificate
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with topfive.Client(url) as client:
            assert client.models()
