"""From a checkpoint to a verified ONNX model repository that Triton can load."""
