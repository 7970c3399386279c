"""Pruning masks and norms are folded into the weights that PyTorch's own modules compute with, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_fuzzing.networks import assert_network, tree
from checkpoint_fuzzing.seeds import official_rcan, random_state, yjn870_srdensenet
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.folding import fold
from srdeploy.models.checkpoint.load import load_checkpoint

Rewrite = Callable[[nn.Module], object]

REWRITES: dict[str, tuple[Rewrite, str]] = {
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3), "pruning"),
    "structured pruning": (lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0), "pruning"),
    "weight norm": (lambda layer: _old(torch.nn.utils.weight_norm, layer), "weight norm"),
    "weight norm of the whole": (lambda layer: _old(torch.nn.utils.weight_norm, layer, dim=None), "weight norm"),
    "weight norm along axis 1": (lambda layer: _old(torch.nn.utils.weight_norm, layer, dim=1), "weight norm"),
    "weight norm, new": (lambda layer: parametrizations.weight_norm(layer), "weight norm (parametrization)"),
    "weight norm, new, whole": (
        lambda layer: parametrizations.weight_norm(layer, dim=None),
        "weight norm (parametrization)",
    ),
    "spectral norm": (lambda layer: torch.nn.utils.spectral_norm(layer), "spectral norm"),
    "spectral norm, new": (lambda layer: parametrizations.spectral_norm(layer), "spectral norm (parametrization)"),
}


def _old(function: Callable[..., object], layer: nn.Module, **options: object) -> object:
    with pytest.warns(FutureWarning, match="deprecated"):
        return function(layer, **options)


def _layers(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


def _computed(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that every convolution really uses: hooks set them when it runs in evaluation mode."""
    found = {}
    for name, layer in network.eval().named_modules():
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                layer(torch.zeros(1, layer.in_channels, 4, 4))
            found |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    return found


@pytest.mark.parametrize("name", REWRITES)
def test_reparametrized_weights_are_folded_exactly(tmp_path: Path, name: str) -> None:
    rewrite, kind = REWRITES[name]
    network = tree(official_rcan())
    layers = _layers(network)[::2]
    for layer in layers:
        rewrite(layer)
        layer.train()(torch.rand(1, layer.in_channels, 4, 4))  # spectral norm turns its vectors in training
        for part in layer.parameters():  # lengths and directions as training leaves them
            part.data = part.data * 1.1
    torch.save({"state_dict": network.state_dict()}, tmp_path / "net.pth")

    loaded = load_checkpoint(tmp_path / "net.pth")

    assert_network(loaded, _computed(network))
    assert f"{kind} of {len(layers)} weights was folded into them" in loaded.evidence.notes


def test_spectral_norm_of_square_deconvolutions_is_folded_along_the_right_axis() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 6, 3)
    torch.nn.utils.spectral_norm(layer, n_power_iterations=20)
    layer(torch.zeros(1, 6, 4, 4))
    layer.eval()(torch.zeros(1, 6, 4, 4))

    found = fold(layer.state_dict()).tensors["weight"]

    assert torch.equal(found, layer.weight)


def test_the_new_style_of_deconvolutions_is_folded(tmp_path: Path) -> None:
    layer = nn.ConvTranspose2d(6, 4, 3)
    parametrizations.spectral_norm(layer)
    layer.eval()

    assert torch.equal(fold(layer.state_dict()).tensors["weight"], layer.weight)


def test_plain_weights_pass_unchanged() -> None:
    state = random_state(yjn870_srdensenet())

    folded = fold(state)

    assert folded.kinds == {}
    assert all(folded.tensors[name] is state[name] for name in state)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"parametrizations.weight.original": (2, 2)}, id="own parametrization"),
        pytest.param({"weight_orig": (2, 2), "weight_u": (2,)}, id="spectral norm without its right vector"),
        pytest.param({"weight_mask": (2, 2)}, id="mask alone"),
    ],
)
def test_a_parametrization_that_is_not_known_is_refused(parts: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="no known parametrization.*remove it before saving"):
        fold({name: torch.ones(shape) for name, shape in parts.items()})


def test_removing_a_parametrization_before_saving_helps(tmp_path: Path) -> None:
    """The next step of the refusal above."""
    network = tree(official_rcan())
    for layer in _layers(network):
        parametrize.register_parametrization(layer, "weight", Doubled())
    torch.save(network.state_dict(), tmp_path / "net.pth")

    with pytest.raises(InputError, match="remove_parametrizations"):
        load_checkpoint(tmp_path / "net.pth")
    for layer in _layers(network):
        parametrize.remove_parametrizations(layer, "weight")
    torch.save(network.state_dict(), tmp_path / "net.pth")

    assert_network(load_checkpoint(tmp_path / "net.pth"), network.state_dict())


@pytest.mark.parametrize(
    "parts",
    [
        {"weight_orig": (2, 2), "weight_mask": (3, 2)},
        {"weight_g": (3, 1), "weight_v": (2, 2)},
        {"weight_g": (2, 2), "weight_v": (2, 2)},
        {"weight_orig": (2, 2), "weight_u": (5,), "weight_v": (2,)},
    ],
    ids=["mask", "length", "length per value", "vectors"],
)
def test_parts_that_do_not_fit_together_are_refused(parts: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="do not fit together"):
        fold({name: torch.ones(shape) for name, shape in parts.items()})
