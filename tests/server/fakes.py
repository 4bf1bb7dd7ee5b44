"""An engine whose answers can be told from the pixels, and that fails when told to; images to send it; a certificate."""

import asyncio
import io
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from topfive.model_spec import Architecture, ModelSpec, Preprocessing
from topfive_server.engine import (
    Decode,
    EngineDead,
    EngineError,
    EngineInfo,
    EngineOutOfMemory,
    Predictions,
)

CLASSES = 256
CROP = 16


def make_info(name: str = "fake", version: str = "1", max_batch: int = 8) -> EngineInfo:
    spec = ModelSpec(
        architecture=Architecture(classes=CLASSES),
        preprocessing=Preprocessing(short_side=20, crop=CROP),
        labels=tuple(f"red {value}" for value in range(CLASSES)),
    )
    return EngineInfo(
        name=name,
        version=version,
        spec=spec,
        provider="fake",
        device="cpu",
        max_batch=max_batch,
        buckets=(),
        fingerprint=f"fingerprint of {name}/{version}",
    )


@dataclass
class FakeEngine:
    """The class of an image is the red of its middle: a solid picture of red 17 is of class 17."""

    info: EngineInfo = field(default_factory=make_info)
    delay_s: float = 0.0
    guilty: set[int] = field(default_factory=set)
    """Classes of images on which the whole batch fails."""
    memory: int = 1_000_000
    """Images that fit; larger batches run out of memory."""
    shift: int = 0
    """Added to every class: what an engine does that has gone wrong."""
    dead: bool = False
    hangs: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared, it holds every batch back."""
    batches: list[list[int]] = field(default_factory=list)
    """The classes in each batch that was begun."""
    telling: bool = False
    """Probabilities differ by class, so that a row handed to the wrong image shows."""
    warmed: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def seen(self) -> list[int]:
        return [value for batch in self.batches for value in batch]

    async def predict(self, images: Sequence[NDArray[np.uint8]]) -> Predictions:
        if self.closed:
            raise EngineDead("closed")
        assert 1 <= len(images) <= self.info.max_batch
        reds = [int(image[CROP // 2, CROP // 2, 0]) for image in images]
        self.batches.append(reds)
        if self.hangs:
            await asyncio.Event().wait()
        await self.gate.wait()
        await asyncio.sleep(self.delay_s)
        if self.dead:
            raise EngineDead("the device fell off the bus")
        if len(images) > self.memory:
            raise EngineOutOfMemory(f"no room for {len(images)} images")
        if self.guilty & set(reds):
            raise EngineError("a bad image is in the batch")
        return predictions([(red + self.shift) % CLASSES for red in reds], telling=self.telling)

    def predict_lone(self, decode: Decode) -> Future[Predictions | None]:
        if self.closed:
            raise EngineDead("closed")

        async def compute() -> Predictions | None:
            image = await asyncio.to_thread(decode)
            return None if image is None else await self.predict([image])

        return asyncio.run_coroutine_threadsafe(compute(), asyncio.get_running_loop())

    async def warm_up(self) -> None:
        self.warmed = True

    async def close(self) -> None:
        self.closed = True


def probability(red: int) -> float:
    """Of an image's own class: about a half, different for each class, exact in float32."""
    return 0.5 - red / 1024


def predictions(reds: Sequence[int], *, telling: bool = False) -> Predictions:
    """A half (or `probability`) for the image's own class, half of that for the next, and so on."""
    scores_BC = np.zeros((len(reds), CLASSES), np.float32)
    for row, red in enumerate(reds):
        for rank in range(10):
            scores_BC[row, (red + rank) % CLASSES] = (probability(red) if telling else 0.5) / 2**rank
    classes_BT = np.argsort(-scores_BC, axis=1, kind="stable")[:, :5].astype(np.int64)
    return Predictions(np.take_along_axis(scores_BC, classes_BT, axis=1), classes_BT, scores_BC)


def picture(red: int, *, size: tuple[int, int] = (24, 20), form: str = "PNG") -> bytes:
    """An image file of class `red`."""
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, form)
    return file.getvalue()


def pixels(red: int) -> NDArray[np.uint8]:
    """What `picture(red)` decodes to."""
    image = np.zeros((CROP, CROP, 3), np.uint8)
    image[..., 0] = red
    return image


def make_certificate(folder: Path, name: str, *flags: str) -> tuple[Path, Path]:
    """Paths of a certificate for this machine's loopback address, and of its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *flags, "-keyout", key, "-out", certificate]
    subprocess.run([*map(str, make), *subject], check=True, capture_output=True)
    return certificate, key
