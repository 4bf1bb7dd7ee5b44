"""A small server of the documented protocol, in memory and on a real socket, for the clients' tests."""

import email
import email.message
import email.policy
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
from PIL import Image, UnidentifiedImageError

Answer = tuple[int, dict[str, str], bytes]


def jpeg(width: int = 40, height: int = 30, color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """The bytes of a plain JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "JPEG")
    return buffer.getvalue()


def problem(status: int, code: str, detail: str, **members: Any) -> dict[str, Any]:
    """A problem document as docs/architecture.md describes it."""
    return {"type": f"urn:topfive:error:{code}", "title": code, "status": status, "detail": detail, **members}


def refusal(status: int, code: str, detail: str, **headers: str) -> Answer:
    """A whole answer that refuses."""
    body = json.dumps(problem(status, code, detail, request_id="r-1")).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/problem+json", **named}, body


def dict_of(headers: email.message.Message) -> dict[str, str]:
    """Header fields by their name in lower case."""
    return {name.lower(): value for name, value in headers.items()}


@dataclass
class Request:
    """What the server was asked."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    parts: list[tuple[str | None, bytes]] = field(default_factory=list)


def answer_classify(request: Request) -> Answer:
    """Labels made of the image's own bytes, so that a mix-up of images shows."""
    images: list[dict[str, Any]] = []
    for filename, data in request.parts:
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except UnidentifiedImageError:
            error = problem(415, "unsupported-format", "the data is not an image of an allowed format")
            images.append({"filename": filename, "error": error})
            continue
        top = [
            {
                "label": f"{hashlib.sha256(data).hexdigest()[:8]}-{rank}",
                "class": rank,
                "probability": 0.5 / (rank + 1),
            }
            for rank in range(int(request.query.get("top_k", 5)))
        ]
        images.append({"filename": filename, "width": width, "height": height, "top": top})
    headers = {"X-Request-ID": "r-1", "Server-Timing": "decode;dur=1.5, infer;dur=9.25"}
    if all("error" in image for image in images):
        first = images[0]["error"]
        body = {**first, "images": images} if len(images) > 1 else first
        return (
            first["status"],
            {"Content-Type": "application/problem+json", **headers},
            json.dumps(body).encode(),
        )
    body = {
        "model": request.query.get("model", "alexnet"),
        "version": request.query.get("version", "1"),
        "images": images,
    }
    return 200, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


@dataclass
class FakeServer:
    """Answers by the protocol; `script` answers come first, one per request."""

    script: list[Answer | Exception] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    delay_s: float = 0.0
    ready: bool = True
    max_images: int = 1000
    fingerprint: str = "ab" * 32
    busiest: int = 0
    url: str = "http://fake"
    _active: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        split = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        request = Request(method, split.path, query, headers, body)
        content_type = headers.get("content-type", "")
        if content_type.startswith("multipart/form-data"):
            raw = f"Content-Type: {content_type}\r\n\r\n".encode() + body
            message = email.message_from_bytes(raw, policy=email.policy.HTTP)
            for part in message.iter_parts():
                data = part.get_payload(decode=True)
                assert isinstance(data, bytes)
                request.parts.append((part.get_filename(), data))
        elif body:
            request.parts = [(None, body)]
        with self._lock:
            self.requests.append(request)
            self._active += 1
            self.busiest = max(self.busiest, self._active)
            scripted = self.script.pop(0) if self.script else None
        try:
            time.sleep(self.delay_s)
            if isinstance(scripted, Exception):
                raise scripted
            return scripted or self._route(request)
        finally:
            with self._lock:
                self._active -= 1

    def _route(self, request: Request) -> Answer:
        if request.path == "/readyz":
            return (200 if self.ready else 503), {}, b"{}"
        if request.path == "/v1/models":
            model = {"name": "alexnet", "version": "1", "default": True, "classes": 1000, "crop": 227}
            model |= {"fingerprint": self.fingerprint, "labels_url": "/x", "new": 1}
            return 200, {}, json.dumps({"models": [model]}).encode()
        if request.path != "/v1/classify":
            return refusal(404, "not-found", f"no such path: {request.path}")
        if len(request.parts) > self.max_images:
            return refusal(413, "too-many-images", f"at most {self.max_images} images in a request")
        return answer_classify(request)

    def transport(self) -> httpx2.MockTransport:
        """The server without a network."""

        def handle(request: httpx2.Request) -> httpx2.Response:
            target = request.url.raw_path.decode()
            status, headers, body = self.answer(request.method, target, request.headers, request.content)
            return httpx2.Response(status, headers=headers, content=body)

        return httpx2.MockTransport(handle)


@contextmanager
def listening(fake: FakeServer) -> Iterator[FakeServer]:
    """`fake` on a free port of the loopback interface, as `fake.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30
        wbufsize = -1  # one packet for each answer; two would wait for each other's acknowledgement

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = fake.answer(self.command, self.path, dict_of(self.headers), body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    fake.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield fake
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
