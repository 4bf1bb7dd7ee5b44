"""What the server tells Prometheus; docs/operating.md lists every name, and a test compares the two."""

import platform
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from topfive._version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Steps of about 1.5 where latencies lie, so that a quantile read from them is off by a fifth at most; the last is the
# default deadline.
_SECONDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 30, 60),
)
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class Metrics:
    """Every metric of one server, in a registry of its own; also the batcher's observer, one per model."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asked for
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        r = self.registry
        self.requests = Counter(
            "topfive_requests",
            "Requests answered, by route, status and error code (`ok` without one).",
            ["route", "status", "code"],
            registry=r,
        )
        self.request_seconds = Histogram(
            "topfive_request_seconds",
            "From the request's headers to its answer, by outcome (`ok`, `refused`, `client` or `server`).",
            ["route", "outcome"],
            buckets=_SECONDS,
            registry=r,
        )
        self.received_bytes = Counter(
            "topfive_received_bytes", "Bytes of request bodies, as sent.", registry=r
        )
        self.images = Counter(
            "topfive_images",
            "Images answered, by model, version and outcome (`ok` or an error code).",
            ["model", "version", "outcome"],
            registry=r,
        )
        self.decode_seconds = Histogram(
            "topfive_decode_seconds",
            "Decoding one image, waiting for a decode thread included; also of those that failed or were dropped.",
            buckets=_SECONDS,
            registry=r,
        )
        self.queue_seconds = Histogram(
            "topfive_queue_seconds",
            "A decoded image's wait for the engine and for its batch, answered or dropped.",
            buckets=_SECONDS,
            registry=r,
        )
        self.inference_seconds = Histogram(
            "topfive_inference_seconds",
            "One batch in the engine.",
            ["model", "version"],
            buckets=_SECONDS,
            registry=r,
        )
        self.batch_images = Histogram(
            "topfive_batch_images", "Images in a batch.", ["model", "version"], buckets=_BATCHES, registry=r
        )
        self.dropped = Counter(
            "topfive_dropped_images",
            "Images dropped before the stage named, because their client had left or their deadline had passed.",
            ["stage", "reason"],
            registry=r,
        )
        # From 0 on: `increase()` does not see the first of a series that was not there before.
        for stage in ("decode", "engine"):
            for reason in ("client-gone", "deadline"):
                self.dropped.labels(stage, reason)
        self.engine_failures = Counter(
            "topfive_engine_failures",
            "Batches that the engine failed, by kind.",
            ["model", "version", "kind"],
            registry=r,
        )
        self.engine_rebuilds = Counter(
            "topfive_engine_rebuilds",
            "Engines rebuilt after they died or hung, by result.",
            ["model", "version", "result"],
            registry=r,
        )
        self.reloads = Counter(
            "topfive_reloads",
            "Model versions taken into service, removed, refused or rolled back (and why) while running.",
            ["result"],
            registry=r,
        )
        self.worker_restarts = Counter(
            "topfive_worker_restarts",
            "Attempts to start a server process again that had ended, by result.",
            ["result"],
            registry=r,
        )
        build = Gauge(
            "topfive_build_info", "Always 1; the labels tell the version.", ["version", "python"], registry=r
        )
        build.labels(__version__, platform.python_version()).set(1)

    def add_gauges(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Read values at the time of the scrape instead of keeping them up to date."""
        self.registry.register(_AtScrape(collect))

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def image_ended(self, decode_s: float | None, queue_s: float | None) -> None:
        """An image's request has ended; None for what the image never came to."""
        if decode_s is not None:
            self.decode_seconds.observe(decode_s)
        if queue_s is not None:
            self.queue_seconds.observe(queue_s)

    def observer(self, model: str, version: str) -> "ModelObserver":
        """The batcher's observer for one model version."""
        return ModelObserver(self, model, version)


class ModelObserver:
    """Counts one model version's batches; implements `batcher.Observer`."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics = metrics
        self._labels = (model, version)
        self._batch_images = metrics.batch_images.labels(model, version)
        self._inference_seconds = metrics.inference_seconds.labels(model, version)
        self._ok = metrics.images.labels(model, version, "ok")
        for kind in ("error", "out-of-memory", "dead", "hung"):  # from 0 on, as above
            metrics.engine_failures.labels(model, version, kind)
        for result in ("ok", "failed"):
            metrics.engine_rebuilds.labels(model, version, result)

    def batch_done(self, size: int, seconds: float) -> None:
        """A batch came back from the engine."""
        self._batch_images.observe(size)
        self._inference_seconds.observe(seconds)

    def batch_failed(self, kind: str) -> None:
        """The engine failed a batch."""
        self._metrics.engine_failures.labels(*self._labels, kind).inc()

    def dropped(self, stage: str, reason: str) -> None:
        """An image was dropped before a stage."""
        self._metrics.dropped.labels(stage, reason).inc()

    def rebuilt(self, result: str) -> None:
        """The engine was rebuilt: `ok` or `failed`."""
        self._metrics.engine_rebuilds.labels(*self._labels, result).inc()

    def image_ok(self) -> None:
        """An image was answered with labels."""
        self._ok.inc()

    def image_failed(self, code: str) -> None:
        """An image was answered with an error."""
        self._metrics.images.labels(*self._labels, code).inc()


class _AtScrape(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    """A gauge with one value."""
    return GaugeMetricFamily(name, help_, value=value)
