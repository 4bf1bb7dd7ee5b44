"""What the Open Inference Protocol says *about* a model: metadata, configuration, statistics."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topfive_server.job import Answer
from topfive_server.oip_codec import DATATYPES, INPUT, Interface


@dataclass(kw_only=True)
class Statistics:
    """Counters of one model version since it was first asked for, for `/stats`; times in seconds."""

    requests: int = 0
    request_s: float = 0.0
    failures: int = 0
    failure_s: float = 0.0
    images: int = 0
    executions: float = 0.0
    """Batches, each image counted as its share of one."""
    queue_s: float = 0.0
    infer_s: float = 0.0
    last: int = 0
    """Milliseconds since 1970."""

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """Count a request that was answered."""
        self.requests += 1
        self.request_s += seconds
        self.images += len(answers)
        self.executions += sum(1 / answer.batch_size for answer in answers)
        self.queue_s += max(answer.queue_s + answer.batch_s for answer in answers)
        self.infer_s += max(answer.infer_s for answer in answers)
        self.last = time.time_ns() // 1_000_000

    def as_json(self, name: str, version: str) -> dict[str, Any]:
        """One element of `model_stats`."""

        def duration(count: int, seconds: float) -> dict[str, int]:
            return {"count": count, "ns": round(seconds * 1e9)}

        none = duration(0, 0)
        return {
            "name": name,
            "version": version,
            "last_inference": self.last,
            "inference_count": self.images,
            "execution_count": round(self.executions),
            "inference_stats": {
                "success": duration(self.requests, self.request_s),
                "fail": duration(self.failures, self.failure_s),
                "queue": duration(self.requests, self.queue_s),
                # Copying is part of `compute_infer` here; perf_analyzer ends itself where the three counts differ.
                "compute_input": duration(self.requests, 0),
                "compute_infer": duration(self.requests, self.infer_s),
                "compute_output": duration(self.requests, 0),
                "cache_hit": none,
                "cache_miss": none,
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }


def model_metadata(interface: Interface, versions: Sequence[str]) -> dict[str, Any]:
    """The answer to `GET /v2/models/{model}`."""
    return {
        "name": interface.name,
        "versions": list(versions),
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, interface.side, interface.side, 3]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": interface.shape(name)}
            for name, datatype in DATATYPES.items()
        ],
    }


def model_config(interface: Interface) -> dict[str, Any]:
    """The model configuration, with the fields that clients read."""
    outputs = [
        {
            "name": name,
            "data_type": f"TYPE_{datatype}",
            "dims": interface.shape(name)[1:],
            "label_filename": "labels.txt" if name == "scores" else "",
            "is_shape_tensor": False,
        }
        for name, datatype in DATATYPES.items()
    ]
    side = interface.side
    return {
        "name": interface.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": interface.max_batch,
        "input": [
            {
                "name": INPUT,
                "data_type": "TYPE_UINT8",
                "format": "FORMAT_NONE",
                "dims": [side, side, 3],
                "is_shape_tensor": False,
                "allow_ragged_batch": False,
                "optional": False,
            }
        ],
        "output": outputs,
        "dynamic_batching": {"preferred_batch_size": [], "max_queue_delay_microseconds": 0},
        "instance_group": [],
        "parameters": {},
        "model_transaction_policy": {"decoupled": False},
    }
