"""Tiles side by side with what people use, and video end to end beside its slowest stage.

    python benchmarks/upscale.py [--part pictures|video] [--picture PHOTO] [--tile 128] [--rounds 3]

Pictures. One network (the demo RCAN x2, whose channel attention makes tiles differ from the whole image) and one photo:

- srdeploy: whole image, exact tiles in lock-step, overlapped tiles with a crossfade;
- plain ONNX Runtime: windows of the same size with 16 pixels of overlap on each side, cut;
- spandrel: the checkpoint in PyTorch with the usual loop, tiles padded by 10 pixels and cut.

Each runs in a process of its own, in turns, with the same number of threads. Seconds are the median over the rounds of
one whole picture, opening excluded. Memory is the peak of the process above what it held before the run. Fidelity is
the PSNR to the whole image by the same library, so that it measures the tiles alone; the seam score is explained in
`srdeploy.upscale.tiles.seam_score_at`, and its value on the whole image at the same places is the neutral point.

Lock-step on the three engines that can be cut, with whole images by the same engine beside it, is what exactness costs.

Video: see `upscale_video.py`, which `--part video` runs. What limits both: on a busy machine others steal time. Read
the ratios, and run it on a quiet one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import upscale_video

from srdeploy.core.environment import package_versions
from srdeploy.runtime.bench.conditions import conditions

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "rcan_x2_demo.pt"
CONTESTANTS = (
    "whole",
    "lock-step",
    "overlapped",
    "plain onnxruntime, 16 px",
    "spandrel whole",
    "spandrel loop",
    "openvino whole",
    "openvino lock-step",
    "eager whole",
)
REFERENCES = {
    "spandrel loop": "spandrel whole",
    "openvino lock-step": "openvino whole",
}
"""Which whole image the tiles are compared with; ours on ONNX Runtime by default."""


def main() -> None:
    """Run all contestants and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--picture", type=Path, default=ROOT / "examples" / "photos" / "evaluation" / "coffee.png")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("pictures", "video"), help="one of the two; default: both")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(_contest(arguments)))
        return
    made = {"pictures": _picture_document, "video": _video_document}
    for part in [arguments.part] if arguments.part else list(made):
        with tempfile.TemporaryDirectory() as folder:
            arguments.folder = Path(folder)
            _export(arguments.folder / "model.onnx")
            document = made[part](arguments)
        document |= {"command": " ".join(["python", *sys.argv]), "conditions": conditions()}
        document["versions"] = package_versions(["srdeploy", "torch", "onnxruntime", "openvino", "spandrel", "av"])
        path = arguments.output / f"upscale_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = document.pop("markdown")
        path.write_text(json.dumps(document, indent=2) + "\n")
        path.with_suffix(".md").write_text(text)
        print(text)


def _picture_document(arguments: argparse.Namespace) -> dict[str, Any]:
    document = {
        "picture": arguments.picture.name,
        "tile": arguments.tile,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "pictures": _pictures(arguments),
    }
    return document | {"markdown": _markdown(document)}


def _video_document(arguments: argparse.Namespace) -> dict[str, Any]:
    cases = upscale_video.cases(arguments.folder, arguments.folder / "model.onnx", arguments.picture, arguments.rounds)
    return {"rounds": arguments.rounds, "video": cases, "markdown": upscale_video.markdown(cases)}


def _export(path: Path) -> None:
    from srdeploy.export.exporter import export_onnx
    from srdeploy.models.checkpoint.load import Choices, load_checkpoint

    export_onnx(load_checkpoint(CHECKPOINT, Choices(value_range=1.0)), path)


