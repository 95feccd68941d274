"""Export to ONNX and OpenVINO: tracing, the check against PyTorch, int8."""
