"""Tiles side by side with what people use, and video end to end beside its slowest stage.

    python benchmarks/upscale.py [--picture PHOTO] [--tile 128] [--rounds 3] [-o benchmarks/results/upscale]

Pictures. One network (the demo RCAN x2, whose channel attention makes tiles differ from the whole image) and one photo:

- srdeploy: whole image, exact tiles in lock-step, overlapped tiles with a crossfade;
- plain ONNX Runtime: windows of the same size with 16 pixels of overlap on each side, cut;
- spandrel: the checkpoint in PyTorch with the usual loop, tiles padded by 10 pixels and cut.

Each runs in a process of its own, in turns, with the same number of threads. Seconds are the median over the rounds of
one whole picture, opening excluded. Memory is the peak of the process above what it held before the run. Fidelity is
the PSNR to the whole image by the same library, so that it judges the tiles alone; the seam score is explained in
`srdeploy.runtime.tiling.seam_score_at`, and its value on the whole image at the same places is the neutral point.

Video. Decoding, the network and encoding are timed alone over the same frames, then `upscale_video` end to end; the
last figure should come within 10 % of the slowest stage. Engine-only is the bare runner without conversions and guards.

What limits both: on a busy machine stages steal time from each other. Read the ratios, and run it on a quiet one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from srdeploy.core.environment import machine, package_versions

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "rcan_x2_demo.pt"
CONTESTANTS = ("whole", "lock-step", "overlapped", "onnxruntime 16 px", "spandrel whole", "spandrel loop")


def main() -> None:
    """Run all contestants and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--picture", type=Path, default=ROOT / "examples" / "photos" / "evaluation" / "coffee.png")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "upscale")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(_contest(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        _export(arguments.folder / "model.onnx")
        rows = _pictures(arguments)
        video = _video(arguments)
    document = {
        "picture": arguments.picture.name,
        "tile": arguments.tile,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "pictures": rows,
        "video": video,
        "machine": machine(),
        "versions": package_versions(["srdeploy", "torch", "onnxruntime", "spandrel", "av", "numpy"]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    text = _markdown(document)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


def _export(path: Path) -> None:
    from srdeploy.export.exporter import export_onnx
    from srdeploy.models.load import Choices, load_checkpoint

    export_onnx(load_checkpoint(CHECKPOINT, Choices(value_range=1.0)), path)


def _pictures(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every contestant in turns; the first round warms the file cache and counts like the others."""
    from srdeploy.runtime.tiling import plan_tiles, seam_score_at

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
        reference = np.load(arguments.folder / f"{'spandrel whole' if 'spandrel' in name else 'whole'}.npy")
        error = float(np.mean((output.astype(np.float64) - reference) ** 2))
        height, width = output.shape[0] // 2, output.shape[1] // 2
        pad = {"onnxruntime 16 px": 16, "spandrel loop": 10}.get(name)
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
    from srdeploy.core.images import rgb8
    from srdeploy.runtime.memory import run_memory

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
    if name == "onnxruntime 16 px":
        return _plain_onnxruntime(model, tile, threads)
    from srdeploy.runtime.budget import TileSettings
    from srdeploy.runtime.upscaler import Upscaler

    settings = {
        "whole": TileSettings(mode="whole"),
        "lock-step": TileSettings(mode="exact", side=tile),
        "overlapped": TileSettings(mode="overlapped", side=tile),
    }[name]
    up = Upscaler.open(model, settings, threads=threads)
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
    except ImportError:
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


def _video(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the stages alone and end to end, interleaved; medians over the rounds."""
    from srdeploy.core.runner import run_image
    from srdeploy.runtime.upscaler import Upscaler
    from srdeploy.runtime.video import VideoOptions, upscale_video
    from srdeploy.runtime.video_io import VideoReader, VideoWriter, choose_encoding

    source = arguments.folder / "clip.mkv"
    _clip(source, arguments.picture, arguments.frames)
    reader = VideoReader(source)
    frames = list(reader.frames())
    reader.close()
    size = (2 * reader.info.height, 2 * reader.info.width)
    encoding = choose_encoding(reader.info, source, size=size, codec=None, quality=None)
    seconds: dict[str, list[float]] = {"decode": [], "compute": [], "encode": [], "engine only": [], "end to end": []}
    with Upscaler.open(arguments.folder / "model.onnx", threads=arguments.threads) as up:
        batch = _batch(frames[0].pixels.astype(np.float32) / 255)
        made = [type(frame)(up(frame.pixels), frame.pts, frame.duration) for frame in frames]

        def decode() -> None:
            again = VideoReader(source)
            for _ in again.frames():
                pass
            again.close()

        def encode() -> None:
            writer = VideoWriter(arguments.folder / "alone.mkv", reader.info, encoding, size)
            for frame in made:
                writer.write(frame)
            writer.close()

        stages = {
            "decode": decode,
            "compute": lambda: [up.upscale(frame.pixels) for frame in frames],
            "encode": encode,
            "engine only": lambda: [run_image(up.runner, batch) for _ in frames],
            "end to end": lambda: upscale_video(
                up, source, arguments.folder / "out.mkv", VideoOptions(force=True, segment_frames=arguments.frames)
            ),
        }
        for _ in range(arguments.rounds):
            for name, stage in stages.items():
                started = time.perf_counter()
                stage()
                seconds[name].append(time.perf_counter() - started)
    rates = {name: len(frames) / statistics.median(values) for name, values in seconds.items()}
    slowest = min(("decode", "compute", "encode"), key=lambda name: rates[name])
    return {
        "frames": len(frames),
        "size": [reader.info.height, reader.info.width],
        "frames_per_second": rates,
        "slowest_stage": slowest,
        "end_to_end_share_of_slowest": rates["end to end"] / rates[slowest],
    }


def _clip(path: Path, picture: Path, count: int) -> None:
    """A pan over the photograph: 192 x 144, 24 frames a second."""
    import av

    from srdeploy.core.images import rgb8

    pixels = rgb8(picture)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        for number in range(count):
            left = number % max(1, pixels.shape[1] - 192)
            view = np.ascontiguousarray(pixels[:144, left : left + 192])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))


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
    video = document["video"]
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
        f"{document['rounds']} rounds on {document['machine']['processor']}.",
        "",
        markdown_table(headers, rows),
        "",
        f"Video, {video['frames']} frames of {video['size'][1]}x{video['size'][0]}, frames per second:",
        "",
        markdown_table(list(video["frames_per_second"]), [[f"{v:.1f}" for v in video["frames_per_second"].values()]]),
        "",
        f"End to end reaches {100 * video['end_to_end_share_of_slowest']:.0f} % of the slowest stage alone "
        f"({video['slowest_stage']}).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
