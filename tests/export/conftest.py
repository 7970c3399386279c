"""One small network for each arithmetic that the canonical networks know, with random weights, as a checkpoint."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from srdeploy.core.artifact import sha256_of_file
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.mean_shift import MeanShift
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import NetworkConfig, network_of, spec_of
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig

RCAN = RcanConfig(
    scale=2,
    groups=2,
    blocks=2,
    features=8,
    attention_width=2,
    upsampler=(2,),
    value_range=1.0,
    mean_shift="none",
)

DENSE = SrDenseNetConfig(growth=4, layers=2, blocks=2, low_level=8, bottleneck=16, upsampled=8)

RCAN_VARIANTS: dict[str, NetworkConfig] = {
    "x1": replace(RCAN, scale=1, upsampler=()),
    "x2": RCAN,
    "x3": replace(RCAN, scale=3, upsampler=(3,)),
    "x4-chained": replace(RCAN, scale=4, upsampler=(2, 2)),
    "x4-one-step": replace(RCAN, scale=4, upsampler=(4,)),
    "x8": replace(RCAN, scale=8, upsampler=(2, 2, 2)),
    "y": replace(RCAN, channels=1),
    "255-matrix": replace(RCAN, value_range=255.0, mean_shift="matrix"),
    "255-no-mean": replace(RCAN, value_range=255.0),
    "255-silu": replace(RCAN, value_range=255.0, mean_shift="matrix", activation="silu"),
    "255-gelu-gate": replace(RCAN, value_range=255.0, attention_activation="gelu"),
    "255-prelu": replace(RCAN, value_range=255.0, mean_shift="matrix", activation="prelu"),
    "255-active-upsampler": replace(RCAN, value_range=255.0, upsampler_activation="leaky_relu", residual_scale=0.1),
    "1-matrix": replace(RCAN, mean_shift="matrix"),
    "1-mean-std": replace(RCAN, mean_shift="constant", mean=(0.4, 0.5, 0.3), std=(0.2, 0.25, 0.3)),
    "255-mean": replace(RCAN, value_range=255.0, mean_shift="constant", mean=(0.4488, 0.4371, 0.404)),
    "learned-scale": replace(RCAN, residual_scale=None, activation="leaky_relu"),
    "no-group-ends": replace(RCAN, group_convolution=False, group_skip=False, activation="elu"),
    "unshuffle-2": replace(RCAN, unshuffle=2, upsampler=(2, 2)),
    "unshuffle-4-255": replace(RCAN, scale=1, unshuffle=4, upsampler=(2, 2), value_range=255.0, mean_shift="matrix"),
}

DENSE_VARIANTS: dict[str, NetworkConfig] = {
    "all": DENSE,
    "low-and-last": replace(DENSE, reconstruction_input="low_and_last", block_input="previous"),
    "last": replace(DENSE, reconstruction_input="last", block_input="previous"),
    "fully-dense": replace(DENSE, layer_input="everything", bottleneck_activation=False),
    "cumulative": replace(
        DENSE, layer_input="everything", block_input="previous", cumulative_blocks=True, first_activation=False
    ),
    "new-first": replace(DENSE, block_order="new_first", bottleneck_activation=False),
    "prelu-twice": replace(DENSE, activation="prelu", reactivate_concatenations=True, bottleneck_bias=False),
    "no-bias": replace(DENSE, upsampler_bias=False, last_bias=False, bottleneck_bias=False),
    "k4": replace(DENSE, deconvolutions=(Deconvolution(4, 2, 1),) * 2, upsampler_activation=False),
    "k2": replace(DENSE, deconvolutions=(Deconvolution(2, 2),) * 2),
    "k3-stride-3": replace(DENSE, deconvolutions=(Deconvolution(3, 3),)),
    "odd-output": replace(DENSE, deconvolutions=(Deconvolution(3, 2, 1),) * 2),
    "shuffles-rgb-matrix": replace(DENSE, deconvolutions=(), pixel_shuffles=(2, 2), channels=3, mean_shift="matrix"),
    "layer-scale": replace(DENSE, layer_scale=0.3),
    "layer-scale-gelu": replace(DENSE, layer_scale=0.3, activation="gelu"),
    "layer-scale-norm-before": replace(
        DENSE, layer_scale=-0.5, normalisation="before_layers", layer_input="everything", activation="elu"
    ),
    "no-bottleneck": replace(DENSE, bottleneck=None),
    "255-matrix": replace(DENSE, channels=3, value_range=255.0, mean_shift="matrix"),
    "norm-on-block": replace(DENSE, normalisation="block_input", reactivate_concatenations=True),
    "norm-on-block-255": replace(DENSE, normalisation="block_input", value_range=255.0),
    "norm-before": replace(DENSE, normalisation="before_layers", layer_input="everything"),
    "norm-after": replace(DENSE, normalisation="after_convolutions"),
    "norm-after-255-shuffle": replace(
        DENSE,
        normalisation="after_convolutions",
        upsampler_normalisation=True,
        deconvolutions=(),
        pixel_shuffles=(3,),
        value_range=255.0,
    ),
    "norm-on-upsampler": replace(DENSE, upsampler_normalisation=True, upsampler_bias=False),
}

VARIANTS = {f"rcan-{name}": config for name, config in RCAN_VARIANTS.items()} | {
    f"srdensenet-{name}": config for name, config in DENSE_VARIANTS.items()
}


def randomised(network: nn.Module) -> nn.Module:
    """Give every tensor a value of its own, so that nothing cancels: statistics, slopes, drifted mean shifts."""
    generator = torch.Generator().manual_seed(7)

    def noise(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.empty_like(tensor).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("residual_scale"):
                parameter.copy_(noise(parameter, 0.2, 0.8))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(noise(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(noise(module.running_var, 0.5, 2.0))
                module.weight.copy_(noise(module.weight, 0.5, 1.5))
                module.bias.copy_(noise(module.bias, -0.5, 0.5))
            elif isinstance(module, nn.PReLU):
                module.weight.copy_(noise(module.weight, 0.1, 0.4))
            elif isinstance(module, MeanShift):
                module.weight += noise(module.weight, -0.01, 0.01)
                module.bias += noise(module.bias, -0.1, 0.1)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                module.bias.copy_(noise(module.bias, -0.2, 0.2))
    return network.eval()


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def config(request: pytest.FixtureRequest) -> NetworkConfig:
    """Every variant in turn."""
    variant: NetworkConfig = request.param
    return variant


@pytest.fixture(scope="session")
def variants() -> dict[str, NetworkConfig]:
    """The variants by name."""
    return VARIANTS


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[NetworkConfig], LoadedCheckpoint]:
    """Return a function that makes a loaded checkpoint with random weights."""

    def make(config: NetworkConfig) -> LoadedCheckpoint:
        torch.manual_seed(3)
        network = randomised(network_of(config))
        path = tmp_path_factory.mktemp("checkpoint") / "network.pth"
        torch.save(network.state_dict(), path)
        evidence = Evidence("test", "made by the test", "here", "torch zip", (), {}, ())
        return LoadedCheckpoint(path, sha256_of_file(path), "test", config, spec_of(config), network, evidence)

    return make
