"""Feasibility before a build, and profiles from images."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from srdeploy.core.errors import BuildError, InputError, UsageError
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.feasibility import (
    MAX_ELEMENTS,
    MEMORY_MARGIN,
    Footprint,
    check_feasible,
    footprint,
    largest_legal_shape,
    lr_pixels,
)
from srdeploy.runtime.engines.feeds import check_profile
from srdeploy.runtime.engines.profiles import proposed_profile
from srdeploy.runtime.engines.tensorrt.build import check_memory
from srdeploy.runtime.engines.tensorrt.layers import Layers

GraphFactory = Callable[..., Path]

PROFILES = (
    ShapeProfile((1, 3, 8, 8), (1, 3, 16, 16), (4, 3, 64, 64)),
    ShapeProfile((1, 3, 8, 8), (1, 3, 64, 64), (1, 3, 128, 256)),
)
RCAN_X4 = Footprint("up", 1024, 4736, 31_184_772)
SRDENSENET_X4 = Footprint("up", 4096, 16384, 5_319_170)


@pytest.mark.parametrize(
    ("cost", "shape", "fits"),
    [
        (RCAN_X4, (1, 3, 1080, 1920), True),
        (RCAN_X4, (1, 3, 1080, 2048), False),
        (RCAN_X4, (2, 3, 1080, 1920), False),
        (SRDENSENET_X4, (1, 1, 540, 960), True),
        (SRDENSENET_X4, (1, 1, 720, 1280), False),
    ],
    ids=["rcan-1080p", "rcan-2k", "rcan-1080p-batch-2", "srdensenet-540p", "srdensenet-720p"],
)
def test_the_limit_of_2_to_the_31_elements(cost: Footprint, shape: tuple[int, int, int, int], fits: bool) -> None:
    profile = ShapeProfile((1, shape[1], 8, 8), shape, shape)

    if fits:
        check_feasible(cost, (profile,), None)
    else:
        with pytest.raises(UsageError, match="largest legal shape of this kind is"):
            check_feasible(cost, (profile,), None)


@pytest.mark.parametrize("memory", [None, 2**30, 8 * 2**30], ids=["any", "1GiB", "8GiB"])
@pytest.mark.parametrize("shape", [(1, 3, 2160, 3840), (4, 3, 3840, 2160), (16, 3, 9000, 9000)], ids=str)
@pytest.mark.parametrize("cost", [RCAN_X4, SRDENSENET_X4], ids=["rcan", "srdensenet"])
def test_the_largest_legal_shape_is_legal_and_nearly_the_largest(
    cost: Footprint, shape: tuple[int, int, int, int], memory: int | None
) -> None:
    legal = largest_legal_shape(cost, shape, memory)

    check_feasible(cost, (ShapeProfile((1, 3, 1, 1), legal, legal),), memory)
    larger = (legal[0], legal[1], legal[2] + 16, legal[3] + 16)
    with pytest.raises(UsageError):
        check_feasible(cost, (ShapeProfile((1, 3, 1, 1), larger, larger),), memory)


def test_memory_is_part_of_the_limit() -> None:
    profile = ShapeProfile((1, 3, 8, 8), (1, 3, 512, 512), (1, 3, 512, 512))
    needed = 4736 * lr_pixels(profile.max) * MEMORY_MARGIN + RCAN_X4.weights_bytes

    check_feasible(RCAN_X4, (profile,), int(needed) + 1)
    with pytest.raises(UsageError, match="GiB of GPU memory; expected at most"):
        check_feasible(RCAN_X4, (profile,), int(needed * 0.99))


def test_a_network_that_does_not_fit_at_all_is_answered() -> None:
    assert largest_legal_shape(RCAN_X4, (4, 3, 64, 64), 1000) == (1, 3, 1, 1)


@pytest.mark.parametrize(("dtype", "bytes_per_element"), [("float32", 4), ("float16", 2)], ids=["fp32", "fp16"])
def test_the_footprint_of_a_graph(dtype: str, bytes_per_element: int, small_onnx: GraphFactory) -> None:
    cost = footprint(read_graph(small_onnx(dtype=dtype)))

    # A convolution's result and its activation live at once: 2 x 16 channels.
    assert cost.activation_bytes_per_pixel == pytest.approx(32 * bytes_per_element)
    assert cost.elements_per_pixel == 16
    assert cost.weights_bytes == (3 * 16 + 16 * 16 + 16 * 12) * 9 * bytes_per_element
    assert cost.max_pixels(None) == MAX_ELEMENTS // 16


def test_deconvolution_counts_its_large_output(small_onnx: GraphFactory) -> None:
    graph = read_graph(small_onnx(upsampler="deconvolution"))

    assert [layer.op for layer in graph.layers] == ["Conv", "Conv", "ConvTranspose"]
    assert [layer.macs for layer in graph.layers] == [3 * 16 * 9, 16 * 16 * 9, 16 * 3 * 9]
    assert graph.inferred[0]["up"] == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("kwargs", "asked"),
    [
        ({}, {"fp32": 3}),
        ({"dtype": "float16", "odd_layer": "float32"}, {"fp16": 2, "fp32": 1}),
        ({"quantized": "both"}, {"fp32": 2, "int8": 1}),
        ({"dtype": "bfloat16"}, {"bf16": 3}),
    ],
    ids=["fp32", "fp16-with-island", "int8", "bf16"],
)
def test_what_a_graph_asks_for(kwargs: dict[str, str], asked: dict[str, int], small_onnx: GraphFactory) -> None:
    assert read_graph(small_onnx(**kwargs)).layers_by_type() == asked


@pytest.mark.parametrize(
    ("sizes", "batch", "profile"),
    [
        ([(100, 200)], 1, "1x3x96x200..1x3x100x200..1x3x104x200"),
        ([(100, 200), (200, 100)], 4, "1x3x96x96..1x3x200x100..4x3x200x200"),
        ([(64, 64), (64, 64), (300, 300)], 2, "1x3x64x64..1x3x64x64..2x3x304x304"),
        ([(5, 3)], 1, "1x3x1x1..1x3x5x3..1x3x8x8"),
    ],
    ids=["one", "both-orientations", "commonest", "tiny"],
)
def test_profiles_from_images(sizes: list[tuple[int, int]], batch: int, profile: str) -> None:
    found = proposed_profile(sizes, channels=3, batch=batch)

    assert str(found) == profile
    assert all(found.contains((1, 3, *size)) for size in sizes)


def test_no_images_no_profile() -> None:
    with pytest.raises(InputError, match="no image sizes"):
        proposed_profile([], channels=3, batch=1)


@pytest.mark.parametrize(
    ("shape", "index"),
    [((1, 3, 8, 8), 0), ((4, 3, 64, 64), 0), ((1, 3, 65, 8), 1), ((1, 3, 128, 256), 1)],
    ids=["smallest", "largest", "second", "largest-of-second"],
)
def test_the_first_profile_that_takes_a_shape_is_chosen(shape: tuple[int, ...], index: int) -> None:
    assert check_profile(shape, PROFILES, engine="e.rtx") == index


def test_a_shape_outside_names_the_profiles_and_the_way_out() -> None:
    with pytest.raises(UsageError) as caught:
        check_profile((2, 3, 65, 300), PROFILES, engine="e.rtx")

    assert str(caught.value) == (
        "input shape 2x3x65x300 is outside every profile of e.rtx; expected 1x3x8x8 to 4x3x64x64 or 1x3x8x8 to"
        " 1x3x128x256; use srdeploy upscale, which tiles and pads, or build again with --max-shape 2x3x128x300"
    )


@pytest.mark.parametrize(("memory", "fits"), [(None, True), (300, True), (299, False)])
def test_what_was_built_must_fit_the_memory(memory: int | None, fits: bool) -> None:
    layers = Layers((), activation_bytes=200, weights_bytes=100, read_from="the log")

    with contextlib.nullcontext() if fits else pytest.raises(BuildError, match="build for a smaller --max-shape"):
        check_memory(layers, 50, memory, PROFILES)
