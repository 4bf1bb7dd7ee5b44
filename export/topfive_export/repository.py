"""The model repository on disk, in Triton's layout: names, versions, `config.pbtxt`, and publication in one step.

Imports neither torch nor onnx: whoever only reads a repository needs neither.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from topfive_export.variant import ExportError, OptionError, Precision, Target, Variant

CONFIG_FILE: Final = "config.pbtxt"
LABELS_FILE: Final = "labels.txt"
REPORT_FILE: Final = "report.json"
MODEL_FILE: Final = "model.onnx"
REPORT_SCHEMA: Final = 1
"""Version of the layout of `report.json`."""
MAX_NAME: Final = 100
_STAGING: Final = "-topfive-export-"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Shapes of a graph's input and outputs, without the batch; the same for all versions of a model."""

    input: tuple[int, int, int]
    """Height, width, colours; -1 where it is free."""
    top: int
    classes: int
    features: int

    def as_json(self) -> dict[str, Any]:
        """As `report.json` carries it."""
        return {
            "input": list(self.input),
            "top": self.top,
            "classes": self.classes,
            "features": self.features,
        }


def check_name(name: str) -> str:
    """A model's name, if it can be a folder and part of an address.

    Raises:
        OptionError: it cannot.
    """
    allowed = name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not allowed or not name[0].isalnum() or len(name) > MAX_NAME:
        raise OptionError(
            f"--name is {name!r}; it must be ASCII letters, digits, '-', '_' and '.', begin with a letter or digit, and "
            f"have at most {MAX_NAME} characters"
        )
    return name


def all_variants() -> list[Variant]:
    """Every variant that can be exported."""
    plain = [
        Variant(precision=precision, target=target, views=views)
        for views in (1, 10)
        for precision in get_args(Precision)
        for target in get_args(Target)
        if (precision, target) not in {("fp16", "cpu"), ("int8", "cuda")}
    ]
    return [Variant(graph="image"), *plain]


