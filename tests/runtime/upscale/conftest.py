"""Small seeded networks as runners, for everything that stands between an engine and a picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srdeploy.core.runner import Runner
from srdeploy.models.load import Evidence, LoadedCheckpoint
from srdeploy.models.rcan import RcanConfig
from srdeploy.models.spec import NetworkConfig, network_of, spec_of
from srdeploy.models.srdensenet import SrDenseNetConfig
from srdeploy.runtime.engines.eager import open_eager

CheckpointFactory = Callable[..., LoadedCheckpoint]
RunnerFactory = Callable[..., Runner]


def rcan(scale: int = 2, **changes: object) -> RcanConfig:
    """A compact RCAN on 0..1 without mean shift."""
    steps = {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]
    values: dict[str, object] = {"groups": 2, "blocks": 2, "features": 8, "attention_width": 2, "upsampler": steps}
    values |= {"value_range": 1.0, "mean_shift": "none"}
    return RcanConfig(scale=scale, **(values | changes))  # type: ignore[arg-type]


def srdensenet(**changes: object) -> SrDenseNetConfig:
    """A compact SRDenseNet_All x4 on Y: receptive radius 10 in LR pixels or less."""
    values = {"growth": 4, "layers": 2, "blocks": 2, "low_level": 8, "bottleneck": 16, "upsampled": 16}
    return SrDenseNetConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_checkpoint() -> CheckpointFactory:
    """Return a function from a configuration to a loaded checkpoint with seeded weights and picture-like output."""

    def make(config: NetworkConfig, seed: int = 0) -> LoadedCheckpoint:
        torch.manual_seed(seed)
        network = network_of(config).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("last.bias"):
                    parameter.fill_(0.5)  # around mid-gray, so that clamping does not flatten the output
        evidence = Evidence("test", "test network", "seeded weights", "none", (), {}, ())
        return LoadedCheckpoint(Path("seeded.pth"), f"{seed:064d}", "test", config, spec_of(config), network, evidence)

    return make


@pytest.fixture(scope="session")
def make_runner(make_checkpoint: CheckpointFactory) -> RunnerFactory:
    """Return a function from a configuration to an eager runner."""

    def make(config: NetworkConfig, seed: int = 0) -> Runner:
        return open_eager(make_checkpoint(config, seed), threads=1)

    return make


@pytest.fixture
def picture() -> Callable[..., NDArray[np.uint8]]:
    """Return a function that draws a smooth picture with edges: (height, width[, channels]) uint8."""

    def draw(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
        planes = []
        for channel in range(channels):
            wave = np.sin(rows / (5 + channel) + seed) + np.cos(columns / (7 - channel) + seed)
            disc = (rows - height / 3) ** 2 + (columns - width / 2) ** 2 < (min(height, width) / 4) ** 2
            planes.append(120 + 40 * wave + 40 * disc)
        return np.clip(np.stack(planes, axis=2), 0, 255).astype(np.uint8)

    return draw
