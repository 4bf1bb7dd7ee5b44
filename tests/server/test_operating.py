"""docs/operating.md and the dashboard name what the code has: settings with their defaults, statuses, metrics, routes."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from topfive_server.config import ServerConfig
from topfive_server.errors import all_errors
from topfive_server.session import RuntimeOptions

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def exported() -> dict[str, set[str]]:
    """Every metric of a running server with its labels, as the exposition names it."""
    from tests.server.fakes import picture
    from tests.server.harness import serving

    with serving() as server:
        server.classify(picture(1))
        families = list(server.on_loop(lambda: list(server.application.metrics.registry.collect())))
        # Labelled families without a sample yet do not tell their labels by samples.
        collectors = server.application.metrics
    labels: dict[str, set[str]] = {}
    for value in vars(collectors).values():
        if hasattr(value, "_labelnames"):
            suffix = "_total" if value._type == "counter" else ""
            labels[value._name + suffix] = set(value._labelnames)
    for family in families:
        if family.name.startswith("topfive_") and family.samples:
            name = family.name + ("_total" if family.type == "counter" else "")
            labels.setdefault(name, set(family.samples[0].labels) - {"le"})
    return labels


def test_every_setting_with_its_default() -> None:
    documented = {flag.strip("`"): default.strip("`") for flag, default, _ in rows("Settings")}
    real = {}
    for kind in (ServerConfig, RuntimeOptions):
        defaults = kind()
        for field in dataclasses.fields(kind):
            real[f"--{field.name.replace('_', '-')}"] = str(getattr(defaults, field.name))
    assert documented == real


def test_every_setting_means_what_its_help_says() -> None:
    # docs/cli.md has the help, by a test of its own.
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = reference.split("\n### topfive serve\n")[1].split("\n### ")[0]
    helps = dict(re.findall(r"^\* `(--[a-z0-9-]+)[^`]*`: (.*?)(?: \*\[|$)", section, re.MULTILINE))
    for flag, _, meaning in rows("Settings"):
        assert meaning == helps[flag.strip("`")], flag


def test_every_status() -> None:
    documented = {(int(status), code.strip("`")) for status, code, _ in rows("Statuses")}
    assert documented == {(kind.status, kind.code) for kind in all_errors()}


def test_every_metric_with_its_labels() -> None:
    documented = {name.strip("`"): set(re.findall(r"`(\w+)`", labels)) for name, labels, _ in rows("Metrics")}
    assert documented == exported()


def test_every_field_of_the_log() -> None:
    import inspect

    from topfive_server import accounting

    source = inspect.getsource(accounting._fields)
    section = TEXT.split("\n## The log\n")[1].split("\n## ")[0]
    fields = re.findall(r'^\s+"(\w+)": |fields\["(\w+)"\]', source, re.MULTILINE)
    assert len(fields) >= 14
    for field in map("".join, fields):
        assert f"`{field}`" in section, field


def dashboard() -> list[str]:
    record = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    return [t["expr"] for panel in record["panels"] for t in panel.get("targets", [])]


def alerts() -> list[str]:
    """The expressions of the example alerts, each a line or the folded lines after `expr: >-`."""
    text = (ROOT / "deploy" / "alerts.yaml").read_text()
    return re.findall(r"^ +expr: ((?:>-\n)?(?:.*\n(?: {10,}.*\n)*))", text, re.MULTILINE)


@pytest.mark.parametrize(("expressions", "least"), [(dashboard, 10), (alerts, 5)])
def test_dashboard_and_alerts_ask_only_for_metrics_that_exist(
    expressions: Callable[[], list[str]], least: int
) -> None:
    assert len(expressions()) >= least
    known = exported()
    for expression in expressions():
        names = re.findall(r"topfive_\w+", expression)
        assert names or re.search(r"\bup\{", expression)  # Prometheus' own
        if "topfive_request_seconds" in names or "topfive_request_seconds_bucket" in names:
            assert "outcome" in expression  # refusals are quick: with them an overload would look fast
        for name in names:
            assert re.sub(r"_(bucket|sum|count)$", "", name) in known, expression
        grouped = ",".join(re.findall(r"by \(([^)]*)\)", expression))
        selected = ",".join(re.findall(r"(\w+)(?==~?\"|!~?\")", expression))
        for label in filter(None, f"{grouped},{selected}".replace(" ", "").split(",")):
            added = {"le", "instance", "job"}  # by the histogram, and by Prometheus
            assert label in added or any(label in labels for labels in known.values()), expression
