"""Change a network to the outside contract, 0..1 in and out, without adding operations that its weights can absorb.

A network trained on 0..255 computes

    z = M_in (255 x) + b_in,    u = inside(z),    y = (M_out u + b_out) / 255

with the stored mean-shift matrices M and biases b (identity and zero without a mean shift). What moves into weights,
and what must not:

- The factor and M_in go into the first convolution: both map zero to zero, so the zeros it pads with stay zeros.
- The mean cannot. The convolution pads *after* the mean was subtracted, so a border pixel sees zero, which a changed
  bias would turn into minus the mean. It stays one subtraction: z = 255 M_in (x - m) with m = -M_in^-1 b_in / 255.
- M_out, b_out and the factor go into the last convolution, behind which nothing pads.
- Inside, activations are 255 times larger than they need be, and FP16 ends at 65504. Where every activation on the way
  is positively homogeneous, f(a x) = a f(x) for a > 0, everything inside is brought down by 255: the factor leaves the
  first and last convolution, every bias on the way is divided by 255, and the convolution that a channel gate begins
  with is multiplied by 255, so that its sigmoid sees what it saw before. SiLU, GELU and ELU are not homogeneous; such
  networks stay as they are inside.
- The factor on a block's branch goes into the convolution before the gate, and its inverse into the convolution that
  the gate begins with. The factor on a dense layer's maps goes through its activation where that is homogeneous.
- A batch normalisation behind a convolution goes into that convolution. In front of a padded convolution only its
  factors could; its shifts meet the same border as the mean, so it stays whole, unless all its shifts are zero.

Everything is computed in double precision and rounded once.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from srdeploy.models.networks.activations import is_positively_homogeneous
from srdeploy.models.networks.rcan import Rcan, RcanConfig
from srdeploy.models.networks.spec import NetworkConfig
from srdeploy.models.networks.srdensenet import SrDenseNet

INNER = "network."
"""Prefix of the module paths of a network inside `Centered` or `Scaled`."""

_MAX_CONDITION = 1e3
"""Condition number of a mean-shift matrix above which its inverse would cost digits; real ones are near 1."""

_MIN_SCALE = 1e-3
"""Minimum residual factor that is folded: the gate's first convolution is multiplied by its inverse."""


@dataclass(frozen=True)
class Folded:
    """A network on the outside contract, ready to be exported.

    Attributes:
        network: (N, C, H, W) in 0..1 to (N, C, H', W') on 0..1, not clamped; evaluation mode, no gradients.
        notes: changes made to it, one sentence each.
    """

    network: nn.Module
    notes: tuple[str, ...]


