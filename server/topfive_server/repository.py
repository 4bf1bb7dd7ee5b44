"""The model repository: which models and versions are there, and is each one whole?

Layout (docs/architecture.md; Triton's): `<root>/<name>/<version>/model.onnx`, `report.json` beside it. Versions are
positive integers; the highest is the default. Names and versions come from clients and from URLs, so they are matched
against a pattern before any path is made of them: nothing outside the repository is ever touched.

Only headers are read here (`onnx_header`): listing a repository of ten models takes milliseconds.
"""

import enum
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from topfive.errors import TopfiveError
from topfive.model_spec import ModelSpec, ModelSpecError
from topfive_server.onnx_header import (
    FLOAT,
    INT64,
    UINT8,
    OnnxHeader,
    OnnxHeaderError,
    TensorInfo,
    read_header,
)

METADATA_KEY: Final = "topfive"
"""Key of `metadata_props` whose value is the model's description (`ModelSpec.to_json`)."""
MODEL_FILE: Final = "model.onnx"
REPORT_FILE: Final = "report.json"

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
_OUTPUTS: Final = {"probabilities": FLOAT, "classes": INT64, "scores": FLOAT}


class RepositoryError(TopfiveError):
    """A repository that cannot be served; the message is a sentence for the operator."""


class UnknownModelError(RepositoryError):
    """No such model or version; the message is a sentence for the client."""


class BrokenModelError(RepositoryError):
    """The version is there, but half-copied, corrupt, or not a model of ours; the message says which."""

    name = version = ""
    """Which version it is: folder names; set by `Repository`."""


