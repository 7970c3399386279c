"""What the engines are worth on an NVIDIA GPU: parity, latency against every fair baseline, distance to the floor.

    python benchmarks/gpu.py [--network rcan] [--minutes 8] [-o benchmarks/results]

What is measured, for full RCAN x4 and SRDenseNet_All x4 (random weights: they cost the same time as trained ones),
batch 1, at 320x180, 480x270 and 960x540 LR pixels: compute on the GPU (CUDA events around one inference) and end to end
(numpy image to numpy result) of eager FP32 with TF32 off, eager FP16 in channels-last, torch.compile FP16 with
max-autotune, and every engine that runs here, TensorRT with CUDA graphs on and off.

What limits it: a lower bound per shape comes from two rates measured on the same GPU in the same run, an FP16 matrix
product and a device copy. No engine can be quicker than multiply-adds at the one and activations, each written and read
once, at the other; a good FP16 engine lies between that floor and twice the floor. Below 480x270 the activations fit
into the L2 cache of large GPUs, so only the arithmetic floor binds there.

How to read it: compare rows of one table. Candidates take turns (A B C A B C), so drifting clocks touch all of them
alike. A row that could not be measured in the time, or at all, is listed with its reason. Needs no network.
"""

import argparse
import contextlib
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srdeploy.calibration.quantize import quantize
from srdeploy.core.environment import machine
from srdeploy.core.errors import SrdeployError
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape
from srdeploy.export.exporter import export_onnx
from srdeploy.models.load import Evidence, LoadedCheckpoint
from srdeploy.models.rcan import rcan_x4
from srdeploy.models.spec import NetworkConfig, network_of, spec_of
from srdeploy.models.srdensenet import srdensenet_all
from srdeploy.runtime.engines.eager import EagerRunner, open_eager
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import availability, build_engine, open_engine
from srdeploy.runtime.engines.tensorrt_flavour import why_no_gpu
from srdeploy.runtime.engines.tensorrt_run import TensorRtRunner
from srdeploy.runtime.latency import Effort, bench, named

NETWORKS: dict[str, tuple[NetworkConfig, float]] = {
    # name -> (configuration, bytes of FP16 activations read and written per LR pixel at the best possible fusion)
    "rcan": (rcan_x4(), 188_900.0),
    "srdensenet": (srdensenet_all(4), 42_500.0),
}
SIZES = ((180, 320), (270, 480), (540, 960))
EFFORT = Effort(warmup_runs=10, warmup_seconds=0.5, min_runs=20, max_runs=200, seconds=2.0)


