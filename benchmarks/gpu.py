"""Engines on an NVIDIA GPU: parity, latency against the strongest baselines, distance to the floor.

    python benchmarks/gpu.py [--network rcan] [--minutes 8] [-o benchmarks/results]
    python benchmarks/gpu.py --brief -o build/bench    # a functional run of minutes: its numbers mean nothing

What is measured, for full RCAN x4 and SRDenseNet_All x4 (random weights: they cost the same time as trained ones),
batch 1, at 480x270, 320x180 and 960x540 LR pixels: compute on the GPU (CUDA events around one inference) and end to end
(numpy image to numpy result) of eager FP32 with TF32 off, eager FP16 in channels-last, every FP16 engine that runs
here, TensorRT with CUDA graphs on and off, TensorRT INT8 beside its FP16 (calibrated on made-up images: of random
weights only the time counts), and torch.compile FP16 with max-autotune. Before all that: whether an engine
that TensorRT-RTX built for compute capability 8.0 opens here at all.

What limits it: a lower bound per shape comes from two rates measured on the same GPU in the same run, an FP16 matrix
product and a device copy. No engine can be faster than multiply-adds at the one and activations, each written and read
once, at the other; a good FP16 engine lies between that floor and twice the floor. Below 480x270 the activations fit
into the L2 cache of large GPUs, so only the arithmetic floor binds there.

How to read it: compare rows of one table. Candidates take turns (A B C A B C), so drifting clocks touch all of them
alike. torch.compile compiles for minutes, so it comes last, in tables of its own beside eager FP32 and the engines.
After the time given everything stops where it is; what was measured by then is written, and a row that could not be
measured is listed with its reason. Needs no network.
"""

import argparse
import contextlib
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.core.environment import machine, package_versions
from srdeploy.core.errors import SrdeployError
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.rcan import rcan_x4
from srdeploy.models.networks.spec import NetworkConfig, network_of, spec_of
from srdeploy.models.networks.srdensenet import srdensenet_all
from srdeploy.runtime.bench.baselines import ON_GPU
from srdeploy.runtime.bench.latency import bench
from srdeploy.runtime.bench.naming import named
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.gpu import why_no_gpu
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import availability, build_engine, open_engine
from srdeploy.runtime.engines.sidecar import read_engine
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.log import runtime_log
from srdeploy.runtime.engines.tensorrt.open import open_plan
from srdeploy.runtime.engines.tensorrt.rtx import RTX
from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner
from srdeploy.runtime.engines.timer import timed

NETWORKS: dict[str, tuple[NetworkConfig, float]] = {
    # name -> (configuration, bytes of FP16 activations read and written per LR pixel at the best possible fusion)
    "rcan": (rcan_x4(), 188_900.0),
    "srdensenet": (srdensenet_all(4), 42_500.0),
    "small": (replace(rcan_x4(), groups=1, blocks=1, features=16, attention_width=2), 4_000.0),
}


EFFORT = Effort(warmup_runs=10, warmup_seconds=0.5, min_runs=20, max_runs=200, seconds=1.0)


@dataclass(frozen=True)
class Plan:
    """What is measured: networks, LR sizes (height, width), effort, and the sizes of the two probes of the GPU."""

    networks: tuple[str, ...] = ("rcan", "srdensenet")
    sizes: tuple[tuple[int, int], ...] = ((270, 480), (180, 320), (540, 960))
    effort: Effort = EFFORT
    product_side: int = 8192
    copy_bytes: int = 2**30
    compiled: bool = True

    def profile(self, channels: int) -> ShapeProfile:
        """Return the shapes of an engine: tuned for the first size."""
        height, width = (max(size[axis] for size in self.sizes) for axis in range(2))
        return ShapeProfile((1, channels, 16, 16), (1, channels, *self.sizes[0]), (1, channels, height, width))


BRIEF = Plan(
    networks=("small",),
    sizes=((24, 32), (16, 24)),
    effort=Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.01),
    product_side=256,
    copy_bytes=2**20,
    compiled=False,
)
GRACE_SECONDS = 15
"""Kept for closing what is open and for writing the result."""


class OutOfTime(BaseException):
    """The time given is over; no `except Exception` on the way may hold it."""


