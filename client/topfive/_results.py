"""What a server answers, as frozen records."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from topfive.errors import TopfiveError


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One of the classes that the model sees in an image."""

    label: str
    """The class's name."""
    class_index: int
    """The class's position in the model's outputs, from 0."""
    probability: float
    """Between 0 and 1; over all classes of the model they add up to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """The answer for one image."""

    ok: ClassVar[Literal[True]] = True
    """Tells it from a `Failure`."""
    filename: str | None
    """The path as it was given, the name of a file object, or None for data without a name."""
    width: int
    """Width of the image as the server saw it, upright, in pixels."""
    height: int
    """Height, as `width`."""
    top: tuple[Label, ...]
    """The most probable classes, descending; `top_k` of them, fewer when the model has fewer."""
    model: str
    """Name of the model that answered."""
    version: str
    """Its version."""
    request_id: str = ""
    """Identifies the request in the server's log."""
    timing_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Milliseconds that the request spent in the server, by stage (`Server-Timing`)."""

    @property
    def best(self) -> Label:
        """The most probable class."""
        return self.top[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One image of many that could not be classified."""

    ok: ClassVar[Literal[False]] = False
    """Tells it from a `Classification`."""
    filename: str | None
    """As `Classification.filename`."""
    error: TopfiveError | OSError
    """What `classify` would have raised for this image alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that a server offers."""

    name: str
    version: str
    default: bool
    """Whether it answers when no model is asked for."""
    classes: int
    """Number of classes."""
    crop: int
    """Side of the square of pixels that the network sees."""
    fingerprint: str
    """SHA-256 of the model's files and its preprocessing: equal ones give equal answers."""
