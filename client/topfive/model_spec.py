"""What a model is, in one readable record: `ModelSpec`.

It is the file `model.json` of a checkpoint and the value of `metadata_props["topfive"]` in an exported ONNX
file. Training writes it, export copies it, the server and the client read it: classes, mean, crop and recipe
travel with the weights, so nothing about a model is ever configured twice.

Reading validates every field and fails with a sentence that names the field, what was found and what is allowed.
"""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, Union, get_args, get_origin, get_type_hints

from topfive.errors import TopfiveError

SCHEMA_VERSION = 1
"""Version of the record's layout; a reader refuses a newer one rather than guess."""

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
ArchitectureName: TypeAlias = Literal["alexnet-2012", "alexnet-2014", "alexnet-caffe", "caffenet"]


class ModelSpecError(TopfiveError, ValueError):
    """A model description that is malformed, inconsistent, or newer than this program."""


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ModelSpecError(f"{field} is {value!r}; it must be {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Every decision that fixes the shape and the arithmetic of the network."""

    name: ArchitectureName = "alexnet-2012"
    """`alexnet-2012`: the paper's two towers, as groups. `alexnet-2014`: one tower, torchvision's shapes.
    `alexnet-caffe`, `caffenet`: two towers with Caffe's response norm (across both, k = 1, after ReLU or pooling)."""
    classes: int = 1000
    """Number of classes: the length of the last layer's output."""
    width: float = 1.0
    """Factor on the channels of every layer but the last; 1.0 is the published network."""
    dropout: float = 0.5
    """Probability of dropping a unit of the fully-connected layers during training."""
    dropout_scaling: Literal["evaluation", "training"] = "evaluation"
    """Where dropout is compensated: outputs times (1 - p) at `evaluation` (2012), or inverted dropout in `training`."""
    normalization: Literal["lrn", "batch", "none"] = "lrn"
    """Response normalisation over neighbouring maps (2012), batch normalisation, or none."""
    within_map_norm: bool = False
    """`alexnet-2012` with `lrn`: normalise over 5x5 windows of each map after conv2's response norm, as the original
    *code* did (`cnorm2`) and the paper does not say."""
    overlapping_pooling: bool = True
    """Max-pooling over 3x3 windows with stride 2 (paper section 3.4), or 2x2 with stride 2."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        _require(
            self.name in get_args(ArchitectureName),
            "architecture.name",
            self.name,
            " or ".join(get_args(ArchitectureName)),
        )
        _require(
            1 <= self.classes <= 1_000_000, "architecture.classes", self.classes, "between 1 and 1,000,000"
        )
        _require(0.01 <= self.width <= 16, "architecture.width", self.width, "between 0.01 and 16")
        _require(0 <= self.dropout < 1, "architecture.dropout", self.dropout, "at least 0 and below 1")
        _require(
            not self.within_map_norm or (self.name == "alexnet-2012" and self.normalization == "lrn"),
            "architecture.within_map_norm",
            self.within_map_norm,
            "false but for alexnet-2012 with normalization lrn",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a photograph becomes the network's input (`topfive.preprocessing` does it; export fuses the arithmetic).

    Resize the shorter side to `short_side`, cut the central `crop` square, then `(x - mean) / std` per channel,
    all on the 0-255 scale of 8-bit RGB.
    """

    short_side: int = 256
    """Pixels of the shorter side before the crop."""
    crop: int = 227
    """Side of the central square that the network sees, in pixels."""
    resample: Literal["bilinear"] = "bilinear"
    """Antialiased bilinear, as `PIL.Image.Resampling.BILINEAR` computes it."""
    color_order: Literal["RGB"] = "RGB"
    """Order of the channels of the uint8 input; weights trained on BGR are permuted when they are imported."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from each channel, 0-255. With `mean_image` it is that image's average, for people to read."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Each channel is divided by this, 0-255; (1, 1, 1) in 2012."""
    mean_image: bool = False
    """Subtract a mean *image* instead (2012): `preprocessing.mean_image` f32 [3, short_side, short_side] in the weights."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        _require(1 <= self.crop <= 4096, "preprocessing.crop", self.crop, "between 1 and 4096 pixels")
        _require(
            self.crop <= self.short_side <= 4096,
            "preprocessing.short_side",
            self.short_side,
            f"between the crop ({self.crop}) and 4096 pixels",
        )
        _require(
            all(math.isfinite(v) and 0 <= v <= 255 for v in self.mean),
            "preprocessing.mean",
            self.mean,
            "within 0-255",
        )
        _require(
            all(math.isfinite(v) and 0 < v <= 255 for v in self.std),
            "preprocessing.std",
            self.std,
            "above 0, up to 255",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The whole description of a trained model; see the module docstring."""

    architecture: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    """Human-readable name of each class, in the order of the network's outputs."""
    schema_version: int = SCHEMA_VERSION
    recipe: dict[str, Json] = dataclasses.field(default_factory=dict)
    """The training recipe, field by field, as `topfive train` was told."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Measured on the validation images at the time of saving, e.g. `top1`, `top5` (fractions), `loss`, `epoch`."""
    data_fingerprint: str = ""
    """SHA-256 over the sorted names and sizes of the training files, or empty."""
    code_fingerprint: str = ""
    """Version (and git commit where known) of the program that trained it."""

    def __post_init__(self) -> None:
        """Reject an inconsistent record, naming the field."""
        _require(
            1 <= self.schema_version <= SCHEMA_VERSION,
            "schema_version",
            self.schema_version,
            f"between 1 and {SCHEMA_VERSION}; a newer file needs a newer topfive",
        )
        _require(
            len(self.labels) == self.architecture.classes,
            "labels",
            f"{len(self.labels)} names",
            f"{self.architecture.classes} names, one for each of architecture.classes",
        )
        for index, label in enumerate(self.labels):
            # splitlines knows more line ends than "\n"; labels.txt has one label on each line.
            ok = bool(label.strip()) and label.splitlines() == [label]
            _require(ok, f"labels[{index}]", label, "a non-empty single line")

    def to_json(self) -> str:
        """The record as indented JSON text, ending in a newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "model.json") -> Self:
        """Parse and validate; `source` (a path, say) begins every error sentence.

        Raises:
            ModelSpecError: not JSON, an unknown, missing or ill-typed field, or a newer schema version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelSpecError(f"{source} is not valid JSON: {error}") from error
        try:
            if isinstance(data, dict) and isinstance(version := data.get("schema_version"), int):
                # Before anything else: a newer file may well have fields that this program does not know.
                _require(
                    version <= SCHEMA_VERSION,
                    "schema_version",
                    version,
                    f"at most {SCHEMA_VERSION}; update topfive",
                )
            parsed = _parse(cls, data, "")
        except ModelSpecError as error:
            raise ModelSpecError(f"{source}: {error}") from error
        assert isinstance(parsed, cls)  # noqa: S101
        return parsed

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `model.json` from `path` (the file, or the checkpoint folder that holds it).

        Raises:
            FileNotFoundError: there is no such file.
            ModelSpecError: as `from_json`.
        """
        file = path / "model.json" if path.is_dir() else path
        return cls.from_json(file.read_text(encoding="utf-8"), source=str(file))


def _parse(kind: Any, value: Any, field: str) -> Any:
    """Turn parsed JSON into `kind` (a dataclass or an annotation), naming `field` in every complaint."""
    if dataclasses.is_dataclass(kind):
        return _parse_record(kind, value, field)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        _require(value in arguments, field, value, " or ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        _require(isinstance(value, list), field, value, "a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        _require(len(value) == len(kinds), field, value, f"a list of {len(kinds)}")
        return tuple(_parse(k, v, f"{field}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _require(isinstance(value, dict), field, value, "an object")
        for key in value:
            _require_storable(key, field)
        return {key: _parse(arguments[1], item, f"{field}.{key}") for key, item in value.items()}
    if origin in {Union, types.UnionType}:  # only Json
        _require_storable(value, field)
        return value
    if kind is float:
        _require(_is_finite_number(value), field, value, "a finite number")
        return float(value)
    if kind is int:
        _require(isinstance(value, int) and not isinstance(value, bool), field, value, "a whole number")
    elif kind is bool or kind is str:
        _require(isinstance(value, kind), field, value, "true or false" if kind is bool else "text")
        _require_storable(value, field)
    return value


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _require_storable(value: Any, field: str) -> None:
    """What Python's parser takes and no JSON file can hold: not-a-number, infinity, lone halves of surrogate pairs."""
    if isinstance(value, float):
        _require(math.isfinite(value), field, value, "a finite number")
    elif isinstance(value, str):
        _require(
            value.isascii() or value == value.encode("utf-8", "replace").decode(), field, value, "Unicode"
        )
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_storable(item, f"{field}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_storable(key, field)
            _require_storable(item, f"{field}.{key}")


def _parse_record(kind: Any, value: Any, field: str) -> Any:
    prefix = f"{field}." if field else ""
    if not isinstance(value, Mapping):
        raise ModelSpecError(f"{field or 'the record'} is {type(value).__name__}; it must be a JSON object")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ModelSpecError(f"{prefix}{name} is not a known field{hint}")
    arguments = {}
    for name, f in fields.items():
        if name in value:
            arguments[name] = _parse(hints[name], value[name], prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ModelSpecError(f"{prefix}{name} is missing")
    return kind(**arguments)
