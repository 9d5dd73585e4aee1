"""From a system's current paths to a Triton model repository: segments, ONNX files, configurations, generations."""