def main() -> int:
    arguments = _arguments()
    reason = why_no_gpu()
    if reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 8
    deadline = time.monotonic() + 60 * arguments.minutes
    document: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "gpu": _gpu(),
        "engines": [status.to_json() for status in availability()],
        "rates": measured_rates(),
        "networks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.network or NETWORKS:
            document["networks"][name] = measure_network(name, Path(folder), deadline, document["rates"])
        document["rtx_engine_for_8.0"] = _attempt(lambda: rtx_elsewhere(Path(folder)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    slug = document["gpu"]["name"].lower().replace(" ", "-")
    path = arguments.output / f"gpu-{slug}-{document['created'][:10]}.json"
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    print(json.dumps({"result": str(path)}))
    return 0


def measure_network(name: str, folder: Path, deadline: float, rates: dict[str, float]) -> dict[str, Any]:
    """Export, build, compare and measure one network."""
    config, bytes_per_pixel = NETWORKS[name]
    checkpoint = random_checkpoint(config)
    fp32, fp16 = folder / f"{name}.fp32.onnx", folder / f"{name}.fp16.onnx"
    export_onnx(checkpoint, fp32)
    quantize(fp32, fp16, precision=Precision.FP16, target=Target.TENSORRT, calibration=None)
    result: dict[str, Any] = {"skipped": {}, "parity": [], "latency": []}
    with contextlib.ExitStack() as stack:
        runners = open_all(checkpoint, fp32, fp16, folder, result["skipped"], stack)
        result["parity"] = parity(runners)
        for height, width in SIZES:
            shape = (1, checkpoint.contract().channels, height, width)
            if time.monotonic() > deadline:
                result["skipped"][format_shape(shape)] = "the time was over"
                continue
            table = measure_shape(runners, shape)
            table["floor"] = floor_ms(checkpoint, shape, bytes_per_pixel, rates)
            result["latency"].append(table)
            print_table(name, table)
    return result


def open_all(
    checkpoint: LoadedCheckpoint,
    fp32: Path,
    fp16: Path,
    folder: Path,
    skipped: dict[str, str],
    stack: contextlib.ExitStack,
) -> list[Runner]:
    """Open the baselines and every engine that runs here; the first runner is the baseline of the ratios."""
    runners: list[Runner] = [
        open_eager(checkpoint, device="cuda"),
        named(
            open_eager(checkpoint, device="cuda", dtype=torch.float16, channels_last=True), "eager fp16 channels-last"
        ),
        named(CompiledRunner(checkpoint), "torch.compile fp16 max-autotune"),
    ]
    channels = checkpoint.contract().channels
    profile = ShapeProfile((1, channels, 16, 16), (1, channels, 270, 480), (1, channels, 540, 960))
    for status in availability():
        engine = status.name
        if status.why_not_run or not (engine.startswith(("tensorrt", "onnxruntime-"))):
            skipped[engine] = status.why_not_run or "runs on the CPU"
            continue
        for source in (fp32, fp16):
            label = f"{engine} {source.stem.rsplit('.', 1)[-1]}"
            try:
                if engine.startswith("tensorrt"):
                    path = folder / f"{label.replace(' ', '-')}.engine"
                    options = BuildOptions(profiles=(profile,), use_cache=False)
                    built = build_engine(source, path, engine=engine, options=options, force=True)
                    print(
                        f"{label}: built in {built.seconds:.1f} s, {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr
                    )
                    for graphs in (True, False):
                        runner = stack.enter_context(open_engine(path))
                        assert isinstance(runner, TensorRtRunner)
                        runner.capture = runner.capture and graphs
                        if graphs or engine == "tensorrt":
                            runners.append(named(runner, f"{label}{'' if graphs else ' without CUDA graphs'}"))
                else:
                    runners.append(named(stack.enter_context(open_engine(source, engine=engine)), label))
            except (SrdeployError, RuntimeError) as error:
                skipped[label] = str(error)
    return runners


class CompiledRunner(EagerRunner):
    """The eager FP16 network through torch.compile with max-autotune: the strongest baseline without an export."""

    def __init__(self, checkpoint: LoadedCheckpoint) -> None:
        super().__init__(checkpoint, "cuda", 1, torch.float16, channels_last=True)
        compiled = torch.compile(self._network, mode="max-autotune", dynamic=False)
        self._network = compiled  # type: ignore[assignment]  # called like the module it wraps
        self._info = replace(self._info, numeric_mode="FP16, torch.compile max-autotune, channels last")


def parity(runners: list[Runner]) -> list[dict[str, Any]]:
    """Compare every runner with the first one, in decibels, on smooth images of three sizes."""
    rows = []
    channels = runners[0].info.contract.channels
    for height, width in ((64, 64), (97, 131), (180, 320)):
        image = smooth_image((1, channels, height, width))
        expected = run_image(runners[0], image).astype(np.float64)
        for runner in runners[1:]:
            error = float(np.mean((run_image(runner, image) - expected) ** 2))
            decibels = None if error == 0 else round(-10 * float(np.log10(error)), 2)
            rows.append({"runner": runner.info.name, "shape": format_shape(image.shape), "psnr_db": decibels})
    return rows


def measure_shape(runners: list[Runner], shape: Shape) -> dict[str, Any]:
    """Measure all runners on one shape; runners that cannot take it are named with the reason."""
    able, failed = [], {}
    for runner in runners:
        try:
            torch.cuda.reset_peak_memory_stats()
            run_image(runner, smooth_image(shape))
            able.append((runner, torch.cuda.max_memory_allocated()))
        except (SrdeployError, RuntimeError) as error:
            failed[runner.info.name] = str(error).splitlines()[0]
    result = bench([runner for runner, _ in able], shape=shape, effort=EFFORT, image=smooth_image(shape)).to_json()
    for row in result["rows"]:
        del row["times_ms"]
    peaks = {runner.info.name: memory for runner, memory in able}
    return {**result, "failed": failed, "peak_torch_memory_bytes": peaks}


def measured_rates() -> dict[str, float]:
    """Measure an FP16 matrix product (TFLOP/s) and a device copy (GB/s, read plus write)."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    product_ms = _median_ms(lambda: torch.mm(left, right))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
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


def rtx_elsewhere(folder: Path) -> str:
    """Try to open a TensorRT-RTX engine for compute capability 8.0 on this GPU, past our own refusal."""
    from srdeploy.runtime.engines.sidecar import read_engine
    from srdeploy.runtime.engines.tensorrt_open import deserialized
    from srdeploy.runtime.engines.tensorrt_rtx_engine import FLAVOUR

    path, source = folder / "for-8.0.rtx", folder / "srdensenet.fp16.onnx"
    if not source.exists():
        source = folder / "rcan.fp16.onnx"
    channels = 1 if "srdensenet" in source.name else 3
    profile = ShapeProfile((1, channels, 16, 16), (1, channels, 64, 64), (1, channels, 64, 64))
    options = BuildOptions(profiles=(profile,), compute_capabilities=("8.0",), use_cache=False)
    build_engine(source, path, engine="tensorrt-rtx", options=options)
    deserialized(FLAVOUR, FLAVOUR.load(), read_engine(path))
    return "opened"


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
    times = []
    for turn in range(runs + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        if turn >= 5:
            times.append(start.elapsed_time(end))
    return float(np.median(times))


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _attempt(work: Callable[[], str]) -> str:
    try:
        return work()
    except Exception as error:  # the exact outcome is the result, whatever it is
        return f"{type(error).__name__}: {error}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="default: both")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new shape is begun after this time")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
