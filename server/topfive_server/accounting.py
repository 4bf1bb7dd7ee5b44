"""What is kept of a request that has ended, by whatever protocol it came: its place in the metrics, its line in the log."""

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Histogram

from topfive_server.config import ServerConfig
from topfive_server.logs import REQUESTS
from topfive_server.metrics import Metrics
from topfive_server.stages import Stage, slowest, stages, waits

if TYPE_CHECKING:
    from topfive_server.job import Job

requests_log = logging.getLogger(REQUESTS)

CLIENT_GONE: Final = 499
"""The status that stands for a client that left before its answer, as nginx counts it."""


class Account:
    """What the log and the metrics need to know of one request."""

    __slots__ = (
        "bytes_in",
        "client",
        "code",
        "images",
        "jobs",
        "key",
        "method",
        "model",
        "path",
        "request_id",
        "route",
        "started",
        "status",
        "timings",
        "version",
    )

    def __init__(
        self, *, request_id: str, started: float, method: str, path: str, client: str | None
    ) -> None:
        self.request_id = request_id
        self.started = started
        """On the monotonic clock."""
        self.method = method
        """As it was sent; to the routes HEAD is GET."""
        self.path = path
        self.client = client
        """Its address."""
        self.route = "other"
        """The route's path template: a bounded set, for the metrics."""
        self.status = 0
        """0 until the answer begins."""
        self.code = "ok"
        """The error's code, or `ok`."""
        self.key = ""
        """The name of the API key that it came with."""
        self.model = self.version = ""
        self.images = 0
        self.bytes_in = 0
        """Bytes of the body that have come."""
        self.jobs: list[Job] = []
        """Its images on their way, for whoever asks afterwards where the time went."""
        self.timings: dict[str, float] = {}
        """Stage -> seconds; of several images the slowest."""

    def stages(self, ended: float) -> list[Stage]:
        """Where its time went, once it has ended."""
        return stages(self.timings, self.jobs, started=self.started, ended=ended)


class Accounts:
    """Counts requests, and writes one line for each."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._known: dict[tuple[str, int, str], tuple[Counter, Histogram]] = {}

    def close(self, account: Account, *, ended: float | None = None, trace_id: str = "") -> None:
        """Keep what is to be kept of a request that has ended (now)."""
        ended = monotonic() if ended is None else ended
        seconds = ended - account.started
        status = account.status = account.status or CLIENT_GONE
        metrics, config = self._metrics, self._config
        counter, histogram = self._series(account.route, status, account.code)
        counter.inc()
        histogram.observe(seconds)
        if account.bytes_in:
            metrics.received_bytes.inc(account.bytes_in)
        received = min(account.started + account.timings.get("receive", 0.0), ended)
        for job in account.jobs:
            metrics.image_ended(*waits(job, received=received, ended=ended))
        slow = seconds * 1000 > config.slow_request_ms
        if not (config.log_requests or slow or status >= 500):
            return
        level = logging.INFO
        if slow or status > 500:  # 503 and 504 are states; 500 is a fault
            level = logging.WARNING
        elif status == 500:
            level = logging.ERROR
        if requests_log.isEnabledFor(level):
            fields = _fields(account, ended, slow=slow, trace_id=trace_id)
            # Not `log`: it walks the stack for the name of this file, which no line says.
            message = "slow request" if slow else "request"
            requests_log.handle(
                requests_log.makeRecord(
                    requests_log.name, level, "", 0, message, (), None, extra={"fields": fields}
                )
            )

    def _series(self, route: str, status: int, code: str) -> tuple[Counter, Histogram]:
        """Looked up once: finding a series by its labels takes longer than counting."""
        key = route, status, code
        if key not in self._known:
            self._known[key] = (
                self._metrics.requests.labels(route, str(status), code),
                self._metrics.request_seconds.labels(route, outcome(status)),
            )
        return self._known[key]


def outcome(status: int) -> str:
    """`ok`, `refused` (by admission), `client` (its mistake, or it left) or `server`, for latencies: few values."""
    if status < 400:
        return "ok"
    if status == 429:
        return "refused"
    return "client" if status < 500 else "server"


def _fields(account: Account, ended: float, *, slow: bool, trace_id: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request_id": account.request_id,
        "client": account.client,
        "method": account.method,
        "path": account.path[:200],
        "status": account.status,
        "code": account.code,
        "ms": round((ended - account.started) * 1000, 2),
        "bytes": account.bytes_in,
        "images": account.images,
        "model": account.model,
        "version": account.version,
    }
    if account.key:
        fields["key"] = account.key
    timings = account.timings
    if slow or account.status >= 400:
        found = account.stages(ended)
        # Of a request that failed there are no timings beyond `receive`.
        timings = {stage.name: stage.seconds for stage in found} | timings
        if account.status >= CLIENT_GONE and found:
            fields["stage"] = found[-1].name
        if slow or (account.status >= CLIENT_GONE and found):
            fields["slowest"] = slowest(found, ended=ended)
    fields |= {f"{stage}_ms": round(seconds * 1000, 2) for stage, seconds in timings.items()}
    if trace_id:
        fields["trace_id"] = trace_id
    return fields
