"""Real ahead-of-time builds with TensorRT-RTX, which needs no GPU, and what they refuse."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from srdeploy.core.errors import BuildError, CapabilityError, InputError, OutputError, UsageError
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.progress import Advance
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine
from srdeploy.runtime.engines.tensorrt.log import Log, build_logger
from srdeploy.runtime.engines.tensorrt.rtx import describe_header

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")

GraphFactory = Callable[..., Path]
PROFILE = ShapeProfile((1, 3, 8, 8), (1, 3, 16, 16), (2, 3, 32, 32))
ONE_CHANNEL = ShapeProfile((1, 1, 8, 8), (1, 1, 8, 8), (1, 1, 8, 8))
OPTIONS = BuildOptions(profiles=(PROFILE,), compute_capabilities=("8.9",), use_cache=False)


class Steps:
    """Collects what a build reports."""

    def __init__(self) -> None:
        self.steps = 0.0
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        def advance(amount: float = 1, note: str | None = None) -> None:
            self.steps += amount

        yield advance

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(
    ("graph", "asked", "convolutions"),
    [
        ({}, "fp32", {"fp32": 3}),
        ({"dtype": "float16"}, "fp16", {"fp16": 3}),
        ({"dtype": "float16", "upsampler": "deconvolution"}, "fp16", {"fp16": 3}),
        ({"dtype": "bfloat16"}, "bf16", {"bf16": 3}),
        ({"quantized": "inputs"}, "int8", {"fp32": 2, "int8": 1}),
    ],
    ids=["fp32", "fp16", "fp16-deconvolution", "bf16", "int8"],
)
def test_the_type_in_the_graph_is_the_type_in_the_engine(
    graph: dict[str, str], asked: str, convolutions: dict[str, int], small_onnx: GraphFactory, tmp_path: Path
) -> None:
    progress = Steps()

    result = build_engine(
        small_onnx(**graph), tmp_path / "e.rtx", engine="tensorrt-rtx", options=OPTIONS, progress=progress
    )

    details = read_manifest(result.path).details
    assert details["built"]["convolutions"] == convolutions
    assert details["precision"]["asked"] == asked
    assert details["built"]["activation_bytes"] > 0
    assert details["target"]["compute_capabilities"] == ["8.9"]
    assert progress.steps > 20
    assert describe_header(result.path.read_bytes()) == {"version": "1.7.1.116", "compute_capabilities": ["8.9"]}


def test_a_convolution_in_another_type_fails_the_build(small_onnx: GraphFactory, tmp_path: Path) -> None:
    # TensorRT-RTX 1.7.1 computes an FP32 convolution between two FP16 casts in FP16 and says nothing.
    path = small_onnx(dtype="float16", odd_layer="float32")

    with pytest.raises(
        BuildError, match=r"1 of 3 convolutions .* 'node_odd' computes in fp16; expected fp32"
    ) as caught:
        build_engine(path, tmp_path / "e.rtx", engine="tensorrt-rtx", options=OPTIONS)

    assert caught.value.exit_code == 5
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_files_of_the_current_folder_are_not_run(
    small_onnx: GraphFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(elsewhere)

    assert build_engine(small_onnx(), tmp_path / "a", engine="tensorrt-rtx", options=OPTIONS).path.exists()


def test_several_profiles_and_targets(small_onnx: GraphFactory, tmp_path: Path) -> None:
    large = ShapeProfile((1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 64, 64))
    options = replace(OPTIONS, profiles=(PROFILE, large), compute_capabilities=("12.0", "8.6"))

    result = build_engine(small_onnx(), tmp_path / "e.rtx", engine="tensorrt-rtx", options=options)

    assert len(result.manifest.details["profiles"]) == 2
    assert describe_header(result.path.read_bytes()) == {
        "version": "1.7.1.116",
        "compute_capabilities": ["8.6", "12.0"],
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (replace(OPTIONS, profiles=()), UsageError, "the engine needs shapes"),
        (replace(OPTIONS, profiles=(ONE_CHANNEL,)), UsageError, "1 channels"),
        (replace(OPTIONS, compute_capabilities=("9.0",)), UsageError, "does not build for compute capability 9.0"),
        (replace(OPTIONS, compute_capabilities=("fast",)), UsageError, "compute capability 'fast'"),
        (replace(OPTIONS, optimization_level=3), UsageError, "--optimization-level does not apply"),
        (replace(OPTIONS, version_compatible=True), UsageError, "open only with the release that built them"),
        (replace(OPTIONS, hardware_compatibility="ampere_plus"), UsageError, "--compute-capability instead"),
        (replace(OPTIONS, timing_cache=Path("t")), UsageError, "times no kernels"),
        (replace(OPTIONS, workspace_bytes=1 << 10), BuildError, "omit --workspace"),
        (replace(OPTIONS, memory_bytes=1 << 16), UsageError, "largest legal shape of this kind is"),
        (
            replace(OPTIONS, profiles=(ShapeProfile((1, 3, 8, 8), (1, 3, 8, 8), (64, 3, 4096, 4096)),)),
            UsageError,
            r"expected less than 2\^31 .* largest legal shape of this kind is 64x3x",
        ),
    ],
    ids=["no-profile", "channels", "hopper", "no-number", "level", "version", "hardware", "timing", "workspace",
         "memory", "2^31"],
)  # fmt: skip
def test_what_cannot_be_built_is_one_line(
    options: BuildOptions, error: type[Exception], message: str, small_onnx: GraphFactory, tmp_path: Path
) -> None:
    path = small_onnx()

    with pytest.raises(error, match=message) as caught:
        build_engine(path, tmp_path / "e.rtx", engine="tensorrt-rtx", options=options)

    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.graph.node[1], "op_type", "Mystery"), "Mystery|node_head_relu"),
        (lambda model: setattr(model.opset_import[0], "version", 99), "opset|version|does not"),
        (lambda model: model.graph.initializer[0].ClearField("raw_data"), "does not accept"),
    ],
    ids=["operator", "opset", "weights"],
)
def test_graphs_that_tensorrt_does_not_take(
    change: Callable[[onnx.ModelProto], None], message: str, small_onnx: GraphFactory, tmp_path: Path
) -> None:
    model = onnx.load(small_onnx())
    change(model)
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)

    with pytest.raises((BuildError, InputError), match=message) as caught:
        build_engine(path, tmp_path / "e.rtx", engine="tensorrt-rtx", options=OPTIONS)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e.rtx").exists()


def test_bf16_deconvolution_names_the_way_out(small_onnx: GraphFactory, tmp_path: Path) -> None:
    path = small_onnx(dtype="bfloat16", upsampler="deconvolution")

    with pytest.raises(BuildError, match="--deconvolution rewrite"):
        build_engine(path, tmp_path / "e.rtx", engine="tensorrt-rtx", options=OPTIONS)


def test_the_whole_log_is_kept(small_onnx: GraphFactory, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "build.log"

    with pytest.raises(BuildError, match=f"full log: {log}"):
        build_engine(
            small_onnx(),
            tmp_path / "e.rtx",
            engine="tensorrt-rtx",
            options=replace(OPTIONS, workspace_bytes=1 << 10, log_path=log),
        )

    assert "workspace limit" in log.read_text()


def test_ctrl_c_ends_the_build_at_once_and_leaves_nothing(small_onnx: GraphFactory, tmp_path: Path) -> None:
    path = small_onnx(dtype="float16", features=64)
    script = (
        "import contextlib, psutil\n"
        "from pathlib import Path\n"
        "from srdeploy.core.shapes import ShapeProfile\n"
        "from srdeploy.runtime.engines.options import BuildOptions\n"
        "from srdeploy.runtime.engines.registry import build_engine\n"
        "def advance(amount=1, note=None):\n"
        "    if note == 'building engine':\n"
        "        (worker,) = psutil.Process().children()\n"
        "        worker.suspend()  # its build would never end\n"
        "    print(note, flush=True)\n"
        "class Told:\n"
        "    def note(self, message): print(message, flush=True)\n"
        "    def task(self, description, total=None): return contextlib.nullcontext(advance)\n"
        f"p = ShapeProfile((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))\n"
        f"build_engine(Path({str(path)!r}), Path({str(tmp_path / 'e.rtx')!r}), engine='tensorrt-rtx',"
        f" options=BuildOptions(profiles=(p,)), progress=Told())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:  # wait until the builder is at work
        if "building engine" in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)

    assert "KeyboardInterrupt" in stderr
    assert process.returncode != 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


class TestOpeningWithoutGpu:
    """What can be said about an engine before a GPU is needed."""

    @pytest.fixture
    def built(self, small_onnx: GraphFactory, tmp_path: Path) -> Path:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        return build_engine(small_onnx(), tmp_path / "e.rtx", engine="tensorrt-rtx", options=OPTIONS).path

    def test_no_gpu_is_exit_8_with_one_line(self, built: Path) -> None:
        with pytest.raises(CapabilityError, match="engine for 8.9, and no NVIDIA GPU") as caught:
            open_engine(built)

        assert caught.value.exit_code == 8
        assert "\n" not in str(caught.value)

    def test_a_refused_deserialization_is_an_error_and_not_a_none(self, built: Path) -> None:
        # In a process of its own: TensorRT keeps the first logger of a process, which may be another test's.
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from srdeploy.runtime.engines.sidecar import read_engine\n"
            "from srdeploy.runtime.engines.tensorrt.open import deserialized\n"
            "from srdeploy.runtime.engines.tensorrt.rtx import RTX\n"
            "deserialized(RTX, RTX.load(), read_engine(Path(sys.argv[1])))\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(built)], capture_output=True, text=True, check=False)

        assert "CapabilityError: TensorRT-RTX cannot open" in done.stderr
        assert "the NVIDIA driver is missing or too old for this TensorRT" in done.stderr
        assert done.stdout == ""

    def test_another_release(self, built: Path) -> None:
        data = bytearray(built.read_bytes())
        data[24:28] = bytes([1, 8, 0, 5])
        _rewrite(built, bytes(data))

        with pytest.raises(
            CapabilityError,
            match=r"was built with TensorRT-RTX 1\.8\.0\.5.*1\.7\.1\.116 is installed here; build it again",
        ):
            open_engine(built)

    def test_not_an_engine_at_all(self, built: Path) -> None:
        _rewrite(built, b"something else" * 20)

        with pytest.raises(InputError, match="does not begin like a TensorRT-RTX engine"):
            open_engine(built)

    @pytest.mark.parametrize("damage", ["flip", "cut", "no-sidecar"])
    def test_damage_is_found_before_anything_else(self, built: Path, damage: str) -> None:
        data = bytearray(built.read_bytes())
        if damage == "flip":
            data[-20] ^= 4
            built.write_bytes(data)
        elif damage == "cut":
            built.write_bytes(data[:100])
        else:
            manifest_path(built).unlink()

        with pytest.raises(InputError):
            open_engine(built)

    def test_an_onnx_file_is_not_an_engine(self, small_onnx: GraphFactory) -> None:
        with pytest.raises(UsageError, match="srdeploy build .* --engine tensorrt-rtx"):
            open_engine(small_onnx(), engine="tensorrt-rtx")


@pytest.mark.tmpfs
@pytest.mark.parametrize("full", ["output", "work-folder"])
def test_disk_full_in_the_middle_of_a_build(
    full: str, small_onnx: GraphFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    path = small_onnx(dtype="float16")  # its engine has about 370 kB, the disk 128 kB
    output = (small_disk if full == "output" else tmp_path) / "e.rtx"
    if full == "work-folder":
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    output.write_bytes(b"a good engine")

    with pytest.raises(OutputError, match="No space left|no space left|full") as caught:
        build_engine(path, output, engine="tensorrt-rtx", options=OPTIONS, force=True)

    assert caught.value.exit_code == 8
    assert output.read_bytes() == b"a good engine"
    assert sorted(entry.name for entry in small_disk.iterdir()) == (["e.rtx"] if full == "output" else [])


def _rewrite(engine: Path, data: bytes) -> None:
    """Put other bytes in place of an engine with a sidecar that fits them."""
    from srdeploy.core.artifact import sha256_of_bytes

    manifest = replace(read_manifest(engine), sha256=sha256_of_bytes(data))
    engine.write_bytes(data)
    manifest_path(engine).write_text(manifest.to_json())


def test_missing_tensorrt_names_the_extra(small_onnx: GraphFactory, tmp_path: Path) -> None:
    from srdeploy.core.extras import is_installed

    if is_installed("tensorrt") or is_installed("tensorrt_bindings"):
        pytest.skip("TensorRT is installed here")
    with pytest.raises(CapabilityError, match=r"pip install 'srdeploy\[tensorrt\]'"):
        build_engine(small_onnx(), tmp_path / "e.plan", engine="tensorrt", options=BuildOptions(profiles=(PROFILE,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorRT-RTX has timing caches in name only
def test_what_full_tensorrt_sets_is_taken_by_a_real_builder_configuration(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    from srdeploy.runtime.engines.tensorrt.full import FULL

    timings = tmp_path / "timings"
    options = BuildOptions(
        optimization_level=4,
        max_aux_streams=0,
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        timing_cache=timings,
    )
    builder = trt.Builder(build_logger(trt, Log(), None))
    config = builder.create_builder_config()

    FULL.configure(trt, config, options)

    assert (config.builder_optimization_level, config.max_aux_streams) == (4, 0)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    FULL.finish(trt, config, options)
    assert timings.stat().st_size > 0
    FULL.configure(trt, config, replace(options, timing_cache=tmp_path / "another"))
