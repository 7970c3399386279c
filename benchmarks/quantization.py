"""INT8 on OpenVINO: ours beside the defaults of NNCF, of ONNX Runtime's `quantize_static` and of ModelOpt's ONNX PTQ.

    python benchmarks/quantization.py --checkpoint srdensenet_x4.pth --checkpoint rcan_x2.pt \
        --photos PHOTOS --hr SET5/HR [--latency-only rcan_x4] [--compress 0.02] [--modelopt PYTHON] [--keep DIR] \
        [--json results.json]

What is measured, for each checkpoint and each INT8 graph, all running in OpenVINO with FP32 hint (no BF16):

- drop: loss of Y PSNR against HR images, on --hr (shrunk by MATLAB's bicubic) and on the photographs that no method
  was calibrated with (every fourth of --photos);
- fidelity: PSNR against the FP32 output, mean over the --hr images;
- share of the multiply-adds that OpenVINO's runtime model says it computes in 8 bits;
- latency at --size, all graphs, FP32 and eager PyTorch taking turns over five openings of every engine: medians, and
  the median of the ratios of each turn to FP32 with its 95 % interval. FP32 is the graph as exported; "FP32, merged
  end" is the FP32 engine that srdeploy makes of it. Sizes are free, as in what `build` makes of an exported graph, or
  with --fixed-shape known to OpenVINO, as in what it makes of `export --static`.

What limits it: all graphs share one machine; only ratios of one run are comparable, and only when nothing
else runs: `conditions` of the result has load and clock before and after. All methods see the same calibration crops.
`--latency-only` names presets whose random weights make timings honest and decibels meaningless. `--keep` keeps the
graphs in a folder and takes those that are there, so that making and timing can be separate runs. Needs the `bench`
extra. `--modelopt` names the interpreter of an environment with nvidia-modelopt, whose packages conflict; its autotune
measures with TensorRT on a GPU and is not part of this.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from srdeploy.calibration.compress.compress import compress
from srdeploy.calibration.compress.result import CompressOptions
from srdeploy.calibration.fp32 import read_fp32_graph
from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.calibration.options import Cost, QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.cli.console import RichProgress, markdown_table
from srdeploy.core.contract import ModelContract
from srdeploy.core.imaging.files import find_images
from srdeploy.core.imaging.read import network_input, rgb8
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.shapes import Shape
from srdeploy.models.checkpoint.load import load_checkpoint
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.ratios import ratio_of_rounds
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.merged_end import merge_end, tile_end
from srdeploy.runtime.engines.registry import open_engine

OPENINGS = 5
"""Every engine is opened so often: where its buffers happen to lie makes it up to a quarter slower while it is open."""


LABELS = {
    "compressed": "ours, compressed",
    "nncf": "NNCF default PTQ",
    "onnxruntime": "ORT quantize_static",
    "modelopt": "ModelOpt ONNX PTQ",
}


@dataclass
class Entry:
    """One graph of the comparison and what was measured of it."""

    method: str
    path: Path
    seconds: float = float("nan")
    drop_hr: float = float("nan")
    drop_photos: float = float("nan")
    fidelity: float = float("nan")
    int8_macs: float = float("nan")
    ms: float = float("nan")
    over_fp32: str = ""
    ratio: float = float("nan")
    ratio_low: float = float("nan")
    ratio_high: float = float("nan")
    as_exported: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, action="append", default=[])
    parser.add_argument("--latency-only", choices=["rcan_x4"], action="append", default=[])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--hr", type=Path, required=True)
    parser.add_argument(
        "--min-fidelity",
        type=float,
        action="append",
        default=[],
        help="once per checkpoint, in their order; default 57",
    )
    parser.add_argument("--cost", choices=["latency", "macs"], default="latency", help="what our search pays in")
    parser.add_argument(
        "--compress",
        type=float,
        metavar="DB",
        help="adds our INT8 graph of the network compressed for INT8, both within this loss on held-out photographs",
    )
    parser.add_argument("--crops", type=int, default=48)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latency input")
    parser.add_argument(
        "--fixed-shape", action="store_true", help="time graphs that OpenVINO knows the size of; default: any size"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peers", nargs="*", default=["nncf", "onnxruntime"])
    parser.add_argument(
        "--modelopt", type=Path, help="interpreter with nvidia-modelopt: adds its ONNX PTQ to the peers"
    )
    parser.add_argument("--keep", type=Path, help="folder that keeps the graphs, or holds those of an earlier run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": ["python", *sys.argv],
        "threads": arguments.threads,
        "conditions": {"before": conditions()},
        "networks": {},
    }
    with nullcontext(arguments.keep) if arguments.keep else tempfile.TemporaryDirectory() as folder:
        for checkpoint, bound in zip_longest(arguments.checkpoint, arguments.min_fidelity, fillvalue=57.0):
            source = exported(checkpoint, Path(folder) / f"{checkpoint.stem}.onnx")
            document["networks"][checkpoint.stem] = compare(source, checkpoint, arguments, bound)
        for preset in arguments.latency_only:
            checkpoint = random_checkpoint(preset, Path(folder))
            source = exported(checkpoint, Path(folder) / f"{preset}.onnx")
            document["networks"][preset] = compare(source, checkpoint, arguments, None)
    document["conditions"]["after"] = conditions()
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def compare(source: Path, checkpoint: Path, arguments: argparse.Namespace, bound: float | None) -> list[dict[str, Any]]:
    has_quality = bound is not None  # random weights have none
    graph = read_fp32_graph(source)
    model, contract = graph.model, graph.contract
    progress = RichProgress()
    crops = arguments.crops if has_quality else 4
    calibration = make_calibration_set(
        arguments.photos, contract=contract, hr=True, count=crops, crop=48, whole=2 if has_quality else 0
    )
    opener = opener_for(arguments.threads)
    entries = [Entry("FP32", source, as_exported=True), Entry("FP32, merged end", source)]
    methods: dict[str, Callable[[Path], None]] = {
        "ours": lambda path: ours(source, path, calibration, bound, arguments.cost, opener),
        "compressed": lambda path: ours_compressed(source, path, calibration, arguments.compress, opener),
        "nncf": lambda path: by_nncf(source, path, calibration),
        "onnxruntime": lambda path: by_onnxruntime(source, path, calibration),
        "modelopt": lambda path: by_modelopt(source, path, calibration, arguments.modelopt),
    }
    compressed = ["compressed"] if arguments.compress and has_quality else []
    for name in ("ours", *compressed, *arguments.peers, *(["modelopt"] if arguments.modelopt else [])):
        path = source.with_name(f"{source.stem}.{name}.onnx" if name != "nncf" else f"{source.stem}.nncf.xml")
        entries.append(Entry(LABELS.get(name, name), path))
        if not path.exists():
            start = time.perf_counter()
            methods[name](path)
            entries[-1].seconds = time.perf_counter() - start
            progress.note(f"{source.stem}: {name} took {entries[-1].seconds:.0f} s")
    runners = [opened(entry, contract, arguments.threads) for entry in entries]
    if has_quality:
        hr = hr_samples(arguments.hr, contract)
        for evaluator, field in (
            (Evaluator(model, calibration.held_out, contract), "drop_photos"),
            (Evaluator(model, hr, contract), ""),
        ):
            for entry, runner in zip(entries, runners, strict=True):
                quality = evaluator.evaluate_runner(runner)
                setattr(entry, field or "drop_hr", quality.drop_db)
                entry.fidelity = quality.fidelity_db
    for entry, runner in zip(entries, runners, strict=True):
        entry.int8_macs = runner.info.built["macs_share"].get("int8", 0.0)
    shape = (1, contract.channels, arguments.size, arguments.size)
    eager = open_eager(load_checkpoint(checkpoint), threads=arguments.threads)
    times: list[list[float]] = [[] for _ in range(len(entries) + 1)]
    fixed = shape if arguments.fixed_shape else None
    for opening in range(OPENINGS):
        if opening or fixed:
            runners = [opened(entry, contract, arguments.threads, fixed) for entry in entries]
        for own, measured in zip(times, latencies([*runners, eager], shape, arguments.repeats), strict=True):
            own += measured
    entries.append(Entry("eager PyTorch FP32", checkpoint, int8_macs=0.0))
    for entry, own in zip(entries, times, strict=True):
        entry.ms = statistics.median(own)
        ratio = ratio_of_rounds(times[0], own, visit=arguments.repeats)
        entry.over_fp32 = ratio.label
        entry.ratio, entry.ratio_low, entry.ratio_high = ratio.value, ratio.low, ratio.high
    show(source.stem, entries)
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(entry).items()}
        | {"path": entry.path.name}
        for entry in entries
    ]


def ours(
    source: Path,
    output: Path,
    calibration: CalibrationSet,
    fidelity: float | None,
    cost: Cost,
    opener: Callable[[Path], Runner],
) -> None:
    # Without a quality to search for (random weights) the plain decisions that trained networks lead to are taken.
    plain = QuantizeOptions(strength=0.5, method="minmax")
    options = QuantizeOptions(min_fidelity=fidelity, cost=cost) if fidelity else plain
    quantize(
        source,
        output,
        precision=Precision.INT8,
        target=Target.OPENVINO,
        calibration=calibration,
        options=options,
        open_engine=opener,
        progress=RichProgress(),
    )


def ours_compressed(
    source: Path, output: Path, calibration: CalibrationSet, drop: float, opener: Callable[[Path], Runner]
) -> None:
    """What `deploy --compress` does: half of the loss for compression, and what is left for INT8."""
    small = source.with_name(f"{source.stem}.small.onnx")
    compress(
        source,
        small,
        calibration=calibration,
        options=CompressOptions(Bound(drop / 2), Target.OPENVINO, precision=Precision.INT8),
        open_engine=opener,
        progress=RichProgress(),
    )
    quantize(
        small,
        output,
        precision=Precision.INT8,
        target=Target.OPENVINO,
        calibration=calibration,
        options=QuantizeOptions(max_psnr_drop=drop),
        open_engine=opener,
        reference=source,
        progress=RichProgress(),
    )


def by_nncf(source: Path, output: Path, calibration: CalibrationSet) -> None:
    import nncf
    import openvino

    network = openvino.Core().read_model(source)
    quantized = nncf.quantize(network, nncf.Dataset(list(calibration)))
    openvino.save_model(quantized, output, compress_to_fp16=False)


def by_onnxruntime(source: Path, output: Path, calibration: CalibrationSet) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"input": batch}

    quantize_static(source, output, Reader())
    with_metadata(output, source)


def opener_for(threads: int | None) -> Callable[[Path], Runner]:
    return lambda path: open_engine(path, engine="openvino", threads=threads, parity=True)


def by_modelopt(source: Path, output: Path, calibration: CalibrationSet, python: Path) -> None:
    shape = next(iter(calibration)).shape
    crops = np.concatenate([batch for batch in calibration if batch.shape == shape])
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "crops.npy", crops)
        data = ["--calibration_data_path", f"{folder}/crops.npy", "--calibration_eps", "cpu"]
        kinds = ["--quantize_mode", "int8", "--high_precision_dtype", "fp32"]
        command = [python, "-m", "modelopt.onnx.quantization", "--onnx_path", source, "--output_path", output]
        subprocess.run([*command, *kinds, *data], check=True, stdout=subprocess.DEVNULL)
    with_metadata(output, source)


def with_metadata(path: Path, source: Path) -> None:
    """Give a graph the metadata that tells what it is, where its maker dropped it."""
    model = onnx.load(path)
    if not any(entry.key.startswith("srdeploy.") for entry in model.metadata_props):
        model.metadata_props.extend(onnx.load(source).metadata_props)
        onnx.save(model, path)


def opened(entry: Entry, contract: ModelContract, threads: int | None, fixed: Shape | None = None) -> Runner:
    """Open a graph with OpenVINO: ours as srdeploy does, others as they are; `fixed` sets the size of the input."""
    path = entry.path
    ours = path.suffix != ".xml" and not entry.as_exported
    if ours and fixed is None:
        return opener_for(threads)(path)
    import openvino

    from srdeploy.runtime.engines import openvino as openvino_engine

    graph = read_graph(path.with_name(path.name.replace(".nncf.xml", ".onnx")))
    merged: tuple[str, ...] = ()
    if ours:
        graph, merged = merge_end(graph)
    core = openvino.Core()
    network = core.read_model(tile_end(graph).serialized() if ours else path)
    if fixed:
        network.reshape(list(fixed))
    compiled = core.compile_model(network, "CPU", openvino_engine._configuration(threads))
    built = openvino_engine._built(compiled, graph.layers, merged)
    return openvino_engine.OpenVinoRunner(compiled, contract, graph.inputs, built, threads, None, True)


def hr_samples(folder: Path, contract: ModelContract) -> list[Any]:
    from srdeploy.core.samples import Sample

    samples = []
    for path in find_images(folder):
        high = rgb8(path)
        height, width = (size - size % contract.scale for size in high.shape[:2])
        high = high[:height, :width]
        low = imresize(high, scale=1 / contract.scale)
        samples.append(Sample(path.name, network_input(low, contract.colours), high))
    return samples


def latencies(runners: Sequence[Runner], shape: tuple[int, ...], repeats: int) -> list[list[float]]:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    times: list[list[float]] = [[] for _ in runners]
    for turn in range(repeats + 2):
        for own, runner in zip(times, runners, strict=True):
            start = time.perf_counter()
            run_image(runner, image)
            if turn >= 2:  # the first turns warm up
                own.append(1e3 * (time.perf_counter() - start))
    return times


def exported(checkpoint: Path, output: Path) -> Path:
    from srdeploy.export.exporter import export_onnx

    if not output.exists():
        export_onnx(load_checkpoint(checkpoint), output)
    return output


def random_checkpoint(preset: str, folder: Path) -> Path:
    """Write the full-size network with random weights in the official layout."""
    import torch

    torch.manual_seed(0)
    features, state = 64, dict[str, torch.Tensor]()

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        layer = torch.nn.Conv2d(inputs, outputs, kernel)
        state[f"{name}.weight"], state[f"{name}.bias"] = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]

    conv("head.0", 3, features)
    for group in range(10):
        for block in range(20):
            name = f"body.{group}.body.{block}.body"
            conv(f"{name}.0", features, features)
            conv(f"{name}.2", features, features)
            conv(f"{name}.3.conv_du.0", features, 4, 1)
            conv(f"{name}.3.conv_du.2", 4, features, 1)
        conv(f"body.{group}.body.20", features, features)
    conv("body.10", features, features)
    conv("tail.0.0", features, 4 * features)
    conv("tail.0.2", features, 4 * features)
    conv("tail.1", features, 3)
    torch.save(state, folder / f"{preset}.pt")
    return folder / f"{preset}.pt"


def show(name: str, entries: Sequence[Entry]) -> None:
    headers = (
        "graph",
        "drop HR dB",
        "drop photos dB",
        "fidelity dB",
        "MACs in INT8",
        "ms",
        "over FP32",
        "over eager",
        "made in s",
    )
    rows = [
        (
            entry.method,
            f"{entry.drop_hr:.4f}",
            f"{entry.drop_photos:.4f}",
            f"{entry.fidelity:.2f}",
            f"{100 * entry.int8_macs:.1f} %",
            f"{entry.ms:.1f}",
            entry.over_fp32,
            f"{entries[-1].ms / entry.ms:.2f}x",
            "" if math.isnan(entry.seconds) else f"{entry.seconds:.0f}",
        )
        for entry in entries
    ]
    print(f"\n### {name}\n\n{markdown_table(headers, rows)}", flush=True)


if __name__ == "__main__":
    main()
