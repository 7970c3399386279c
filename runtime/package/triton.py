"""A Triton model repository from a bundle.

    DIR/NAME_openvino_int8/config.pbtxt, 1/model.onnx          one model per engine: planes in 0..1, (N, C, H, W)
    DIR/NAME_tensorrt_fp16/config.pbtxt, 1/sm89.plan, ...
    DIR/NAME_pictures/config.pbtxt, 1/model.py, 1/bundle/...   pictures of any size: `srdeploy.upscale.triton_model`
    DIR/package.json                                           which bundle it is from, and the SHA-256 of every file

Triton's own backends take portable ONNX files and TensorRT plans, and do not tile. OpenVINO's blobs and ONNX Runtime's
optimized graphs belong to one release and are not given to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srdeploy.core.errors import InputError
from srdeploy.core.shapes import Shape, ShapeProfile, parse_shape
from srdeploy.runtime.bundle import Bundle, BundleEngine
from srdeploy.runtime.engines.sidecar import Engine, read_engine
from srdeploy.runtime.package.packaged import (
    Packaged,
    copy_bundle,
    copy_graph,
    package_folder,
    package_name,
    portable_graph,
)

MAX_BATCH = 8
"""Largest batch of models whose engine has no profile, and so no limit of its own."""
_DEFAULT_SHAPE: Shape = (1, 3, 180, 320)
_BACKENDS = {
    "onnxruntime": ("onnxruntime", "KIND_CPU"),
    "onnxruntime-cuda": ("onnxruntime", "KIND_GPU"),
    "onnxruntime-tensorrt": ("onnxruntime", "KIND_GPU"),
    "openvino": ("openvino", "KIND_CPU"),
    "tensorrt": ("tensorrt", "KIND_GPU"),
}
"""Engine family to Triton's backend and the kind of its instances."""
_MODEL = "from srdeploy.upscale.triton_model import TritonPythonModel  # noqa: F401  # Triton looks for this name\n"


@dataclass(frozen=True)
class _Served:
    """One model of the repository: the engines of a family and precision, which are several for several GPUs."""

    name: str
    backend: str
    kind: str
    engines: tuple[BundleEngine, ...]


def write_triton(bundle: Bundle, output: Path, *, name: str | None = None, force: bool = False) -> Packaged:
    """Write a Triton model repository.

    Args:
        bundle: verified.
        output: the folder to make.
        name: first part of the models' names; None for the bundle's.
        force: replace an earlier repository of `package`.

    Raises:
        UsageError: the folder exists, or the name is not one.
        InputError: the bundle has no engine that Triton runs, or a file was edited.
        OutputError: the disk is full, or the folder cannot be written.
    """
    stem = package_name(bundle, name)
    served, notes = _served(bundle, stem)
    if not served:
        held = ", ".join(f"{entry.engine} {entry.precision}" for entry in bundle.engines) or "none"
        raise InputError(
            f"bundle {bundle.path} has no engine that Triton runs ({held})",
            expected=f"one of {', '.join(_BACKENDS)}",
            next_step="deploy again with --engine openvino or --engine tensorrt",
        )
    with package_folder(bundle, output, target="triton", force=force) as folder:
        for model in served:
            notes += _write_model(bundle, model, folder / model.name)
        _write_pictures(bundle, f"{stem}_pictures", folder / f"{stem}_pictures")
    contents = (*(model.name for model in served), f"{stem}_pictures")
    return Packaged("triton", output, contents, tuple(dict.fromkeys(notes)))


def _served(bundle: Bundle, stem: str) -> tuple[list[_Served], list[str]]:
    """Group the engines of a bundle into models; the notes name what Triton does not run."""
    models: dict[str, _Served] = {}
    notes: list[str] = []
    for entry in bundle.engines:
        if entry.engine not in _BACKENDS:
            notes.append(f"{entry.engine} {entry.precision} is not included: Triton has no backend for it")
            continue
        backend, kind = _BACKENDS[entry.engine]
        name = f"{stem}_{entry.engine}_{entry.precision}"
        engines = models[name].engines if name in models else ()
        models[name] = _Served(name, backend, kind, (*engines, entry))
    return list(models.values()), notes


def _write_model(bundle: Bundle, model: _Served, folder: Path) -> list[str]:
    version = folder / "1"
    version.mkdir(parents=True)
    if model.backend == "tensorrt":
        plans, notes = _copy_plans(bundle, model, version)
        profiles = next(iter(plans.values())).profiles
        lines = [f'default_model_filename: "{next(iter(plans))}"', *_by_capability(plans)]
    else:
        copy_graph(bundle, portable_graph(bundle, model.engines[0]), version)
        profiles, notes = (), []
        lines = ['default_model_filename: "model.onnx"']
    text = _config(model, bundle.contract.channels, profiles, _tuned_shape(bundle, profiles), lines)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")
    return notes


