"""What a cluster costs next to the network: handing out work, the journal, and encoding.

    python benchmarks/scale_overheads.py --ray ADDRESS MODEL.onnx [-o benchmarks/results/scale_overheads.json]

What is measured, in seconds (medians, or means over many): connecting; the first worker ready, which is the start of
its process, its imports and opening the engine; handing one chunk without pictures to a worker and getting its result
back; reading a picture's header for the prediction; the journal's two lines and the hash of an output; and encoding a
picture of 16 megapixels (a photograph of examples/, enlarged bicubically; a network's output has more detail)
in each format. What limits it: one machine, whose driver, workers and raylets share its cores.

How to read it: these are the constants of benchmarks/scale_simulation.py.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from srdeploy.core.environment import machine
from srdeploy.core.imaging.files import find_images
from srdeploy.core.imaging.read import opened
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.scale.chunks import Chunk, Work, dispatch
from srdeploy.upscale.scale.cluster import RayPool, choose_share, connected
from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts
from srdeploy.upscale.scale.model_package import model_sha256
from srdeploy.upscale.scale.worker import FolderJob, WorkerOptions
from srdeploy.upscale.single_image import OutputOptions

CHUNKS = 300
FORMATS = {"png": None, "webp lossless": None, "webp": 95, "jpg": 95, "tif": None}


def of_the_cluster(address: str, model: Path, folder: Path) -> dict[str, float]:
    started = time.monotonic()
    with connected(address) as ray:
        connect = time.monotonic() - started
        facts = RunFacts(key="", source=str(folder), suffix=None, total=0)
        job = FolderJob(folder, folder / "out", OutputOptions(), facts)
        options = WorkerOptions(model=model.resolve(), model_sha256=model_sha256(model))
        started = time.monotonic()
        pool = RayPool(
            ray,
            choose_share(ray, "cpu", 1),
            options,
            lambda actor, chunk: actor.run_chunk.remote(job, chunk.targets, 1),
        )
        pool.first()
        ready = time.monotonic() - started
        waiting = [Chunk((), 0)] * CHUNKS
        taken: list[Any] = []
        work: Work[Chunk, Any] = Work(
            lambda worker: waiting.pop() if waiting else None,
            lambda worker, chunk, outcome: taken.append(outcome),
            lambda: len(taken) == CHUNKS,
        )
        started = time.monotonic()
        dispatch(pool, work)
        chunk = (time.monotonic() - started) / CHUNKS
        pool.close()
    return {"connect_s": connect, "first_worker_ready_s": ready, "chunk_s": chunk}


def median_seconds(function: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        started = time.monotonic()
        function()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def of_a_picture(folder: Path) -> dict[str, float]:
    photo = find_images(Path(__file__).parents[1] / "examples" / "photos")[0]
    with Image.open(photo) as image:
        large = np.asarray(image.convert("RGB").resize((4096, 4096), Image.Resampling.BICUBIC))

    def header() -> None:
        with opened(photo, max_pixels=None):
            pass

    found = {"header_s": median_seconds(header, 200)}
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "a.png").write_bytes(bytes(1_000_000))
    with FolderJournal(folder / "out", RunFacts(key="key", source=str(folder), suffix=None, total=1)) as journal:

        def record() -> None:
            journal.started("a.png", sha256="0")
            journal.done("a.png", sha256="0")

        found["journal_s"] = median_seconds(record, 200)
    for name, quality in FORMATS.items():
        path = folder / f"large.{name.split()[0]}"
        found[f"encode_16mp_{name.replace(' ', '_')}_s"] = median_seconds(
            lambda path=path, quality=quality: write_image(path, large, quality=quality), 3
        )
        found[f"bytes_16mp_{name.replace(' ', '_')}"] = path.stat().st_size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ray", required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/scale_overheads.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {**of_the_cluster(given.ray, given.model, Path(folder)), **of_a_picture(Path(folder))}
    for name, value in found.items():
        print(f"{name:32} {value:.6g}")
    given.output.write_text(json.dumps({"machine": machine(), "measured": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
