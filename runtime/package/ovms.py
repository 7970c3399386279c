"""The layout of OpenVINO Model Server from a bundle.

DIR/config.json             one entry per model: shape with free sizes, the arithmetic that was verified
DIR/NAME_int8/1/model.onnx  one model per OpenVINO engine of the bundle, as a portable ONNX file
DIR/package.json            which bundle it is from, and the SHA-256 of every file
"""

import json
from pathlib import Path
from typing import Any

from srdeploy.core.errors import InputError
from srdeploy.runtime.bundle import Bundle
from srdeploy.runtime.package.packaged import Packaged, copy_graph, package_folder, package_name, portable_graph

FAMILY = "openvino"
CONFIG = "config.json"


def write_ovms(bundle: Bundle, output: Path, *, name: str | None = None, force: bool = False) -> Packaged:
    """Write a folder that OpenVINO Model Server serves.

    Args:
        bundle: verified.
        output: the folder to make.
        name: first part of the models' names; None for the bundle's.
        force: replace an earlier folder of `package`.

    Raises:
        UsageError: the folder exists, or the name is not one.
        InputError: the bundle has no OpenVINO engine, or a file was edited.
        OutputError: the disk is full, or the folder cannot be written.
    """
    stem = package_name(bundle, name)
    engines = {f"{stem}_{entry.precision}": entry for entry in bundle.engines if entry.engine == FAMILY}
    if not engines:
        raise InputError(
            f"bundle {bundle.path} has no OpenVINO engine", next_step="deploy again with --engine openvino"
        )
    with package_folder(bundle, output, target="ovms", force=force) as folder:
        for model, entry in engines.items():
            version = folder / model / "1"
            version.mkdir(parents=True)
            copy_graph(bundle, portable_graph(bundle, entry), version)
        entries = [_entry(model, bundle.contract.channels) for model in engines]
        text = json.dumps({"model_config_list": entries}, indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return Packaged("ovms", output, tuple(engines))


def _entry(model: str, channels: int) -> dict[str, Any]:
    return {
        "config": {
            "name": model,
            "base_path": model,  # relative to config.json
            "shape": f"(-1,{channels},-1,-1)",
            "target_device": "CPU",
            # Precision lives in the graph: without the hint, processors with BF16 units would compute in BF16.
            "plugin_config": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
        }
    }
