"""API keys: who may ask. The file holds hashes only, and comparing takes the same time for every key.

A key is any long random text (`openssl rand -hex 32`). Its line in the file is its SHA-256 in hexadecimal and a name:

    printf %s "$KEY" | sha256sum | sed 's/-$/alice/' >> keys.txt

Keys are random, not chosen by people, so a plain hash is enough: there is no dictionary to try.
"""

import hashlib
import hmac
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from topfive.errors import TopfiveError
from topfive_server.errors import UnauthorizedError

_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+(\S.*))?")


class KeyFileError(TopfiveError):
    """The file of API keys cannot be used."""


class CertificateError(TopfiveError):
    """The server cannot present its certificate; the message says why."""


class KeyRing:
    """The hashes of the keys that open the server, and whose they are."""

    def __init__(self, names: dict[bytes, str]) -> None:
        """`names`: SHA-256 of a key -> its name."""
        self._names = names

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of lines `<sha256 in hexadecimal> <name>`; empty lines and lines with # are skipped.

        Raises:
            KeyFileError: it cannot be read, a line is malformed, or it holds no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise KeyFileError(f"the file of API keys {path} cannot be read: {reason}") from error
        names = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise KeyFileError(
                    f"{path} line {number} is not a key: it must be 64 hexadecimal digits (the key's SHA-256) and a name"
                )
            names[bytes.fromhex(match[1])] = match[2] or f"line {number}"
        if not names:
            raise KeyFileError(f"{path} holds no API key, so nobody could ask anything")
        return cls(names)

    def name_of(self, headers: Mapping[bytes, bytes]) -> str:
        """The name of the key that the request carries, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Raises:
            UnauthorizedError: it carries none, or one that is not known.
        """
        key = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            key = token.strip()
        if not key:
            raise UnauthorizedError("send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        digest = hashlib.sha256(key).digest()
        # Every digest is compared, so that the time says nothing of which one matched.
        found = [name for known, name in self._names.items() if hmac.compare_digest(digest, known)]
        if not found:
            raise UnauthorizedError(
                "the key that was sent is not one of this server's; ask its operator for one"
            )
        return found[0]


def check_certificate(certificate: Path, key: Path) -> None:
    """See that a server can use the pair, before anything else is done.

    Raises:
        CertificateError: a file cannot be read, is no PEM, has a password, or the two do not belong together.
    """
    for option, path in (("--tls-certificate", certificate), ("--tls-key", key)):
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise CertificateError(f"{option} {path} cannot be read: {error.strerror}") from error
    try:
        # Asked for a password, OpenSSL would read it from the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise CertificateError(
            f"--tls-certificate {certificate} and --tls-key {key} cannot be used ({error}); they must be a certificate "
            "and its key, without a password, in PEM"
        ) from error
