"""From a network to a checked FP32 ONNX file."""
