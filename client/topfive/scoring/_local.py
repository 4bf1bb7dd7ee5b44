"""Scoring with the engine in this process: threads read and decode while the engine works on the batch before."""

import importlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol, cast

from PIL import Image

from topfive.allocator import keep_large_buffers
from topfive.errors import TopfiveError
from topfive.model_spec import ModelSpec
from topfive.preprocessing import (
    CorruptImageError,
    Decoded,
    ImageError,
    ImageTooLargeError,
    UnsupportedFormatError,
    decode,
)
from topfive.scoring._answers import Answers, content_sha256
from topfive.scoring._errors import RefusedError, StoppedError
from topfive.scoring._rows import ENGINE_FAILED, Label, Outcome, failed
from topfive.scoring._scorer import Identity, run_ahead
from topfive.scoring._sources import ReadError, Source

_ENGINE: Final = "topfive_server.local"
_DEVICES: Final = "topfive_server.devices"
_STATUS: Final[dict[type[ImageError], str]] = {
    UnsupportedFormatError: "unsupported-format",
    ImageTooLargeError: "too-many-pixels",
    CorruptImageError: "corrupt-image",
}
"""The server's codes for the same errors."""


class Classifier(Protocol):
    """The engine in process: `topfive_server.local.LocalClassifier`."""

    spec: ModelSpec
    name: str
    version: str
    fingerprint: str
    max_batch: int

    def classify_batch(
        self, squares: Sequence[Image.Image], top_k: int = 5
    ) -> list[list[tuple[str, int, float]]]:
        """Label, class index and probability of the `top_k` likeliest classes of each image."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


def load_classifier(
    models: Path, *, model: str | None, version: str | None, device: str, threads: int | None
) -> Classifier:
    """Load the engine for a model repository.

    Raises:
        RefusedError: there is no such folder, or the engine cannot load this model, or not on this device.
        ModuleNotFoundError: the `scoring` extra is not installed.
    """
    if not models.is_dir():
        raise RefusedError(f"there is no model repository {models}; `topfive export` makes one")
    engine = importlib.import_module(_ENGINE)
    keep_large_buffers()
    try:
        classifier = engine.LocalClassifier(
            models, model=model, version=version, device=device, threads=threads
        )
    except TopfiveError as error:
        raise RefusedError(str(error)) from error
    return cast("Classifier", classifier)


class LocalScorer:
    """Files to outcomes with the engine in this process.

    Memory is bounded by three chunks of squares (155 kB an image at 227 x 227) and what the threads decode.
    """

    def __init__(
        self,
        classifier: Classifier,
        source: Source,
        *,
        top_k: int,
        max_pixels: int,
        decode_threads: int | None = None,
    ) -> None:
        self._classifier = classifier
        self._source = source
        self._top_k = top_k
        self._max_pixels = max_pixels
        self._threads = decode_threads or importlib.import_module(_DEVICES).cores(hyper_threads=True)

    @property
    def identity(self) -> Identity:
        """See `Scorer.identity`."""
        return Identity(
            model=self._classifier.name,
            version=self._classifier.version,
            fingerprint=self._classifier.fingerprint,
            classes=self._classifier.spec.architecture.classes,
            runs_on="this process",
        )

    @property
    def chunk_files(self) -> int:
        """The engine's largest batch."""
        return self._classifier.max_batch

    def close(self) -> None:
        """Free the engine."""
        self._classifier.close()

    def score(self, chunks: Iterable[list[str]], answers: Answers | None = None) -> Generator[list[Outcome]]:
        """See `Scorer.score`."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")

        def start(chunk: list[str]) -> list[Future[tuple[str, Decoded | Outcome]]]:
            return [pool.submit(self._decode, path, answers) for path in chunk]

        try:
            for futures in run_ahead(chunks, start, ahead=2):
                yield self._classify([future.result() for future in futures], answers)
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, path: str, answers: Answers | None) -> tuple[str, Decoded | Outcome]:
        """One file's SHA-256, empty where nobody asks, and the file decoded, its answer if known, or its failure."""
        sha256 = ""
        try:
            content = self._source.read(path)
            if answers is not None:
                sha256 = content_sha256(content)
                if known := answers.find(sha256):
                    return sha256, known
            return sha256, decode(content, self._classifier.spec.preprocessing, max_pixels=self._max_pixels)
        except ReadError as error:
            return sha256, failed(error.status, error)
        except ImageError as error:
            return sha256, failed(_STATUS[type(error)], error)
        except MemoryError:
            return sha256, failed("out-of-memory", "there was not enough memory to decode the image")

    def _classify(
        self, files: Sequence[tuple[str, Decoded | Outcome]], answers: Answers | None
    ) -> list[Outcome]:
        images = [(sha256, item) for sha256, item in files if isinstance(item, Decoded)]
        # Which of them are new is decided here, chunk after chunk: the engine's batches depend on no thread's haste.
        outcomes = iter(
            self._compute([image for _, image in images])
            if answers is None
            else answers.of(images, self._compute)
        )
        return [item if isinstance(item, Outcome) else next(outcomes) for _, item in files]

    def _compute(self, images: Sequence[Decoded]) -> list[Outcome]:
        answers = self._predict([image.image for image in images]) if images else []
        return [
            answer
            if isinstance(answer, Outcome)
            else Outcome(width=image.width, height=image.height, top=[Label(*label) for label in answer])
            for image, answer in zip(images, answers, strict=True)
        ]

    def _predict(self, squares: Sequence[Image.Image]) -> list[list[tuple[str, int, float]] | Outcome]:
        """One answer per image; a batch that fails is halved until the image that it fails on stands alone."""
        try:
            answers = self._classifier.classify_batch(squares, self._top_k)
        except Exception as error:  # noqa: BLE001  whatever one image makes an engine raise must not cost the others
            if len(squares) > 1:
                middle = len(squares) // 2
                return [*self._predict(squares[:middle]), *self._predict(squares[middle:])]
            return [failed(ENGINE_FAILED, f"the engine failed on this image: {error}")]
        if len(answers) != len(squares):
            raise StoppedError(f"the engine gave {len(answers)} answers for {len(squares)} images")
        return list(answers)
