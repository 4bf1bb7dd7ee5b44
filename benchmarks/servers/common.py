"""What all services of `compare.py` share, so that only the serving differs: settings, decoding, the session.

Each service is written as its framework's documentation would write it. Decoding is topfive's own (Pillow, scaled
JPEG decode, one resample), the session has the options that topfive gives its own, and only the two small outputs are
fetched. The driver sets the environment variables below.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from topfive.model_spec import ModelSpec
from topfive.preprocessing import decode

MAX_BATCH = 32
"""As topfive's own on a CPU; every server that batches gets it."""


def setting(name: str, default: str | None = None) -> str:
    """`COMPARE_<name>` of the environment."""
    value = os.environ.get(f"COMPARE_{name}", default)
    if value is None:
        raise SystemExit(f"COMPARE_{name} is not set; start this service with benchmarks/compare.py")
    return value


def port() -> int:
    """Where to listen, on 127.0.0.1."""
    return int(setting("PORT"))


def workers() -> int:
    """Processes (or instances) that hold a session each."""
    return int(setting("WORKERS", "1"))


def threads() -> int:
    """Threads of one session; with several workers, the cores are shared out among them."""
    return int(setting("THREADS"))


class Decoder:
    """From a JPEG's bytes to the pixels; needs no session."""

    def __init__(self) -> None:
        self.spec = ModelSpec.read(Path(setting("SPEC")))
        self._pool = ThreadPoolExecutor(threads())

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """One image, uint8 [crop, crop, 3]."""
        return np.asarray(decode(data, self.spec.preprocessing).image)

    def decode_all(self, bodies: Sequence[bytes]) -> list[NDArray[np.uint8]]:
        """A batch, on as many threads as the session has."""
        return list(self._pool.map(self.decode, bodies))


class Classifier:
    """The ONNX file in a session."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(
            setting("MODEL"), options, providers=["CPUExecutionProvider"]
        )
        self._labels = ModelSpec.read(Path(setting("SPEC"))).labels
        # Ready means warm, in every service: the largest batch allocates what all need.
        side = self._session.get_inputs()[0].shape[1]
        for size in (1, MAX_BATCH):
            self.run(np.zeros((size, side, side, 3), np.uint8))

    def run(self, images_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Probabilities and classes, [B, 5] each, best first."""
        probabilities_B5, classes_B5 = self._session.run(["probabilities", "classes"], {"image": images_BHWC})
        return probabilities_B5, classes_B5

    def classify(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """One answer for each image, in order."""
        probabilities_B5, classes_B5 = self.run(np.stack(images))
        return [self.answer(p, c) for p, c in zip(probabilities_B5, classes_B5, strict=True)]

    def answer(self, probabilities_5: NDArray[np.float32], classes_5: NDArray[np.int64]) -> dict[str, Any]:
        """What goes to the client for one image."""
        pairs = zip(probabilities_5.tolist(), classes_5.tolist(), strict=True)
        return {"top": [{"label": self._labels[c], "class": c, "probability": p} for p, c in pairs]}