def versions(model: Path) -> list[int]:
    """Version numbers below a model's folder, ascending."""
    if not model.is_dir():
        return []
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal() and path.name[0] != "0")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_report(version: Path) -> dict[str, Any]:
    """`report.json` of one version; empty where there is none or it is not one of ours."""
    try:
        report = json.loads((version / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def choose_version(
    out: Path, family: str, wanted: Sequence[Variant], checkpoint_sha256: str, version: int | None
) -> int:
    """The number under which `wanted` are published together.

    One number means one set of weights in all variants of a family: variants of a checkpoint that is there already
    join it under its number; another checkpoint gets the next number that the whole family has free. A variant that is
    there already gets none by itself: it would be the newest version, and alone in it.

    Raises:
        ExportError: `version` is taken, or belongs to other weights; without it, the variant is there already.
    """
    names = {variant.model_name(family) for variant in all_variants()}
    owners = {
        number: str(read_report(out / name / str(number)).get("checkpoint", {}).get("sha256", ""))
        for name in sorted(names)
        for number in versions(out / name)
    }
    taken = {number for variant in wanted for number in versions(out / variant.model_name(family))}
    if version is not None:
        if version in taken:
            raise ExportError(
                f"version {version} of {wanted[-1].model_name(family)} exists in {out}; it is never overwritten: "
                "say another --version, or remove it yourself"
            )
        if owners.get(version, checkpoint_sha256) != checkpoint_sha256:
            raise ExportError(
                f"version {version} of {family} in {out} was exported from another checkpoint; one number is one set "
                "of weights in all variants: leave --version out for the next free number"
            )
        return version
    free = max(owners, default=0) + 1
    own = {number for number, owner in owners.items() if owner == checkpoint_sha256}
    if own and own <= taken:
        number = max(own)
        folders = [out / variant.model_name(family) for variant in wanted]
        # A folder without versions would be no model of ours.
        ways = [
            str(folder if versions(folder) == [number] else folder / str(number))
            for folder in folders
            if number in versions(folder)
        ]
        raise ExportError(
            f"{wanted[-1].model_name(family)} in {out} holds these weights already, as version {number}: to make it anew, "
            f"remove {' and '.join(ways)} first; to publish them once more under a new number, say --version {free}, and "
            "export their other variants again, too"
        )
    return max(own - taken, default=free)


def check_compatible(model: Path, labels: Sequence[str], interface: Interface) -> None:
    """See that a new version fits the `config.pbtxt` and `labels.txt` that all versions of `model` share.

    Raises:
        ExportError: it does not, or the folder is no model's.
    """
    if not model.exists():
        return
    existing = versions(model)
    report = read_report(model / str(existing[-1])) if existing else {}
    try:
        known = (model / LABELS_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        known = []
    if not report or not (model / CONFIG_FILE).is_file():
        raise ExportError(f"{model} is not a model that topfive exported; choose another --name or --out")
    if known != list(labels) or report.get("interface") != interface.as_json():
        raise ExportError(
            f"{model} holds versions with other classes or another image size, and all versions share one "
            f"{CONFIG_FILE} and {LABELS_FILE}; choose another --name"
        )


def config_text(name: str, interface: Interface, variant: Variant) -> str:
    """`config.pbtxt` for Triton's onnxruntime backend (model_config.proto of Triton 2.x)."""
    # Memory grows with the batch and, for the whole graph, with the pixels of an image.
    max_batch = 64 if variant.graph == "hot" and variant.views == 1 else 8
    kind = {"int8": "KIND_CPU", "fp16": "KIND_GPU", "fp32": "KIND_AUTO"}[variant.precision]
    if variant.target == "cuda":
        kind = "KIND_GPU"
    inputs = ", ".join(map(str, interface.input))
    return f"""\
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ {inputs} ] }} ]
output [
  {{ name: "probabilities" data_type: TYPE_FP32 dims: [ {interface.top} ] }},
  {{ name: "classes" data_type: TYPE_INT64 dims: [ {interface.top} ] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [ {interface.classes} ] label_filename: "{LABELS_FILE}" }},
  {{ name: "features" data_type: TYPE_FP32 dims: [ {interface.features} ] }}
]
# What has come in while the device was busy goes together; nobody waits for company.
dynamic_batching {{ }}
instance_group [ {{ count: 1 kind: {kind} }} ]
"""


class Staging:
    """Folders that are filled out of sight and appear in the repository all together, or not at all."""

    def __init__(self, folder: Path, out: Path) -> None:
        self._folder = folder
        self._out = out
        self._models: list[tuple[str, int]] = []

    def version(self, name: str, number: int) -> Path:
        """A new, empty folder for version `number` of model `name`."""
        folder = self._folder / name / str(number)
        folder.mkdir(parents=True)
        self._models.append((name, number))
        return folder

    def publish(self) -> list[Path]:
        """Move everything into its place; the last model staged appears last.

        Raises:
            ExportError: a version has been published by someone else meanwhile; nothing is.
            OSError: the disk refuses.
        """
        done: list[tuple[Path, Path]] = []
        try:
            for name, number in self._models:
                source, target = self._folder / name, self._out / name
                if target.exists():
                    source, target = source / str(number), target / str(number)
                _sync(source)
                _rename_if_free(source, target)
                done.append((target, source))
            _sync_folder(self._out)
        except BaseException:
            for target, source in reversed(done):
                target.rename(source)
            raise
        return [self._out / name / str(number) for name, number in self._models]


@contextmanager
def staged(out: Path) -> Iterator[Staging]:
    """A staging area on the repository's disk, but outside it where possible; gone afterwards, whatever happens.

    An export that is killed leaves its hidden folder behind. Triton takes every folder of a repository for a model and
    does not start with one that is none, so it had better not lie inside.
    """
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    parent = out.resolve().parent
    beside = parent.stat().st_dev == out.stat().st_dev and os.access(parent, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.resolve().name}{_STAGING}", dir=parent if beside else out))
    try:
        yield Staging(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _rename_if_free(source: Path, target: Path) -> None:
    if target.exists():
        raise ExportError(f"{target} has appeared meanwhile; run the export again")
    source.rename(target)


def _sync(folder: Path) -> None:
    """Bring files to the disk before their folder is renamed, so that a power cut leaves no half version."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
