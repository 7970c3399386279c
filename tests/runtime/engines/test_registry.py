"""ONNX Runtime and OpenVINO on the CPU: what they open, build, answer and refuse."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError, InputError, SrdeployError, UsageError
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.runner import TimedRunner, run_image
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines import openvino
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import availability, build_engine, open_engine

CPU = ["onnxruntime", "openvino"]
GraphFactory = Callable[..., Path]


def image(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def expected(path: Path, picture: np.ndarray) -> np.ndarray:
    """The graph's answer by ONNX's own reference evaluator: independent of every engine."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load(path)).run(None, {"input": picture})[0]


@pytest.mark.parametrize("engine", CPU)
@pytest.mark.parametrize("upsampler", ["shuffle", "deconvolution"])
def test_onnx_file_runs_at_any_shape(engine: str, upsampler: str, small_onnx: GraphFactory) -> None:
    path = small_onnx(upsampler=upsampler)

    with open_engine(path, engine=engine, threads=1, parity=True) as runner:
        for shape in [(1, 3, 1, 1), (2, 3, 5, 7), (1, 3, 16, 9)]:
            picture = image(*shape)
            output = run_image(runner, picture)

            # 1e-5: FP32 sums of at most 144 products of order 1 in another order
            np.testing.assert_allclose(output, expected(path, picture), atol=1e-5)


