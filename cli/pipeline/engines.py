"""Which engines `deploy` builds for which devices, at which precisions, and the names of their graphs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from srdeploy.calibration.search.bound import Bound
from srdeploy.cli.console import warning_line
from srdeploy.cli.pipeline.types import FP16_ONNX, FP32_ONNX, Candidate, DeployOptions
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.precision import Precision, Target
from srdeploy.runtime.engines.gpu import find_gpu
from srdeploy.runtime.engines.recommend import precisions_of, recommended
from srdeploy.runtime.engines.registry import CPU_FAMILIES, ENGINES, engine_status, family
from srdeploy.runtime.engines.tensorrt.products import parse_capability


@dataclass(frozen=True)
class Placement:
    """An engine family on the device that it is built for, verified and measured on: "cpu" or "cuda:N"."""

    engine: str
    device: str


def checked_placements(options: DeployOptions) -> tuple[Placement, ...]:
    """Return what to build for which device, and refuse before any work what cannot succeed.

    Raises:
        UsageError: options that do not fit together or the engines.
        CapabilityError: a requested engine cannot be made here, or none is requested and none is installed.
    """
    if options.output.suffix != ".srd":
        raise UsageError(f"bundle name {options.output}", expected="a name that ends in .srd")
    Bound(options.max_psnr_drop)  # checks the number
    if options.compress and options.max_psnr_drop is None:
        raise UsageError(
            "--compress without a bound",
            expected="the loss that is allowed",
            next_step="add, for example, --max-psnr-drop 0.02",
        )
    placements = _placements(options.engines, _devices(options.devices))
    engines = list(dict.fromkeys(entry.engine for entry in placements))
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
    return placements


def threads_for(engine: str, threads: int | None) -> int | None:
    """Return the CPU threads that an engine is opened with: those given, None for engines on a GPU."""
    return threads if engine in CPU_FAMILIES else None


def _devices(given: Sequence[str]) -> tuple[str, ...]:
    """Return devices in their full form; empty for "auto"."""
    devices = dict.fromkeys("cuda:0" if device == "cuda" else device for device in given)
    for device in devices:
        if re.fullmatch(r"auto|cpu|cuda:[0-9]+", device) is None:
            raise UsageError(f"device {device!r}", expected="auto, cpu, cuda or cuda:N")
    if "auto" in devices and len(devices) > 1:
        raise UsageError("--device auto beside other devices", next_step="remove --device auto")
    return tuple(device for device in devices if device != "auto")


def _placements(engines: Sequence[str], devices: Sequence[str]) -> tuple[Placement, ...]:
    if not engines:
        return _default_placements(devices)
    placements = []
    for name in dict.fromkeys(engines):
        on_cpu = family(name).name in CPU_FAMILIES
        fitting = [device for device in devices if (device == "cpu") == on_cpu]
        if devices and not fitting:
            raise UsageError(
                f"--engine {name} with --device {', '.join(devices)}",
                expected="an engine for that device",
                next_step=f"add --device {'cpu' if on_cpu else 'cuda'}, or choose another engine",
            )
        _refuse_impossible(name)
        placements += [Placement(name, device) for device in fitting or [_usual_device(name)]]
    return tuple(placements)


def _default_placements(devices: Sequence[str]) -> tuple[Placement, ...]:
    if not devices:
        usual = recommended()
        placements = tuple(Placement(entry.engine, _usual_device(entry.engine)) for entry in usual)
        if not placements:
            raise CapabilityError("no engine is installed", next_step="install one with: pip install 'srdeploy[cpu]'")
        found = find_gpu()
        if found is not None and not any(entry.runs_here and entry.engine not in CPU_FAMILIES for entry in usual):
            warning_line(f"{found} is not used: no engine for it is installed; to see what is missing: srdeploy doctor")
        return placements
    chosen: list[Placement] = []
    for device in devices:
        on_cpu = device == "cpu"
        names = [
            entry.engine
            for entry in recommended(device)
            if entry.runs_here and (entry.engine in CPU_FAMILIES) == on_cpu
        ]
        if not names:
            reasons = [(name, engine_status(name, device).why_not_run) for name in _families(on_cpu)]
            raise CapabilityError(
                f"no engine runs on {device} here ({'; '.join(f'{name}: {reason}' for name, reason in reasons)})",
                next_step="to see what this machine lacks: srdeploy doctor",
            )
        chosen += [Placement(name, device) for name in names]
    return tuple(chosen)


def _families(on_cpu: bool) -> list[str]:
    return [entry.name for entry in ENGINES if (entry.name in CPU_FAMILIES) == on_cpu]


def _usual_device(engine: str) -> str:
    return "cpu" if engine in CPU_FAMILIES else "cuda:0"


def why_not_made(name: str) -> str | None:
    """Return why an engine cannot be made here, None if it can: built, or opened where nothing is built."""
    status = engine_status(name)
    return status.why_not_build if family(name).suffix else status.why_not_run


def _refuse_impossible(name: str) -> None:
    reason = why_not_made(name)
    if reason is not None:
        raise CapabilityError(f"engine {name} cannot be made here: {reason}")


def candidates_for(placements: Sequence[Placement]) -> list[Candidate]:
    """Return the engines to make: each placement at every precision that is worth building on it."""
    engines = [entry.engine for entry in placements]
    return [
        Candidate(
            entry.engine,
            precision,
            onnx_name(entry.engine, precision),
            device=entry.device,
            shared=engines.count(entry.engine) > 1,
        )
        for entry in placements
        for precision in precisions_of(entry.engine, None if entry.device == "cpu" else find_gpu(entry.device))
    ]


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


def compressed_for(target: Target) -> Precision:
    """Return the precision that a graph is compressed for: engines on the CPU are fastest in INT8."""
    return Precision.INT8 if target.value in CPU_FAMILIES else Precision.FP32


def target_of(engine: str) -> Target:
    """Return the target that a graph for this engine is laid out for."""
    return Target.ONNXRUNTIME if engine.startswith("onnxruntime") else Target(engine)