class GraphKind(enum.Enum):
    """What a graph takes; told from the shape of its input, not from its name."""

    HOT = "hot"
    """uint8 [N, crop, crop, 3]: what the server runs, behind `topfive.preprocessing.decode`."""
    VIEWS = "views"
    """uint8 [N, short_side, short_side, 3]: averages ten views inside."""
    WHOLE = "whole"
    """uint8 [N, H, W, 3] of any size: resize and crop inside, for use without topfive."""


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of one model, described by its file."""

    name: str
    version: str
    path: Path
    """The ONNX file."""
    kind: GraphKind
    spec: ModelSpec
    features: int | None
    """Length of the `features` output, or None where the graph has none."""
    report: dict[str, Any] = field(default_factory=dict)
    """`report.json`: what export verified, and the limits; empty where there is none."""

    @property
    def input_side(self) -> int | None:
        """Side of the square that the graph takes, in pixels; None for any size."""
        preprocessing = self.spec.preprocessing
        return {
            GraphKind.HOT: preprocessing.crop,
            GraphKind.VIEWS: preprocessing.short_side,
            GraphKind.WHOLE: None,
        }[self.kind]

    @property
    def graph(self) -> str:
        """Folder of the graph in the repository, e.g. `alexnet_int8`, where `name` is its family's."""
        return self.path.parent.parent.name

    @property
    def precision(self) -> str:
        """`fp32`, `fp16` or `int8`, as its report says; `fp32` where it says nothing."""
        return str(self.variant.get("precision", "fp32"))

    @property
    def variant(self) -> dict[str, Any]:
        """The report's `variant`; empty where there is none."""
        return _part(self.report, "variant")

    @property
    def verified(self) -> bool:
        """Whether its report says that export verified it, and which file that was (`fingerprint` compares)."""
        return self.report.get("passed") is True and isinstance(self._verified_sha256, str)

    @property
    def _verified_sha256(self) -> Any:
        return _part(self.report, "file").get("sha256")

    def fingerprint(self) -> str:
        """SHA-256 of the model's files and its preprocessing: equal fingerprints give equal answers.

        Reads all of them, which takes half a second for 244 MB, unless they were read before and have not changed.

        Raises:
            BrokenModelError: a file cannot be read, or the graph is not the one that its report is about.
        """
        try:
            return self._hash()
        except OSError as error:
            raise BrokenModelError(f"{self.path} cannot be read: {error.strerror}") from error

    def _hash(self) -> str:
        digest = hashlib.sha256(repr(self.spec.preprocessing).encode())
        # External weights, where there are any, lie beside the graph.
        for path in sorted(p for p in self.path.parent.iterdir() if p.is_file() and p.name != REPORT_FILE):
            stat = path.stat()
            content = _sha256(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if path == self.path and self._verified_sha256 not in {None, content.hex()}:
                raise BrokenModelError(
                    f"{path} is not the file that its {REPORT_FILE} is about (another SHA-256), so nothing has been "
                    f"verified of it; copy or export it again, or remove {REPORT_FILE} to have it served unverified"
                )
            digest.update(f"\0{path.name}\0".encode())
            digest.update(content)
        return digest.hexdigest()


def _part(report: dict[str, Any], key: str) -> dict[str, Any]:
    part = report.get(key)
    return part if isinstance(part, dict) else {}


@lru_cache(maxsize=256)
def _sha256(path: Path, *_identity: int) -> bytes:
    """Of a file's content, read once for each of its identities: several devices open the same file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class Repository:
    """A folder of models. Nothing is kept in memory: every call looks at the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Names of the models that have at least one version, sorted.

        Raises:
            RepositoryError: the folder is missing or cannot be read.
        """
        try:
            folders = [p.name for p in self.root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
        except OSError as error:
            raise RepositoryError(
                f"the model repository {self.root} cannot be read ({error.strerror}); "
                "give the folder that `topfive export --out` wrote"
            ) from error
        return sorted(name for name in folders if self.versions(name))

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest (lowest) first; empty when there is no such model.

        A folder counts as a version once it holds `model.onnx`, whole or not.

        Raises:
            RepositoryError: the model's folder cannot be read.
        """
        if not _NAME.fullmatch(name):
            return []
        try:
            found = [
                p.name
                for p in (self.root / name).iterdir()
                if _VERSION.fullmatch(p.name) and (p / MODEL_FILE).is_file()
            ]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RepositoryError(
                f"the model folder {error.filename or self.root / name} cannot be read ({error.strerror}); "
                "check its permissions"
            ) from error
        return oldest_first(found)

    def read(self, name: str, version: str | None = None) -> ModelVersion:
        """Read and validate one version's description; the newest when `version` is None.

        Raises:
            UnknownModelError: no such model or version.
            BrokenModelError: it is there, but cannot be served.
        """
        known = self.versions(name)
        if not known:
            raise UnknownModelError(f"there is no model {shorten(name)}")
        if version is None:
            version = known[-1]
        elif version not in known:
            raise UnknownModelError(
                f"model {name} has no version {shorten(version)}; it has {', '.join(known)}"
            )
        try:
            return _read_version(name, version, self.root / name / version / MODEL_FILE)
        except BrokenModelError as error:
            error.name, error.version = name, version
            raise

    def read_all(self) -> tuple[list[ModelVersion], list[BrokenModelError]]:
        """Every version of every model that can be served, and why each other one cannot.

        Raises:
            RepositoryError: the folder is missing, cannot be read, or holds no model at all.
        """
        good: list[ModelVersion] = []
        broken: list[BrokenModelError] = []
        names = self.names()
        if not names:
            raise RepositoryError(
                f"the model repository {self.root} holds no model "
                f"(looked for <name>/<version>/{MODEL_FILE}); run `topfive export` to make one"
            )
        for name in names:
            for version in self.versions(name):
                try:
                    good.append(self.read(name, version))
                except BrokenModelError as error:
                    broken.append(error)
                except UnknownModelError:  # removed while we looked
                    continue
        return good, broken


def oldest_first(versions: Iterable[str]) -> list[str]:
    """Versions of a model in their order, which is that of the numbers: the last is the newest."""
    return sorted(versions, key=int)


def shorten(text: str, limit: int = 80) -> str:
    """`text` quoted and printable, cut to `limit` characters: for names that strangers sent."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _read_version(name: str, version: str, path: Path) -> ModelVersion:
    where = f"{name}/{version}/{MODEL_FILE}"
    try:
        header = read_header(path)
    except OnnxHeaderError as error:
        raise BrokenModelError(f"{where} {error}") from error
    except OSError as error:
        raise BrokenModelError(f"{where} cannot be read: {error.strerror}") from error
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise BrokenModelError(
            f"{where} has no {METADATA_KEY!r} metadata, so its classes and preprocessing are unknown; "
            "export it with `topfive export`"
        )
    try:
        spec = ModelSpec.from_json(text, source=f"{where} metadata")
    except ModelSpecError as error:
        raise BrokenModelError(str(error)) from error
    kind = _graph_kind(where, header, spec)
    features = _check_outputs(where, header, spec)
    report = _read_report(f"{name}/{version}/{REPORT_FILE}", path.with_name(REPORT_FILE))
    return ModelVersion(
        name=name, version=version, path=path, kind=kind, spec=spec, features=features, report=report
    )


def _graph_kind(where: str, header: OnnxHeader, spec: ModelSpec) -> GraphKind:
    image = {tensor.name: tensor for tensor in header.inputs}.get("image")
    crop, short_side = spec.preprocessing.crop, spec.preprocessing.short_side
    if len(header.inputs) == 1 and image is not None and image.element_type == UINT8:
        match image.shape:
            case (_, int(height), int(width), 3) if height == width == crop:
                return GraphKind.HOT
            case (_, int(height), int(width), 3) if height == width == short_side:
                return GraphKind.VIEWS
            case (_, str(), str(), 3):
                return GraphKind.WHOLE
    found = ", ".join(_describe(tensor) for tensor in header.inputs) or "no input"
    raise BrokenModelError(
        f"{where} takes {found}; it must take `image` uint8 [N, {crop}, {crop}, 3] (its own crop), "
        f"[N, {short_side}, {short_side}, 3] for ten views, or [N, H, W, 3] of any size"
    )


def _check_outputs(where: str, header: OnnxHeader, spec: ModelSpec) -> int | None:
    """Length of `features`; raises where the outputs are not those of the contract."""
    outputs = {tensor.name: tensor for tensor in header.outputs}
    for name, element_type in _OUTPUTS.items():
        tensor = outputs.get(name)
        if tensor is None or tensor.element_type != element_type:
            found = ", ".join(_describe(t) for t in header.outputs) or "no output"
            raise BrokenModelError(
                f"{where} gives {found}; it must give probabilities float32 [N,T], classes int64 [N,T] "
                "and scores float32 [N,C]"
            )
    match outputs["scores"].shape:
        case (_, int(classes)) if classes != spec.architecture.classes:
            raise BrokenModelError(
                f"{where} gives scores for {classes} classes, but its own description names "
                f"{spec.architecture.classes}"
            )
    match outputs["features"].shape if "features" in outputs else None:
        case (_, int(length)):
            return length
    return None


def _describe(tensor: TensorInfo) -> str:
    kinds = {UINT8: "uint8", FLOAT: "float32", INT64: "int64"}
    kind = kinds.get(tensor.element_type, f"type {tensor.element_type}")
    dims = ", ".join(str(d) or "?" for d in tensor.shape) if tensor.shape is not None else "..."
    return f"`{tensor.name}` {kind} [{dims}]"


def _read_report(where: str, path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BrokenModelError(f"{where} cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise BrokenModelError(f"{where} is not a JSON object")
    return report
