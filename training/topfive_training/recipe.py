"""The recipe: every decision of a training run but where its data is and which machine does it.

`RECIPES["2012"]` is what the original *code* did (cuda-convnet as released by the Computer History Museum, run 145),
which is not everywhere what the paper says; each field names its source. `RECIPES["modern"]` trains the same layers
with what has been learned since.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, get_args, get_origin, get_type_hints

from topfive.errors import TopfiveError
from topfive.model_spec import Architecture, ArchitectureName, Json

_LAYERS: Final = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


class RecipeError(TopfiveError, ValueError):
    """A recipe field that is unknown or out of range; the message is a sentence naming field, value and way out."""

    exit_code: ClassVar[int] = 2


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise RecipeError(f"{field} is {value!r}; it must be {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every decision of a training run; the defaults are the `2012` recipe."""

    # The network
    architecture: ArchitectureName = "alexnet-2012"
    """`alexnet-2012` (the paper's two towers), `alexnet-2014` (one tower, torchvision's shapes), or one of Caffe's."""
    width: float = 1.0
    """Factor on the channels of every layer but the last."""
    dropout: float = 0.5
    """Probability of dropping a unit in fc6 and fc7 (paper section 4.2)."""
    dropout_scaling: Literal["evaluation", "training"] = "evaluation"
    """The code leaves training unscaled and multiplies by (1 - p) at `evaluation`; `training` is inverted dropout."""
    normalization: Literal["lrn", "batch", "none"] = "lrn"
    """Response norm within each tower, alpha divided by the window's size (code); batch norm; or none."""
    within_map_norm: bool = True
    """After conv2's response norm another one over 5x5 windows of each map: `cnorm2` of the code (`layers-145.cfg`), which
    the paper does not mention. Goes with alexnet-2012 and `lrn`, and is off without them."""
    overlapping_pooling: bool = True
    """3x3 windows with stride 2 (paper section 3.4), or 2x2 with stride 2."""

    # What the network sees
    short_side: int = 256
    """Shorter side of the stored squares, in pixels (paper section 2)."""
    crop: int = 227
    """Side of the crop, in pixels. The paper says 224; the code's sizes round up, which is 227 without padding."""
    mean: Literal["image", "channel", "none"] = "image"
    """What is subtracted from 0-255 pixels: the training images' mean image (paper section 2), their mean colour."""
    std: Literal["none", "channel"] = "none"
    """What pixels are divided by: nothing (code), or each channel's standard deviation over the training images."""

    # Initial weights
    initialization: Literal["fixed", "he"] = "fixed"
    """Gaussians of the fixed deviations below (code), or He et al. 2015 with zero biases."""
    std_early: float = 0.01
    """Standard deviation of conv1 and conv2's initial weights (code and paper)."""
    std_late: float = 0.03
    """Standard deviation of conv3, conv4 and conv5's initial weights (code; the paper says .01)."""
    std_fully_connected: float = 0.01
    """Standard deviation of fc6, fc7 and fc8's initial weights (code and paper)."""
    bias: float = 1.0
    """Initial bias of conv2, conv4, conv5, fc6 and fc7 (paper section 5); the others start at 0."""
    std_follows_width: bool = True
    """Enlarge the deviations as the fan-in shrinks below the published network's, so that signals keep their size."""

    # Augmentation
    flip: bool = True
    """Mirror half of the crops (paper section 4.1)."""
    images_per_crop: int = 32
    """How many images of a batch share one draw of crop and flip: 32 in the code, 1 in the paper."""
    color_noise: float = 0.1
    """Standard deviation of the noise along the colours' principal components, in units of each component's standard
    deviation (code; paper section 4.1 multiplies by the eigenvalue, which is no length on the 0-255 scale)."""
    label_smoothing: float = 0.0
    """Probability mass that is spread over all classes (Szegedy et al. 2016)."""

    # Optimisation
    epochs: int = 91
    """Passes over the training images (code; the paper says roughly 90)."""
    batch_size: int = 128
    """Images per step, over all ranks together (paper section 5). With `modern` a larger one raises the rate, unless that
    is given too."""
    rate: float = 0.01
    """Learning rate of the weights at its highest (paper section 5)."""
    bias_rate_factor: float = 2.0
    """Biases learn at this multiple of the rate (code: .02 against .01)."""
    bias_rate_drops: bool = False
    """With `run-145`: whether the biases' rate drops with the weights', as the paper's one rate for all does, or stays until
    their layer is frozen (code: `layer-params-145.cfg` ends with epsB .02 beside epsW 1e-5)."""
    layer_rates: str = ""
    """Factors on the rates of layers, as `conv=0.1,fc8=2`: a layer, or the start of several names; 0 freezes. Empty in
    2012. A frozen layer's batch norm keeps gathering statistics."""
    momentum: float = 0.9
    """Factor on the velocity (paper section 5)."""
    rate_inside_velocity: bool = True
    """v = momentum v - rate (decay w + g); w += v (paper section 5, code), or torch's v = momentum v + g; w -= rate v."""
    weight_decay: float = 0.0005
    """Decay of the weights (paper section 5)."""
    decay_biases: bool = False
    """Whether biases (and batch norm's parameters) decay too; not in the code."""
    schedule: Literal["run-145", "cosine", "constant"] = "run-145"
    """`run-145` (code): weights' rate x1, x.1 at epoch 25, x.01 at 51, conv1 x.001 and colour noise off at 67, conv1 frozen
    at 72, x.001 at 79, stop at 91, all scaled to `epochs`. `cosine`: to zero after a linear warm-up."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly from zero; 0 in 2012."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the layers on a GPU; `bf16` keeps weights and softmax in fp32. A CPU always computes in fp32."""
    seed: int = 0
    """Fixes initial weights, order, crops, noise and dropout."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        for name, hint in get_type_hints(Recipe).items():
            if get_origin(hint) is Literal:
                value = getattr(self, name)
                _require(value in get_args(hint), name, value, " or ".join(map(str, get_args(hint))))
        limits: dict[str, tuple[float, float]] = {
            "width": (0.01, 16),
            "short_side": (32, 4096),
            "std_early": (0, 10),
            "std_late": (0, 10),
            "std_fully_connected": (0, 10),
            "bias": (-10, 10),
            "images_per_crop": (1, 1_000_000),
            "color_noise": (0, 10),
            "epochs": (1, 100_000),
            "batch_size": (1, 1_000_000),
            "rate": (0, 1000),
            "bias_rate_factor": (0, 1000),
            "weight_decay": (0, 1),
            "warmup_epochs": (0, self.epochs),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            _require(low <= value <= high, name, value, f"between {low:g} and {high:,.10g}")
        _parse_layer_rates(self.layer_rates)
        for name in ("dropout", "momentum", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "at least 0 and below 1")
        _require(
            not self.within_map_norm or self._may_normalize_within(),
            "within_map_norm",
            self.within_map_norm,
            f"false with {self.architecture} and normalization {self.normalization}; it goes with alexnet-2012 and lrn",
        )
        low, high = (195, 230) if self.architecture == "alexnet-2014" else (196, 227)
        _require(
            low <= self.crop <= high, "crop", self.crop, f"between {low} and {high} for {self.architecture}"
        )
        _require(self.crop <= self.short_side, "crop", self.crop, f"at most short_side ({self.short_side})")

    def _may_normalize_within(self) -> bool:
        return self.architecture == "alexnet-2012" and self.normalization == "lrn"

    def layer_rate(self, layer: str) -> float:
        """The factor on the rate of `layer`, such as `conv1`; the last entry that fits counts."""
        factor = 1.0
        for start, value in _parse_layer_rates(self.layer_rates):
            if layer.startswith(start):
                factor = value
        return factor

    def network(self, classes: int) -> Architecture:
        """The network that this recipe trains."""
        return Architecture(
            name=self.architecture,
            classes=classes,
            width=self.width,
            dropout=self.dropout,
            dropout_scaling=self.dropout_scaling,
            normalization=self.normalization,
            within_map_norm=self.within_map_norm,
            overlapping_pooling=self.overlapping_pooling,
        )

    def to_json(self) -> dict[str, Json]:
        """Field by field, for `model.json`."""
        return dataclasses.asdict(self)


def _parse_layer_rates(text: str) -> list[tuple[str, float]]:
    pairs = []
    for entry in filter(None, text.replace(" ", "").split(",")):
        layer, equals, number = entry.partition("=")
        known = bool(layer) and any(name.startswith(layer) for name in _LAYERS)
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        allowed = (
            f"like conv1=0,fc=0.1, of the layers {', '.join(_LAYERS)}, each with a factor between 0 and 1000"
        )
        _require(known and bool(equals) and 0 <= factor <= 1000, "layer_rates", text, allowed)
        pairs.append((layer, factor))
    return pairs


RECIPES: Final[Mapping[str, Recipe]] = {
    "2012": Recipe(),
    "modern": Recipe(
        dropout_scaling="training",
        normalization="batch",
        within_map_norm=False,
        mean="channel",
        std="channel",
        initialization="he",
        images_per_crop=1,
        label_smoothing=0.1,
        epochs=30,
        batch_size=256,
        rate=0.02,
        bias_rate_factor=1.0,
        bias_rate_drops=True,
        rate_inside_velocity=False,
        schedule="cosine",
        warmup_epochs=2.0,
        precision="bf16",
    ),
}
"""By name, for `topfive train --recipe`."""


def field_documentation() -> dict[str, str]:
    """What each field means, on one line: the text under it in `Recipe`."""
    (recipe,) = ast.parse(inspect.getsource(Recipe)).body
    assert isinstance(recipe, ast.ClassDef)
    texts = {}
    for field, text in itertools.pairwise(recipe.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr)
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


_PUBLISHED_2014: Final[Mapping[str, Any]] = {
    "normalization": "none",
    "dropout_scaling": "training",
    "crop": 224,
}


def make_recipe(name: str, overrides: Mapping[str, object]) -> Recipe:
    """The named recipe with fields changed; text values, as a command line gives them, are parsed.

    Choosing `architecture=alexnet-2014` brings that network's normalisation, dropout and crop, unless given too; another
    architecture or normalisation than that of 2012 is without its norm within maps. `modern` raises its rate with a
    larger batch, unless the rate is given too.

    Raises:
        RecipeError: an unknown recipe or field (with the nearest name), or a value out of range.
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe is {name!r}; it must be {' or '.join(RECIPES)}")
    hints = get_type_hints(Recipe)
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        field = key.replace("-", "_")
        if field not in hints:
            close = difflib.get_close_matches(field, hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; the fields are {', '.join(hints)}"
            raise RecipeError(f"{field} is no field of a recipe{hint}")
        changes[field] = _parse(field, hints[field], value)
    base = RECIPES[name]
    if changes.get("architecture") == "alexnet-2014":
        changes = {k: v for k, v in _PUBLISHED_2014.items() if getattr(base, k) != "batch"} | changes
    network = {name: changes.get(name, getattr(base, name)) for name in ("architecture", "normalization")}
    if network != {"architecture": "alexnet-2012", "normalization": "lrn"}:
        changes.setdefault("within_map_norm", False)
    if name == "modern" and "batch_size" in changes and "rate" not in changes:
        # So many times the images, so many times the rate, after a warm-up (Goyal et al. 2017). Smaller batches are for
        # little data, of which there are few steps: they keep the rate.
        changes["rate"] = base.rate * max(1, changes["batch_size"] / base.batch_size)
    if "epochs" in changes and "warmup_epochs" not in changes:
        changes["warmup_epochs"] = min(base.warmup_epochs, changes["epochs"] / 4)
    return dataclasses.replace(base, **changes)


_BEFORE: Final[Mapping[str, Json]] = {"within_map_norm": False, "bias_rate_drops": True}
"""What was done before there was a field for it; where no field is named here, its default."""


def recorded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's record, with what a program that did not know them all yet did."""
    return {**_BEFORE, **fields}


def _parse(field: str, hint: Any, value: object) -> object:
    """Turn `value`, perhaps text, into what the field's annotation says."""
    if get_origin(hint) is Literal or hint is str:
        return value
    if hint is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        _require(str(value).lower() in words, field, value, "true or false")
        return words[str(value).lower()]
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    _require(math.isfinite(number), field, value, "a number")
    if hint is int:
        _require(number.is_integer(), field, value, "a whole number")
        return int(number)
    return number
