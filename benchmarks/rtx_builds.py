"""What a TensorRT-RTX build costs on a machine without a GPU: seconds, kernels, memory.

    python benchmarks/rtx_builds.py [--builds 4] [-o benchmarks/results]

Full RCAN x4 and SRDenseNet_All x4 (random weights) in FP16, compute capability 8.9, profile 1 to 4 x 16 to 256 squared.
The time is that of the whole command `srdeploy build`, imports included, without the cache. Needs a quiet machine for
two minutes.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu import NETWORKS, exported_fp16, random_checkpoint

from srdeploy.core.environment import machine


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--builds", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    document: dict[str, Any] = {"created": created, "machine": machine(), "networks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, _) in NETWORKS.items():
            graph = exported_fp16(random_checkpoint(config), Path(folder, f"{name}.fp32.onnx"))
            channels = random_checkpoint(config).contract().channels
            builds = [built(graph, channels, Path(folder, f"{name}-{turn}"), turn) for turn in range(arguments.builds)]
            document["networks"][name] = {"builds": builds, "different": len({row["sha256"] for row in builds})}
            print(json.dumps({name: document["networks"][name]}, indent=1), file=sys.stderr)
    path = arguments.output / f"rtx-builds-{created[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"result": str(path)}))
    return 0


def built(graph: Path, channels: int, folder: Path, turn: int) -> dict[str, Any]:
    """Build once in a new folder; returns seconds, bytes, hash and what was read back."""
    folder.mkdir()
    for number in range(turn):
        (folder / f"file{number}").touch()
    shapes = {"min": (1, 16), "opt": (1, 128), "max": (4, 256)}
    command = [str(Path(sys.executable).with_name("srdeploy")), "build", str(graph), "--engine", "tensorrt-rtx"]
    command += ["--compute-capability", "8.9", "--no-cache", "--json", "-o", str(folder / "engine.rtx")]
    for which, (batch, size) in shapes.items():
        command += [f"--{which}-shape", f"{batch}x{channels}x{size}x{size}"]
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, f"TURN_{turn}": "x" * 37 * turn}, stdout=subprocess.PIPE, check=True
    )
    seconds = time.perf_counter() - started
    result = json.loads(done.stdout)
    facts = result["details"]["built"]
    data = (folder / "engine.rtx").read_bytes()
    (folder / "engine.rtx").unlink()
    return {
        "seconds": round(seconds, 2),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": result["versions"],
        **{name: facts[name] for name in ("convolutions", "kernels", "activation_bytes")},
    }


if __name__ == "__main__":
    sys.exit(main())
