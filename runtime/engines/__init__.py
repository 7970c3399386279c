"""Engines: build one from an ONNX file, open one as a runner, list what this machine can build and run.

One module per family, or a package (`tensorrt`, shared by TensorRT and TensorRT-RTX); `registry` has the table.
"""

from srdeploy.runtime.engines.options import BuildOptions, BuildResult
from srdeploy.runtime.engines.recommend import recommended
from srdeploy.runtime.engines.registry import availability, build_engine, open_engine

__all__ = ["BuildOptions", "BuildResult", "availability", "build_engine", "open_engine", "recommended"]
