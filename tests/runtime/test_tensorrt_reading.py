"""Reading TensorRT's words: layer tables, the inspector's JSON, logs and their translation, engine headers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from srdeploy.core.errors import BuildError, CapabilityError
from srdeploy.core.manifest import Manifest
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt import full_engine as tensorrt_full_engine
from srdeploy.runtime.engines.tensorrt import rtx_engine as tensorrt_rtx_engine
from srdeploy.runtime.engines.tensorrt.build import _worker_error
from srdeploy.runtime.engines.tensorrt.families import parse_capability, version_numbers
from srdeploy.runtime.engines.tensorrt.layers import (
    Kernel,
    Layers,
    fused_mismatches,
    layers_from_inspector,
    layers_from_log,
    mismatches,
    prove_precision,
)
from srdeploy.runtime.engines.tensorrt.log import Log, captured, last_problem, read_log, translated
from srdeploy.runtime.engines.tensorrt.rtx_engine import FLAVOUR, describe_header
from srdeploy.runtime.engines.tensorrt.worker import options_from_json, options_to_json

LINE = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: a, Dimensions: [-1,16,-1,-1], Datatype: {source},"
    " Format: (NHWC) Channel major format }}], Constants: [ {{ Name: w, Dimensions: [16,16,3,3], Datatype: {weights},"
    " Format: (NHWC) Channel major format }}], Outputs: [ {{ Name: b, Dimensions: [-1,16,-1,-1], Datatype: {result},"
    " Format: (NHWC) Channel major format }}], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: {layer}]"
)


def line(kind: str, source: str, weights: str, result: str, layer: str = "conv") -> str:
    return LINE.format(name=f"{kind}_1", kind=kind, source=source, weights=weights, result=result, layer=layer)


def kernel(kind: str, computes_in: str, *layers: str, constants: tuple[str, ...] = ()) -> Kernel:
    return Kernel("k", kind, (computes_in,), constants, ("fp32",), layers)


def test_the_build_log_gives_kernels_types_and_memory() -> None:
    layers = layers_from_log(
        [
            "parsing",
            "Total Activation Memory: 9240576 bytes",
            "Total Weights Memory: 14080 bytes",
            "Engine table:\n"
            + line("correlation", "Half", "Half", "Half", "conv0")
            + "\n"
            + line("kgen", "Half", "Half", "Float", "up"),
            line("correlation", "Int8", "Int8", "Float", "conv1"),
        ]
    )

    assert [entry.signature for entry in layers.kernels] == [
        "correlation fp16->fp16",
        "kgen fp16->fp32",
        "correlation int8->fp32",
    ]
    assert layers.convolutions == {"fp16": 1, "int8": 1}
    assert (layers.activation_bytes, layers.weights_bytes) == (9240576, 14080)
    assert [entry.onnx_layers for entry in layers.kernels] == [("conv0",), ("up",), ("conv1",)]


@pytest.mark.parametrize(
    "tensor",
    [
        {"Name": "a", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"},
        {"Name": "a", "Datatype": "Half", "Format": "Channel major"},
        {"Name": "a", "Format/Datatype": "Half"},
    ],
    ids=["10.x-words", "11.x-split", "one-word"],
)
def test_the_inspector_writes_types_in_several_ways(tensor: dict[str, str]) -> None:
    document = {
        "Layers": [
            {
                "Name": "conv0",
                "LayerType": "CaskConvolution",
                "ParameterType": "Convolution",
                "Inputs": [tensor],
                "Outputs": [tensor],
                "Weights": {"Type": "Half", "Count": 16},
                "Metadata": "[ONNX Layer: conv0]",
            },
            "a name only",
        ]
    }

    layers = layers_from_inspector(json.dumps(document), activation_bytes=5)

    assert layers.kernels == (Kernel("conv0", "Convolution", ("fp16",), ("fp16",), ("fp16",), ("conv0",)),)
    assert layers.convolutions == {"fp16": 1}


@pytest.mark.parametrize(
    ("kernels", "wrong"),
    [
        ([kernel("correlation", "fp16", "c1"), kernel("deconv", "fp32", "c2")], []),
        ([kernel("correlation", "fp32", "c1"), kernel("deconv", "fp32", "c2")], ["fp16"]),
        ([kernel("correlation", "fp16", "c2")], ["fp32"]),
        ([kernel("correlation", "fp16")], []),
        ([kernel("correlation", "int8")], ["fp16 or fp32"]),
    ],
    ids=["as-asked", "one-wider", "one-narrower", "unnamed-possible", "unnamed-impossible"],
)
def test_a_kernel_in_another_type_is_found(kernels: list[Kernel], wrong: list[str]) -> None:
    asked = {"c1": "fp16", "c2": "fp32"}

    assert [expected for _, expected in mismatches(kernels, asked)] == wrong


@pytest.mark.parametrize(
    ("kernels", "wrong"),
    [
        ([kernel("kgen", "fp32", "c1", constants=("fp16",))], 0),
        ([kernel("kgen", "fp32", "c1")], 1),
        ([kernel("kgen", "fp32", "c1"), kernel("correlation", "fp16", "c1")], 0),
        ([kernel("kgen", "fp32", "other")], 0),
    ],
    ids=["fused-as-asked", "fused-in-another", "epilogue-of-a-convolution", "not-named"],
)
def test_a_layer_inside_a_generated_kernel_is_checked_too(kernels: list[Kernel], wrong: int) -> None:
    assert len(fused_mismatches(kernels, {"c1": "fp16"})) == wrong


def test_a_table_without_convolutions_proves_nothing() -> None:
    with pytest.raises(BuildError, match="cannot be proven"):
        prove_precision(Layers((), None, None, "the log"), graph=None)  # type: ignore[arg-type]  # not looked at


@pytest.mark.parametrize(
    ("message", "cause", "step"),
    [
        ("[api] Could not infer output types for operation: 12: deconv: x", "no BF16 or INT8 deconvolution", "rewrite"),
        ("OutOfMemory (Requested size was 12345 bytes.)", "needs 12345 bytes", "--workspace"),
        ("no tactics to implement the operation within workspace limit.", "scratch memory", "--workspace"),
        ("Could not find any implementation for node {Conv_3}", "no kernel fits", "smaller --max-shape"),
        ("No importer registered for op: Mystery. Attempting", "no operation Mystery", "export"),
        ("Compute capability 9.0 (SM90) not supported by this version", "9.0 is not one", "doctor"),
        ("Unable to load library: libnvinfer_lean.so.1", "lean runtime", "--version-compatible"),
        ("The engine plan file is not compatible: Version tag does not match", "another release", "build it again"),
        ("generated on an incompatible device, please rebuild", "another GPU", "build it again"),
        ("CUDA initialization failure with error: 35 cudaError 35", "no NVIDIA driver", "CPU engine"),
        ("CUDA error: out of memory", "memory is full", "smaller shape"),
        ("Dynamic input tensor input is missing dimensions in profile 0", "do not fit", "--min-shape"),
        ("[E] [tag] something new went wrong", "something new went wrong", ""),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_known_errors_are_translated(message: str, cause: str, step: str) -> None:
    log = Log(messages=[("INFO", "fine"), ("ERROR", message)])

    found, next_step = translated(log)

    assert cause in found
    assert step in next_step


def test_warnings_are_not_taken_for_errors() -> None:
    log = Log(messages=[("WARNING", "OutOfMemory (Requested size was 1")])

    assert translated(log)[0] == "TensorRT gave no reason"


def test_errors_while_an_engine_runs_are_kept_for_the_next_line() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    with captured(trt) as (logger, log):
        logger.log(trt.ILogger.Severity.ERROR, "heard")

    assert log.problems() == ["heard"]
    assert last_problem(trt) == "TensorRT gave no reason"
    logger.log(trt.ILogger.Severity.WARNING, "only a warning")
    logger.log(trt.ILogger.Severity.ERROR, "older")
    logger.log(trt.ILogger.Severity.ERROR, "[executionContext.cpp::enqueueV3] Error Code 1: Cuda Runtime (newest)")
    assert last_problem(trt) == "Error Code 1: Cuda Runtime (newest)"
    assert last_problem(trt) == "TensorRT gave no reason"


def test_a_log_file_reads_back_with_messages_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "build.log"
    path.write_text("[INFO] one\n[VERBOSE] table\nName: a\n[not a severity] b\n[ERROR] bad\n")

    assert read_log(path).messages == [
        ("INFO", "one"),
        ("VERBOSE", "table\nName: a\n[not a severity] b"),
        ("ERROR", "bad"),
    ]


@pytest.mark.parametrize(
    ("data", "described"),
    [
        (b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + bytes(4) + bytes([0x08]) + bytes(40), ("1.7.1.116", ["8.9"])),
        (b"vtrt" + bytes(20) + bytes([1, 8, 0, 3]) + bytes(4) + bytes([0x7E]) + bytes(40),
         ("1.8.0.3", ["8.0", "8.6", "8.9", "12.0", "12.1"])),
        (b"vtrt" + bytes(10), None),
        (b"ftrt" + bytes(100), None),
    ],
    ids=["one-gpu", "portable", "short", "another-magic"],
)  # fmt: skip
def test_headers(data: bytes, described: tuple[str, list[str]] | None) -> None:
    wanted = described and {"version": described[0], "compute_capabilities": described[1]}

    assert describe_header(data) == wanted


HOPPER = ("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30)
ADA = ("NVIDIA L4", (8, 9), 24 * 2**30)


def engine_for(**target: object) -> Engine:
    details = {"target": {"words": "a GPU", **target}, "key": {"options": {"version_compatible": True}}}
    manifest = Manifest(kind="engine", sha256="0" * 64, details=details, versions={"tensorrt": "10.16.1.11"})
    return Engine(Path("e.plan"), b"", manifest)


@pytest.mark.parametrize(
    ("check", "target", "found", "fits"),
    [
        (tensorrt_rtx_engine.check_target, {"compute_capabilities": ["8.9"]}, ADA, True),
        (tensorrt_rtx_engine.check_target, {"compute_capabilities": ["8.6", "12.0"]}, ADA, False),
        (tensorrt_rtx_engine.check_target, {"compute_capabilities": []}, ADA, True),
        (tensorrt_rtx_engine.check_target, {"compute_capabilities": []}, HOPPER, False),
        (tensorrt_full_engine.check_target, {"compute_capability": "9.0"}, HOPPER, True),
        (tensorrt_full_engine.check_target, {"compute_capability": "9.0"}, ADA, False),
        (tensorrt_full_engine.check_target, {"compute_capability": "8.0", "hardware_compatibility": "x"}, ADA, True),
    ],
    ids=["rtx-same", "rtx-other", "rtx-portable", "rtx-hopper", "same", "other", "compatible"],
)
def test_an_engine_for_another_gpu_is_refused_with_both_named(
    check: Callable[..., None], target: dict[str, object], found: tuple[str, tuple[int, int], int], fits: bool
) -> None:
    if fits:
        check(engine_for(**target), found)
        return
    with pytest.raises(CapabilityError, match=f"e.plan was built for .*; this GPU is {found[0]} .*; build it again"):
        check(engine_for(**target), found)


@pytest.mark.parametrize("here", ["10.12.0.36", "11.4.0.106"])
def test_an_engine_of_another_tensorrt_release_is_refused_with_both_named(here: str) -> None:
    tensorrt_full_engine.check_release(engine_for(), "10.16.1.11")

    with pytest.raises(
        CapabilityError, match=rf"built for TensorRT 10\.16\.1\.11, a GPU; here is {here}; build it again"
    ):
        tensorrt_full_engine.check_release(engine_for(), here)


@pytest.mark.parametrize(
    ("status", "last", "code", "words"),
    [
        (5, {"error": ["cannot build", None, "do this"], "code": 5}, 5, "cannot build; do this"),
        (8, {"error": ["cannot write", None, None], "code": 8}, 8, "free some space"),
        (-9, {}, 5, "memory was full"),
        (-11, {}, 5, "crashed with signal 11"),
        (1, {}, 5, "status 1"),
    ],
    ids=["told", "disk", "killed", "crashed", "unexpected"],
)
def test_every_end_of_the_worker_is_an_error_of_ours(
    status: int, last: dict[str, object], code: int, words: str
) -> None:
    error = _worker_error(FLAVOUR, status, last, "Traceback: boom")

    assert error.exit_code == code
    assert words in str(error)


def test_options_survive_the_way_to_the_worker() -> None:
    from srdeploy.core.shapes import ShapeProfile

    shape = (1, 3, 8, 8)
    options = BuildOptions(
        profiles=(ShapeProfile(shape, shape, shape),),
        compute_capabilities=("8.9",),
        timing_cache=Path("t"),
        log_path=Path("l"),
        workspace_bytes=5,
    )

    assert options_from_json(json.loads(json.dumps(options_to_json(options)))) == options


@pytest.mark.parametrize(
    ("text", "capability"), [("8.9", (8, 9)), ("89", (8, 9)), ("sm_120", (12, 0)), ("12.1", (12, 1))], ids=str
)
def test_compute_capabilities(text: str, capability: tuple[int, int]) -> None:
    assert parse_capability(text) == capability


@pytest.mark.parametrize("text", ["fast", "8.9.1", "", "8."], ids=repr)
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_capability(text)


def test_versions_compare_as_numbers() -> None:
    assert version_numbers("10.9.0.34") < version_numbers("10.12.0") < version_numbers("11.4.0.106")