def main() -> int:
    arguments = _arguments()
    reason = why_no_gpu()
    if reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 8
    plan = BRIEF if arguments.brief else Plan()
    plan = replace(plan, networks=tuple(arguments.network or plan.networks))
    document: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "brief": arguments.brief,
        "versions": package_versions(("srdeploy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")),
        "machine": machine(),
        "gpu": _gpu(),
        "engines": [status.to_json() for status in availability()],
        "stopped": None,
        "networks": {},
    }
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, time_limit(60 * arguments.minutes - GRACE_SECONDS):
            measure_all(plan, Path(folder), document)
    except OutOfTime:
        document["stopped"] = "the time was over; what is missing was not measured"
    document["seconds"] = round(time.monotonic() - started, 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    slug = document["gpu"]["name"].lower().replace(" ", "-")
    path = arguments.output / f"gpu-{slug}-{document['created'][:10]}.json"
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    print(json.dumps({"result": str(path), "gpu": document["gpu"]["name"], "stopped": document["stopped"]}))
    return 0


def measure_all(plan: Plan, folder: Path, document: dict[str, Any]) -> None:
    """Measure everything, the most important first, and put every result into the document as soon as it exists."""
    document["rates"] = measured_rates(plan)
    document["rtx_engine_for_8.0"] = _attempt(lambda: rtx_elsewhere(folder))
    with contextlib.ExitStack() as stack:
        benches = []
        for name in plan.networks:
            result: dict[str, Any] = {"skipped": {}, "opened": {}, "parity": [], "latency": []}
            document["networks"][name] = result
            benches.append((name, result, *open_all(name, plan, folder, result, stack)))
            measure_network(name, plan, result, *benches[-1][2:], document["rates"])
        for name, result, checkpoint, runners in benches:
            int8 = open_int8(name, plan, folder, result, checkpoint, stack)
            if int8 is not None:
                beside = [runners[0], *(runner for runner in runners if runner.info.name == f"{FULL.name} fp16"), int8]
                measure_network(name, plan, result, checkpoint, beside, document["rates"])
        for name, result, checkpoint, runners in benches if plan.compiled else ():
            form = replace(ON_GPU["compile"], name="torch.compile fp16 max-autotune", compile_mode="max-autotune")
            compiled = open_eager(checkpoint, form, device="cuda")
            chosen = [runners[0], *(runner for runner in runners if runner.info.engine != "eager"), compiled]
            measure_network(name, plan, result, checkpoint, chosen, document["rates"])


def measure_network(
    name: str,
    plan: Plan,
    result: dict[str, Any],
    checkpoint: LoadedCheckpoint,
    runners: list[Runner],
    rates: dict[str, float],
) -> None:
    """Compare and measure the runners of one network on every size."""
    for height, width in plan.sizes:
        shape = (1, checkpoint.contract().channels, height, width)
        known = {row["runner"] for row in result["parity"] if row["shape"] == format_shape(shape)}
        result["parity"] += parity([runner for runner in runners if runner.info.name not in known], shape)
        table = measure_shape(runners, shape, plan.effort)
        table["floor"] = floor_ms(checkpoint, shape, NETWORKS[name][1], rates)
        result["latency"].append(table)
        print_table(name, table)


def open_all(
    name: str, plan: Plan, folder: Path, result: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[LoadedCheckpoint, list[Runner]]:
    """Export a network and open the baselines and every engine that runs here; the first runner is the reference."""
    checkpoint = random_checkpoint(NETWORKS[name][0])
    fp16 = exported_fp16(checkpoint, folder / f"{name}.fp32.onnx")
    runners: list[Runner] = [open_eager(checkpoint, ON_GPU[form], device="cuda") for form in ("eager", "half")]
    profile = plan.profile(checkpoint.contract().channels)
    for status in availability():
        engine = status.name
        if status.why_not_run or not engine.startswith(("tensorrt", "onnxruntime-")):
            result["skipped"][engine] = status.why_not_run or "runs on the CPU"
            continue
        try:
            if engine.startswith("onnxruntime-"):
                runners.append(_opened(stack, result, f"{engine} fp16", lambda: open_engine(fp16, engine=engine)))  # noqa: B023
                continue
            path = folder / f"{name}.{engine}"
            options = BuildOptions(profiles=(profile,), use_cache=False)
            built = build_engine(fp16, path, engine=engine, options=options)
            result["opened"][f"{engine} fp16"] = built.to_json()
            for graphs in (True, False):
                label = f"{engine} fp16{'' if graphs else ' without CUDA graphs'}"
                runners.append(_opened(stack, result, label, lambda: open_built(engine, path, graphs=graphs)))  # noqa: B023
        except (SrdeployError, RuntimeError) as error:
            result["skipped"][engine] = str(error)
    return checkpoint, runners


def open_int8(
    name: str,
    plan: Plan,
    folder: Path,
    result: dict[str, Any],
    checkpoint: LoadedCheckpoint,
    stack: contextlib.ExitStack,
) -> Runner | None:
    """Quantize a network for TensorRT and open its engine; where that fails, None, and the reason in the result."""
    label = f"{FULL.name} int8"
    if FULL.name in result["skipped"]:
        result["skipped"][label] = result["skipped"][FULL.name]
        return None
    try:
        graph, path = folder / f"{name}.int8.onnx", folder / f"{name}.int8.plan"
        quantize(
            folder / f"{name}.fp32.onnx",
            graph,
            precision=Precision.INT8,
            target=Target.TENSORRT,
            calibration=made_up_images(checkpoint, folder / f"{name}.images"),
            options=QuantizeOptions(strength=0.0, method="minmax", time_budget_s=1.0),  # the plainest graph
        )
        options = BuildOptions(profiles=(plan.profile(checkpoint.contract().channels),), use_cache=False)
        result["opened"][label] = build_engine(graph, path, engine=FULL.name, options=options).to_json()
        return _opened(stack, result, label, lambda: open_built(FULL.name, path, graphs=True))
    except (SrdeployError, RuntimeError) as error:
        result["skipped"][label] = str(error)
        return None


def made_up_images(checkpoint: LoadedCheckpoint, folder: Path) -> CalibrationSet:
    """Return a small calibration set of smooth images."""
    folder.mkdir()
    for index in range(4):
        pixels = np.rint(255 * np.roll(smooth_image((1, 3, 96, 112))[0], 9 * index, axis=2)).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index}.png")
    return make_calibration_set(folder, contract=checkpoint.contract(), count=4, crop=48)


def open_built(engine: str, path: Path, *, graphs: bool) -> TensorRtRunner:
    """Open a TensorRT engine with CUDA graphs or without, which `open_engine` leaves no choice in."""
    return open_plan(FULL if engine == "tensorrt" else RTX, read_engine(path), "cuda:0", None, graphs=graphs)


def _opened(stack: contextlib.ExitStack, result: dict[str, Any], label: str, opener: Callable[[], Runner]) -> Runner:
    """Open a runner, and note the GPU memory that it took."""
    before = torch.cuda.mem_get_info()[0]
    runner = named(stack.enter_context(opener()), label)
    result["opened"].setdefault(label, {})["device_bytes"] = before - torch.cuda.mem_get_info()[0]
    return runner


def exported_fp16(checkpoint: LoadedCheckpoint, fp32: Path) -> Path:
    """Export a network and bring it to FP16; returns the second file."""
    fp16 = fp32.with_name(fp32.name.replace("fp32", "fp16"))
    export_onnx(checkpoint, fp32)
    quantize(fp32, fp16, precision=Precision.FP16, target=Target.TENSORRT, calibration=None)
    return fp16


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when the time is over, wherever it is."""

    def over(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parity(runners: list[Runner], shape: Shape) -> list[dict[str, Any]]:
    """Compare every runner with the first one, in decibels, on a smooth image."""
    rows = []
    image = smooth_image(shape)
    expected = run_image(runners[0], image).astype(np.float64)
    for runner in runners[1:]:
        row: dict[str, Any] = {"runner": runner.info.name, "shape": format_shape(shape)}
        try:
            error = float(np.mean((run_image(runner, image) - expected) ** 2))
            row["psnr_db"] = None if error == 0 else round(-10 * float(np.log10(error)), 2)
        except (SrdeployError, RuntimeError) as problem:
            row["failed"] = str(problem).splitlines()[0]
        rows.append(row)
    return rows


def measure_shape(runners: list[Runner], shape: Shape, effort: Effort) -> dict[str, Any]:
    """Measure all runners on one shape; runners that cannot take it are named with the reason.

    The memory of a runner is what its first run on the shape adds: at its peak in PyTorch's allocator, and for good on
    the whole GPU (kept buffers, libraries and CUDA graphs included).
    """
    able, failed, memory = [], {}, {}
    for runner in runners:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        try:
            run_image(runner, smooth_image(shape))
        except (SrdeployError, RuntimeError) as error:
            failed[runner.info.name] = str(error).splitlines()[0]
            continue
        able.append(runner)
        memory[runner.info.name] = {
            "torch_peak_bytes": torch.cuda.max_memory_allocated() - allocated,
            "device_bytes_kept": free - torch.cuda.mem_get_info()[0],
        }
    result = bench(able, shape=shape, effort=effort, image=smooth_image(shape)).to_json()
    for row in result["rows"]:
        del row["times_ms"]
    return {**result, "failed": failed, "gpu_memory": memory}


def measured_rates(plan: Plan) -> dict[str, float]:
    """Measure an FP16 matrix product (TFLOP/s) and a device copy (GB/s, read plus write)."""
    size = plan.product_side
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    product_ms = _median_ms(lambda: torch.mm(left, right))
    source = torch.empty(plan.copy_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source))
    return {"fp16_tflops": 2 * size**3 / product_ms / 1e9, "copy_gb_per_s": 2 * source.numel() / copy_ms / 1e6}


def floor_ms(
    checkpoint: LoadedCheckpoint, shape: Shape, bytes_per_pixel: float, rates: dict[str, float]
) -> dict[str, float]:
    """Return the lower bounds of one FP16 inference in milliseconds."""
    pixels = shape[0] * shape[2] * shape[3]
    arithmetic = 2 * checkpoint.spec.macs_per_pixel * pixels / rates["fp16_tflops"] / 1e9
    memory = bytes_per_pixel * pixels / rates["copy_gb_per_s"] / 1e6
    return {"arithmetic_ms": arithmetic, "memory_ms": memory, "floor_ms": max(arithmetic, memory)}


def rtx_elsewhere(folder: Path) -> dict[str, Any]:
    """Try to open a TensorRT-RTX engine for compute capability 8.0 on this GPU, past our own refusal, and to run it."""
    checkpoint = random_checkpoint(replace(rcan_x4(), groups=2, blocks=2))
    path = folder / "for-8.0.rtx"
    profile = ShapeProfile((1, 3, 16, 16), (1, 3, 64, 64), (1, 3, 64, 64))
    options = BuildOptions(profiles=(profile,), compute_capabilities=("8.0",), use_cache=False)
    build_engine(exported_fp16(checkpoint, folder / "for-8.0.fp32.onnx"), path, engine="tensorrt-rtx", options=options)
    trt = RTX.load()
    with runtime_log(trt) as (logger, log):
        runtime = trt.Runtime(logger)
        cuda_engine = runtime.deserialize_cuda_engine(path.read_bytes())
    outcome: dict[str, Any] = {"version": trt.__version__, "opened": cuda_engine is not None, "log": log.problems}
    del cuda_engine
    if outcome["opened"]:
        with open_built("tensorrt-rtx", path, graphs=True) as runner, open_eager(checkpoint, device="cuda") as eager:
            outcome["parity"] = parity([eager, runner], (1, 3, 64, 64))
    return outcome


def random_checkpoint(config: NetworkConfig) -> LoadedCheckpoint:
    """Return a network with PyTorch's initial weights by a fixed seed."""
    torch.manual_seed(0)
    return LoadedCheckpoint(
        path=Path("random.pt"),
        sha256="0" * 64,
        dialect="random",
        config=config,
        spec=spec_of(config),
        network=network_of(config).eval(),
        evidence=Evidence("random", "random weights", "this file", "none", (), {}, ()),
    )


def smooth_image(shape: tuple[int, ...]) -> np.ndarray:
    """Return an image with gradients and edges on 0..1, (N, C, H, W) float32."""
    n, c, h, w = shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    waves = [0.5 + 0.4 * np.sin(x / (5 + channel) + y / 11) * np.cos(y / (7 + channel)) for channel in range(c)]
    return np.ascontiguousarray(np.broadcast_to(np.stack(waves), (n, c, h, w)), dtype=np.float32)


def print_table(name: str, table: dict[str, Any]) -> None:
    floor = table["floor"]["floor_ms"]
    print(f"\n{name} {table['shape']}  floor {floor:.2f} ms", file=sys.stderr)
    for row in table["rows"]:
        median = row["median_ms"]
        remark = "" if row["stable"] else "  unstable"
        print(
            f"  {row['runner']['name']:44} {row['kind']:11} {median:9.3f} ms  p90 {row['p90_ms']:9.3f}"
            f"  {row['ratio'] or 0:5.2f}x eager fp32  {median / floor:5.2f}x floor{remark}",
            file=sys.stderr,
        )


def _median_ms(work: Callable[[], object], runs: int = 20) -> float:
    run = timed(work, "cuda:0")
    return float(np.median([run() for _ in range(runs + 5)][5:]))


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:  # the exact outcome is the result, whatever it is
        return {"error": f"{type(error).__name__}: {error}"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="default: rcan and srdensenet")
    parser.add_argument("--brief", action="store_true", help="a small network at small sizes: does everything run?")
    parser.add_argument("--minutes", type=float, default=8.0, help="everything stops after this time")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