def _config(model: _Served, channels: int, profiles: Sequence[ShapeProfile], tuned: Shape, lines: Sequence[str]) -> str:
    """Return a model's config.pbtxt.

    OpenVINO's backend refuses a batch below the maximum, so there the batch is an axis as the others are.
    """
    batched = model.backend != "openvino"
    batch = max((profile.max[0] for profile in profiles), default=MAX_BATCH) if batched else 0
    dims = f"[ {channels}, -1, -1 ]" if batched else f"[ -1, {channels}, -1, -1 ]"
    warm = tuned[1:] if batched else tuned
    numbers = ", ".join(f'"{index}"' for index in range(len(profiles)))
    profile = f" profile: [ {numbers} ]" if len(profiles) > 1 else ""
    random = f"{{ data_type: TYPE_FP32 dims: [ {', '.join(map(str, warm))} ] random_data: true }}"
    return "\n".join(
        [
            f'name: "{model.name}"',
            f'backend: "{model.backend}"',
            f"max_batch_size: {batch}",
            f'input [ {{ name: "input" data_type: TYPE_FP32 dims: {dims} }} ]',
            f'output [ {{ name: "output" data_type: TYPE_FP32 dims: {dims} }} ]',
            f"instance_group [ {{ count: 1 kind: {model.kind}{profile} }} ]",
            # Without a queue delay: it would hold back every lone request. Requests of equal shape are batched.
            *(["dynamic_batching { }"] if batched else []),
            "version_policy { latest { num_versions: 1 } }",
            f'model_warmup [ {{ name: "tuned" batch_size: {tuned[0] if batched else 0}'
            f' inputs {{ key: "input" value {random} }} }} ]',
            *lines,
            "",
        ]
    )


def _tuned_shape(bundle: Bundle, profiles: Sequence[ShapeProfile]) -> Shape:
    """Return the shape to warm up at: the profile's optimum, else the one that the bundle was timed at."""
    if profiles:
        return profiles[0].opt
    timed = bundle.manifest.details.get("bench_shape")
    if timed is not None:
        return parse_shape(str(timed))
    _, _, height, width = _DEFAULT_SHAPE
    low = bundle.contract.min_size
    return 1, bundle.contract.channels, max(low, height), max(low, width)


def _copy_plans(bundle: Bundle, model: _Served, folder: Path) -> tuple[dict[str, Engine], list[str]]:
    """Copy the plans of a model, one per compute capability; return them by file name, with notes.

    Triton has one configuration for all plans of a model, so plans of other profiles than the first's are excluded.
    """
    plans: dict[str, Engine] = {}
    notes: list[str] = []
    for entry in model.engines:
        engine = read_engine(bundle.file(entry.file))
        name = f"sm{_capability(engine).replace('.', '')}.plan"
        first = next(iter(plans.values()), engine)
        if name in plans:
            continue  # another GPU of the same kind
        if engine.profiles != first.profiles:
            notes.append(f"{entry.file} is not included: its profiles are not those of {first.path.name}")
            continue
        plans[name] = engine
        (folder / name).write_bytes(engine.data)
        version = engine.manifest.versions.get("tensorrt", "that built it")
        notes.append(f"{model.name} needs a Triton container with TensorRT {version}")
    return plans, notes


def _capability(engine: Engine) -> str:
    """Return the compute capability that a plan was built on, such as "8.9"."""
    found = engine.target.get("compute_capability")
    if not found:
        raise InputError(
            f"the sidecar of {engine.path} names no compute capability", next_step="build the engine again"
        )
    return str(found)


def _by_capability(plans: dict[str, Engine]) -> list[str]:
    return [f'cc_model_filenames {{ key: "{_capability(engine)}" value: "{name}" }}' for name, engine in plans.items()]


def _write_pictures(bundle: Bundle, name: str, folder: Path) -> None:
    """Write the model that takes pictures, with the bundle that it opens."""
    version = folder / "1"
    copy_bundle(bundle, version / "bundle")
    (version / "model.py").write_text(_MODEL, encoding="utf-8")
    config = [
        f'name: "{name}"',
        'backend: "python"',
        "max_batch_size: 0",
        "input [",
        '  { name: "pixels" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] optional: true },',
        '  { name: "encoded" data_type: TYPE_STRING dims: [ -1 ] optional: true }',
        "]",
        "output [",
        '  { name: "upscaled_pixels" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] },',
        '  { name: "upscaled_encoded" data_type: TYPE_STRING dims: [ -1 ] }',
        "]",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        "version_policy { latest { num_versions: 1 } }",
        'parameters { key: "device" value { string_value: "auto" } }',
        "",
    ]
    (folder / "config.pbtxt").write_text("\n".join(config), encoding="utf-8")
