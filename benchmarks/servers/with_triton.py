"""Triton's python backend: the `model.py` of a repository that the driver makes, and its `config.pbtxt`.

The request is Triton's "raw binary request" (`Inference-Header-Content-Length: 0`): the body is the JPEG, as with
the other servers. Triton batches the requests; this model decodes the batch on threads and runs the ONNX file.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as utils

# The interpreter inside Triton's backend does not look there by itself.
sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
from benchmarks.servers.common import Classifier, Decoder  # noqa: E402


class TritonPythonModel:
    """What the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002  the hook's signature
        """Once for each instance."""
        self._decoder, self._classifier = Decoder(), Classifier()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One batch: a list of requests, each of one image."""
        bodies = [utils.get_input_tensor_by_name(request, "image").as_numpy().item() for request in requests]
        answers = self._classifier.classify(self._decoder.decode_all(bodies))
        return [
            utils.InferenceResponse([utils.Tensor("answer", np.array([[json.dumps(answer)]], object))])
            for answer in answers
        ]
