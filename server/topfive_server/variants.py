"""Which graph of a family is served: the fastest that passed its limits and suits the device.

`topfive export` writes one model per precision and target (`alexnet`, `alexnet_int8`, `alexnet_fp16`, ...). They form
a family: under one version number all hold the same weights. Clients know the family's name; which graph answers is
the server's business, and it says so.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from topfive._processor import int8_saturates
from topfive_server.devices import Device
from topfive_server.repository import REPORT_FILE, GraphKind, ModelVersion, RepositoryError

Wanted: TypeAlias = Literal["auto", "fp32", "fp16", "int8", "all"]

_ORDER: Final[dict[str, tuple[str, ...]]] = {
    # Measured (design notes, section 4): on a CPU int8 is twice as fast; a CPU computes fp16 by converting.
    "cpu": ("int8 cpu", "fp32 cpu", "fp32 cuda", "fp16 cuda"),
    # Band normalisation is for CPUs; int8 graphs do not run on the CUDA provider, and with TensorRT neither: it takes
    # symmetric int8 only, and ours have uint8 activations with a zero point (and passed their limits on a CPU).
    "cuda": ("fp16 cuda", "fp32 cuda", "fp32 cpu"),
}
"""Graphs that run on a device, fastest first."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One version of one family, and the graph that answers for it."""

    version: ModelVersion
    """Named as clients name it: the family (ten-view graphs: `<family>_views10`)."""
    graph: str
    """Folder of the graph in the repository, e.g. `alexnet_int8`."""
    reason: str
    """Why this graph, for the log; `/v1/models` tells which one it is and whether it was verified."""


class Refused(NamedTuple):
    """A version that cannot be served, and why."""

    name: str
    version: str
    reason: str


class Chosen(NamedTuple):
    """What `choose` found, sorted by name, then oldest version first."""

    choices: list[Choice]
    refused: list[Refused]


def choose(versions: Iterable[ModelVersion], device: Device, wanted: Wanted = "auto") -> Chosen:
    """For every family and version number the graph to serve, or why there is none.

    `wanted` names a precision instead, or `all`: every graph under its own folder's name. Graphs that take images of
    any size are passed over: they are for use without topfive.
    """
    servable = [version for version in versions if version.kind is not GraphKind.WHOLE]
    choices: list[Choice] = []
    refused: list[Refused] = []
    if wanted == "all":
        choices = [Choice(version=v, graph=v.name, reason="all graphs are served") for v in servable]
    else:
        families: dict[tuple[str, str], list[ModelVersion]] = defaultdict(list)
        for version in servable:
            families[served_name(version), version.version].append(version)
        for (name, number), group in families.items():
            try:
                choices.append(_choose_one(name, group, device, wanted))
            except RepositoryError as error:
                refused.append(Refused(name, number, str(error)))
    return Chosen(
        sorted(choices, key=lambda choice: (choice.version.name, int(choice.version.version))),
        sorted(refused, key=lambda row: (row.name, int(row.version))),
    )


def served_name(version: ModelVersion) -> str:
    """Name under which clients know this graph: its family's, or its folder's where the report names no family."""
    family = version.variant.get("family")
    if not isinstance(family, str) or not version.name.startswith(family):
        return version.name
    return family if version.kind is GraphKind.HOT else f"{family}_views{version.variant.get('views', 10)}"


def _choose_one(name: str, group: Sequence[ModelVersion], device: Device, wanted: Wanted) -> Choice:
    order = _ORDER[device.kind]
    suited = [v for v in group if v.report.get("passed", True) is True and _kind(v) in order]
    if wanted != "auto":
        suited = [v for v in suited if v.precision == wanted]
    if not suited:
        raise RepositoryError(_why_none(name, group, device, wanted))
    # Exact ones first: an int8 graph that saturates here is not the one that was verified, however fast it is.
    best = min(suited, key=lambda v: (not v.verified, _saturates(v), order.index(_kind(v))))
    others = ", ".join(v.name for v in group if v is not best) or "no other"
    return Choice(
        version=dataclasses.replace(best, name=name),
        graph=best.name,
        reason=f"{_kind(best)}: {_why(best, suited, device, wanted)} (beside {others})",
    )


def _why(best: ModelVersion, suited: Sequence[ModelVersion], device: Device, wanted: Wanted) -> str:
    if wanted != "auto":
        why = f"{wanted} was asked for"
    elif best.verified:
        why = f"the fastest kind for {device.kind} that passed its limits"
    else:
        why = f"the fastest kind for {device.kind}"
    if not best.verified:
        why += f"; unverified: no {REPORT_FILE} says that this file passed its limits"
    if any(_saturates(v) for v in suited):
        int8 = "it saturates" if _saturates(best) else "int8 was passed over, which saturates"
        why += f"; {int8} on this processor without int8 dot products"
    return why


def _why_none(name: str, group: Sequence[ModelVersion], device: Device, wanted: Wanted) -> str:
    there = ", ".join(sorted(f"{v.name} ({_kind(v)})" for v in group))
    what, way_out = "graph", f"export one with --target {device.kind}"
    if wanted != "auto":
        what = f"{wanted} graph"
        way_out = "serve with --variant auto"
        if any(kind.startswith(wanted) for kind in _ORDER[device.kind]):
            way_out = f"export one with --precision {wanted}, {way_out}"
    return (
        f"{name} version {group[0].version} has no {what} for {device} that passed its limits; it has {there}; "
        f"{way_out}, or remove that version's folders"
    )


def _kind(version: ModelVersion) -> str:
    return f"{version.precision} {version.variant.get('target', 'cpu')}"


def _saturates(version: ModelVersion) -> bool:
    return version.precision == "int8" and int8_saturates(version.report)
