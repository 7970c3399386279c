"""What a TensorRT-RTX build costs on a machine without a GPU, and what is in the engine: kernels and memory.

    python benchmarks/rtx_builds.py [--builds 4] [-o benchmarks/results]

Full RCAN x4 and SRDenseNet_All x4 (random weights) in FP16, compute capability 8.9.

- Time: of the whole command `srdeploy build`, imports included, without the cache, for batch 1 to 4, 16 to 256 squared.
- Kernels and activation memory: for that profile and for the one of `srdeploy deploy`, with the rewrites for
  TensorRT-RTX and without them, next to the least number of kernels that the exported graph could need.

Needs a quiet machine for three minutes.
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from gpu import NETWORKS, exported_fp16, random_checkpoint

from srdeploy.core.environment import machine
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine
from srdeploy.runtime.engines.tensorrt.layers import Kernel, layers_from_log
from srdeploy.runtime.engines.tensorrt.log import read_messages
from srdeploy.runtime.engines.tensorrt.rewrites.rewrite import AHEAD_OF_TIME

PROFILES = {  # (batch, height, width): least, tuned for, largest
    "batch 1 to 4": ((1, 16, 16), (1, 128, 128), (4, 256, 256)),
    "deploy": ((1, 16, 16), (1, 180, 320), (1, 360, 640)),
}
TIMED = "batch 1 to 4"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--builds", type=int, default=4, help="timed builds of each network")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    document: dict[str, Any] = {"created": created, "machine": machine(), "networks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rcan", "srdensenet"):
            checkpoint = random_checkpoint(NETWORKS[name][0])
            graph = exported_fp16(checkpoint, Path(folder, f"{name}.fp32.onnx"))
            channels = checkpoint.contract().channels
            builds = [built(graph, channels, Path(folder, f"{name}-{turn}"), turn) for turn in range(arguments.builds)]
            document["networks"][name] = {
                "builds": builds,
                "different": len({row["sha256"] for row in builds}),
                "minimum": minimum(read_graph(graph)),
                "engines": [
                    {"profile": profile, "rewrites": rewrites, **contents(graph, channels, profile, rewrites=rewrites)}
                    for profile in PROFILES
                    for rewrites in (False, True)
                ],
            }
            print(json.dumps({name: document["networks"][name]}, indent=1), file=sys.stderr)
            print("\n".join(table(name, document["networks"][name])), file=sys.stderr)
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
    command = [str(Path(sys.executable).with_name("srdeploy")), "build", str(graph), "--engine", "tensorrt-rtx"]
    command += ["--compute-capability", "8.9", "--no-cache", "--json", "-o", str(folder / "engine.rtx")]
    for which, (batch, height, width) in zip(("min", "opt", "max"), PROFILES[TIMED], strict=True):
        command += [f"--{which}-shape", f"{batch}x{channels}x{height}x{width}"]
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


def contents(graph: Path, channels: int, profile: str, *, rewrites: bool) -> dict[str, Any]:
    """Build for a profile; returns the kernels by where in the network they are, and the memory."""
    least, tuned, largest = ((batch, channels, *size) for batch, *size in PROFILES[profile])
    log = graph.with_name("build.log")
    options = BuildOptions(
        profiles=(ShapeProfile(least, tuned, largest),),
        compute_capabilities=("8.9",),
        use_cache=False,
        log_path=log,
    )
    with mock.patch.dict(AHEAD_OF_TIME, clear=not rewrites):
        engine = graph.with_name("engine.rtx")
        manifest = build_engine(graph, engine, engine="tensorrt-rtx", options=options, force=True).manifest
    kernels = layers_from_log(text for _, text in read_messages(log)).kernels
    places = Counter(place(kernel) for kernel in kernels)
    units = {unit: len({name for name, _ in places if name.startswith(f"{unit} ")}) for unit in ("block", "group")}
    by_unit = {
        unit: {
            what: count / units[unit]
            for what, count in sorted(
                Counter(what for name, what in map(place, kernels) if name.startswith(unit)).items()
            )
        }
        for unit in units
        if units[unit]
    }
    facts = manifest.details["built"]
    return {
        "kernels": len(kernels),
        "units": units,
        "per_block": round(sum(by_unit.get("block", {}).values()), 3),
        "per_group": round(sum(by_unit.get("group", {}).values()), 3),
        "elsewhere": sum(count for (name, _), count in places.items() if name == "elsewhere"),
        "kinds_per_unit": by_unit,
        "kinds_elsewhere": {what: count for (name, what), count in sorted(places.items()) if name == "elsewhere"},
        "activation_bytes": facts["activation_bytes"],
        "engine_bytes": engine.stat().st_size,
    }


def place(kernel: Kernel) -> tuple[str, str]:
    """Return where a kernel is ("block 3.1", "group 3", "elsewhere"), and its kind or what its generated name says."""
    generated = re.match(r"__myl_([A-Za-z]+)", kernel.name)
    what = generated[1] if generated else kernel.kind
    names = " ".join(kernel.onnx_layers)
    for unit, pattern in (("block", r"\bgroups\.(\d+\.blocks\.\d+)\."), ("block", r"(?<!\.)\bblocks\.(\d+)\b")):
        found = re.search(pattern, names)
        if found:
            return f"{unit} {found[1]}", what
    found = re.search(r"\bgroups\.(\d+)\b", names)
    return (f"group {found[1]}" if found else "elsewhere"), what


def minimum(graph: GraphFile) -> dict[str, Any]:
    """Return the least number of kernels of a graph, if everything is fused that can be, and its multiply-adds.

    A kernel per layer with weights, except in a gate, which is two: one that adds up the maps, and one that multiplies
    them, which cannot start before the last of them is added. Two more cast the image and the result.
    """
    outside = [layer for layer in graph.layers if layer.role != "attention"]
    gates = sum(layer.role == "attention" for layer in graph.layers) // 2
    return {
        "layers": len(outside),
        "gates": gates,
        "kernels": len(outside) + 2 * gates + 2,
        "macs_per_pixel": graph.contract.macs_per_pixel,
    }


def table(name: str, network: dict[str, Any]) -> list[str]:
    """Return the network's rows of a table in Markdown."""
    lines = [
        "| network, profile, rewrites | kernels | per block | per group | elsewhere | activations |",
        "| --- " * 6 + "|",
    ]
    for row in network["engines"]:
        label = f"{name}, {row['profile']}, {'with' if row['rewrites'] else 'without'}"
        numbers = [row[key] for key in ("kernels", "per_block", "per_group", "elsewhere")]
        lines.append(f"| {label} | {' | '.join(map(str, numbers))} | {row['activation_bytes'] / 2**20:.0f} MiB |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
