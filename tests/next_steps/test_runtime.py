"""Next steps of engines on the CPU, of verification, benchmarks, reports, bundles and packages."""

import json
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from next_steps.conftest import SMALL, User
from next_steps.inventory import ROOT
from next_steps.test_calibration import changed_weights

from srdeploy.cli.verify import _refuse_failures
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import (
    GateError,
    InputError,
    UnstableError,
    UsageError,
)
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.runtime.bench.latency import BenchResult, Effort, Row, statistics_of
from srdeploy.runtime.bundle import read_bundle
from srdeploy.runtime.engines.feeds import check_feeds
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.package.flat import flat_model
from srdeploy.runtime.verify.difference import difference
from srdeploy.runtime.verify.parity import Case, Gates, VerifyResult

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
AGAINST = "--against good.pt --images photo.png --threads 1"


def edited(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# A test that is skipped inside would miss its message; these skip it whole.
needs_ncnn = pytest.mark.skipif(find_spec("ncnn") is None or find_spec("pnnx") is None, reason="ncnn is not installed")
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


# ----------------------------------------------------------------------------------------------------------------------
# Engines


@needs_ncnn
@pytest.mark.advice("runtime/engines/ncnn.py:open_built", "open the ONNX file for that")
@pytest.mark.advice("runtime/engines/onnxruntime_cpu.py:open_built", "open the ONNX file for that")
@pytest.mark.advice("runtime/engines/openvino.py:open_built", "open the ONNX file for that")
@pytest.mark.advice("runtime/engines/feeds.py:check_feeds", "convert it with .astype(numpy.")
@pytest.mark.advice("runtime/engines/registry.py:_refuse_device", "for NVIDIA GPUs use --engine onnxruntime-cuda")
@pytest.mark.advice("runtime/engines/registry.py:_refuse_options", "omit it")
def test_what_engines_are_asked_for(user: User) -> None:
    graph = read_graph(Path("good.onnx"))
    inner = graph.model.graph.node[0].output[0]
    for engine in ("onnxruntime", "openvino", "ncnn"):
        user.runs(f"build good.onnx --engine {engine} -o {engine}.engine")
        with pytest.raises(UsageError):
            open_engine(Path(f"{engine}.engine"), outputs=[inner])
    with open_engine(Path("good.onnx"), outputs=[inner], threads=1) as runner:
        feeds = {"input": np.zeros((1, 3, 8, 8))}
        with pytest.raises(UsageError) as caught:
            check_feeds(feeds, graph.inputs, engine="good.onnx")
        advised = re.search(r"\.astype\(numpy\.(\w+)\)", str(caught.value))
        assert advised is not None
        assert inner in runner.run({"input": feeds["input"].astype(getattr(np, advised[1]))})

    assert "--engine onnxruntime-cuda" in user.refused("upscale good.onnx photo.png --device cuda -o a.png")
    user.refused("build good.onnx --engine onnxruntime --tf32 --workspace 1MiB -o a.engine")
    user.runs("build good.onnx --engine onnxruntime -o a.engine")


@pytest.mark.advice("runtime/engines/onnxruntime_cpu.py:OnnxRuntimeRunner.kernel_times", "open the ONNX file")
@pytest.mark.advice(
    "runtime/engines/openvino.py:OpenVinoRunner.kernel_times", "open the ONNX file, with its own outputs"
)
def test_the_times_of_kernels_of_what_was_built(user: User) -> None:
    feeds = {"input": np.zeros((1, 3, 8, 8), np.float32)}
    for engine in ("onnxruntime", "openvino"):
        path = Path(f"{engine}.engine")
        user.runs(f"build good.onnx --engine {engine} -o {path}")
        with open_engine(path, threads=1) as built, pytest.raises(UsageError, match="cannot be profiled"):
            built.kernel_times(feeds)  # type: ignore[attr-defined]
        with open_engine(Path("good.onnx"), engine=engine, threads=1) as runner:
            assert runner.kernel_times(feeds)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("ncnn", marks=needs_ncnn),
        pytest.param(
            "tensorrt-rtx",
            marks=[
                needs_rtx,
                pytest.mark.advice("runtime/engines/registry.py:open_engine", " --profile-images IMAGES"),
            ],
        ),
    ],
)
@pytest.mark.advice("runtime/engines/registry.py:open_engine", "build one with: srdeploy build ")
def test_a_graph_where_an_engine_is_needed(user: User, engine: str) -> None:
    message = user.refused(f"upscale good.onnx photo.png --engine {engine} -o a.png")

    user.runs(message[message.index("srdeploy build") :].replace("IMAGES", "photos"))


