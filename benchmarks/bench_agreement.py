"""Does `srdeploy bench` tell the time right? The same engine by three stopwatches.

    python benchmarks/bench_agreement.py MODEL.onnx [--shape 1x3x96x96] [--seconds 4] [--rounds 5]

What is measured: one FP32 graph in OpenVINO (one stream, synchronous, hint f32, all threads), by

- srdeploy's bench, its "compute" row;
- OpenVINO's own benchmark_app, in a process of its own, by the median that it prints;
- a loop of ten lines around `infer()`, as one would write it by hand.

What limits it: the machine drifts between processes, so the three take turns for several rounds, and the median over
the rounds is compared. They should agree within 10 %.

How to read it: the ratio to benchmark_app. Needs no network and no data.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from srdeploy.cli.console import markdown_table
from srdeploy.core.environment import cpu_count
from srdeploy.core.shapes import Shape, format_shape, parse_shape
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.latency import bench
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines.registry import open_engine

LIMIT = 0.10


def by_srdeploy(model: Path, shape: Shape, seconds: float) -> float:
    effort = Effort(warmup_seconds=1.0, min_runs=15, max_runs=100_000, seconds=seconds, tolerance=1e-9)
    with open_engine(model, engine="openvino", parity=True) as runner:
        row = bench([runner], shape=shape, effort=effort).row(runner.info.name, "compute")
    assert row is not None
    return row.statistics.median_ms


def by_benchmark_app(model: Path, shape: Shape, seconds: float) -> float:
    """Run OpenVINO's tool and read its median in milliseconds."""
    words = [
        str(Path(sys.executable).with_name("benchmark_app")), "-m", str(model), "-d", "CPU", "-api", "sync",
        "-hint", "none", "-nstreams", "1", "-nthreads", str(cpu_count()), "-infer_precision", "f32",
        "-shape", f"[-1,{shape[1]},-1,-1]", "-data_shape", f"[{','.join(map(str, shape))}]",
        "-t", str(max(1, round(seconds))),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = re.search(r"Median:\s+([0-9.]+) ms", done.stdout)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"benchmark_app failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return float(found[1])


def by_hand(model: Path, shape: Shape, seconds: float) -> float:
    import openvino

    core = openvino.Core()
    settings = {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": cpu_count(), "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(bench_image(shape)))
    times = []
    start = time.perf_counter()
    while time.perf_counter() < start + 1.0 + seconds:
        before = time.perf_counter()
        request.infer()
        if before > start + 1.0:
            times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="FP32 ONNX file written by srdeploy export")
    parser.add_argument("--shape", type=parse_shape, default=(1, 3, 96, 96))
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time of each stopwatch in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    stopwatches = {"srdeploy bench, compute": by_srdeploy, "benchmark_app": by_benchmark_app, "loop by hand": by_hand}
    found: dict[str, list[float]] = {name: [] for name in stopwatches}
    for number in range(options.rounds):
        for name, stopwatch in stopwatches.items():
            found[name].append(stopwatch(options.model, options.shape, options.seconds))
        print(f"round {number + 1}: " + ", ".join(f"{name} {times[-1]:.3f} ms" for name, times in found.items()))
    medians = {name: statistics.median(times) for name, times in found.items()}
    base = medians["benchmark_app"]
    rows = [
        (name, f"{medians[name]:.3f}", f"{medians[name] / base:.3f}", f"{min(times):.3f} to {max(times):.3f}")
        for name, times in found.items()
    ]
    print(f"\nOpenVINO FP32 at {format_shape(options.shape)}, median of {options.rounds} rounds\n")
    print(markdown_table(("stopwatch", "ms", "ratio to benchmark_app", "range over the rounds"), rows))
    agrees = all(abs(value / base - 1.0) <= LIMIT for value in medians.values())
    print(f"\n{'agree' if agrees else 'DISAGREE'} within {LIMIT:.0%}")
    document: dict[str, Any] = {
        "shape": format_shape(options.shape),
        "rounds_ms": found,
        "median_ms": medians,
        "agrees": agrees,
        "environment": conditions(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench_agreement.json").write_text(json.dumps(document, indent=1) + "\n")
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
