"""Reading an engine's kernels from the build log and the engine inspector, and proving their types."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from srdeploy.core.errors import BuildError
from srdeploy.runtime.engines.tensorrt.layers import (
    Kernel,
    Layers,
    Proof,
    fused_mismatches,
    layers_from_inspector,
    layers_from_log,
    mismatches,
    prove_precision,
)

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

    layers = layers_from_inspector([json.dumps(document)], activation_bytes=5)

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


DYNAMIC = {"Name": "a", "Format/Datatype": "N/A due to dynamic shapes"}


@pytest.mark.parametrize(
    ("layer", "computes_in"),
    [
        ({"Inputs": [DYNAMIC], "Weights": {"Type": "Half"}, "TacticName": "sm80_f32f32_"}, "fp16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc"}, "fp16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc"}, "fp32"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32"}, "int8"),
        ({"Inputs": [DYNAMIC], "TacticName": "ampere_h16816gemm_64x64_ldg8_stages_64x5_nn_v1"}, "fp16"),
        ({"Inputs": [DYNAMIC], "TacticName": "0x0000000000000000"}, "unknown"),
    ],
    ids=["weights", "tactic-fp16", "tactic-fp32", "tactic-int8", "gemm", "nothing"],
)
def test_a_type_that_is_not_stated_follows_from_weights_or_tactic(layer: dict[str, Any], computes_in: str) -> None:
    document = {"Layers": [{"Name": "conv0", "LayerType": "CaskConvolution", "Outputs": [DYNAMIC], **layer}]}

    (found,) = layers_from_inspector([json.dumps(document)]).kernels

    assert found.computes_in == computes_in


CONVOLUTIONS: Any = SimpleNamespace(layer_types={"c1": "fp16", "c2": "fp16"})


@pytest.mark.parametrize(
    ("kernels", "proof"),
    [
        ([kernel("correlation", "fp16", "c1"), kernel("correlation", "fp16", "c2")], Proof("fp16", ())),
        ([kernel("correlation", "fp16", "c1"), kernel("correlation", "unknown", "c2")], Proof("fp16", ("k",))),
        ([kernel("correlation", "unknown", "c1")], Proof("not proven", ("k",))),
        ([], Proof("not proven", ("c1", "c2"))),
        ([kernel("kgen", "unknown", "c1"), kernel("correlation", "fp16", "c2")], Proof("fp16", ())),
    ],
    ids=["proven", "one-unknown", "all-unknown", "no-convolutions", "unknown-in-a-generated-kernel"],
)
def test_what_cannot_be_read_is_not_proven_and_never_a_wrong_type(kernels: list[Kernel], proof: Proof) -> None:
    assert prove_precision(Layers(tuple(kernels), None, None, "the log"), CONVOLUTIONS) == proof


def test_a_wrong_type_fails_beside_unknown_ones() -> None:
    kernels = (kernel("correlation", "unknown", "c1"), kernel("correlation", "fp32", "c2"))

    with pytest.raises(BuildError, match="1 of 2 convolutions were built in another type than the graph's: 'c2'"):
        prove_precision(Layers(kernels, None, None, "the log"), CONVOLUTIONS)