@pytest.mark.advice(
    "runtime/engines/onnxruntime_cpu.py:open_built",
    "build it again here: srdeploy build model.onnx --engine onnxruntime -o ENGINE",
)
@pytest.mark.advice(
    "runtime/engines/openvino.py:_check_made_for_here",
    "build it again here: srdeploy build model.onnx --engine openvino -o ENGINE",
)
@pytest.mark.advice("runtime/engines/sidecar.py:Engine._detail", "build the engine again with srdeploy build")
def test_engines_of_elsewhere(user: User) -> None:
    for engine in ("onnxruntime", "openvino"):
        user.runs(f"build good.onnx --engine {engine} -o {engine}.engine")
        edited(Path(f"{engine}.engine.json"), lambda sidecar, engine=engine: sidecar["versions"].update({engine: "0"}))
        message = user.refused(f"upscale {engine}.engine photo.png -o {engine}.png")
        command = message[message.index("srdeploy build") :].replace("model.onnx", "good.onnx")
        user.runs(command.replace("ENGINE", f"again_{engine}.engine"))
        user.runs(f"upscale again_{engine}.engine photo.png -o {engine}.png")
    sidecar = Path("again_onnxruntime.engine.json")
    edited(sidecar, lambda document: document["details"].pop("target"))
    user.refused("upscale again_onnxruntime.engine photo.png -o out.png")
    user.runs("build good.onnx --engine onnxruntime -o again_onnxruntime.engine --force --no-cache")
    user.runs("upscale again_onnxruntime.engine photo.png -o out.png")


@pytest.mark.advice("runtime/engines/onnxruntime_cpu.py:_scratch_folder", "free some space there, or set TMPDIR")
def test_a_temporary_folder_that_is_gone(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "build good.onnx --engine onnxruntime --no-cache -o a.engine"

    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    user.refused(command)
    Path("other").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)  # as a new process
    monkeypatch.setenv("TMPDIR", str(Path("other").resolve()))
    user.runs(command)


@pytest.mark.tmpfs
@pytest.mark.advice("runtime/engines/onnxruntime_cpu.py:_refuse_full_scratch", "free some space there, or set TMPDIR")
def test_a_temporary_folder_that_is_full(user: User, monkeypatch: pytest.MonkeyPatch, small_disk: Path) -> None:
    command = "build good.onnx --engine onnxruntime --no-cache -o a.engine"
    (small_disk / "other").write_bytes(bytes(124_000))

    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    user.refused(command)
    (small_disk / "other").unlink()
    user.runs(command)


@pytest.mark.advice(
    "runtime/engines/registry.py:_refuse_overflow", "quantize with --weight-bits 7, or use another precision"
)
def test_a_processor_without_vnni(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = f"quantize good.onnx --precision int8 --images photos {SMALL}"
    user.runs(f"{int8} --weight-bits 8 -o eight.onnx")
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: True)

    user.refused("upscale eight.onnx photo.png -o out.png")
    user.runs(f"{int8} --weight-bits 7 -o seven.onnx")
    user.runs("upscale seven.onnx photo.png -o out.png")
    user.runs("upscale fp16.onnx photo.png -o out16.png")
    assert user.types("verify eight.onnx --against good.pt --images photo.png --threads 1")[0] in (0, 6)


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def _result(precision: str, problem: str | None, fidelity: float, grid: float) -> VerifyResult:
    contract = ModelContract("rcan", {}, 2, "rgb", Precision(precision), None, 1.0, 1, "0" * 64)
    info = RunnerInfo("engine", "openvino", "cpu", contract, "FP32")

    def case(value: float, what: str | None) -> Case:
        plain = difference(np.zeros((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), 10 ** (-value / 20), np.float32))
        return Case("a", (1, 1, 1, 1), type(plain)(**{**plain.to_json(), "problem": what}), 40.0)

    return VerifyResult(info, info, Gates.of(Precision(precision)), (case(fidelity, problem),), (case(grid, None),))


INT8 = f"quantize good.onnx --precision int8 --images photos {SMALL}"
NAN = "4 NaN and 0 infinite values of 9"


