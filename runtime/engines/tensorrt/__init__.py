"""TensorRT and TensorRT for RTX: build, read back, open and run."""
