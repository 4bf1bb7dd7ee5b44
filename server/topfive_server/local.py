"""`LocalClassifier`: a model repository as a function, without a server; for `topfive score --model`."""

import logging
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from topfive.errors import TopfiveError
from topfive_server.devices import Device, DeviceError, resolve
from topfive_server.engine import EngineError, Predictions
from topfive_server.engine_life import CLOSE_TIMEOUT_S
from topfive_server.onnx_engine import OnnxEngine
from topfive_server.repository import (
    BrokenModelError,
    GraphKind,
    ModelVersion,
    Repository,
    RepositoryError,
    UnknownModelError,
    shorten,
)
from topfive_server.session import RuntimeOptions
from topfive_server.variants import choose, served_name

log = logging.getLogger(__name__)


class LocalClassifierError(TopfiveError):
    """The model cannot be used, or failed on a batch; the message is a sentence for a person."""


class LocalClassifier:
    """Classifies decoded squares in this process. Safe from several threads; use one per process.

    Raises:
        LocalClassifierError: no such model, a broken one, or a device that cannot be used.
    """

    def __init__(
        self,
        models: Path,
        *,
        model: str | None = None,
        version: str | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Open a model, which takes a second or so.

        Args:
            models: the model repository.
            model: family or folder name; may be left out where the repository holds one family.
            version: its version; the newest by default.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            threads: CPU threads that share a batch; all cores by default.
        """
        try:
            where = resolve(device)
            chosen = _find(Repository(models), model, version, where)
            self._engine = OnnxEngine(chosen, where, RuntimeOptions(threads=threads or 0))
        except (RepositoryError, DeviceError, EngineError, OSError) as error:
            raise LocalClassifierError(str(error)) from error
        info = self._engine.info
        self.fingerprint = info.fingerprint
        self.spec = info.spec
        self.name = info.name
        self.version = info.version
        self.max_batch = info.max_batch
        self.device = info.device
        """Where it computes, e.g. `cpu` or `cuda:0`."""

    def classify_batch(
        self, squares: Sequence[Image.Image], top_k: int = 5
    ) -> list[list[tuple[str, int, float]]]:
        """For each square, in order, its `top_k` most likely classes: label, class, probability, descending.

        Args:
            squares: any number of RGB images of `crop` x `crop` pixels, from `topfive.preprocessing.decode`.
            top_k: at least 1; more than there are classes gives them all.

        Raises:
            LocalClassifierError: the engine failed on a batch, or the classifier was closed.
            ValueError: an image of another size or mode, or a `top_k` below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        images = [self._pixels(square) for square in squares]
        starts = range(0, len(images), self.max_batch)
        try:
            # All at once: while one batch computes, the next is copied.
            batches = [self._engine.submit(images[start : start + self.max_batch]) for start in starts]
            return [row for batch in batches for row in self._rows(batch.result(), top_k)]
        except EngineError as error:
            raise LocalClassifierError(str(error)) from error

    def close(self) -> None:
        """Release the device; idempotent. An engine that hangs is left to itself after 5 s."""
        if wait(self._engine.stop(), CLOSE_TIMEOUT_S).not_done:
            log.warning("the engine has not closed within %g s and is left to itself", CLOSE_TIMEOUT_S)

    def _pixels(self, square: Image.Image) -> NDArray[np.uint8]:
        crop = self.spec.preprocessing.crop
        if square.mode != "RGB" or square.size != (crop, crop):
            raise ValueError(
                f"an image is {square.mode} {square.width} x {square.height}; it must be RGB {crop} x {crop}"
            )
        return np.asarray(square, np.uint8)

    def _rows(self, predictions: Predictions, top_k: int) -> list[list[tuple[str, int, float]]]:
        probabilities, classes = predictions.probabilities_BT, predictions.classes_BT
        if top_k > classes.shape[1]:
            # More than the graph sorts out by itself. Stable, so that equal probabilities keep the order of classes.
            classes = np.argsort(-predictions.scores_BC, axis=1, kind="stable")
            probabilities = np.take_along_axis(predictions.scores_BC, classes, axis=1)
        return [
            [(self.spec.labels[i], i, p) for i, p in zip(row[:top_k], values[:top_k], strict=True)]
            for row, values in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]


def _find(repository: Repository, model: str | None, version: str | None, device: Device) -> ModelVersion:
    """The version to use, chosen among its family's graphs as the server chooses.

    Raises:
        RepositoryError: there is none, or it is broken.
    """
    good: list[ModelVersion] = []
    for name in repository.names():
        if version is not None and version not in repository.versions(name):
            continue
        try:
            good.append(repository.read(name, version))
        except BrokenModelError:
            # A newest version that is broken is not quietly replaced by an older one.
            if model is None or name.startswith(model):
                raise
    hot = [candidate for candidate in good if candidate.kind is GraphKind.HOT]
    if model is not None:
        family = [candidate for candidate in hot if served_name(candidate) == model]
        hot = family or [candidate for candidate in hot if candidate.name == model]
        if not family and hot:
            return hot[0]
    if not hot:
        asked = shorten(model) if model is not None else "model that takes decoded squares"
        raise UnknownModelError(
            f"{repository.root} holds no {asked}{f' with version {shorten(version)}' if version else ''}; "
            f"it holds {', '.join(repository.names()) or 'nothing'}"
        )
    families = sorted({served_name(candidate) for candidate in hot})
    if len(families) > 1:
        raise UnknownModelError(f"{repository.root} holds several models; name one of {', '.join(families)}")
    choices, refused = choose(hot, device)
    if not choices:
        raise UnknownModelError(refused[-1].reason)
    choice = choices[-1]
    log.info("%s version %s: %s", choice.version.name, choice.version.version, choice.reason)
    return choice.version
