"""`topfive doctor`: what is installed, what is missing, how to get it."""

import importlib
import importlib.metadata
import json
import platform
import re
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from topfive._version import __version__

DEVICES = "topfive_server.devices:describe"
"""The server's own findings: a list of (name, ok, detail, fix)."""
OLDEST_PYTHON = (3, 11)
EXTRAS = {
    "training": "topfive train, evaluate, prepare, import, report",
    "imagenet": "topfive prepare with ILSVRC-2012's archives",
    "export": "topfive export",
    "server": "topfive serve",
    "scoring": "topfive score",
    "triton": "a Triton server as the engine",
    "plot": "topfive load-test --plot",
    "telemetry": "topfive serve --traces",
    "cuda": "topfive serve on a GPU where CUDA is not installed system-wide",
}
"""What each optional part is for."""
_PROBES = {
    "training": ("torch", "safetensors", "matplotlib"),
    "export": ("onnx", "onnxscript"),
    "server": ("onnxruntime", "fastapi", "uvicorn"),
    "scoring": ("onnxruntime", "pyarrow"),
    "triton": ("tritonclient.grpc",),
}
"""Modules with compiled code that may be installed and yet not load."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Literal["ok", "missing", "broken"]
    """`missing` is an optional part that is not there; `broken` is one that is and does not work."""
    detail: str
    fix: str = ""
    """What to do about it, or empty."""


def doctor(*, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> int:
    """Say what is installed, what is missing and how to get it.

    Exit status: 0 what is installed works, 1 something is broken. A part that is not installed is not broken.

    Args:
        as_json: print one JSON object with all findings instead of a table.
    """
    findings = examine()
    broken = any(finding.status == "broken" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not broken, "findings": [asdict(f) for f in findings]}, indent=2))  # noqa: T201
    else:
        _print_table(findings)
    return 1 if broken else 0


def examine() -> list[Finding]:
    """All findings, the base first."""
    findings = [_python(), Finding(name="topfive", status="ok", detail=__version__), _pillow()]
    findings += [_extra(extra) for extra in EXTRAS]
    findings += _twin_runtimes()
    if any(f.name == "server" and f.status == "ok" for f in findings):
        findings += _devices()
    return findings


def _python() -> Finding:
    detail = f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()}) at {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding(name="python", status="broken", detail=detail, fix=f"Use Python {oldest} or newer.")
    return Finding(name="python", status="ok", detail=detail)


def _pillow() -> Finding:
    from PIL import __version__ as version  # noqa: PLC0415
    from PIL import features  # noqa: PLC0415

    codecs = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp", "TIFF": "libtiff"}
    missing = [name for name, feature in codecs.items() if not features.check(feature)]
    turbo = features.version_feature("libjpeg_turbo")
    detail = f"{version}, {f'libjpeg-turbo {turbo}' if turbo else 'without libjpeg-turbo (slow JPEG)'}"
    if missing:
        detail += f", cannot read {', '.join(missing)}"
        return Finding(
            name="pillow", status="broken", detail=detail, fix="pip install --force-reinstall pillow"
        )
    return Finding(name="pillow", status="ok", detail=detail)


def _extra(extra: str) -> Finding:
    versions, missing = _distributions("topfive", extra)
    install = f"pip install 'topfive[{extra}]'"
    if missing:
        detail = f"{', '.join(missing)} not installed; for {EXTRAS[extra]}"
        return Finding(name=extra, status="missing", detail=detail, fix=install)
    for module in _PROBES.get(extra, ()):
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  a broken library fails in any way it likes; that is the finding
            detail = f"{module} is installed but does not load: {type(error).__name__}: {error}"
            return Finding(name=extra, status="broken", detail=detail, fix=f"{install} --force-reinstall")
    return Finding(name=extra, status="ok", detail=", ".join(f"{n} {v}" for n, v in versions.items()))


def _distributions(name: str, extra: str) -> tuple[dict[str, str], list[str]]:
    """What `name[extra]` asks for: versions of what is installed, and the names of what is not."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    for requirement in importlib.metadata.requires(name) or []:
        spec, _, marker = requirement.partition(";")
        if f"extra == '{extra}'" not in marker.replace('"', "'"):
            continue
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?", spec.strip())
        if match is None:
            continue
        try:
            versions[match[1]] = importlib.metadata.version(match[1])
        except importlib.metadata.PackageNotFoundError:
            missing.append(match[1])
            continue
        for nested in filter(None, (part.strip() for part in (match[2] or "").split(","))):
            nested_versions, nested_missing = _distributions(match[1], nested)
            versions |= nested_versions
            missing += nested_missing
    return versions, missing


def _twin_runtimes() -> list[Finding]:
    installed = [n for n in ("onnxruntime", "onnxruntime-gpu") if _is_installed(n)]
    if len(installed) < 2:
        return []
    detail = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'topfive[server]'"
    return [Finding(name="onnxruntime", status="broken", detail=detail, fix=fix)]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _devices() -> list[Finding]:
    module, _, function = DEVICES.partition(":")
    try:
        checks = getattr(importlib.import_module(module), function)()
    except Exception as error:  # noqa: BLE001  a doctor reports what it runs into
        return [Finding(name="devices", status="broken", detail=f"{type(error).__name__}: {error}")]
    return [
        Finding(name=name, status="ok" if ok else "broken", detail=detail, fix=fix)
        for name, ok, detail, fix in checks
    ]


def _print_table(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    styles = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False)
    for column in ("part", "state", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        detail = Text(finding.detail)
        if finding.fix:
            detail.append(f"\n{finding.fix}", style="cyan")
        table.add_row(finding.name, Text(finding.status, styles[finding.status]), detail)
    console.print(table)
