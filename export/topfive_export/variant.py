"""Which graph is made of a checkpoint, for what, and how closely it must agree with the network it came from."""

import dataclasses
from typing import Any, ClassVar, Final, Literal, TypeAlias

from topfive.errors import TopfiveError

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Target: TypeAlias = Literal["cpu", "cuda"]
Views: TypeAlias = Literal[1, 10]
Graph: TypeAlias = Literal["hot", "image"]


class ExportError(TopfiveError):
    """An export that cannot be done or must not be published."""


class OptionError(ExportError):
    """An option's value that is not allowed, or a combination of options that makes no sense."""

    exit_code: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a graph's answers may be from the torch network's; `None`: not limited, only reported.

    Two answers are *decided* where the reference leads by more than the graph is allowed to be off; only those can
    disagree in earnest. The other images are near-ties: counted and reported, compared by their probabilities alone.
    """

    probability_difference: float | None
    """Largest difference of any class's probability on any image."""
    relative_difference: float
    """Difference of the log-probabilities as a share of what they vary by from image to image (root mean square over
    classes), on the worst image. It measures a network that is unsure of everything as strictly as a sure one."""
    features_difference: float
    """Largest difference of a feature, as a share of the largest feature."""
    top1_agreement: float
    """Share of images with the same first answer, among the decided ones if `near_ties_excused`, else among all."""
    top5_agreement: float
    """Share of images with the same set of first five, counted likewise."""
    near_ties_excused: bool
    """Whether near-ties are left out of both shares."""
    accuracy_drop: float
    """By how much top-1 and top-5 accuracy may fall below the reference's, on labelled images."""


LIMITS: Final[dict[tuple[Graph, Precision], Limits]] = {
    ("hot", "fp32"): Limits(
        probability_difference=1e-4,
        relative_difference=0.001,
        features_difference=1e-4,
        top1_agreement=1.0,
        top5_agreement=1.0,
        near_ties_excused=True,
        accuracy_drop=0.002,
    ),
    # The resize inside the graph is off Pillow's by one grey level at one pixel in a thousand.
    ("image", "fp32"): Limits(
        probability_difference=0.02,
        relative_difference=0.05,
        features_difference=0.02,
        top1_agreement=1.0,
        top5_agreement=1.0,
        near_ties_excused=True,
        accuracy_drop=0.005,
    ),
    ("hot", "fp16"): Limits(
        probability_difference=0.02,
        relative_difference=0.05,
        features_difference=0.02,
        top1_agreement=1.0,
        top5_agreement=1.0,
        near_ties_excused=True,
        accuracy_drop=0.005,
    ),
    # Between what quantisation costs trained networks and what broken ones do: both are in docs/export.md. The relative
    # difference is of little use here: it is largest where the network is surest, in classes that it gives next to none.
    ("hot", "int8"): Limits(
        probability_difference=0.1,
        relative_difference=1.0,
        features_difference=0.4,
        top1_agreement=0.95,
        top5_agreement=0.75,
        near_ties_excused=False,
        accuracy_drop=0.02,
    ),
}

FP32_LIMITS: Final = LIMITS["hot", "fp32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One graph of a family: all variants of one version number hold the same weights."""

    graph: Graph = "hot"
    """`hot` takes the decoded square; `image` takes pixels of any size and resizes inside."""
    precision: Precision = "fp32"
    target: Target = "cpu"
    """`cpu`: response norm as a banded convolution; `cuda`: as the operator that has a kernel there."""
    views: Views = 1
    """Views of an image that are averaged: the central one, or corners, centre and their mirror images."""

    def __post_init__(self) -> None:
        """Reject what would be slower than its plainer sibling or cannot be verified."""
        if self.precision == "fp16" and self.target == "cpu":
            raise OptionError(
                "precision fp16 is for --target cuda: processors compute in fp32 and would only convert back and forth"
            )
        if self.precision == "int8" and self.target == "cuda":
            raise OptionError(
                "precision int8 is for --target cpu: ONNX Runtime's CUDA provider has no int8 convolutions and would "
                "copy every layer to the processor; use fp16 there"
            )
        if self.graph == "image" and (self.precision != "fp32" or self.target != "cpu" or self.views != 1):
            raise OptionError("the whole graph (with resize and crop inside) exists in fp32, one view, only")

    def model_name(self, family: str) -> str:
        """The folder in the repository, e.g. `alexnet`, `alexnet_image`, `alexnet_int8`, `alexnet_views10_fp16`."""
        parts = [family]
        if self.graph == "image":
            parts.append("image")
        if self.views != 1:
            parts.append(f"views{self.views}")
        if self.precision != "fp32":
            parts.append(self.precision)
        elif self.target == "cuda":
            parts.append("cuda")
        return "_".join(parts)

    @property
    def limits(self) -> Limits:
        """What the gate holds it to."""
        return LIMITS[self.graph, self.precision]

    def as_json(self, family: str) -> dict[str, Any]:
        """As `report.json` and the ONNX metadata carry it."""
        return {"family": family, **dataclasses.asdict(self)}
