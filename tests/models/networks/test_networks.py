"""The canonical networks: published counts, costs measured against formulas, receptive fields measured by poking."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srdeploy.core.errors import InputError
from srdeploy.models.choices import ACTIVATIONS
from srdeploy.models.networks.activations import is_positively_homogeneous, make_activation
from srdeploy.models.networks.rcan import Rcan, RcanConfig, chain, rcan_x2, rcan_x3, rcan_x4, rcan_x8
from srdeploy.models.networks.spec import NetworkConfig, config_from_json, config_to_json, network_of, spec_of
from srdeploy.models.networks.srdensenet import (
    Deconvolution,
    SrDenseNet,
    SrDenseNetConfig,
    srdensenet_all,
    srdensenet_batchnorm,
    srdensenet_h,
    srdensenet_hl,
)

TINY_RCAN = RcanConfig(scale=2, groups=2, blocks=2, features=8, attention_width=2, upsampler=(2,))
TINY_DENSE = SrDenseNetConfig(growth=4, layers=2, blocks=2, low_level=8, bottleneck=16, upsampled=16)
TRIMMED = replace(TINY_DENSE, deconvolutions=(Deconvolution(3, 2, 1), Deconvolution(3, 2, 1)))


def trainable(config: NetworkConfig) -> int:
    with torch.device("meta"):
        network = network_of(config)
    return sum(values.numel() for values in network.parameters())


@pytest.mark.parametrize(
    ("config", "values"),
    [
        pytest.param(rcan_x2(), 15_444_643, id="rcan_x2"),
        pytest.param(rcan_x3(), 15_629_283, id="rcan_x3"),
        pytest.param(rcan_x4(), 15_592_355, id="rcan_x4"),
        pytest.param(rcan_x8(), 15_740_067, id="rcan_x8"),
        pytest.param(srdensenet_all(), 2_659_585, id="srdensenet_all"),
        pytest.param(srdensenet_all(channels=3), 2_666_499, id="srdensenet_all rgb"),
    ],
)
def test_presets_have_the_published_number_of_values(config: NetworkConfig, values: int) -> None:
    assert trainable(config) == values


def test_mean_shift_is_stored_and_not_trained() -> None:
    network = Rcan(TINY_RCAN)

    names = [name for name, _ in network.named_parameters()]

    assert "sub_mean.weight" in network.state_dict()
    assert not any("mean" in name for name in names)


def test_srdensenet_all_has_69_layers_and_68_activations() -> None:
    config = replace(srdensenet_all(), growth=2, low_level=2, bottleneck=2, upsampled=2)
    network = SrDenseNet(config)
    calls = {"layers": 0, "activations": 0}
    for module in network.modules():
        kind = {nn.Conv2d: "layers", nn.ConvTranspose2d: "layers", nn.ReLU: "activations"}
        for base, name in kind.items():
            if isinstance(module, base):
                module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))

    network(torch.rand(1, 1, 3, 3))

    assert calls == {"layers": 69, "activations": 68}


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        pytest.param(rcan_x2(), 15.307, id="rcan_x2"),
        pytest.param(rcan_x3(), 15.500, id="rcan_x3"),
        pytest.param(rcan_x4(), 15.918, id="rcan_x4"),
        pytest.param(rcan_x8(), 18.360, id="rcan_x8"),
        pytest.param(srdensenet_all(), 4.462, id="srdensenet_all"),
    ],
)
def test_presets_cost_the_published_multiply_adds(config: NetworkConfig, millions: float) -> None:
    assert spec_of(config).macs_per_pixel / 1e6 == pytest.approx(millions, abs=6e-4)


@pytest.mark.parametrize(
    ("config", "kilobytes"),
    [pytest.param(rcan_x4(), 188.9, id="rcan_x4"), pytest.param(srdensenet_all(), 42.5, id="srdensenet_all")],
)
def test_presets_move_the_half_precision_bytes_counted_by_hand(config: NetworkConfig, kilobytes: float) -> None:
    assert 2 * spec_of(config).traffic_per_pixel / 1e3 == pytest.approx(kilobytes, abs=0.05)


SMALL: list[Any] = [
    pytest.param(TINY_RCAN, id="rcan x2"),
    pytest.param(replace(TINY_RCAN, scale=6, upsampler=(2, 3), channels=1), id="rcan x6 gray"),
    pytest.param(replace(TINY_RCAN, scale=4, upsampler=(4,), group_convolution=False), id="rcan one step"),
    pytest.param(replace(TINY_RCAN, scale=1, upsampler=(), mean_shift="none"), id="rcan x1"),
    pytest.param(replace(TINY_RCAN, scale=1, upsampler=(2, 2), unshuffle=4), id="rcan x1 unshuffle"),
    pytest.param(replace(TINY_RCAN, scale=2, upsampler=(2, 2), unshuffle=2, features=64), id="rcan x2 unshuffle"),
    pytest.param(TINY_DENSE, id="dense all"),
    pytest.param(replace(TINY_DENSE, low_level=200), id="dense wide"),
    pytest.param(replace(TINY_DENSE, layer_input="everything"), id="dense everything"),
    pytest.param(replace(TINY_DENSE, block_input="previous", reconstruction_input="last"), id="dense h"),
    pytest.param(replace(TINY_DENSE, block_input="previous", reconstruction_input="low_and_last"), id="dense hl"),
    pytest.param(
        replace(TINY_DENSE, layer_input="everything", cumulative_blocks=True, bottleneck=None), id="dense cumulative"
    ),
    pytest.param(replace(TINY_DENSE, deconvolutions=(), pixel_shuffles=(3, 2)), id="dense shuffles"),
    pytest.param(replace(TINY_DENSE, deconvolutions=(Deconvolution(3, 3),)), id="dense x3"),
    pytest.param(replace(TINY_DENSE, deconvolutions=(Deconvolution(4, 2, 1),) * 3, channels=3), id="dense x8"),
    pytest.param(replace(TINY_DENSE, deconvolutions=(Deconvolution(2, 2),)), id="dense k2"),
    pytest.param(replace(TINY_DENSE, normalisation="block_input", reactivate_concatenations=True), id="dense bn"),
    pytest.param(replace(TINY_DENSE, normalisation="before_layers"), id="dense bn before"),
    pytest.param(replace(TINY_DENSE, normalisation="after_convolutions", block_order="new_first"), id="dense bn after"),
    pytest.param(replace(TINY_DENSE, deconvolutions=(), pixel_shuffles=(), bottleneck=8), id="dense x1"),
]


@pytest.mark.parametrize("config", SMALL)
def test_cost_formulas_agree_with_what_runs(config: NetworkConfig) -> None:
    """Multiply-adds, largest tensor and traffic, counted while the network runs on a size that every factor divides."""
    network = network_of(config).eval()
    height, width = 8, 12
    macs, largest, moved = [0], [0], [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and output.shape[2] > 1:
            moved[0] += inputs[0].numel() + output.numel()
        largest[0] = max(largest[0], output.shape[1] * output.shape[2] * output.shape[3], inputs[0][0].numel())
        if isinstance(module, nn.ConvTranspose2d):
            macs[0] += module.weight.numel() * inputs[0].shape[2] * inputs[0].shape[3]
        elif isinstance(module, nn.Conv2d) and output.shape[2] > 1:  # the attention gates run once per image
            macs[0] += module.weight.numel() * output.shape[2] * output.shape[3]

    for module in network.modules():
        if not list(module.children()) and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(count)
    network(torch.rand(1, config.channels, height, width))
    spec = spec_of(config)

    assert spec.macs_per_pixel * height * width == pytest.approx(macs[0])
    assert largest[0] <= spec.largest_tensor_per_pixel * height * width
    if isinstance(config, RcanConfig):  # and what gates and skips read and write
        passes = config.groups * (3 * config.blocks + config.group_skip) + 1
        moved[0] += passes * config.features * height * width // config.unshuffle**2
    assert moved[0] == pytest.approx(spec.traffic_per_pixel * height * width, rel=0.1 if spec.trim else 1e-9)
    if not spec.trim and getattr(config, "unshuffle", 1) == 1:
        assert largest[0] == spec.largest_tensor_per_pixel * height * width


@pytest.mark.parametrize("config", [*SMALL, pytest.param(TRIMMED, id="dense 2H-1")])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 6)], ids=str)
def test_output_size_is_what_the_specification_says(config: NetworkConfig, size: tuple[int, int]) -> None:
    spec = spec_of(config)

    output = network_of(config).eval()(torch.rand(2, config.channels, *size))

    assert tuple(output.shape) == (2, config.channels, *(spec.scale * side - spec.trim for side in size))


@pytest.mark.parametrize(
    "config", [case for case in SMALL if isinstance(case.values[0], SrDenseNetConfig)] + [pytest.param(TRIMMED)]
)
def test_receptive_radius_is_exact(config: SrDenseNetConfig) -> None:
    """Move one input pixel: nothing beyond the radius changes, and something at the radius does.

    Weights are positive, so that no path cancels another, and the image is large enough for the whole field.
    """
    torch.manual_seed(0)
    network = SrDenseNet(config).double().eval()
    for values in network.parameters():
        values.data.abs_().add_(0.01)
    radius = spec_of(config).receptive_radius
    assert radius is not None
    side = 2 * radius + 3
    image = torch.rand(1, config.channels, side, side).double()
    poked = image.clone()
    center = radius + 1
    poked[0, :, center, center] += 0.5

    with torch.no_grad():
        changed = (network(poked) - network(image)).abs()[0].sum(0) > 0
    rows, columns = torch.nonzero(changed, as_tuple=True)
    distance = max(
        int((rows.div(config.scale, rounding_mode="floor") - center).abs().max()),
        int((columns.div(config.scale, rounding_mode="floor") - center).abs().max()),
    )

    assert distance == radius


def test_rcan_sees_the_whole_image() -> None:
    torch.manual_seed(0)
    network = Rcan(TINY_RCAN).double().eval()
    image = torch.rand(1, 3, 40, 40).double() * 255
    poked = image.clone()
    poked[0, :, 0, 0] += 100

    with torch.no_grad():
        far = (network(poked) - network(image))[0, :, -1, -1].abs().max()

    assert spec_of(TINY_RCAN).receptive_radius is None
    assert far > 0


def test_presets_of_srdensenet_differ_as_the_paper_says() -> None:
    assert srdensenet_all().reconstruction_inputs() == 128 * 9
    assert srdensenet_hl().reconstruction_inputs() == 128 * 2
    assert srdensenet_h().reconstruction_inputs() == 128
    assert srdensenet_h().block_inputs() == [128] * 8
    assert spec_of(srdensenet_all()).receptive_radius == 66


def test_batchnorm_block_grows_by_32_maps_to_160() -> None:
    config = srdensenet_batchnorm(scale=2)
    network = SrDenseNet(config).eval()
    joined: list[int] = []
    network.blocks[0].activation.register_forward_hook(lambda module, inputs, output: joined.append(output.shape[1]))

    output = network(torch.rand(1, 1, 4, 4))

    assert output.shape == (1, 1, 8, 8)
    assert config.layer_inputs(config.block_inputs()[0]) == [32, 32, 64, 96, 128]
    assert sorted(set(joined)) == [32, 64, 96, 128, 160]
    assert isinstance(network.blocks[1].norm, nn.BatchNorm2d)
    assert network.blocks[1].norm.num_features == 32 + 160


def test_padding_of_unshuffled_sizes_is_a_reflection() -> None:
    config = replace(TINY_RCAN, scale=1, upsampler=(2, 2), unshuffle=4, mean_shift="none", value_range=1.0)
    network = Rcan(config).eval()
    image = torch.rand(1, 3, 5, 6)
    padded = nn.functional.pad(image, (0, 2, 0, 3), mode="reflect")

    with torch.no_grad():
        small, large = network(image), network(padded)

    assert torch.equal(small, large[:, :, :5, :6])
    assert spec_of(config).min_size == 3


def test_networks_are_built_without_values_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = Rcan(TINY_RCAN)

    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize(
    "config",
    [
        rcan_x3(),
        replace(TINY_RCAN, mean_shift="constant", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 0.5), residual_scale=None),
        srdensenet_all(scale=8),
        srdensenet_batchnorm(),
        replace(TINY_DENSE, deconvolutions=(), pixel_shuffles=(3,)),
    ],
    ids=["rcan", "rcan constants", "srdensenet", "batchnorm", "shuffles"],
)
def test_configurations_survive_json(config: NetworkConfig) -> None:
    import json

    values = json.loads(json.dumps(config_to_json(config)))

    assert config_from_json(spec_of(config).architecture, values) == config


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("edsr", {}, "architecture 'edsr'"),
        ("rcan", {"colour": 1}, "unknown fields colour"),
        ("rcan", {"scale": 3}, "does not give scale 3"),
        ("rcan", {"features": "many"}, "does not fit together"),
    ],
    ids=["architecture", "field", "scale", "type"],
)
def test_wrong_configurations_are_refused(architecture: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_json(architecture, config_to_json(TINY_RCAN) | change)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (TINY_RCAN, {"groups": 0}),
        (TINY_RCAN, {"channels": 4}),
        (TINY_RCAN, {"value_range": 2.0}),
        (TINY_RCAN, {"upsampler": (3,)}),
        (TINY_RCAN, {"mean_shift": "constant"}),
        (TINY_RCAN, {"std": (1.0, 1.0, 1.0)}),
        (TINY_RCAN, {"mean_shift": "constant", "mean": (0.5,)}),
        (TINY_DENSE, {"layers": 0}),
        (TINY_DENSE, {"channels": 2}),
        (TINY_DENSE, {"value_range": 0.5}),
        (TINY_DENSE, {"pixel_shuffles": (2,)}),
        (TINY_DENSE, {"cumulative_blocks": True}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_make_no_sense_are_refused(config: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="."):
        replace(config, **change)


@pytest.mark.parametrize(
    ("scale", "factors"), [(1, ()), (2, (2,)), (3, (3,)), (4, (2, 2)), (6, (2, 3)), (8, (2, 2, 2))]
)
def test_chain_takes_twos_first(scale: int, factors: tuple[int, ...]) -> None:
    assert chain(scale) == factors
    assert math.prod(factors) == scale


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_homogeneity_is_told_right(kind: Any) -> None:
    activation = make_activation(kind, 0.2)
    maps = torch.randn(1, 1, 8, 8)

    with torch.no_grad():
        same = torch.allclose(activation(3 * maps), 3 * activation(maps), atol=1e-6)

    assert same == is_positively_homogeneous(kind)


def test_only_whole_doublings_have_a_preset() -> None:
    with pytest.raises(ValueError, match="must be 2, 4 or 8"):
        srdensenet_all(scale=3)
