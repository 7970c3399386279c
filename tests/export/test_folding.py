"""Folding is exact: every variant, on sizes where the border is everything."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from srdeploy.export.folding import Centered, Folded, Scaled, fold_network
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.models.networks.mean_shift import MeanShift
from srdeploy.models.networks.spec import NetworkConfig
from srdeploy.models.networks.srdensenet import SrDenseNet

CheckpointOf = Callable[[NetworkConfig], LoadedCheckpoint]
Variants = dict[str, NetworkConfig]


def largest_difference(folded: nn.Module, reference: nn.Module, channels: int) -> float:
    """Compare in double precision, so that only the one rounding of the folded weights is seen."""
    worst = 0.0
    folded, reference = folded.double(), reference.double()
    for height, width in ((4, 4), (5, 9), (12, 8)):
        image = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1)).double()
        with torch.inference_mode():
            worst = max(worst, float((folded(image) - reference(image)).abs().max()))
    return worst


def test_folded_network_equals_the_network(config: NetworkConfig, checkpoint_of: CheckpointOf) -> None:
    checkpoint = checkpoint_of(config)

    folded = fold_network(checkpoint.network, config)

    assert largest_difference(folded.network, checkpoint.reference, config.channels) < 2e-6


def test_mean_in_the_bias_of_the_first_convolution_would_be_wrong(
    checkpoint_of: CheckpointOf, variants: Variants
) -> None:
    config = variants["rcan-1-matrix"]
    checkpoint = checkpoint_of(config)
    folded = fold_network(checkpoint.network, config).network
    assert isinstance(folded, Centered)
    first = folded.network.get_submodule("first")
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    first.bias.data -= first.weight.sum((2, 3)) @ folded.mean.flatten()

    difference = largest_difference(folded.network, checkpoint.reference, config.channels)

    assert difference > 1e-3


def test_folding_leaves_the_original_alone(checkpoint_of: CheckpointOf, variants: Variants) -> None:
    checkpoint = checkpoint_of(variants["rcan-255-matrix"])
    before = {name: value.clone() for name, value in checkpoint.network.state_dict().items()}

    fold_network(checkpoint.network, checkpoint.config)

    after = checkpoint.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def body_amplitude(network: nn.Module, image: torch.Tensor) -> float:
    seen: list[float] = []
    body = next(module for name, module in network.named_modules() if name.endswith("body_end"))
    handle = body.register_forward_hook(lambda module, inputs, output: seen.append(float(inputs[0].abs().max())))
    with torch.inference_mode():
        network(image)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "factor"), [("255-matrix", 255.0), ("255-prelu", 255.0), ("255-silu", 1.0)])
def test_activations_come_down_where_the_network_is_homogeneous(
    name: str, factor: float, checkpoint_of: CheckpointOf, variants: Variants
) -> None:
    checkpoint = checkpoint_of(variants[f"rcan-{name}"])
    folded = fold_network(checkpoint.network, checkpoint.config)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    ratio = body_amplitude(checkpoint.reference, image) / body_amplitude(folded.network, image)

    assert ratio == pytest.approx(factor, rel=1e-3)


def norms_left(folded: Folded) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [("norm-on-block", 2), ("norm-before", 4), ("norm-after", 0), ("norm-on-upsampler", 0)],
)
def test_batch_normalisations_fold_only_where_exact(
    name: str, left: int, checkpoint_of: CheckpointOf, variants: Variants
) -> None:
    checkpoint = checkpoint_of(variants[f"srdensenet-{name}"])

    folded = fold_network(checkpoint.network, checkpoint.config)

    assert norms_left(folded) == left
    assert bool(folded.notes)


def test_normalisation_without_shift_folds_into_the_padded_convolution(
    checkpoint_of: CheckpointOf, variants: Variants
) -> None:
    checkpoint = checkpoint_of(variants["srdensenet-norm-on-block"])
    assert isinstance(checkpoint.network, SrDenseNet)
    for module in checkpoint.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.zero_()
            module.bias.data.zero_()

    folded = fold_network(checkpoint.network, checkpoint.config)

    assert norms_left(folded) == 0
    assert largest_difference(folded.network, checkpoint.reference, 1) < 2e-6


def test_singular_mean_shift_stays_an_operation(checkpoint_of: CheckpointOf, variants: Variants) -> None:
    checkpoint = checkpoint_of(variants["rcan-255-matrix"])
    shift = checkpoint.network.get_submodule("sub_mean")
    assert isinstance(shift, MeanShift)
    shift.weight.fill_(1 / 3)  # every channel becomes the mean of all: no inverse

    folded = fold_network(checkpoint.network, checkpoint.config)

    assert isinstance(folded.network, Scaled)
    assert largest_difference(folded.network, checkpoint.reference, 3) < 1e-9