def test_ctrl_c_after_runners_have_come_and_gone_is_an_exception_not_a_crash(small_onnx: GraphFactory) -> None:
    # In a process of its own, since it used to die here: see `shared_core`.
    script = f"""
import gc, signal
from pathlib import Path
from srdeploy.runtime.engines.registry import open_engine
first = open_engine(Path({str(small_onnx())!r}), engine="openvino", threads=1).__enter__()
second = open_engine(Path({str(small_onnx())!r}), engine="openvino", threads=1).__enter__()
first.__exit__(None, None, None)
del first
gc.collect()
second.__exit__(None, None, None)
del second
gc.collect()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr[-2000:]


def test_threads_that_open_openvino_at_once_share_one_core() -> None:
    # In a process of its own, since the real one must never be freed.
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from srdeploy.runtime.engines import openvino
made, second = [], threading.Event()
def core():
    made.append(object())
    if len(made) > 1:
        second.set()
    second.wait(0.3)  # it comes by then, unless it has to wait
    return made[-1]
openvino.import_extra = lambda *names: SimpleNamespace(Core=core)
with ThreadPoolExecutor(2) as threads:
    found = list(threads.map(lambda _: openvino.shared_core(), range(2)))
print(len(made), found == made * 2)
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "1 True\n"


@pytest.mark.parametrize("engine", CPU)
@pytest.mark.parametrize(
    ("kwargs", "tolerance"),
    [({}, 1e-5), ({"dtype": "float16"}, 2e-2), ({"quantized": "both"}, 1e-5)],
    ids=["fp32", "fp16", "int8"],
)
def test_built_engine_gives_what_the_onnx_file_gives(
    engine: str, kwargs: dict[str, object], tolerance: float, small_onnx: GraphFactory, tmp_path: Path
) -> None:
    path = small_onnx(**kwargs)
    picture = image(1, 3, 12, 10)
    with open_engine(path, engine=engine, threads=1, parity=True) as runner:
        straight = run_image(runner, picture)

    result = build_engine(path, tmp_path / "engine.bin", engine=engine)
    with open_engine(result.path, threads=1, parity=True) as runner:
        built = run_image(runner, picture)
        info = runner.info

    np.testing.assert_allclose(built, straight, atol=tolerance)
    assert info.engine == engine
    assert sum(info.built["convolutions"].values()) == 3
    assert info.contract == ModelContract.from_metadata(
        {entry.key: entry.value for entry in onnx.load(path).metadata_props}, name="source"
    )


@pytest.mark.parametrize("engine", CPU)
@pytest.mark.parametrize(
    ("quantized", "read_back", "words"),
    [
        (False, {"fp32": 3}, "FP32"),
        ("inputs", {"onnxruntime": {"fp32": 3}, "openvino": {"fp32": 2, "int8": 1}}, "INT8 graph"),
        ("both", {"fp32": 2, "int8": 1}, "INT8 graph"),
    ],
    ids=["none", "conv-inputs-only", "inputs-and-outputs"],
)
def test_convolution_types_are_read_back(
    engine: str, quantized: object, read_back: dict[str, object], words: str, small_onnx: GraphFactory
) -> None:
    with open_engine(small_onnx(quantized=quantized), engine=engine, threads=1, parity=True) as runner:
        assert runner.info.built["convolutions"] == read_back.get(engine, read_back)
        assert runner.info.numeric_mode.startswith(words)


def test_openvino_states_the_share_of_multiply_adds(small_onnx: GraphFactory) -> None:
    with open_engine(small_onnx(quantized="both"), engine="openvino", threads=1, parity=True) as runner:
        share = runner.info.built["macs_share"]

    assert share["int8"] == pytest.approx(16 * 16 / (3 * 16 + 16 * 16 + 16 * 12), abs=1e-4)
    assert sum(share.values()) == pytest.approx(1.0, abs=1e-3)


def test_fp16_on_onnxruntime_is_called_what_it_is(small_onnx: GraphFactory, tmp_path: Path) -> None:
    result = build_engine(small_onnx(dtype="float16"), tmp_path / "half.ort.onnx", engine="onnxruntime")

    assert result.manifest.details["precision"]["asked"] == "fp16"
    assert result.manifest.details["precision"]["built"] == "fp32"
    assert any("computed in FP32" in note for note in result.notes)


@pytest.mark.parametrize("parity", [False, True])
def test_openvino_computes_fp32_layers_in_fp32_however_it_is_opened(small_onnx: GraphFactory, parity: bool) -> None:
    with open_engine(small_onnx(), engine="openvino", threads=1, parity=parity) as runner:
        assert "f32" in runner.info.numeric_mode
        assert set(runner.info.built["convolutions"]) == {"fp32"}
    with openvino.open_native(read_graph(small_onnx()), threads=1) as runner:
        assert "own choice" in runner.info.numeric_mode


@pytest.mark.parametrize("engine", CPU)
def test_inner_tensors_can_be_asked_for(engine: str, small_onnx: GraphFactory) -> None:
    with open_engine(small_onnx(), engine=engine, threads=1, outputs=["head_relu", "output"]) as runner:
        outputs = runner.run({"input": image(1, 3, 6, 5)})

    assert {name: value.shape for name, value in outputs.items()} == {
        "head_relu": (1, 16, 6, 5),
        "output": (1, 3, 12, 10),
    }
    assert outputs["head_relu"].min() == 0


@pytest.mark.parametrize("engine", CPU)
def test_unknown_inner_tensor_is_refused(engine: str, small_onnx: GraphFactory) -> None:
    with pytest.raises(InputError, match="no tensor named 'nowhere'"):
        open_engine(small_onnx(), engine=engine, outputs=["nowhere"])


@pytest.mark.parametrize("engine", CPU)
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "got inputs none"),
        ({"image": image(1, 3, 4, 4)}, "got inputs 'image'; expected 'input' float32"),
        ({"input": image(1, 3, 4, 4), "more": image(1)}, "'more'"),
        ({"input": image(1, 3, 4, 4).astype(np.float64)}, "has type float64"),
        ({"input": image(1, 4, 4, 4)}, "has shape 1x4x4x4"),
        ({"input": image(3, 4, 4)}, "has shape 3x4x4"),
        ({"input": image(1, 3, 0, 4)}, "has shape 1x3x0x4"),
        ({"input": [[1.0]]}, "is a list"),
    ],
    ids=["nothing", "wrong-name", "extra", "float64", "channels", "axes", "empty", "not-an-array"],
)
def test_wrong_inputs_are_named(
    engine: str, feeds: dict[str, np.ndarray], message: str, small_onnx: GraphFactory
) -> None:
    with open_engine(small_onnx(), engine=engine, threads=1) as runner, pytest.raises(UsageError, match=message):
        runner.run(feeds)


@pytest.mark.parametrize("engine", CPU)
def test_strided_input_is_accepted(engine: str, small_onnx: GraphFactory) -> None:
    picture = image(1, 8, 9, 3).transpose(0, 3, 1, 2)  # (N, C, H, W) seen through strides
    with open_engine(small_onnx(), engine=engine, threads=1) as runner:
        np.testing.assert_array_equal(run_image(runner, picture), run_image(runner, np.ascontiguousarray(picture)))


@pytest.mark.parametrize("engine", CPU)
def test_threads_get_their_own_answers(engine: str, small_onnx: GraphFactory) -> None:
    pictures = [image(1, 3, 8 + index, 9, seed=index) for index in range(6)]
    with open_engine(small_onnx(), engine=engine, threads=1) as runner:
        alone = [run_image(runner, picture) for picture in pictures]
        together: dict[int, np.ndarray] = {}

        def work(index: int) -> None:
            for _ in range(5):
                together[index] = run_image(runner, pictures[index])

        workers = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    for index, answer in enumerate(alone):
        np.testing.assert_array_equal(together[index], answer)


@pytest.mark.parametrize("engine", CPU)
def test_results_survive_the_next_run(engine: str, small_onnx: GraphFactory) -> None:
    with open_engine(small_onnx(), engine=engine, threads=1) as runner:
        first = run_image(runner, image(1, 3, 6, 6))
        kept = first.copy()
        run_image(runner, image(1, 3, 6, 6, seed=9))

    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("engine", CPU)
def test_compute_is_timed_apart(engine: str, small_onnx: GraphFactory) -> None:
    with open_engine(small_onnx(), engine=engine, threads=1) as runner:
        assert isinstance(runner, TimedRunner)
        compute = runner.prepare({"input": image(1, 3, 64, 64)})
        times = [compute() for _ in range(5)]

        assert all(0 < milliseconds < 10_000 for milliseconds in times)
        with pytest.raises(UsageError):
            runner.prepare({"input": image(1, 1, 8, 8)})


@pytest.mark.parametrize("engine", CPU)
def test_unsupported_operator_is_one_line(engine: str, small_onnx: GraphFactory, tmp_path: Path) -> None:
    model = onnx.load(small_onnx())
    model.graph.node[1].domain, model.graph.node[1].op_type = "example.unknown", "Mystery"
    model.opset_import.append(onnx.helper.make_opsetid("example.unknown", 1))
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)

    with pytest.raises(InputError) as caught:
        open_engine(path, engine=engine)
    with pytest.raises(SrdeployError):
        build_engine(path, tmp_path / "odd.engine", engine=engine)

    assert "Mystery" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "odd.engine").exists()


@pytest.mark.parametrize("engine", CPU)
@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(profiles=(ShapeProfile((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)),)),
        BuildOptions(compute_capabilities=("8.9",)),
        BuildOptions(tf32=True),
        BuildOptions(workspace_bytes=1 << 30),
    ],
    ids=["profile", "capability", "tf32", "workspace"],
)
def test_options_of_other_families_are_refused(
    engine: str, options: BuildOptions, small_onnx: GraphFactory, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"does not apply to {engine}"):
        build_engine(small_onnx(), tmp_path / "engine.bin", engine=engine, options=options)


@pytest.mark.parametrize("engine", CPU)
class TestBuiltEngineFiles:
    """A built engine is opened only with its own sidecar, on a machine it was built for."""

    @pytest.fixture
    def built(self, engine: str, small_onnx: GraphFactory, tmp_path: Path) -> Path:
        return build_engine(small_onnx(), tmp_path / "engine.bin", engine=engine).path

    def test_bit_flip(self, built: Path) -> None:
        data = bytearray(built.read_bytes())
        data[len(data) // 2] ^= 1
        built.write_bytes(data)

        with pytest.raises(InputError, match="has SHA-256"):
            open_engine(built)

    def test_truncated(self, built: Path) -> None:
        built.write_bytes(built.read_bytes()[:-10])

        with pytest.raises(InputError, match="changed or truncated"):
            open_engine(built)

    def test_sidecar_missing(self, built: Path) -> None:
        manifest_path(built).unlink()

        with pytest.raises(InputError, match="no readable manifest"):
            open_engine(built)

    def test_sidecar_of_another_engine(
        self, built: Path, engine: str, small_onnx: GraphFactory, tmp_path: Path
    ) -> None:
        other = build_engine(small_onnx("other.onnx", seed=5), tmp_path / "other.bin", engine=engine).path
        manifest_path(built).write_bytes(manifest_path(other).read_bytes())

        with pytest.raises(InputError, match="has SHA-256"):
            open_engine(built)

    @pytest.mark.parametrize(("part", "message"), [("versions", "here is"), ("target", "lacks")])
    def test_another_version_or_processor(self, built: Path, part: str, message: str) -> None:
        manifest = read_manifest(built)
        if part == "target":
            target = {"cpu_flags": ["avx1024"], "capabilities": ["FP4096"]}
            other = replace(manifest, details={**manifest.details, "target": target})
        else:
            other = replace(manifest, versions={"onnxruntime": "9.9.9", "openvino": "2099.1"})
        manifest_path(built).write_text(other.to_json())

        with pytest.raises(CapabilityError, match=f"{message}.*build it again here") as caught:
            open_engine(built)
        assert caught.value.exit_code == 8

    def test_asked_for_as_another_family(self, built: Path, engine: str) -> None:
        with pytest.raises(UsageError, match=f"is an engine of {engine}"):
            open_engine(built, engine="tensorrt-rtx")

    def test_existing_output_needs_force(self, built: Path, engine: str, small_onnx: GraphFactory) -> None:
        before = built.read_bytes()

        with pytest.raises(UsageError, match="exists already"):
            build_engine(small_onnx("new.onnx", seed=3), built, engine=engine)
        assert built.read_bytes() == before

        build_engine(small_onnx("new.onnx", seed=3), built, engine=engine, force=True)
        assert built.read_bytes() != before

    def test_failed_rebuild_keeps_the_good_engine(self, built: Path, engine: str, tmp_path: Path) -> None:
        before = built.read_bytes(), manifest_path(built).read_bytes()
        (tmp_path / "bad.onnx").write_bytes(b"not a graph")

        with pytest.raises(InputError):
            build_engine(tmp_path / "bad.onnx", built, engine=engine, force=True)

        assert (built.read_bytes(), manifest_path(built).read_bytes()) == before
        assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_gpu_is_never_replaced_by_the_cpu(small_onnx: GraphFactory) -> None:
    for engine in CPU:
        with pytest.raises(UsageError, match="runs on the CPU, and device 'cuda'"):
            open_engine(small_onnx(), engine=engine, device="cuda")


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "cpu:0", "gpu"])
def test_what_is_no_device_is_one_line(device: str, small_onnx: GraphFactory) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
        open_engine(small_onnx(), engine="onnxruntime", device=device)


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_gpu_providers_are_refused_where_they_cannot_run(engine: str, small_onnx: GraphFactory) -> None:
    if next(status for status in availability() if status.name == engine).why_not_run is None:
        pytest.skip(f"{engine} runs here")

    with pytest.raises(CapabilityError, match=f"{engine} cannot run here") as caught:
        open_engine(small_onnx(), engine=engine)
    assert caught.value.exit_code == 8
    with pytest.raises(UsageError, match="runs on NVIDIA GPUs, and device 'cpu' was requested"):
        open_engine(small_onnx(), engine=engine, device="cpu")
    with pytest.raises(UsageError, match="nothing to build"):
        build_engine(small_onnx(), Path("never"), engine=engine)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_session_does_not_fall_back_to_the_cpu(small_onnx: GraphFactory) -> None:
    # ONNX Runtime by itself would answer with a warning and a CPU session.
    import onnxruntime

    from srdeploy.runtime.engines.onnxruntime_gpu import CUDA, strict_session

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")

    with pytest.raises(CapabilityError, match="CUDAExecutionProvider"):
        strict_session(onnxruntime, small_onnx().read_bytes(), CUDA, {}, what="the file")


def test_unknown_engine_lists_the_known_ones(small_onnx: GraphFactory) -> None:
    with pytest.raises(UsageError, match="one of onnxruntime, openvino, ncnn, tensorrt-rtx"):
        open_engine(small_onnx(), engine="tensorflow")


def test_onnx_file_without_our_metadata_is_refused(small_onnx: GraphFactory, tmp_path: Path) -> None:
    model = onnx.load(small_onnx())
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")

    with pytest.raises(InputError, match="carries no srdeploy metadata"):
        open_engine(tmp_path / "foreign.onnx")


def test_external_weights_are_read_and_hashed(small_onnx: GraphFactory, tmp_path: Path) -> None:
    model = onnx.load(small_onnx())
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="external.bin", size_threshold=0)
    with open_engine(path, threads=1) as runner:
        picture = image(1, 3, 4, 4)
        np.testing.assert_allclose(run_image(runner, picture), expected(small_onnx(), picture), atol=1e-5)
    first = build_engine(path, tmp_path / "one.bin", engine="onnxruntime")

    data = bytearray((tmp_path / "external.bin").read_bytes())
    data[3] ^= 0x40
    (tmp_path / "external.bin").write_bytes(data)
    second = build_engine(path, tmp_path / "two.bin", engine="onnxruntime")

    assert first.manifest.details["key_sha256"] != second.manifest.details["key_sha256"]
    (tmp_path / "external.bin").unlink()
    with pytest.raises(InputError, match="external weights external.bin"):
        open_engine(path)


@pytest.mark.parametrize("engine", CPU)
def test_8_bit_weights_are_refused_where_they_overflow_and_opened_to_measure_it(
    engine: str, small_onnx: GraphFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = small_onnx(quantized="both")
    built = build_engine(path, tmp_path / "engine.bin", engine=engine).path
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: True)

    for file in (path, built):
        with pytest.raises(CapabilityError, match="lacks VNNI") as caught:
            open_engine(file, engine=engine)
        assert "--weight-bits 7" in str(caught.value)
        with open_engine(file, engine=engine, parity=True) as runner:
            assert run_image(runner, image(1, 3, 8, 8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("engine", CPU)
def test_7_bit_weights_open_on_every_processor(
    engine: str, small_onnx: GraphFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_onnx(quantized="both")
    model = onnx.load(path)
    contract = ModelContract.from_metadata({e.key: e.value for e in model.metadata_props}, name="source")
    narrow = replace(contract, provenance={"quantization": {"weight_bits": 7}})
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, narrow.to_metadata())
    onnx.save(model, path)
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: True)

    with open_engine(path, engine=engine) as runner:
        assert runner.info.contract.weight_bits == 7
