"""Every tensor of a TensorRT engine compared with its ONNX graph, by Polygraphy.

Tensors of a built engine are gone. So Polygraphy builds the graph again with all tensors marked as outputs, for the
shape of one image, and runs it next to the graph computed node by node. Marked tensors keep TensorRT from fusing across
them: a fault that exists only in a fused kernel does not appear.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import BuildError, CapabilityError
from srdeploy.core.extras import import_extra
from srdeploy.core.onnx_file import GraphFile
from srdeploy.runtime.engines.gpu import Gpu, find_gpu, why_no_gpu
from srdeploy.runtime.engines.literal import LiteralRunner
from srdeploy.runtime.engines.polygraphy_runner import polygraphy_runner
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.rtx import RTX
from srdeploy.runtime.verify.difference import snr_db


def tensorrt_snr(
    graph: GraphFile, image: NDArray[np.float32], tensors: Sequence[str], *, engine: str, device: str = "auto"
) -> dict[str, float]:
    """Return the agreement of a TensorRT build's tensors with the graph, in dB.

    Args:
        graph: the ONNX file.
        image: (1, C, H, W) float32 in [0, 1].
        tensors: names in the graph; those that TensorRT does not have are missing in the result.
        engine: "tensorrt" or "tensorrt-rtx".
        device: "auto", or the GPU as "cuda:N".

    Raises:
        MissingExtraError: Polygraphy or TensorRT is not installed.
        CapabilityError: no GPU, or this process has used Polygraphy with the other TensorRT.
        BuildError: TensorRT refuses the graph.
    """
    gpu = find_gpu(device)
    if gpu is None:
        raise CapabilityError(f"the layers of a {engine} engine can be compared only where it runs, and {why_no_gpu()}")
    backend = _backend(engine)  # first: it decides which TensorRT Polygraphy imports
    literal = polygraphy_runner(partial(LiteralRunner, graph, tensors), "literal")
    comparator = import_extra("polygraphy.comparator", "gpu").Comparator
    logger = import_extra("polygraphy.logger", "gpu").G_LOGGER
    exception = import_extra("polygraphy.exception", "gpu").PolygraphyException
    found: dict[str, float] = {}

    def compare(expected: Any, actual: Any) -> "OrderedDict[str, bool]":
        for name in tensors:
            if name in actual:
                value = np.asarray(actual[name]).astype(np.float32)
                found[name] = snr_db(np.asarray(expected[name]), value)
        return OrderedDict((name, True) for name in found)

    import torch

    # Polygraphy logs to standard output, uses the current GPU, and calls what TensorRT-RTX has deprecated.
    with logger.verbosity(), torch.cuda.device(gpu.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            marked = _marked_runner(backend, graph, image.shape, engine, gpu)
            results = comparator.run([literal, marked], data_loader=[{INPUT: image}])
        except exception as error:
            raise BuildError(f"Polygraphy cannot run {graph.path} with {engine}: {error}") from error
        comparator.compare_accuracy(results, compare_func=compare)
    return found


def _marked_runner(backend: Any, graph: GraphFile, shape: tuple[int, ...], engine: str, gpu: Gpu) -> Any:
    """Return Polygraphy's TensorRT runner of the graph with all tensors marked as outputs."""
    constants = import_extra("polygraphy.constants", "gpu")
    network = backend.NetworkFromOnnxBytes(graph.serialized(), strongly_typed=True)
    marked = backend.ModifyNetworkOutputs(network, outputs=constants.MARK_ALL)
    profiles = [backend.Profile().add(INPUT, min=shape, opt=shape, max=shape)]
    if engine == RTX.name:
        create = import_extra("polygraphy.backend.tensorrt_rtx", "gpu").CreateConfigRTX
        config = create(profiles=profiles, compute_capabilities=[gpu.capability])
    else:
        config = backend.CreateConfig(profiles=profiles)  # TF32 is off
    return backend.TrtRunner(backend.EngineFromNetwork(marked, config), name=engine)


def _backend(engine: str) -> Any:
    """Return `polygraphy.backend.trt` for one of the TensorRTs; a process can use one of them only."""
    trt = (RTX if engine == RTX.name else FULL).load()
    settings: Any = import_extra("polygraphy.config", "gpu")
    wanted = engine == RTX.name
    if "polygraphy.backend.trt" in sys.modules and wanted != settings.USE_TENSORRT_RTX:
        raise CapabilityError(
            "this process has used Polygraphy with the other TensorRT", next_step="run the comparison in a new process"
        )
    settings.USE_TENSORRT_RTX = wanted
    backend = import_extra("polygraphy.backend.trt", "gpu")
    # Polygraphy's own logger is written in Python, which can hang the process (see `engines.tensorrt.log`).
    util: Any = import_extra("polygraphy.backend.trt.util", "gpu")
    util.TRT_LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)
    return backend
