"""RCAN: residual groups of residual blocks with channel attention, then sub-pixel upsampling.

Y. Zhang, K. Li, K. Li, L. Wang, B. Zhong, Y. Fu: Image Super-Resolution Using Very Deep Residual Channel Attention
Networks, ECCV 2018, https://arxiv.org/abs/1807.02758. Sub-pixel convolution: W. Shi et al., CVPR 2016,
https://arxiv.org/abs/1609.05158.

There is one network; `RcanConfig` spells out every numerical difference between the public families. The upsampling
factors are visible as data, so that x4 in two steps of 2 and x4 in one step of 4 are two configurations, not two
networks. Sizes never steer Python branches: the network exports with dynamic batch, height and width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srdeploy.models.choices import DIV2K_MEAN, Activation
from srdeploy.models.networks.activations import make_activation
from srdeploy.models.networks.layers import Convolution, convolution_3x3
from srdeploy.models.networks.mean_shift import MeanShift

MeanShiftKind = Literal["none", "constant", "matrix"]


@dataclass(frozen=True)
class RcanConfig:
    """Everything that decides RCAN's arithmetic, except the tensors.

    Attributes:
        scale: output pixels per input pixel and axis.
        groups: number of residual groups.
        blocks: number of residual blocks in each group.
        features: channels of the body.
        attention_width: channels between the two 1x1 convolutions of a channel gate (features / reduction).
        channels: image channels, 3 (RGB) or 1 (Y).
        value_range: 1.0 or 255.0, the largest value of the network's own input and output.
        upsampler: factor of each convolution + pixel shuffle, in order; the product is scale * unshuffle.
        unshuffle: factor of a pixel unshuffle before the first convolution; sizes that it does not divide are
            reflect-padded at the bottom and right, and the result is cropped.
        activation: between the two convolutions of a block.
        attention_activation: between the two 1x1 convolutions of a gate.
        upsampler_activation: after every pixel shuffle; None for none (the paper).
        leaky_slope: slope of "leaky_relu" below zero.
        residual_scale: factor on the branch of every block before its skip is added; None when each block has a
            learned one.
        group_convolution: a group ends with a 3x3 convolution.
        group_skip: a group adds its input to its output.
        mean_shift: "matrix" (stored 1x1 convolutions around the network), "constant" (`mean` and `std`), "none".
        mean: subtracted before and added after the network, on 0..1, one per channel ("constant" only).
        std: divided by after the subtraction and multiplied with before the addition; None for 1.
    """

    scale: int
    groups: int
    blocks: int
    features: int
    attention_width: int
    channels: int = 3
    value_range: float = 255.0
    upsampler: tuple[int, ...] = ()
    unshuffle: int = 1
    activation: Activation = "relu"
    attention_activation: Activation = "relu"
    upsampler_activation: Activation | None = None
    leaky_slope: float = 0.2
    residual_scale: float | None = 1.0
    group_convolution: bool = True
    group_skip: bool = True
    mean_shift: MeanShiftKind = "matrix"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        sizes = (self.scale, self.groups, self.blocks, self.features, self.attention_width, self.unshuffle)
        if min(sizes) < 1:
            raise ValueError(f"sizes of {self} must be at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}, must be 1 or 3")
        if self.value_range not in (1.0, 255.0):
            raise ValueError(f"value_range is {self.value_range}, must be 1 or 255")
        if math.prod(self.upsampler) != self.scale * self.unshuffle:
            raise ValueError(f"upsampler {self.upsampler} does not give scale {self.scale} x {self.unshuffle}")
        if (self.mean_shift == "constant") != (self.mean is not None):
            raise ValueError("mean is for the constant mean shift, and needed there")
        if self.std is not None and self.mean is None:
            raise ValueError("std is for the constant mean shift")
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{values} needs one value for each of {self.channels} channels")


def chain(scale: int) -> tuple[int, ...]:
    """Return the upsampling factors of the paper: steps of 2, then what is left in one step; none for scale 1."""
    factors: list[int] = []
    while scale % 2 == 0:
        factors.append(2)
        scale //= 2
    return (*factors, scale) if scale > 1 else tuple(factors)


def rcan_x2() -> RcanConfig:
    """Return the paper's RCAN for scale 2: 15,444,643 trainable values."""
    return RcanConfig(scale=2, groups=10, blocks=20, features=64, attention_width=4, upsampler=(2,))


def rcan_x3() -> RcanConfig:
    """Return the paper's RCAN for scale 3: 15,629,283 trainable values."""
    return RcanConfig(scale=3, groups=10, blocks=20, features=64, attention_width=4, upsampler=(3,))


def rcan_x4() -> RcanConfig:
    """Return the paper's RCAN for scale 4: 15,592,355 trainable values."""
    return RcanConfig(scale=4, groups=10, blocks=20, features=64, attention_width=4, upsampler=(2, 2))


def rcan_x8() -> RcanConfig:
    """Return the paper's RCAN for scale 8: 15,740,067 trainable values."""
    return RcanConfig(scale=8, groups=10, blocks=20, features=64, attention_width=4, upsampler=(2, 2, 2))


