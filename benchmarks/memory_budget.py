"""Peak memory of `quantize` on RCAN x4 of full size, whatever the pictures.

    python benchmarks/memory_budget.py [--memory 3GiB] [--case photos] [--precision fp16] [--json results.json]

What is measured, for each case and precision, in a process of its own: the largest resident set of making the
calibration set and quantizing, seconds on the clock, and seconds of processor time.

- photos: 62 pictures of 481x321;
- large: eight pictures of 24 megapixels;
- many: 2,000 pictures of 240x160.

The pictures are made from the example photographs, enlarged, cut, turned and relit, with noise; the network has random
weights, so decibels mean nothing here. FP16 is made for TensorRT for RTX, INT8 for OpenVINO. What limits it: the clock
is only meaningful when nothing else runs; `load` is the machine's load average at the start. The goal is 4 GiB.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from srdeploy.cli.console import RichProgress, markdown_table
from srdeploy.core.environment import machine, package_versions
from srdeploy.core.sizes import format_bytes, parse_bytes

EXAMPLES = Path(__file__).parents[1] / "examples" / "photos"
CASES = {"photos": (62, 481, 321), "large": (8, 6000, 4000), "many": (2000, 240, 160)}
"""Name to number, width and height of the pictures."""
TARGETS = {"fp16": "tensorrt-rtx", "int8": "openvino"}
GOAL_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="3GiB", help="budget given to the calibration set")
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--precision", choices=list(TARGETS), action="append")
    parser.add_argument("--model", type=Path, help="an exported FP32 graph instead of RCAN x4 with random weights")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "IMAGES", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    memory = parse_bytes(arguments.memory, "--memory")
    if arguments.one:
        model, images, precision = arguments.one
        print(json.dumps(quantize_once(Path(model), Path(images), precision, memory)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or export_full_size(Path(folder))
        for case in arguments.case or CASES:
            images = make_pictures(Path(folder) / case, *CASES[case])
            for precision in arguments.precision or TARGETS:
                rows.append({"case": case, "precision": precision} | in_a_process(model, images, precision, arguments))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table = [
        (r["case"], r["precision"], format_bytes(r["peak_bytes"]), f"{r['seconds']:.0f}", f"{r['cpu_seconds']:.0f}")
        for r in rows
    ]
    print(markdown_table(("pictures", "precision", "peak memory", "seconds", "processor seconds"), table))
    if arguments.json:
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": ["python", *sys.argv],
            "machine": machine(),
            "versions": package_versions(["openvino", "onnxruntime", "onnx", "numpy"]),
            "budget_bytes": memory,
            "runs": rows,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if any(row["peak_bytes"] > GOAL_BYTES for row in rows):
        sys.exit(1)


def in_a_process(model: Path, images: Path, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    start = time.perf_counter()
    command = [sys.executable, __file__, "--memory", arguments.memory, "--one", str(model), str(images), precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) | {"seconds": round(time.perf_counter() - start, 1), "load": round(load, 1)}


def quantize_once(model: Path, images: Path, precision: str, memory: int) -> dict[str, Any]:
    from srdeploy.calibration.fp32 import read_fp32_graph
    from srdeploy.calibration.images.dataset import make_calibration_set
    from srdeploy.calibration.quantize import quantize
    from srdeploy.core.precision import Precision, Target
    from srdeploy.runtime.engines.registry import open_engine

    progress = RichProgress()
    contract = read_fp32_graph(model).contract
    calibration = make_calibration_set(images, contract=contract, memory_bytes=memory, progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SRDEPLOY_CACHE_DIR"] = folder  # nothing is resumed
        result = quantize(
            model,
            Path(folder) / "result.onnx",
            precision=Precision(precision),
            target=Target(TARGETS[precision]),
            calibration=calibration,
            open_engine=(lambda path: open_engine(path, engine="openvino", parity=True))
            if precision == "int8"
            else None,
            progress=progress,
        )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "peak_bytes": peak_bytes(),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "calibration_pixels": calibration.document["lr_pixels"],
        "int8_macs_share": result.int8_macs,
        "ways_compared": len(result.choice.trials) if result.choice else 0,
    }


def peak_bytes() -> int:
    """Return this process's largest resident set; `ru_maxrss` would include that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def export_full_size(folder: Path) -> Path:
    import torch

    from srdeploy.export.exporter import export_onnx
    from srdeploy.models.checkpoint.load import load_checkpoint
    from srdeploy.models.checkpoint.save import save_checkpoint
    from srdeploy.models.networks.rcan import Rcan, rcan_x4

    torch.manual_seed(0)
    save_checkpoint(Rcan(rcan_x4()), folder / "rcan_x4.pt")
    export_onnx(load_checkpoint(folder / "rcan_x4.pt"), folder / "rcan_x4.onnx", progress=RichProgress())
    return folder / "rcan_x4.onnx"


def make_pictures(folder: Path, count: int, width: int, height: int) -> Path:
    """Write pictures made from the example photographs: enlarged, cut, mirrored, relit, with noise."""
    folder.mkdir()
    sources = [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.rglob("*.png"))]
    random = np.random.default_rng(0)
    for index in range(count):
        source = sources[index % len(sources)]
        zoom = max(width / source.width, height / source.height) * random.uniform(1.0, 1.5)
        enlarged = source.resize(
            (int(source.width * zoom) + 1, int(source.height * zoom) + 1), Image.Resampling.BICUBIC
        )
        left, top = (int(random.integers(0, size + 1)) for size in (enlarged.width - width, enlarged.height - height))
        pixels = np.asarray(enlarged.crop((left, top, left + width, top + height)), dtype=np.float32)
        pixels = pixels[:, :: -1 if random.random() < 0.5 else 1] * random.uniform(0.7, 1.2)
        pixels += random.normal(0, 2, pixels.shape).astype(np.float32)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{index:04}.jpg", quality=92)
    return folder


if __name__ == "__main__":
    main()
