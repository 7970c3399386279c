"""srdeploy's own checkpoints: every variant of the networks survives a file, and damaged metadata are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from srdeploy.core.errors import InputError, UsageError
from srdeploy.models.checkpoint.load import load_checkpoint
from srdeploy.models.checkpoint.save import save_checkpoint
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import NetworkConfig, config_to_json, network_of
from srdeploy.models.networks.srdensenet import SrDenseNetConfig

RCAN = RcanConfig(scale=2, groups=1, blocks=2, features=4, attention_width=1, upsampler=(2,))
DENSE = SrDenseNetConfig(growth=2, layers=2, blocks=2, low_level=4, bottleneck=4, upsampled=4)
NETWORKS = [
    pytest.param(RCAN, id="rcan"),
    pytest.param(
        replace(RCAN, residual_scale=None, mean_shift="constant", mean=(0.1, 0.25, 0.3), std=(1.0, 0.5, 2.0)),
        id="rcan learned and constant",
    ),
    pytest.param(replace(DENSE, block_input="previous", reconstruction_input="last"), id="h"),
    pytest.param(replace(DENSE, block_input="previous", reconstruction_input="low_and_last"), id="hl"),
    pytest.param(DENSE, id="all"),
    pytest.param(replace(DENSE, normalisation="block_input", reactivate_concatenations=True), id="batchnorm"),
    pytest.param(replace(DENSE, activation="prelu", bottleneck=None, channels=3), id="prelu without bottleneck"),
    pytest.param(replace(DENSE, deconvolutions=(), pixel_shuffles=(3,)), id="shuffle"),
]


def trained(config: NetworkConfig) -> Any:
    torch.manual_seed(0)
    network = network_of(config)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.5)
    return network.eval()


@pytest.mark.parametrize("config", NETWORKS)
def test_every_variant_survives_a_file(tmp_path: Path, config: NetworkConfig) -> None:
    network = trained(config)
    path = tmp_path / "net.safetensors"
    image = torch.rand(1, config.channels, 4, 5)

    save_checkpoint(network, path)
    loaded = load_checkpoint(path)
    with torch.inference_mode():
        same = torch.equal(loaded.network(image), network(image))

    assert loaded.config == config
    assert loaded.dialect == "native"
    assert loaded.evidence.decisions == ()
    assert same


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"mine")

    with pytest.raises(UsageError, match="exists already"):
        save_checkpoint(trained(RCAN), path)
    assert path.read_bytes() == b"mine"
    save_checkpoint(trained(RCAN), path, force=True)
    assert load_checkpoint(path).config == RCAN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"architecture": None}, "do not name an architecture", id="no architecture"),
        pytest.param({"architecture": "edsr"}, "architecture 'edsr'", id="another architecture"),
        pytest.param({"features": None}, "lack features", id="a field missing"),
        pytest.param({"features": 8}, "expected", id="another width"),
        pytest.param({"groups": "one"}, "does not fit together", id="no number"),
        pytest.param({"groups": 10**9}, "speak of 2000000000 layers", id="too many groups"),
        pytest.param({"features": 10**12}, "features 1000000000000 and it holds", id="too many features"),
        pytest.param({"features": 4.0}, "features is 4.0", id="a fraction"),
        pytest.param({"group_skip": 1}, "group_skip is 1", id="no truth value"),
        pytest.param({"activation": "tanh"}, "activation is 'tanh'", id="no activation"),
        pytest.param({"upsampler": 2}, "upsampler is 2", id="no list"),
        pytest.param({"scale": 128, "upsampler": [128]}, "speak of scale 128", id="a large scale"),
        pytest.param({"surprise": 1}, "unknown fields surprise", id="a field too many"),
        pytest.param({"blocks": 1}, "left over", id="a block less"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(trained(RCAN), path)
    values = {"architecture": "rcan", **config_to_json(RCAN), **change}
    values = {name: value for name, value in values.items() if name not in change or value is not None}

    save_file(load_file(path), path, metadata={"metadata": json.dumps(values)})

    with pytest.raises(InputError, match=message):
        load_checkpoint(path)
