"""From a model repository to HTTP: dynamic batching over ONNX Runtime or a Triton fleet."""
