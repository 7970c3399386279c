"""A picture of 20,000 x 20,000 pixels through a real RCAN x2, from file to file: seconds and peak memory.

    python benchmarks/huge.py [--side 20000] [--formats tif png] [--threads 1] [-o benchmarks/results/huge]

What is measured: `srdeploy upscale` as a process of its own, from start to end, on an RCAN of one group, one block and
8 features (0.006 M values, trained here for a minute on the demo's photographs, so that its outputs are pictures) and a
mosaic of the demo's photographs. Peak memory is the largest resident size of that process as the kernel counts it
(`wait4`), libraries included. `--memory` is not given: the default of streamed pictures must do.

How the result is checked: windows of the output, read back with libvips, against the same network on the same part of
the input with a wide margin. They differ by what channel attention sees (a tile instead of a window) and by rounding;
a row or column out of place would be below 40 dB at once.

What limits it: a network of this size spends less than half of the time in convolutions; the rest is decoding, tiles,
filters and deflate. A larger network costs its multiply-adds on top and no more memory than the budget allows.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.environment import package_versions
from srdeploy.runtime.bench.conditions import conditions

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "examples" / "photos"
LIMIT_BYTES = 1.5 * (1 << 30)
WINDOW, MARGIN = 192, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--formats", nargs="+", choices=["tif", "png"], default=["tif", "png"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500, help="of the training")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "huge")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="srdeploy-huge.") as name:
        folder = Path(name)
        model = folder / "rcan.onnx"
        network = train_and_export(model, arguments.steps)
        runs = [measure(model, folder, ending, arguments) for ending in arguments.formats]
    document = {
        "command": " ".join(["python", *sys.argv]),
        "side": arguments.side,
        "threads": arguments.threads,
        "network": network,
        "runs": runs,
        "limit_bytes": int(LIMIT_BYTES),
        "conditions": conditions(),
        "versions": package_versions(["srdeploy", "onnxruntime", "pyvips", "pyvips-binary", "pillow", "numpy"]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(runs, indent=2))
    if max(run["peak_bytes"] for run in runs) > LIMIT_BYTES:
        raise SystemExit("the peak is above the limit")


def train_and_export(model: Path, steps: int) -> dict[str, Any]:
    """Train a compact RCAN on the demo's calibration photographs, export it, and say what it is."""
    import torch

    from srdeploy.core.imaging.read import rgb8
    from srdeploy.core.imaging.resize import imresize
    from srdeploy.export.exporter import export_onnx
    from srdeploy.models.checkpoint.load import load_checkpoint
    from srdeploy.models.checkpoint.save import save_checkpoint
    from srdeploy.models.networks.rcan import Rcan, RcanConfig

    config = RcanConfig(
        scale=2, groups=1, blocks=1, features=8, attention_width=2, upsampler=(2,), value_range=1.0, mean_shift="none"
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = Rcan(config)
    pairs = []
    for photo in sorted((PHOTOS / "calibration").glob("*.png")):
        high = rgb8(photo).astype(np.float64) / 255
        high = high[: high.shape[0] // 2 * 2, : high.shape[1] // 2 * 2]
        pairs.append((imresize(high, scale=0.5).astype(np.float32), high.astype(np.float32)))
    random = np.random.default_rng(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for _ in range(steps):
        batch = []
        for low, high in (pairs[index] for index in random.integers(len(pairs), size=8)):
            top, left = (int(random.integers(size - 48)) for size in low.shape[:2])
            high = high[2 * top : 2 * top + 96, 2 * left : 2 * left + 96]
            batch.append((low[top : top + 48, left : left + 48], high))
        low_batch, high_batch = (
            torch.from_numpy(np.stack([pair[side] for pair in batch]).transpose(0, 3, 1, 2)) for side in (0, 1)
        )
        loss = torch.nn.functional.l1_loss(network(low_batch), high_batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    checkpoint = model.with_suffix(".safetensors")
    save_checkpoint(network.eval(), checkpoint)
    export_onnx(load_checkpoint(checkpoint), model)
    return {
        "architecture": "rcan", "scale": 2, "groups": 1, "blocks": 1, "features": 8,
        "values": sum(parameter.numel() for parameter in network.parameters()),
        "training_steps": steps, "training_l1": round(float(np.mean(losses[-100:])), 5),
    }  # fmt: skip


def measure(model: Path, folder: Path, ending: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Upscale one file in a process of its own and check the output."""
    source, output = folder / f"in.{ending}", folder / f"out.{ending}"
    write_mosaic(source, arguments.side)
    words = [Path(sys.executable).with_name("srdeploy"), "upscale", model, source, "-o", output, "--json"]
    words = [str(word) for word in (*words, "--threads", arguments.threads)]
    started = time.monotonic()
    with (folder / "stdout").open("w+") as stdout:
        child = os.posix_spawn(
            words[0], words, dict(os.environ), file_actions=[(os.POSIX_SPAWN_DUP2, stdout.fileno(), 1)]
        )
        _, status, usage = os.wait4(child, 0)
        stdout.seek(0)
        text = stdout.read()
    if status != 0:
        raise SystemExit(f"srdeploy upscale ended with {os.waitstatus_to_exitcode(status)}")
    result = {
        "format": ending,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "peak_gib": round(usage.ru_maxrss / (1 << 20), 3),
        "input_bytes": source.stat().st_size,
        "output_bytes": output.stat().st_size,
        "mode": json.loads(text)["mode"],
        "fidelity_db": [round(value, 1) for value in fidelities(model, source, output, arguments.side)],
    }
    source.unlink()
    output.unlink()
    return result


def write_mosaic(path: Path, side: int) -> None:
    """Write a square mosaic of the demo's photographs, each row of it beginning elsewhere."""
    import pyvips

    photos = [pyvips.Image.new_from_file(str(photo))[:3] for photo in sorted(PHOTOS.glob("*/*.png"))]
    photos = [photo.bandjoin([photo, photo]) if photo.bands == 1 else photo for photo in photos]
    height = min(photo.height for photo in photos)
    row = pyvips.Image.arrayjoin([photo.crop(0, 0, photo.width, height) for photo in photos], across=len(photos))
    wide = row.replicate(side // row.width + 2, 1)
    rows = [wide.crop(97 * number % row.width, 0, side, height) for number in range(side // height + 1)]
    picture = pyvips.Image.arrayjoin(rows, across=1).crop(0, 0, side, side).copy(interpretation="srgb")
    if path.suffix == ".png":
        picture.pngsave(str(path), compression=1)
    else:
        picture.tiffsave(str(path), compression="deflate", bigtiff=True)


def fidelities(model: Path, source: Path, output: Path, side: int) -> list[float]:
    """Return the PSNR of windows along the diagonal and at its ends to the network run on just there."""
    from srdeploy.upscale.upscaler import Upscaler

    length = WINDOW + 2 * MARGIN
    places = np.linspace(0, side - length, 6).astype(int).tolist()
    given = windows(source, side, places, length)
    made = windows(output, 2 * side, [2 * (place + MARGIN) for place in places], 2 * WINDOW)
    inner = np.s_[2 * MARGIN : -2 * MARGIN, 2 * MARGIN : -2 * MARGIN]
    results = []
    with Upscaler.open(model, threads=1) as up:
        for window, actual in zip(given, made, strict=True):
            error = up(window)[inner].astype(np.float64) - actual
            results.append(-10 * float(np.log10(max(np.mean(error**2), 1e-9) / 255**2)))
    return results


def windows(path: Path, side: int, places: list[int], length: int) -> list[NDArray[np.uint8]]:
    """Read square windows along the diagonal of a square picture, from top to bottom."""
    import pyvips

    image = pyvips.Image.new_from_file(str(path), access="sequential")
    assert (image.width, image.height, image.bands) == (side, side, 3)
    region = pyvips.Region.new(image)
    return [
        np.frombuffer(region.fetch(place, place, length, length), np.uint8).reshape(length, length, 3)
        for place in places
    ]


if __name__ == "__main__":
    main()
