"""The embedded engine: ONNX Runtime in the server's process."""