class Rcan(nn.Module):
    """RCAN, as configured."""

    def __init__(self, config: RcanConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features
        if config.mean_shift == "matrix":
            mean = DIV2K_MEAN if config.channels == 3 else (0.0,)
            self.sub_mean = MeanShift([-value * config.value_range for value in mean])
            self.add_mean = MeanShift([value * config.value_range for value in mean])
        self.set_constants()
        self.first = convolution_3x3(config.channels * config.unshuffle**2, features)
        self.groups = nn.ModuleList(_Group(config) for _ in range(config.groups))
        self.body_end = convolution_3x3(features, features)
        self.upsampler = nn.ModuleList(_Upsampling(config, factor) for factor in config.upsampler)
        self.last = convolution_3x3(features, config.channels)

    def set_constants(self) -> None:
        """Fill the constants of the configuration; needed again after building on the meta device."""
        for name in ("mean", "std"):
            values = getattr(self.config, name)
            if values is not None:
                self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Upscale.

        Args:
            image: (N, C, H, W) float in [0, value_range], RGB or Y.

        Returns:
            (N, C, scale * H, scale * W), same range, not clamped.
        """
        config = self.config
        height, width = image.shape[2:]
        if config.unshuffle > 1:
            image = _reflect_to_multiple(image, config.unshuffle)
        head = self.first(F.pixel_unshuffle(self._shift_in(image), config.unshuffle))  # (N, F, H / u, W / u)
        body = head
        for group in self.groups:
            body = group(body)
        maps = self.body_end(body) + head
        for step in self.upsampler:
            maps = step(maps)
        output = self._shift_out(self.last(maps))
        if config.unshuffle > 1:
            output = output[:, :, : height * config.scale, : width * config.scale]
        return output

    def _shift_in(self, image: Tensor) -> Tensor:
        config = self.config
        if config.mean_shift == "matrix":
            return self.sub_mean(image)  # type: ignore[no-any-return]
        if config.mean is not None:
            # The mean is kept on 0..1 and scaled here: 255 times a rounded mean would round once more.
            image = image - self.get_buffer("mean") * config.value_range
            if config.std is not None:
                image = image / self.get_buffer("std")
        return image

    def _shift_out(self, image: Tensor) -> Tensor:
        config = self.config
        if config.mean_shift == "matrix":
            return self.add_mean(image)  # type: ignore[no-any-return]
        if config.mean is not None:
            if config.std is not None:
                image = image * self.get_buffer("std")
            image = image + self.get_buffer("mean") * config.value_range
        return image


class _Group(nn.Module):
    """Blocks, a closing convolution and a skip: (N, F, H, W) to the same."""

    def __init__(self, config: RcanConfig) -> None:
        super().__init__()
        self.skip = config.group_skip
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.end = convolution_3x3(config.features, config.features) if config.group_convolution else None

    def forward(self, maps: Tensor) -> Tensor:
        result = maps
        for block in self.blocks:
            result = block(result)
        if self.end is not None:
            result = self.end(result)
        return result + maps if self.skip else result


class _Block(nn.Module):
    """Convolution, activation, convolution, channel gate, residual factor, skip."""

    def __init__(self, config: RcanConfig) -> None:
        super().__init__()
        self.conv1 = convolution_3x3(config.features, config.features)
        self.activation = make_activation(config.activation, config.leaky_slope)
        self.conv2 = convolution_3x3(config.features, config.features)
        self.gate = _Gate(config)
        self.fixed_scale = config.residual_scale
        if config.residual_scale is None:
            self.residual_scale = nn.Parameter(torch.ones(1))

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.gate(self.conv2(self.activation(self.conv1(maps))))
        if self.fixed_scale is None:
            branch = branch * self.residual_scale
        elif self.fixed_scale != 1.0:
            branch = branch * self.fixed_scale
        return branch + maps  # type: ignore[no-any-return]


class _Gate(nn.Module):
    """Channel attention: each map is multiplied by a number in 0..1 that depends on the means of all maps."""

    def __init__(self, config: RcanConfig) -> None:
        super().__init__()
        self.squeeze = Convolution(config.features, config.attention_width, 1)
        self.activation = make_activation(config.attention_activation, config.leaky_slope)
        self.expand = Convolution(config.attention_width, config.features, 1)

    def forward(self, maps: Tensor) -> Tensor:
        pooled = maps.mean((2, 3), keepdim=True)  # (N, F, 1, 1)
        return maps * torch.sigmoid(self.expand(self.activation(self.squeeze(pooled))))


class _Upsampling(nn.Module):
    """Convolution to factor^2 times the maps and a pixel shuffle: (N, F, H, W) to (N, F, factor H, factor W)."""

    def __init__(self, config: RcanConfig, factor: int) -> None:
        super().__init__()
        self.convolution = convolution_3x3(config.features, config.features * factor**2)
        self.shuffle = nn.PixelShuffle(factor)
        kind = config.upsampler_activation
        self.activation = None if kind is None else make_activation(kind, config.leaky_slope)

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.shuffle(self.convolution(maps))
        return maps if self.activation is None else self.activation(maps)


def _reflect_to_multiple(image: Tensor, factor: int) -> Tensor:
    """Reflect the image at its bottom and right edge up to the next multiple of `factor`.

    Written as an index lookup, because the padding operator fixes the sizes it was traced with. An axis that is too
    short to be reflected repeats its first pixel; the specification's minimum size excludes such inputs.
    """
    for axis in (2, 3):
        size = image.shape[axis]
        padded = (size + factor - 1) // factor * factor
        position = torch.arange(padded, device=image.device)
        mirrored = 2 * (size - 1) - position
        image = image.index_select(axis, torch.where(position < size, position, mirrored).clamp(min=0))
    return image