@pytest.mark.parametrize(
    ("result", "commands"),
    [
        pytest.param(
            _result("fp16", None, 30, 30),
            (
                "quantize good.onnx --precision fp16 --images photos -o a.onnx",
                f"verify a.onnx {AGAINST}",
                "quantize good.onnx --precision bf16 -o b.onnx",
            ),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py",
                "quantize with --images that look like yours, which keeps layers with large activations in FP32, or "
                "with --precision bf16",
            ),
            id="fp16",
        ),
        pytest.param(
            _result("bf16", None, 38, 38),
            ("quantize good.onnx --precision fp16 -o a.onnx", f"verify a.onnx {AGAINST}"),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py", "quantize with --precision fp16, whose mantissa has three more bits"
            ),
            id="bf16",
        ),
        pytest.param(
            _result("int8", None, 38, 38),
            (
                f"quantize good.onnx --precision int8 --images photos {SMALL} --max-psnr-drop 0.5 -o a.onnx",
                f"{INT8} -o b.onnx",
            ),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py",
                "let srdeploy quantize --max-psnr-drop keep the sensitive layers in FP16 or FP32, or calibrate on more "
                "images that look like yours",
            ),
            id="int8",
        ),
        pytest.param(
            _result("fp8", None, 38, 38),
            (
                f"{INT8} -o a.onnx",
                "quantize good.onnx --precision fp16 -o b.onnx",
                f"quantize wide.onnx --precision fp8 --target tensorrt --images photos {SMALL} --keep w_head -o c.onnx",
            ),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py",
                "quantize with --precision int8 or fp16, or leave the first and last layers float with --keep",
            ),
            id="fp8",
        ),
        pytest.param(
            _result("fp16", NAN, 50, 50),
            (
                "quantize good.onnx --precision fp16 --images photos -o a.onnx",
                f"verify a.onnx {AGAINST}",
                "quantize good.onnx --precision bf16 -o b.onnx",
            ),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py",
                "values leave FP16's range of 65504: quantize with --images, which keeps those layers in FP32, or with "
                "--precision bf16",
            ),
            id="fp16-nan",
        ),
        pytest.param(
            _result("fp32", "output shape (1,) instead of (2,)", 50, 50),
            ("export good.pt -o a.onnx", f"verify a.onnx {AGAINST}"),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py", "the graph computes other sizes than the network: export it again"
            ),
            id="sizes",
        ),
        pytest.param(
            _result("fp32", None, 50, 20),
            ("export good.pt -o a.onnx", f"verify a.onnx {AGAINST}"),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py",
                "it is right on whole images and wrong on some shapes: a size was baked into the graph; ",
            ),
            id="baked",
        ),
        pytest.param(
            _result("int8", None, 9, 9),
            (f"verify int8.onnx {AGAINST} --engine openvino --bisect",),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py",
                "this is too far off for rounding: the engine may compute this graph wrongly; run the same command "
                "with another --engine, and with --bisect to find the layer",
            ),
            id="too-far",
        ),
    ],
)
def test_advice_after_a_failed_gate(
    user: User,
    result: VerifyResult,
    commands: tuple[str, ...],
    small_onnx: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_onnx("wide.onnx", features=32)
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: False)

    with pytest.raises(GateError):
        _refuse_failures([result], [None], [None])
    for command in commands:
        user.runs(command)


@pytest.mark.advice(
    "runtime/verify/advice.py",
    "this processor lacks VNNI, and sums of 8-bit weights overflow on it: quantize with --weight-bits 7",
)
def test_advice_for_a_processor_without_vnni(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: True)

    with pytest.raises(GateError):
        _refuse_failures([_result("int8", None, 9, 9)], [None], [None])
    user.runs(f"{INT8} --weight-bits 7 -o a.onnx")
    user.runs("upscale a.onnx photo.png -o a.png")


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(
            1.5,
            marks=pytest.mark.advice(
                "runtime/verify/advice.py", "find the layer that differs: run the same command with --bisect"
            ),
        ),
        pytest.param(
            float("nan"),
            marks=pytest.mark.advice(
                "runtime/verify/advice.py", "find where the values break: run the same command with --bisect"
            ),
        ),
    ],
)
def test_a_graph_with_one_wrong_layer(user: User, factor: float) -> None:
    changed_weights(lambda weights: weights * factor, layer=0)
    command = f"verify changed.onnx {AGAINST}"

    user.types(command)
    code, printed = user.types(f"{command} --bisect")
    assert code == 6, printed
    assert "differs first" in printed


@pytest.mark.advice("runtime/verify/bisect.py:_graph_of_engine", ", with --engine ")
def test_bisection_of_an_engine_without_inner_tensors(user: User) -> None:
    changed_weights(lambda weights: weights * 1.5)
    user.runs("build changed.onnx --engine onnxruntime -o changed.engine")

    user.types(f"verify changed.engine {AGAINST} --bisect")
    _, printed = user.types(f"verify changed.onnx {AGAINST} --engine onnxruntime --bisect")
    assert "differs first" in printed


@pytest.mark.advice(
    "runtime/bench/latency.py:BenchResult.require_stable",
    "close what else runs on this machine, give it more --seconds, or pass --allow-unstable",
)
def test_latencies_that_vary(user: User) -> None:
    times = tuple([1.0, 20.0] * 8)
    info = RunnerInfo("a", "onnxruntime", "cpu", read_graph(Path("good.onnx")).contract, "FP32")
    row = Row(info, "end-to-end", statistics_of(times), False, "its times vary", times)

    with pytest.raises(UnstableError):
        BenchResult((1, 3, 8, 8), Effort(1, 0.0, 10, 10, 0.1), (row,)).require_stable()
    brief = "--warmup-seconds 0.01 --min-runs 5 --no-baselines --threads 1 --shape 1x3x8x8"
    user.runs(f"bench good.onnx --against good.pt {brief} --seconds 0.05 --allow-unstable")