def _pictures(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every contestant in turns; the first round warms the file cache and counts like the others."""
    from srdeploy.upscale.tiles import plan_tiles, seam_score_at

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.rounds):
        for name in CONTESTANTS:
            words = ["--contestant", name, "--folder", arguments.folder, "--picture", arguments.picture]
            words += ["--tile", arguments.tile, "--threads", arguments.threads]
            run = subprocess.run(
                [sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=False
            )
            last = run.stdout.strip().splitlines()[-1:] or [json.dumps({"failed": run.stderr.strip()[-300:]})]
            results[name].append(json.loads(last[0]))
    rows = []
    for name, runs in results.items():
        failed = next((run["failed"] for run in runs if "failed" in run), None)
        if failed is not None:
            rows.append({"contestant": name, "failed": failed})
            continue
        output = np.load(arguments.folder / f"{name}.npy")
        reference = np.load(arguments.folder / f"{REFERENCES.get(name, 'whole')}.npy")
        error = float(np.mean((output.astype(np.float64) - reference) ** 2))
        height, width = output.shape[0] // 2, output.shape[1] // 2
        pad = {"plain onnxruntime, 16 px": 16, "spandrel loop": 10}.get(name)
        if pad is None:
            plan = plan_tiles(height, width, window=(arguments.tile, arguments.tile), halo=16)
            seams = [list(plan.rows.seams), list(plan.columns.seams)]
        else:
            seams = [_edges(size, arguments.tile - 2 * pad) for size in (height, width)]
        rows.append(
            {
                "contestant": name,
                "seconds": statistics.median(run["seconds"] for run in runs),
                "peak_mib": statistics.median(run["peak_mib"] for run in runs),
                "fidelity_db": None if error == 0 else -10 * float(np.log10(error)),
                "largest_difference": float(np.abs(output - reference).max()),
                "seam_score": seam_score_at(output, *seams, scale=2),
                "seam_score_whole": seam_score_at(reference, *seams, scale=2),
            }
        )
    return rows


def _edges(size: int, core: int) -> list[float]:
    return [float(edge) for edge in range(core, size, core)]


def _contest(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant once, in a process of its own."""
    from srdeploy.core.imaging.read import rgb8
    from srdeploy.runtime.bench.memory import run_memory

    pixels = rgb8(arguments.picture).astype(np.float32) / 255
    name, tile = arguments.contestant, arguments.tile
    try:
        run = _prepared(name, arguments.folder / "model.onnx", tile, arguments.threads)
    except ImportError as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    run(pixels[:48, :48])  # kernels are chosen and memory pools made before the clock starts
    result: list[np.ndarray] = []
    seconds: list[float] = []

    def once() -> None:
        started = time.perf_counter()
        result.append(run(pixels))
        seconds.append(time.perf_counter() - started)

    memory = run_memory(once)
    np.save(arguments.folder / f"{name}.npy", result[0])
    return {"seconds": seconds[0], "peak_mib": (memory or 0) / 2**20}


def _prepared(name: str, model: Path, tile: int, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    if name.startswith("spandrel"):
        return _spandrel(tile if name == "spandrel loop" else None, threads)
    if name == "plain onnxruntime, 16 px":
        return _plain_onnxruntime(model, tile, threads)
    from srdeploy.models.checkpoint.load import Choices, load_checkpoint
    from srdeploy.runtime.engines.eager import open_eager
    from srdeploy.upscale.budget import TileSettings
    from srdeploy.upscale.upscaler import Upscaler

    modes = {
        "whole": TileSettings(mode="whole"),
        "lock-step": TileSettings(mode="exact", side=tile),
        "overlapped": TileSettings(mode="overlapped", side=tile),
    }
    settings = modes[name.split()[-1]]
    if name.startswith("eager"):
        up = Upscaler(open_eager(load_checkpoint(CHECKPOINT, Choices(value_range=1.0)), threads=threads), settings)
    else:
        engine = "openvino" if name.startswith("openvino") else None
        up = Upscaler.open(model, settings, engine=engine, threads=threads)
    return lambda pixels: up(pixels)


def _plain_onnxruntime(model: Path, tile: int, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda pixels: _loop(pixels, tile, 16, lambda planes: session.run(None, {"input": planes})[0])


def _spandrel(tile: int | None, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """spandrel asks for torchvision, which exists for released torch builds only: an empty stand-in lets it import."""
    import torch

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # missing, or made for another build of torch
        _stand_in_for_torchvision()
    import spandrel

    torch.set_num_threads(threads)
    network = spandrel.ModelLoader().load_from_state_dict(torch.load(CHECKPOINT, weights_only=True))

    def planes(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            # The bare network: spandrel's own call clamps, and the fidelity here is of unclamped floats.
            return network.model(torch.from_numpy(batch)).numpy()

    if tile is None:
        return lambda pixels: planes(_batch(pixels))[0].transpose(1, 2, 0)
    return lambda pixels: _loop(pixels, tile, 10, planes)


def _loop(pixels: np.ndarray, tile: int, pad: int, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The loop of every upscaling script: cores side by side, padded where there is picture, cut after the network."""
    height, width, _ = pixels.shape
    core = tile - 2 * pad
    output = np.empty((2 * height, 2 * width, 3), np.float32)
    for top in range(0, height, core):
        for left in range(0, width, core):
            bottom, right = min(top + core, height), min(left + core, width)
            above, before = max(top - pad, 0), max(left - pad, 0)
            window = pixels[above : min(bottom + pad, height), before : min(right + pad, width)]
            made = run(_batch(window))[0].transpose(1, 2, 0)
            output[2 * top : 2 * bottom, 2 * left : 2 * right] = made[
                2 * (top - above) : 2 * (bottom - above), 2 * (left - before) : 2 * (right - before)
            ]
    return output


def _batch(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _stand_in_for_torchvision() -> None:
    import importlib.machinery
    import types

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
                 "torchvision.transforms.functional", "torchvision.models"):  # fmt: skip
        module = Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module


def _markdown(document: dict[str, Any]) -> str:
    from srdeploy.cli.console import markdown_table

    rows = []
    for row in document["pictures"]:
        if "failed" in row:
            rows.append([row["contestant"], "could not run: " + row["failed"], "", "", "", ""])
            continue
        fidelity = "equal" if row["fidelity_db"] is None else f"{row['fidelity_db']:.1f}"
        seam = "" if row["seam_score"] is None else f"{row['seam_score']:.4f} ({row['seam_score_whole']:.4f})"
        rows.append(
            [
                row["contestant"],
                f"{row['seconds']:.2f}",
                f"{row['peak_mib']:.0f}",
                fidelity,
                f"{row['largest_difference']:.1e}",
                seam,
            ]
        )
    headers = [
        "contestant",
        "seconds",
        "peak MiB",
        "PSNR to whole, dB",
        "largest difference",
        "seams (whole image there)",
    ]
    lines = [
        f"Picture {document['picture']}, tiles of {document['tile']}, {document['threads']} thread(s), median of "
        f"{document['rounds']} rounds.",
        "",
        markdown_table(headers, rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
