"""srdeploy doctor: which engines can build and which can run on this machine, and why not."""

import tempfile
from pathlib import Path
from typing import Any

from srdeploy.cli.console import console, emit_json, next_command, table
from srdeploy.cli.options import JSON, arguments, example, option, verb
from srdeploy.core.sizes import format_bytes

PACKAGES = ("srdeploy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx",
            "ncnn", "pnnx", "numpy", "pillow", "polygraphy", "nncf", "av", "pyvips", "jinja2",
            "matplotlib")  # fmt: skip

_FLAG_MEANINGS = {
    "avx512_vnni": "fast INT8",
    "avx_vnni": "fast INT8",
    "amx_int8": "INT8 matrix units",
    "amx_bf16": "BF16 matrix units",
    "avx512_bf16": "BF16",
    "avx512_fp16": "FP16",
}


_WEIGHT_BITS = {8: "8 bits", 7: "7 bits: without VNNI, sums of 8-bit ones overflow"}


@arguments
class DoctorOptions:
    """What `srdeploy doctor` is given."""

    as_json: bool = option("--json", default=False, help=JSON)


@verb(DoctorOptions, epilog=example("srdeploy doctor\nsrdeploy doctor --json"))
def command(options: DoctorOptions) -> None:
    """Report which engines can build and run on this machine, and why not."""
    document = examination()
    if options.as_json:
        emit_json(document)
        return
    engines = document["engines"]
    rows = [(entry["engine"], _mark(entry["why_not_build"]), _mark(entry["why_not_run"])) for entry in engines]
    table("engines", ("engine", "build", "run"), rows)
    machine = document["machine"]
    memory = format_bytes(machine["memory_bytes"]) if machine["memory_bytes"] else "unknown"
    table("machine", ("what", "value"), [
        ("processor", f"{machine['processor']}, {machine['cpus']} CPUs"),
        ("instructions", ", ".join(_flag(flag) for flag in machine["cpu_flags"]) or "none that matter here"),
        ("INT8 weights", _WEIGHT_BITS[document["int8_weight_bits"]]),
        ("memory", memory),
        ("GPU", document["gpu"] or document["why_no_gpu"]),
        ("system", machine["system"]),
        ("python", machine["python"]),
        *document["packages"].items(),
        ("engine cache", f"{document['cache']['root']}, {document['cache']['engines']} engines"),
        ("cache problem", document["cache"]["problem"] or "none"),
    ])  # fmt: skip
    if not any(entry["can_run"] for entry in engines):
        console.print("no engine can run here: install one with: pip install 'srdeploy[cpu]'", markup=False)
    next_command("srdeploy", "demo")


def examination() -> dict[str, Any]:
    """Return the whole report as JSON values."""
    from srdeploy.core.environment import int8_sums_saturate, machine, package_versions
    from srdeploy.runtime.engines.cache import EngineCache
    from srdeploy.runtime.engines.gpu import find_gpu, why_no_gpu
    from srdeploy.runtime.engines.registry import availability

    found = find_gpu()
    cache = EngineCache()
    return {
        "engines": [status.to_json() for status in availability()],
        "machine": machine(),
        "int8_weight_bits": 7 if int8_sums_saturate() else 8,
        "gpu": f"{found.name}, compute capability {found.capability_text}, {format_bytes(found.memory_bytes)}"
        if found
        else None,
        "why_no_gpu": why_no_gpu(),
        "packages": package_versions(PACKAGES),
        "cache": {
            "root": str(cache.root),
            "engines": len(cache.entries()),
            "problem": _why_not_writable(cache.root),
        },
    }


def _why_not_writable(folder: Path) -> str | None:
    """Return why a folder, or the first existing one above it, cannot be written; None if it can."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{existing} cannot be written: {(error.strerror or str(error)).lower()}"


def _mark(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def _flag(flag: str) -> str:
    return f"{flag} ({_FLAG_MEANINGS[flag]})" if flag in _FLAG_MEANINGS else flag
