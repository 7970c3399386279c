"""Video end to end beside its stages alone. Run by `python benchmarks/upscale.py --part video`.

Decoding, the network ("compute": conversions and guards included) and encoding are timed alone over the same frames,
then `upscale_video` from file to file, in turns; figures are medians over the rounds. "Engine only" is the bare runner.

How fast can it be? No faster than its slowest stage alone. On a CPU the stages also share the processors, so no
faster than all their processor time together, spread over all processors: with one thread for the network and a second
processor free, the first limit counts; with all threads for the network, the second. The limit is the larger time, and
end to end should come within 10 % of it.

Three cases: a real RCAN with one thread and with all (the network is nearly everything), and one layer that repeats
pixels, which takes about as long as encoding, as a network on a GPU does: there overlap is worth most.
"""

import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.environment import cpu_count
from srdeploy.core.imaging.read import network_input, rgb8

STAGES = ("decode", "compute", "encode")


def cases(folder: Path, rcan: Path, picture: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure all cases.

    Args:
        folder: for clips and models.
        rcan: ONNX file of a real network.
        picture: what the clips pan over.
        rounds: how often everything is run.
    """
    small, large = folder / "small.mkv", folder / "large.mkv"
    write_clip(small, picture, (144, 192), 24)
    write_clip(large, picture, (360, 640), 300)
    layer = folder / "layer.onnx"
    write_layer(layer)
    return [
        {"case": "RCAN x2, 192x144, 1 thread", **measure(rcan, small, folder, rounds, 1)},
        {"case": f"RCAN x2, 192x144, {cpu_count()} threads", **measure(rcan, small, folder, rounds, cpu_count())},
        {"case": "one layer x2, 640x360, 1 thread", **measure(layer, large, folder, rounds, 1)},
    ]


def measure(model: Path, source: Path, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Time the stages of one video alone and end to end."""
    from srdeploy.core.runner import run_image
    from srdeploy.upscale.upscaler import Upscaler
    from srdeploy.upscale.video.encoding import choose_encoding
    from srdeploy.upscale.video.job import VideoOptions, upscale_video
    from srdeploy.upscale.video.reader import Frame, VideoReader
    from srdeploy.upscale.video.writer import VideoWriter

    reader = VideoReader(source)
    frames = list(reader.frames())
    reader.close()
    info = reader.info
    size = (2 * info.height, 2 * info.width)
    encoding = choose_encoding(info, source, size=size, codec=None, quality=None)
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    with Upscaler.open(model, threads=threads) as up:
        batch = network_input(frames[0].pixels, up.contract.colours)
        made = [Frame(up(frame.pixels), frame.pts, frame.duration) for frame in frames]

        def decode() -> None:
            again = VideoReader(source)
            for _ in again.frames():
                pass
            again.close()

        def encode() -> None:
            writer = VideoWriter(folder / "alone.mkv", info, encoding, size)
            for frame in made:
                writer.write(frame)
            writer.close()

        stages: dict[str, Callable[[], object]] = {
            "decode": decode,
            "compute": lambda: [up.upscale(frame.pixels) for frame in frames],
            "encode": encode,
            "engine only": lambda: [run_image(up.runner, batch) for _ in frames],
            "end to end": lambda: upscale_video(up, source, folder / "out.mkv", VideoOptions(force=True)),
        }
        for _ in range(rounds):
            for name, stage in stages.items():
                started, used = time.perf_counter(), time.process_time()
                stage()
                processor.setdefault(name, []).append(time.process_time() - used)
                wall.setdefault(name, []).append(time.perf_counter() - started)
    seconds = {name: statistics.median(values) / len(frames) for name, values in wall.items()}
    work = {name: statistics.median(values) / len(frames) for name, values in processor.items()}
    slowest = max(STAGES, key=lambda name: seconds[name])
    shared = sum(work[name] for name in STAGES) / cpu_count()
    limit = max(seconds[slowest], shared)
    return {
        "frames": len(frames),
        "size": [info.height, info.width],
        "threads": threads,
        "processors": cpu_count(),
        "frames_per_second": {name: round(1 / value, 2) for name, value in seconds.items()},
        "processor_ms_per_frame": {name: round(1000 * value, 2) for name, value in work.items()},
        "slowest_stage": slowest,
        "limit_frames_per_second": round(1 / limit, 2),
        "share_of_slowest_stage": round(seconds[slowest] / seconds["end to end"], 4),
        "share_of_limit": round(limit / seconds["end to end"], 4),
        "seconds_by_round": {name: [round(value, 3) for value in values] for name, values in wall.items()},
    }


def write_clip(path: Path, picture: Path, size: tuple[int, int], count: int) -> None:
    """Write a pan over a photograph, mirrored where it ends, 24 frames a second."""
    import av

    height, width = size
    pixels: NDArray[np.uint8] = rgb8(picture)
    pixels = np.concatenate([pixels, pixels[:, ::-1]], axis=1)
    pixels = np.concatenate([pixels, pixels[::-1]])
    pixels = np.tile(pixels, (-(-height // pixels.shape[0]), -(-(width + count) // pixels.shape[1]), 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            view = np.ascontiguousarray(pixels[:height, number : number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))


def write_layer(path: Path) -> None:
    """Write a network of one layer that repeats every pixel twice in each direction."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from srdeploy.core.contract import ModelContract
    from srdeploy.core.precision import Precision

    weights = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)[..., None, None]  # (12, 3, 1, 1)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weights"], ["repeated"]),
            helper.make_node("DepthToSpace", ["repeated"], ["output"], blocksize=2, mode="CRD"),
        ],
        "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, "h2", "w2"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    contract = ModelContract(
        architecture="srdensenet", configuration={}, scale=2, colours="rgb", precision=Precision.FP32,
        receptive_radius=0, macs_per_pixel=36.0, largest_tensor_per_pixel=12, checkpoint_sha256="0" * 64,
    )  # fmt: skip
    helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, path)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for people."""
    from srdeploy.cli.console import markdown_table

    names = [*STAGES, "engine only", "end to end"]
    lines = [
        [
            row["case"],
            *(f"{row['frames_per_second'][name]:.1f}" for name in names),
            f"{100 * row['share_of_slowest_stage']:.0f} %",
            f"{100 * row['share_of_limit']:.0f} %",
        ]
        for row in rows
    ]
    return markdown_table(["frames per second", *names, "of the slowest stage", "of the limit"], lines) + "\n"