# ----------------------------------------------------------------------------------------------------------------------
# Reports, bundles and packages


@pytest.mark.advice("runtime/report/write.py:read_report", "copy the whole folder again")
@pytest.mark.advice(
    "runtime/report/write.py:check_document", "make it again with verify, bench or deploy of this version"
)
def test_reports_that_are_damaged(user: User) -> None:
    verify = "verify good.onnx --against good.pt --images photos --limit 1 --threads 1"
    user.runs(f"{verify} --report first")
    for part in ("lost", "old"):
        shutil.copytree("first", part)
    name = next(iter(json.loads(Path("lost/report.json").read_text())["pictures"].values()))["file"]
    (Path("lost") / name).unlink()
    edited(Path("old/report.json"), lambda document: document.update(schema=0))

    user.refused("report lost -o page")
    shutil.copy(Path("first") / name, Path("lost") / name)
    user.runs("report lost -o page")
    user.refused("report old -o page2")
    user.runs(f"{verify} --report again")
    user.runs("report again -o page2")


DEPLOY = "deploy good.pt --images photos --size 24x24 --threads 1 --device cpu"


@needs_ncnn
@pytest.mark.advice("runtime/bundle.py:Bundle.verify", "remove it, or deploy again")
@pytest.mark.advice("runtime/bundle.py:Bundle._check", "copy the whole folder again")
@pytest.mark.advice(
    "runtime/bundle.py:read_bundle", "make one with: srdeploy deploy CHECKPOINT --images DIR -o NAME.srd"
)
@pytest.mark.advice("runtime/bundle.py:read_bundle", "copy the whole folder again, or deploy again")
@pytest.mark.advice("runtime/bundle.py:runnable_engines", "to see what this machine lacks: srdeploy doctor")
@pytest.mark.advice("runtime/signature.py:find_signature", "copy it again, or remove it")
@pytest.mark.advice("runtime/package/ovms.py:write_ovms", "deploy again with --engine openvino")
@pytest.mark.advice("runtime/package/packaged.py:package_name", "pass --name NAME")
@pytest.mark.advice(
    "runtime/package/triton.py:write_triton", "deploy again with --engine openvino or --engine tensorrt"
)
def test_bundles(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty.srd").mkdir()
    message = user.refused("package empty.srd --triton b") + str(_refused_bundle(Path("empty.srd")))
    assert "srdeploy deploy CHECKPOINT --images DIR -o NAME.srd" in message
    user.runs(f"{DEPLOY} --engine ncnn -o a.srd")
    shutil.copytree("a.srd", "first.srd")

    Path("a.srd/extra").write_text("mine")
    user.refused("package a.srd --flat flat")
    Path("a.srd/extra").unlink()
    user.runs("package a.srd --flat flat")
    Path("a.srd/model.fp32.onnx").unlink()
    user.refused("package a.srd --flat flat --force")
    shutil.copytree("first.srd", "a.srd", dirs_exist_ok=True)
    user.runs("package a.srd --flat flat --force")
    edited(Path("a.srd/manifest.json"), lambda manifest: manifest["details"]["files"].update(other="0" * 64))
    user.refused("package a.srd --flat flat --force")
    shutil.copytree("first.srd", "a.srd", dirs_exist_ok=True)
    Path("a.srd/model.sig").write_text("not a signature")
    user.refused("inspect a.srd")
    Path("a.srd/model.sig").unlink()
    user.runs("inspect a.srd")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ncnn", None)
        message = user.refused("upscale a.srd photo.png -o out.png")
        assert "ncnn" in user.runs(message[message.index("srdeploy doctor") :])
    shutil.copytree("a.srd", "-a.srd")
    user.refused("package ./-a.srd --flat flat2")
    user.runs("package ./-a.srd --flat flat2 --name a")

    user.refused("package a.srd --ovms ovms")
    user.refused("package a.srd --triton triton")
    user.runs(f"{DEPLOY} --engine openvino -o b.srd")
    user.runs("package b.srd --ovms ovms --triton triton")


def _refused_bundle(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_bundle(path)
    return caught.value


@pytest.mark.advice("runtime/package/flat.py:flat_model", "export it again with --opset ")
def test_a_graph_of_a_newer_opset(user: User) -> None:
    user.runs("export good.pt --opset 21 -o newer.onnx")

    with pytest.raises(InputError) as caught:
        flat_model(read_graph(Path("newer.onnx")))
    advised = re.search(r"--opset \d+", str(caught.value))
    assert advised is not None
    user.runs(f"export good.pt {advised[0]} -o older.onnx")
    assert flat_model(read_graph(Path("older.onnx"))).opset_import[0].version <= 20
