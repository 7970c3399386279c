"""The process that a TensorRT build runs in, and all calls to the builder.

A build is minutes of native code that cannot be interrupted, may crash the process, and allocates gigabytes. In a
process of its own it can be stopped at once, its crash is an error message, and all its memory is freed.

    python -m srdeploy.runtime.engines.tensorrt.worker PRODUCT FOLDER

reads FOLDER/graph.onnx and FOLDER/request.json, writes FOLDER/plan and FOLDER/build.log (and FOLDER/layers.json if the
product has an engine inspector), and prints one JSON object per line: {"phase", "steps"} while it works, and at the end
{"seconds"} or {"error", "code"}.

TensorRT reports failures as None, False and -1. Every one of them is checked here and explained by its log.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srdeploy.core.errors import BuildError, CapabilityError, SrdeployError
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions, profile_from_json, profile_to_json
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.log import Log, build_logger, translated
from srdeploy.runtime.engines.tensorrt.products import Product
from srdeploy.runtime.engines.tensorrt.rtx import RTX

PRODUCTS = {product.name: product for product in (FULL, RTX)}
GRAPH, REQUEST, PLAN, LOG, LAYERS = "graph.onnx", "request.json", "plan", "build.log", "layers.json"


def main(arguments: Sequence[str]) -> int:
    """Build what the folder describes; the exit status is 0, or the code of the error that was printed."""
    product, folder = PRODUCTS[arguments[0]], Path(arguments[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        graph = read_graph(folder / GRAPH)
        # The folder holds a rewritten copy: messages and keys are about the user's file.
        graph = GraphFile(graph.model, path=Path(request["path"]), sha256=request["sha256"], contract=graph.contract)
        started = time.perf_counter()
        build(product, graph, options_from_json(request["options"]), folder)
        _say(seconds=time.perf_counter() - started)
    except SrdeployError as error:
        _say(error=[error.found, error.expected, error.next_step], code=error.exit_code)
        return error.exit_code
    except OSError as error:
        _say(
            error=[f"cannot write the build's work folder {folder.parent}: {error.strerror or error}", None, None],
            code=8,
        )
        return CapabilityError.exit_code
    return 0


def build(product: Product, graph: GraphFile, options: BuildOptions, folder: Path) -> None:
    """Build a plan and write it with its log into the folder."""
    trt = product.load()
    log = Log()
    logger = build_logger(trt, log, folder / LOG)
    if options.device != "auto":  # TensorRT builds on the current CUDA device
        import torch

        torch.cuda.set_device(options.device)
    data = _serialized(product, trt, logger, log, graph, options)
    (folder / PLAN).write_bytes(data)
    if not product.reads_layers_from_log:
        from srdeploy.runtime.engines.tensorrt.open import inspected_layers

        documents = inspected_layers(product, trt, logger, log, data)
        (folder / LAYERS).write_text(json.dumps(documents), encoding="utf-8")


def options_to_json(options: BuildOptions) -> dict[str, Any]:
    """Return build options as JSON values."""
    values = asdict(options)
    values["profiles"] = [profile_to_json(profile) for profile in options.profiles]
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def options_from_json(values: dict[str, Any]) -> BuildOptions:
    """Read `options_to_json` back."""
    paths = {name: Path(values[name]) for name in ("timing_cache", "log_path") if values[name] is not None}
    return BuildOptions(
        **{
            **values,
            **paths,
            "profiles": tuple(profile_from_json(value) for value in values["profiles"]),
            "compute_capabilities": tuple(values["compute_capabilities"]),
        }
    )


def _serialized(product: Product, trt: Any, logger: Any, log: Log, graph: GraphFile, options: BuildOptions) -> bytes:
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the native factory returned nothing
        raise _failed(product, log, "cannot start") from error
    network = _network_from_onnx(product, trt, logger, log, builder, graph)
    config = builder.create_builder_config()
    if config is None:
        raise _failed(product, log, "could not create a builder configuration")
    _set_common(trt, config, options)
    _add_profiles(product, log, builder, network, config, graph, options.profiles)
    product.configure(trt, config, options)
    config.progress_monitor = _progress_monitor(trt)
    host_memory = builder.build_serialized_network(network, config)
    if host_memory is None:
        raise _failed(product, log, f"cannot build {graph.path}")
    product.finish(trt, config, options)
    return bytes(host_memory)


def _network_from_onnx(product: Product, trt: Any, logger: Any, log: Log, builder: Any, graph: GraphFile) -> Any:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if network is None:
        raise _failed(product, log, "could not create a strongly typed network")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.serialized()):
        where = ""
        for index in range(parser.num_errors):
            parser_error = parser.get_error(index)
            log.add(parser_error.desc())
            where = where or f" at node {parser_error.node_name()!r} ({parser_error.node_operator()})"
        raise _failed(product, log, f"does not accept {graph.path}{where}")
    network.name = engine_name(graph)
    return network


def engine_name(graph: GraphFile) -> str:
    """Return the name written into an engine, which links its bytes to the sidecar."""
    return f"srdeploy|{graph.contract.architecture}|{graph.contract.precision.value}|{graph.sha256[:16]}"


def _set_common(trt: Any, config: Any, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Without it, a context allocates the memory of the largest shape, whatever shape it runs. Off by default in full
    # TensorRT.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if options.tf32:  # on by default in every release, so it is always set or cleared
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)


def _add_profiles(
    product: Product,
    log: Log,
    builder: Any,
    network: Any,
    config: Any,
    graph: GraphFile,
    profiles: Sequence[ShapeProfile],
) -> None:
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    wanted = [spec.name for spec in graph.inputs]
    if names != wanted or len(names) != 1:
        # A profile for a name that does not exist is accepted, and the build fails much later.
        raise BuildError(f"the parsed network has inputs {names}", expected=f"{wanted}, as the ONNX file")
    for shapes in profiles:
        trt_profile = builder.create_optimization_profile()
        trt_profile.set_shape(names[0], shapes.min, shapes.opt, shapes.max)
        if not trt_profile or config.add_optimization_profile(trt_profile) < 0:
            raise _failed(product, log, f"refuses the profile {shapes}")


def _failed(product: Product, log: Log, what: str) -> BuildError:
    cause, step = translated(log)
    return BuildError(f"{product.title} {what}: {cause}", next_step=step)


def _progress_monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        """Prints every finished step; never raises into native code."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _say(phase=phase_name, steps=0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _say(phase=phase_name, steps=1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _say(**values: Any) -> None:
    """Print one JSON line. If the reader is gone, `_end_with_parent` stops the build."""
    try:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()
    except OSError:
        return


def _end_with_parent() -> None:
    """End this process when the parent is gone: then its end of our standard input closes."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    status = 1
    try:
        status = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # native objects are not freed: it takes time, and the wrong order crashes
