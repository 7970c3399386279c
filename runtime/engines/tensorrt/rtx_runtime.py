"""What opening and running needs on TensorRT-RTX only: its runtime cache and its own CUDA graphs.

Kernels are compiled on the GPU at first use and kept in a file per engine, GPU and driver; TensorRT-RTX checks itself
that they fit and leaves them alone otherwise. Its graph strategy swaps quick and specialized kernels behind the
captured graph, which a capture from outside could not.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import torch

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import CapabilityError, SrdeployError, UsageError
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.families import Flavour
from srdeploy.runtime.engines.tensorrt.log import last_problem
from srdeploy.runtime.engines.tensorrt.open import deserialized
from srdeploy.runtime.engines.tensorrt.rtx_engine import runtime_cache_folder
from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner

MAX_CACHE_BYTES = 100 * 2**20
"""The runtime cache becomes slow above about this size; a larger one is not kept."""


def open_rtx(
    flavour: Flavour,
    trt: Any,
    engine: Engine,
    device: str,
    outputs: Sequence[str] | None,
    *,
    graphs: bool = True,
    specialize: str = "LAZY",
) -> TensorRtRunner:
    """Deserialize a checked engine and open a runner on it.

    Args:
        flavour: TensorRT-RTX.
        trt: its bindings.
        engine: the verified file.
        device: "cuda:N".
        outputs: must be None.
        graphs: let TensorRT-RTX capture whole CUDA graphs.
        specialize: "LAZY" compiles kernels for a shape in the background, "EAGER" before the first run (for measuring
            and for fixed tiles), "NONE" never.
    """
    if outputs is not None:
        raise UsageError("a built engine has no inner tensors to return", next_step="open the ONNX file for that")
    with torch.cuda.device(device):
        native = deserialized(flavour, trt, engine)
        kernels = _KernelCache(trt, native[1], _cache_path(engine, device))

    def configure(runtime_config: Any) -> None:
        strategies = trt.CudaGraphStrategy
        runtime_config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        choices = trt.DynamicShapesKernelSpecializationStrategy.__members__
        runtime_config.dynamic_shapes_kernel_specialization_strategy = choices[specialize]
        if not runtime_config.set_runtime_cache(kernels.cache):
            raise CapabilityError(f"TensorRT-RTX refuses its runtime cache: {last_problem(trt)}")

    return TensorRtRunner(
        flavour, trt, engine, native, device, configure=configure, capture=False, on_close=kernels.save
    )


class _KernelCache:
    """The compiled kernels of one engine, shared by all its contexts."""

    def __init__(self, trt: Any, cuda_engine: Any, path: Path) -> None:
        self._path = path
        runtime_config = cuda_engine.create_runtime_config()
        self.cache: Any = runtime_config.create_runtime_cache() if runtime_config is not None else None
        if self.cache is None:
            raise CapabilityError(f"TensorRT-RTX gives no runtime cache: {last_problem(trt)}")
        self._before = b""
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            # False means: of another GPU, driver or release. It is then written anew at the end.
            if self.cache.deserialize(data):
                self._before = data

    def save(self) -> None:
        """Write the kernels if there are new ones, and let go of them: they must not outlive the engine.

        A cache that cannot be written costs time, nothing else.
        """
        host_memory = self.cache.serialize()
        data = bytes(host_memory) if host_memory is not None else self._before
        self.cache = None
        if data == self._before or len(data) > MAX_CACHE_BYTES:
            return
        with contextlib.suppress(OSError, SrdeployError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filelock.FileLock(self._path.with_suffix(".lock")), atomic_file(self._path, force=True) as path:
                path.write_bytes(data)


def _cache_path(engine: Engine, device: str) -> Path:
    properties = torch.cuda.get_device_properties(device)
    place = f"{properties.name}|{torch.version.cuda}|{engine.manifest.sha256}"
    return runtime_cache_folder() / f"{hashlib.sha256(place.encode()).hexdigest()[:40]}.bin"
