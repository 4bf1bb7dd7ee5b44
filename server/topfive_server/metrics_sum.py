"""One server's metrics out of those of several processes.

Counters and histograms are added up. A counter must never fall, or Prometheus takes it for a restart and counts all of
it again; so what a process had counted when it was last asked stays in the sum after its death. Of a process's own
metrics (`process_*`, `python_*`) a sum would say nothing: each keeps its own, with a label `worker`.

`prometheus_client.multiprocess` is not for this: it has neither collectors that are asked at each scrape, such as our
gauges, nor a process's own metrics.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Snapshot: TypeAlias = list[list[Any]]
"""Of each metric: name, type, help, and its samples as [name, labels, value]; goes over the wire as JSON."""
_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]

_OWN: Final = ("process_", "python_")
_LEAST: Final = frozenset({"topfive_ready"})
"""Gauges of which the smallest speaks for all."""
_EQUAL: Final = frozenset({"topfive_build_info", "topfive_model_info"})
"""Gauges that are 1 in every process, and in their sum."""


def snapshot(registry: CollectorRegistry) -> Snapshot:
    """What a process has counted so far."""
    return [
        [m.name, m.type, m.documentation, [[s.name, s.labels, s.value] for s in m.samples]]
        for m in registry.collect()
    ]


class Process(NamedTuple):
    """One process in the course of time."""

    number: int
    """Its place, in which others follow it; 0 is the parent's."""
    pid: int


class MetricsSum:
    """Adds up the snapshots of several processes, and remembers those that are gone."""

    def __init__(self) -> None:
        self._last: dict[Process, Snapshot] = {}
        self._gone: dict[int, Process] = {}
        """The last of each number that has ended."""
        self._departed: list[Snapshot] = []
        """At most one: the sum of what the dead have counted."""

    def departed(self, process: Process) -> None:
        """Keep what this process had counted when it was last asked: it has ended."""
        self._gone[process.number] = process
        last = self._last.pop(process, None)
        if last is not None:
            self._departed = [_merge([*self._departed, _counted(last)])]

    def render(self, snapshots: Mapping[Process, Snapshot], *, all_there: bool) -> bytes:
        """The exposition text; unless `all_there`, one process did not answer and nothing counts as ready.

        One that has departed between its answer and that of a slower one is in the sum already, and not there.
        """
        self._last.update({p: rows for p, rows in snapshots.items() if self._gone.get(p.number) != p})
        # Of one that does not answer, what it had counted stays; what it was like then says nothing of now.
        labelled = [
            _with_worker(process.number, rows if process in snapshots else _counted(rows))
            for process, rows in self._last.items()
        ]
        merged = _merge([*self._departed, *labelled])
        departed = any(self._gone.get(process.number) == process for process in snapshots)
        if departed or not all_there:
            for name, _, _, samples in merged:
                if name in _LEAST:
                    samples[:] = [[sample, labels, 0.0] for sample, labels, _ in samples]
        registry = CollectorRegistry()
        registry.register(_Given(merged))
        return generate_latest(registry)


def _counted(rows: Snapshot) -> Snapshot:
    return [row for row in rows if row[1] in {"counter", "histogram"} and not _own(row[0])]


def _own(name: str) -> bool:
    return name.startswith(_OWN)


def _with_worker(number: int, rows: Snapshot) -> Snapshot:
    """A process's own metrics with its number; 0 is the parent."""
    worker = {"worker": str(number)}
    return [
        [
            name,
            kind,
            text,
            [[n, {**labels, **worker}, v] for n, labels, v in samples] if _own(name) else samples,
        ]
        for name, kind, text, samples in rows
    ]


def _merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    families: dict[str, tuple[str, str, dict[_Key, float]]] = {}
    for rows in snapshots:
        for name, kind, text, samples in rows:
            _, _, values = families.setdefault(name, (kind, text, {}))
            for sample, labels, value in samples:
                key = sample, tuple(labels.items())
                values[key] = value if key not in values else _together(name, values[key], value)
    return [
        [name, kind, text, [[sample, dict(labels), value] for (sample, labels), value in values.items()]]
        for name, (kind, text, values) in families.items()
    ]


def _together(name: str, one: float, other: float) -> float:
    if name in _LEAST:
        return min(one, other)
    return max(one, other) if name in _EQUAL else one + other


class _Given(Collector):
    """Families that are there already."""

    def __init__(self, rows: Snapshot) -> None:
        self._rows = rows

    def collect(self) -> Iterable[Metric]:
        for name, kind, text, samples in self._rows:
            metric = Metric(name, text, kind)
            for sample, labels, value in samples:
                metric.add_sample(sample, labels, value)
            yield metric
