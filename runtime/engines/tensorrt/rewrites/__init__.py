"""Exact rewrites of an ONNX graph into the forms for which TensorRT builds the fewest kernels.

`rewrite.rewrite` applies them on the way into the builder; the user's file stays as it is. docs/engines.md has the
kernels and the memory with and without them.
"""
