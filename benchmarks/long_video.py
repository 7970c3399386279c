"""Does memory grow with the length of a video? 10,000 small frames, the resident size sampled all along.

    python benchmarks/long_video.py [--frames 10000] [-o benchmarks/results/long_video]

What is measured: `srdeploy upscale` of a clip of 32 x 24 pixels (a pan over one of the demo's photographs) with the
demo RCAN x2 on ONNX Runtime, one thread, as a process of its own: its resident size over time, and its peak. Frames are
small so that their number is what the run is about; segments, packets and timestamps are as many as for large ones.

How to read it: the median of the last tenth against that of the second (the first tenth fills queues and pools).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from srdeploy.core.environment import package_versions
from srdeploy.runtime.bench.conditions import conditions

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "examples" / "photos" / "evaluation" / "coffee.png"
CHECKPOINT = ROOT / "examples" / "rcan_x2_demo.pt"
HEIGHT, WIDTH = 24, 32
KEPT_SAMPLES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "long_video")
    arguments = parser.parse_args()
    srdeploy = str(Path(sys.executable).with_name("srdeploy"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, source, output = folder / "model.onnx", folder / "in.mp4", folder / "out.mp4"
        subprocess.run([srdeploy, "export", CHECKPOINT, "-o", model], check=True, capture_output=True)
        write_clip(source, arguments.frames)
        words = [srdeploy, "upscale", model, source, "-o", output, "--threads", "1", "--json"]
        child = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)
        samples = watched(child)
        assert child.stdout is not None
        report = json.loads(child.stdout.read())
    if child.returncode != 0 or report["frames"] != arguments.frames:
        raise SystemExit(f"srdeploy upscale ended with {child.returncode}")
    tenth = len(samples) // 10
    sizes = [size for _, size, _ in samples]
    early, late = statistics.median(sizes[tenth : 2 * tenth]), statistics.median(sizes[-tenth:])
    document = {
        "command": " ".join(["python", *sys.argv]),
        "frames": report["frames"],
        "size": [HEIGHT, WIDTH],
        "seconds": report["seconds"],
        "frames_per_second": report["frames_per_second"],
        "resident_mib_second_tenth": early,
        "resident_mib_last_tenth": late,
        "peak_mib": max(peak for _, _, peak in samples),
        "samples": "seconds since the start, resident MiB",
        "resident": [[time_, size] for time_, size, _ in samples[:: max(1, len(samples) // KEPT_SAMPLES)]],
        "conditions": conditions(),
        "versions": package_versions(["srdeploy", "onnxruntime", "av", "numpy"]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"{report['frames']} frames: {early:.0f} MiB, then {late:.0f} MiB; peak {document['peak_mib']:.0f} MiB")


def watched(child: subprocess.Popen[str]) -> list[tuple[float, float, float]]:
    """Return (seconds, resident MiB, peak MiB) of a process, a few times a second until it ends."""
    samples = []
    started = time.monotonic()
    while child.poll() is None:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
        if "VmRSS" in lines:  # gone between its end and our noticing
            size, peak = (round(int(lines[name].split()[0]) / 1024, 1) for name in ("VmRSS", "VmHWM"))
            samples.append((round(time.monotonic() - started, 1), size, peak))
        time.sleep(0.25)
    return samples


def write_clip(path: Path, frames: int) -> None:
    import av

    from srdeploy.core.imaging.read import rgb8

    pixels = rgb8(PHOTO)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            top, left = number // 300 % (pixels.shape[0] - HEIGHT), number % (pixels.shape[1] - WIDTH)
            view = np.ascontiguousarray(pixels[top : top + HEIGHT, left : left + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
