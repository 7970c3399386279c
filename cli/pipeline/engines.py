"""Which engines `deploy` builds, at which precisions, and the names of their graphs."""

from collections.abc import Sequence

from srdeploy.calibration.options import QuantizeOptions
from srdeploy.cli.pipeline.types import FP16_ONNX, FP32_ONNX, Candidate, DeployOptions
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.extras import is_installed
from srdeploy.core.precision import Precision, Target
from srdeploy.runtime.engines.registry import CPU_FAMILIES, family
from srdeploy.runtime.engines.tensorrt.products import parse_capability

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    # What is worth building on each engine. The CPU engines compute FP16 layers in FP32, so FP16 gains nothing there;
    # on TensorRT for RTX FP16 is faster than INT8 for these networks.
    "onnxruntime": (Precision.FP32, Precision.INT8),
    "openvino": (Precision.FP32, Precision.INT8),
    "tensorrt-rtx": (Precision.FP16,),
    "tensorrt": (Precision.FP16, Precision.INT8),
    "onnxruntime-cuda": (Precision.FP16,),
    "onnxruntime-tensorrt": (Precision.FP16,),
}
DEFAULT_ENGINES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt-rtx": "tensorrt_rtx"}
"""Engines that are built when none is requested, by the module that must be installed for it."""


def checked_engines(options: DeployOptions) -> tuple[str, ...]:
    """Return the families to build, and refuse before any work what cannot succeed.

    Raises:
        UsageError: options that do not fit together or the engines.
        CapabilityError: as `possible_engines`.
    """
    if options.output.suffix != ".srd":
        raise UsageError(f"bundle name {options.output}", expected="a name that ends in .srd")
    QuantizeOptions(max_psnr_drop=options.max_psnr_drop)  # checks the number
    engines = possible_engines(options.engines)
    if options.compute_capabilities and "tensorrt-rtx" not in engines:
        raise UsageError(
            f"--compute-capability with {', '.join(engines)}",
            expected="the engine that it applies to, tensorrt-rtx",
            next_step="remove --compute-capability, or add --engine tensorrt-rtx",
        )
    for text in options.compute_capabilities:
        try:
            parse_capability(text)
        except ValueError:
            raise UsageError(f"--compute-capability {text}", expected="a number such as 8.9") from None
    return engines


def threads_for(engine: str, threads: int | None) -> int | None:
    """Return the CPU threads that an engine is opened with: those given, None for engines on a GPU."""
    return threads if engine in CPU_FAMILIES else None


def possible_engines(requested: Sequence[str]) -> tuple[str, ...]:
    """Return the families to build, and refuse before any work those that cannot be built here.

    Raises:
        CapabilityError: an engine cannot be made here, or none is requested and none is installed.
        UsageError: there is no engine of that name.
    """
    if not requested:
        found = tuple(name for name, module in DEFAULT_ENGINES.items() if is_installed(module))
        if not found:
            raise CapabilityError("no engine is installed", next_step="install one with: pip install 'srdeploy[cpu]'")
        return found
    for name in requested:
        chosen = family(name)
        module = chosen.load()
        reason = module.why_not_build() if chosen.suffix else module.why_not_run()
        if reason is not None:
            raise CapabilityError(f"engine {name} cannot be made here: {reason}")
    return tuple(dict.fromkeys(requested))


def graphs_to_quantize(candidates: Sequence[Candidate], *, fp16: bool) -> dict[str, Candidate]:
    """Return the graphs to make from the FP32 one, each with the first candidate that is built from it.

    Args:
        candidates: the engines to build.
        fp16: include the FP16 graph even if no candidate needs it: engines on other machines are built from it.
    """
    others = [Candidate("tensorrt", Precision.FP16, FP16_ONNX)] if fp16 else []
    graphs: dict[str, Candidate] = {}
    for entry in (*candidates, *others):
        if entry.onnx != FP32_ONNX:
            graphs.setdefault(entry.onnx, entry)
    return graphs


def onnx_name(engine: str, precision: Precision) -> str:
    """Return the file of the graph that an engine is built from: Q/DQ differs by target, the float types do not."""
    if precision in (Precision.INT8, Precision.FP8):
        return f"model.{precision}.{target_of(engine)}.onnx"
    return f"model.{precision}.onnx"


def target_of(engine: str) -> Target:
    """Return the target that a graph for this engine is laid out for."""
    return Target.ONNXRUNTIME if engine.startswith("onnxruntime") else Target(engine)
