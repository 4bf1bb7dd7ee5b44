"""Every setting of `topfive serve`: a flag, a `TOPFIVE_*` environment variable or a line of TOML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from topfive_server.devices import cores


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the server listens, what it accepts, how it batches and how it ends."""

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` serves the network, and then API keys and TLS are worth a thought."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    grpc_port: int | None = None
    """Port for Triton's gRPC protocol, 0 for a free one; none: not offered. Needs the `triton` extra."""
    processes: int = 1
    """Processes that serve; more where one event loop is the bound. Threads and queue limits are divided among them."""

    device: str = "auto"
    """What computes: `auto` (the GPUs where there are any, else the CPU), `cpu`, `cuda` (all GPUs) or `cuda:1` (one)."""
    model: str = ""
    """Name of the model that answers when a request names none; empty: the first by name, as long as it is served."""
    versions: int = 1
    """Newest versions of each model to keep in service; `?version=` picks one."""
    watch: bool = False
    """Watch the models folder and take new versions into service while running."""
    watch_interval_s: float = 2.0
    """Seconds between two looks at the models folder."""
    canary_percent: float = 0.0
    """Share of the requests that a new version gets while it is on trial; 0: a new version takes over at once."""

    max_delay_ms: float = 50.0
    """Milliseconds, counted from a batch's first image, that an idle engine waits for images arriving or being decoded."""
    decode_threads: int = 0
    """Threads that decode images; 0 takes one for each core that this process may use."""

    max_wait_ms: float = 0.0
    """Longest predicted wait behind other images; beyond it a request gets 429. 0: the time of 2.5 full batches, at least 500."""
    overload_wait_ms: float = 0.0
    """The same in an overload: when the queue keeps growing, or from the first such 429, until few are sent. 0: the time of 0.3 full batches, at least 20."""
    max_queue_images: int = 256
    """Images in flight from the moment their bytes are here until they are answered; more get 429."""
    max_queue_bytes: int = 512 * 1024 * 1024
    """Bytes of request bodies in memory; more get 429."""
    max_body_bytes: int = 32 * 1024 * 1024
    """Bytes of one request body, as sent and after decompression; more get 413."""
    max_pixels: int = 89_000_000
    """Width x height of one image, read from its header before decoding; more get 413."""
    max_images: int = 64
    """Images in one multipart request, at most `max_queue_images`; more get 413."""
    max_header_bytes: int = 64 * 1024
    """Bytes of the request line and headers, and as many of trailers; more get 431."""

    header_timeout_s: float = 10.0
    """Seconds that a connection may take for its TLS handshake, and then for a request's headers; late headers get 408, and it is closed."""
    body_timeout_s: float = 30.0
    """Seconds that a request's body may take; then 408 and the connection is closed."""
    keep_alive_s: float = 75.0
    """Seconds that an idle connection stays open after an answer."""
    request_timeout_s: float = 60.0
    """Deadline of a request that sends no `X-Timeout-Ms`; one that asks for more gets this."""
    engine_timeout_s: float = 30.0
    """Seconds after which a batch counts as hung: its images get 503, the engine is rebuilt, `/readyz` says no."""

    drain_delay_s: float = 1.0
    """Seconds after SIGTERM that new connections are still served while `/readyz` already says no."""
    drain_timeout_s: float = 30.0
    """Seconds that accepted requests are then given to finish."""

    api_keys: Path | None = None
    """File of API keys, each a line of SHA-256 in hexadecimal and a name; all but `/healthz`, `/readyz` and the pages (`/`, `/docs`) then need one."""
    admin: bool = False
    """Open the admin routes (`POST /v1/admin/reload`); needs `api_keys`."""
    tls_certificate: Path | None = None
    """PEM file of the certificate chain; with `tls_key` the server speaks HTTPS."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""

    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or text for people."""
    log_requests: bool = True
    """Write one line for each request; without, only for slow ones and statuses from 500 on. The metrics count all."""
    slow_request_ms: float = 2000.0
    """A request slower than this is logged as a warning that says where the time went."""
    traces: bool = False
    """Send OpenTelemetry traces to where `OTEL_EXPORTER_OTLP_ENDPOINT` says; needs the `telemetry` extra."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        self._within("port", 0, 65535)
        if self.grpc_port is not None:
            self._within("grpc_port", 0, 65535)
        self._within("processes", 1, 1024)
        self._within("versions", 1, 1000)
        self._within("decode_threads", 0, 4096)
        self._within("canary_percent", 0, 99)
        self._within("max_delay_ms", 0, 10_000)
        for field in ("max_wait_ms", "overload_wait_ms"):
            self._within(field, 0, 86_400_000)
        for field in ("max_queue_images", "max_images"):
            self._within(field, 1, 1_000_000)
        for field in ("max_queue_bytes", "max_body_bytes"):
            self._within(field, 1, 2**40)
        self._within("max_pixels", 20_000, 2**40)  # the test image of `/readyz` must pass
        self._within("max_header_bytes", 1024, 2**24)
        timeouts = (
            "header_timeout_s",
            "body_timeout_s",
            "keep_alive_s",
            "request_timeout_s",
            "engine_timeout_s",
        )
        for field in (*timeouts, "watch_interval_s"):
            self._within(field, 0.01, 86_400)
        for field in ("drain_delay_s", "drain_timeout_s"):
            self._within(field, 0, 3600)
        self._within("slow_request_ms", 0, 86_400_000)
        if self.max_body_bytes > self.max_queue_bytes:
            raise ValueError(
                f"max_body_bytes is {self.max_body_bytes}; it must be at most max_queue_bytes ({self.max_queue_bytes}), "
                "or the largest allowed body could never be admitted"
            )
        if self.max_images > self.max_queue_images:
            raise ValueError(
                f"max_images is {self.max_images}; it must be at most max_queue_images ({self.max_queue_images}), "
                "or the largest allowed request could never be admitted"
            )
        if self.processes > 1:
            self._room_in_each_process()
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both or neither")
        if self.admin and self.api_keys is None:
            raise ValueError("admin is true without api_keys; the admin routes open only to a key")

    def _room_in_each_process(self) -> None:
        for limit, largest in (("max_queue_images", "max_images"), ("max_queue_bytes", "max_body_bytes")):
            total, needed = getattr(self, limit), getattr(self, largest)
            if total // self.processes < needed:
                raise ValueError(
                    f"{limit} is {total}, which leaves each of the {self.processes} processes less than {largest} "
                    f"({needed}); raise {limit} to {needed * self.processes} or lower {largest}"
                )

    def _within(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(f"{field} is {value}; it must be between {low} and {high}")

    @property
    def resolved_decode_threads(self) -> int:
        """`decode_threads`, or the number of cores."""
        return self.decode_threads or cores(hyper_threads=True)