class Centered(nn.Module):
    """A network behind the subtraction of a mean: network(image - mean)."""

    mean: Tensor

    def __init__(self, network: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return network(image - mean)."""
        return self.network(image - self.mean)  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """A network between 0..1 and 0..1 by multiplication and division: used when nothing can be folded."""

    def __init__(self, network: nn.Module, value_range: float) -> None:
        super().__init__()
        self.network = network
        self.value_range = value_range

    def forward(self, image: Tensor) -> Tensor:
        """Return network(image * value_range) / value_range."""
        return self.network(image * self.value_range) / self.value_range  # type: ignore[no-any-return]


def fold_network(network: nn.Module, config: NetworkConfig) -> Folded:
    """Return a copy of a canonical network with value range, mean shift and batch normalisation folded where exact."""
    inner = copy.deepcopy(network).eval().requires_grad_(False)
    assert isinstance(inner, Rcan | SrDenseNet)
    notes: list[str] = []
    if isinstance(inner, SrDenseNet):
        notes += _fold_batch_normalisations(inner)
        notes += _fold_layer_scales(inner)
    else:
        notes += _fold_residual_scales(inner)
    if config.value_range == 1.0 and config.mean_shift == "none":
        return Folded(inner, tuple(notes))
    matrix_in, bias_in, matrix_out, bias_out = _colour_maps(inner, config)
    if torch.linalg.cond(matrix_in) > _MAX_CONDITION:
        notes.append("the mean-shift matrix has no exact inverse: value range and mean shift stay operations")
        return Folded(Scaled(inner, config.value_range).eval(), tuple(notes))
    value_range = config.value_range
    inside = value_range if _is_homogeneous(config) else 1.0
    _scale_input(inner.first, matrix_in * (value_range / inside))
    _divide_activations(inner, inside)
    _map_output(inner.last, matrix_out / value_range, bias_out / value_range, inside)
    inner.config = _outside_config(config)
    if value_range != 1.0:
        notes.append(f"value range {value_range:g} folded into the first and the last convolution")
        if inside != 1.0:
            notes.append(f"everything inside divided by {inside:g}")
    if not bool(bias_in.any()):
        return Folded(inner, tuple(notes))
    notes.append("mean shift folded; the subtraction of the mean stays, because the first convolution pads behind it")
    mean = -torch.linalg.solve(matrix_in, bias_in) / value_range
    return Folded(Centered(inner, mean).eval(), tuple(notes))


def _outside_config(config: NetworkConfig) -> NetworkConfig:
    if isinstance(config, RcanConfig):
        return replace(config, value_range=1.0, mean_shift="none", mean=None, std=None)
    return replace(config, value_range=1.0, mean_shift="none")


def _is_homogeneous(config: NetworkConfig) -> bool:
    kinds = [config.activation]
    if isinstance(config, RcanConfig) and config.upsampler_activation is not None:
        kinds.append(config.upsampler_activation)
    return all(is_positively_homogeneous(kind) for kind in kinds)


def _colour_maps(network: Rcan | SrDenseNet, config: NetworkConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return M_in (C, C), b_in (C), M_out (C, C), b_out (C) in double precision, in the network's own value range."""
    channels = config.channels
    if config.mean_shift == "matrix":
        shifts = (network.sub_mean, network.add_mean)
        (matrix_in, bias_in), (matrix_out, bias_out) = (
            (shift.weight.double().view(channels, channels), shift.bias.double()) for shift in shifts
        )
        return matrix_in, bias_in, matrix_out, bias_out
    mean, deviation = torch.zeros(channels).double(), torch.ones(channels).double()
    if isinstance(config, RcanConfig) and config.mean is not None:
        mean = network.get_buffer("mean").double().flatten() * config.value_range
        if config.std is not None:
            deviation = network.get_buffer("std").double().flatten()
    return torch.diag(1 / deviation), -mean / deviation, torch.diag(deviation), mean


def _scale_input(first: nn.Conv2d, matrix: Tensor) -> None:
    """Change a convolution to read matrix * input; a pixel unshuffle makes `factor^2` channels of one."""
    channels = matrix.shape[0]
    weight = first.weight.double()
    weight = weight.view(weight.shape[0], channels, -1, *weight.shape[2:])  # (out, channel, place, 3, 3)
    _assign(first.weight, torch.einsum("ojphw,ji->oiphw", weight, matrix).flatten(1, 2))


def _map_output(last: nn.Conv2d, matrix: Tensor, shift: Tensor, inside: float) -> None:
    """Change a convolution whose input and bias were divided by `inside` to return matrix * (true output) + shift."""
    bias = torch.zeros(last.out_channels).double() if last.bias is None else last.bias.double()
    _assign(last.weight, torch.einsum("oi,ichw->ochw", matrix * inside, last.weight.double()))
    last.bias = nn.Parameter((inside * matrix @ bias + shift).float(), requires_grad=False)


def _divide_activations(network: Rcan | SrDenseNet, factor: float) -> None:
    """Divide every activation outside the gates by `factor`."""
    if factor == 1.0:
        return
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if name.endswith("gate.squeeze"):
                _assign(module.weight, module.weight.double() * factor)
            elif not name.endswith("gate.expand") and module.bias is not None:
                _assign(module.bias, module.bias.double() / factor)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            _assign(module.running_mean, module.running_mean.double() / factor)
            _assign(module.bias, module.bias.double() / factor)


def _fold_batch_normalisations(network: SrDenseNet) -> Iterator[str]:
    normalisations = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    block: Any
    for block in network.blocks:
        if block.norms is not None and network.config.normalisation == "after_convolutions":
            for layer, norm in zip(block.layers, block.norms, strict=True):
                _absorb_behind(layer, norm)
            block.norms = None
            block.config = replace(block.config, normalisation="none")
        elif block.norm is not None and network.config.layer_input == "block":
            factors, shifts = _affine(block.norm)
            if not bool(shifts.any()):
                _assign(block.layers[0].weight, block.layers[0].weight.double() * factors.view(1, -1, 1, 1))
                block.norm = None
    step: Any
    for step in network.upsampler:
        if step.norm is not None:
            _absorb_behind(step.convolution, step.norm)
            step.norm = None
    kept = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    if normalisations - kept:
        yield f"{normalisations - kept} batch normalisations folded into convolutions"
    if kept:
        yield f"{kept} batch normalisations kept: the convolution behind them pads with zeros"


def _absorb_behind(convolution: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> None:
    """Fold a batch normalisation into the convolution in front of it, through a pixel shuffle if there is one."""
    factors, shifts = (
        values.repeat_interleave(convolution.out_channels // norm.num_features) for values in _affine(norm)
    )
    bias = torch.zeros_like(factors) if convolution.bias is None else convolution.bias.double()
    outputs = 1 if isinstance(convolution, nn.ConvTranspose2d) else 0  # the axis of output channels in the weights
    shape = [1, 1, 1, 1]
    shape[outputs] = -1
    _assign(convolution.weight, convolution.weight.double() * factors.view(shape))
    convolution.bias = nn.Parameter((bias * factors + shifts).float(), requires_grad=False)


def _fold_layer_scales(network: SrDenseNet) -> Iterator[str]:
    config = network.config
    scale = config.layer_scale
    activated_before = config.normalisation == "before_layers"
    if scale == 1.0 or not (activated_before or (scale > 0 and is_positively_homogeneous(config.activation))):
        return
    block: Any
    for block in network.blocks:
        for layer in block.layers:
            _scale_output(layer, scale)
        block.config = replace(block.config, layer_scale=1.0)
    yield f"factor {scale:g} on every dense layer folded into its convolution"


def _fold_residual_scales(network: Rcan) -> Iterator[str]:
    folded = 0
    group: Any
    for group in network.groups:
        for block in group.blocks:
            scale = float(block.residual_scale) if block.fixed_scale is None else block.fixed_scale
            if scale == 1.0 and block.fixed_scale is not None:
                continue
            if abs(scale) >= _MIN_SCALE:
                _scale_output(block.conv2, scale)
                _assign(block.gate.squeeze.weight, block.gate.squeeze.weight.double() / scale)
                block.fixed_scale = 1.0
                folded += 1
    if folded:
        yield f"residual factors of {folded} blocks folded into their convolutions"


def _scale_output(convolution: nn.Conv2d, factor: float) -> None:
    _assign(convolution.weight, convolution.weight.double() * factor)
    if convolution.bias is not None:
        _assign(convolution.bias, convolution.bias.double() * factor)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the factors and shifts that a batch normalisation amounts to, in double precision."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factors = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return factors, norm.bias.double() - norm.running_mean.double() * factors


def _assign(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)
