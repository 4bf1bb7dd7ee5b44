"""The log: one JSON object a line, one line a request, never a byte of an image."""

import json
import logging
import random
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, Literal, TextIO

REQUESTS: Final = "topfive_server.requests"
"""Name of the logger that writes one line for each request."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, default=str)
"""`json.dumps` makes one for each call."""
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id(sent: bytes | None) -> str:
    """The client's `X-Request-ID` where it is harmless in a log and a header, else a new one."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent.decode("ascii")
    # Not a secret. The system's generator would cost a system call, in which the event loop gives the interpreter away.
    return f"{random.getrandbits(64):016x}"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: `time`, `level`, `logger`, `message`, then what was given as `extra`."""

    def __init__(self, common: Mapping[str, Any] | None = None) -> None:
        """`common` is said in every line."""
        super().__init__()
        self._common = dict(common or {})

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._common,
        }
        line.update(_fields(record))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _escaped(_ENCODER.encode(line))


class TextFormatter(logging.Formatter):
    """The same for people."""

    def __init__(self, common: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._common = dict(common or {})

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        extra = " ".join(f"{key}={value}" for key, value in {**self._common, **_fields(record)}.items())
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} {record.getMessage()}"
        lines = [f"{text}  {extra}" if extra else text]
        if record.exc_info:
            lines += self.formatException(record.exc_info).split("\n")
        return "\n".join(map(_printable, lines))


def _escaped(line: str) -> str:
    """JSON with escapes, too, for what JSON allows raw and a terminal obeys: C1 controls, changes of direction."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _printable(text: str) -> str:
    """With escapes for what would end the line or give orders to a terminal; a request's path may hold both."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra`; requests give one mapping called `fields`, which is quicker to find."""
    if (fields := record.__dict__.get("fields")) is not None:
        return dict(fields)
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def configure(
    form: Literal["json", "text"], stream: TextIO | None = None, common: Mapping[str, Any] | None = None
) -> None:
    """Send everything to one stream (stderr), in one form; `common` fields are said in every line."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(common) if form == "json" else TextFormatter(common))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("topfive_server").setLevel(logging.INFO)
    # The multipart parser warns of every malformed body; the client has been told already.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # A client that leaves while it is answered is no error of ours.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    # Neither form says them, and every record would ask for them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.raiseExceptions = False  # a closed stderr must not end a request


def _timestamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
