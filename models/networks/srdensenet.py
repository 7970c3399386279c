"""SRDenseNet: dense blocks with skips between all of them, a 1x1 bottleneck and deconvolutions at the end.

T. Tong, G. Li, X. Liu, Q. Gao: Image Super-Resolution Using Dense Skip Connections, ICCV 2017,
https://openaccess.thecvf.com/content_iccv_2017/html/Tong_Image_Super-Resolution_Using_ICCV_2017_paper.html.
The variants of the paper differ in what reaches the reconstruction: the last block (H), the low-level maps and the
last block (HL), or every block (All). All layers but the last two kinds compute at low resolution.

There is one network; `SrDenseNetConfig` spells out every numerical difference between the public families: what each
layer reads, in which order maps are concatenated, the places of activations and batch normalization, how the
upsampling is done and which layers have a bias.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from srdeploy.models.choices import Activation
from srdeploy.models.networks.activations import make_activation
from srdeploy.models.networks.layers import Convolution, TransposedConvolution, convolution_3x3
from srdeploy.models.networks.mean_shift import MeanShift


@dataclass(frozen=True)
class Deconvolution:
    """Geometry of one transposed convolution: H to (H - 1) * stride - 2 * padding + kernel + output_padding."""

    kernel: int
    stride: int
    padding: int = 0
    output_padding: int = 0

    @property
    def offset(self) -> int:
        """What is added to stride * H to get the output size; negative when pixels are missing."""
        return self.kernel + self.output_padding - 2 * self.padding - self.stride


PAPER_DECONVOLUTION = Deconvolution(kernel=3, stride=2, padding=1, output_padding=1)
"""3x3, stride 2, exactly twice the size: the output padding sits at the bottom and right."""


@dataclass(frozen=True)
class SrDenseNetConfig:
    """Everything that decides SRDenseNet's arithmetic, except the tensors.

    Attributes:
        growth: maps that each dense layer adds.
        layers: layers in each dense block.
        blocks: number of dense blocks.
        low_level: maps of the first convolution.
        bottleneck: maps of the 1x1 convolution in front of the upsampling; None for no such layer.
        channels: image channels, 3 (RGB) or 1 (Y).
        value_range: 1.0 or 255.0, the largest value of the network's own input and output.
        reconstruction_input: "all" = low-level maps and every block's maps, "low_and_last" = low-level maps and what
            leaves the last block, "last" = what leaves the last block.
        block_input: "everything" = a block reads all maps made so far; "previous" = only what left the block before.
        layer_input: what a layer after the first of its block reads: "block" = the maps made in this block,
            "everything" = the block's input too. What leaves a block follows the same rule.
        cumulative_blocks: for "all": every block's whole output goes on, though it contains its input already, so
            that maps reach the bottleneck several times (only with layer_input "everything").
        block_order: order of the concatenation between blocks, "old_first" or "new_first".
        activation: kind of every activation.
        leaky_slope: slope of "leaky_relu" below zero.
        first_activation: the first convolution is followed by an activation.
        reactivate_concatenations: the activation is applied once more on every concatenation inside a block.
        bottleneck_activation: the bottleneck is followed by an activation.
        upsampler_activation: every upsampling step is followed by an activation.
        normalisation: batch normalisation: "none"; "block_input" (once, on what a block reads); "before_layers"
            (normalisation, activation, convolution); "after_convolutions" (convolution, normalisation, activation).
        deconvolutions: geometry of each upsampling step; empty with pixel shuffles.
        pixel_shuffles: factors of convolution + pixel shuffle steps; empty with deconvolutions.
        upsampled: maps of the upsampling steps.
        bottleneck_bias: the bottleneck has a bias.
        upsampler_bias: the upsampling steps have a bias.
        last_bias: the last convolution has a bias.
        mean_shift: stored 1x1 convolutions (mean and standard deviation) around the network.
        layer_scale: factor on the maps of every dense layer, after its activation.
        upsampler_normalisation: every upsampling step ends with a batch normalisation, before its activation.
    """

    growth: int
    layers: int
    blocks: int
    low_level: int
    bottleneck: int | None
    upsampled: int
    channels: int = 1
    value_range: float = 1.0
    reconstruction_input: Literal["all", "low_and_last", "last"] = "all"
    block_input: Literal["everything", "previous"] = "everything"
    layer_input: Literal["block", "everything"] = "block"
    cumulative_blocks: bool = False
    block_order: Literal["old_first", "new_first"] = "old_first"
    activation: Activation = "relu"
    leaky_slope: float = 0.2
    first_activation: bool = True
    reactivate_concatenations: bool = False
    bottleneck_activation: bool = True
    upsampler_activation: bool = True
    normalisation: Literal["none", "block_input", "before_layers", "after_convolutions"] = "none"
    deconvolutions: tuple[Deconvolution, ...] = (PAPER_DECONVOLUTION, PAPER_DECONVOLUTION)
    pixel_shuffles: tuple[int, ...] = ()
    bottleneck_bias: bool = True
    upsampler_bias: bool = True
    last_bias: bool = True
    layer_scale: float = 1.0
    upsampler_normalisation: bool = False
    mean_shift: Literal["none", "matrix"] = "none"

    def __post_init__(self) -> None:
        sizes = (self.growth, self.layers, self.blocks, self.low_level, self.bottleneck or 1, self.upsampled)
        if min(sizes) < 1:
            raise ValueError(f"sizes of {self} must be at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}, must be 1 or 3")
        if self.value_range not in (1.0, 255.0):
            raise ValueError(f"value_range is {self.value_range}, must be 1 or 255")
        if self.deconvolutions and self.pixel_shuffles:
            raise ValueError("upsampling is either by deconvolutions or by pixel shuffles")
        if self.cumulative_blocks and (self.layer_input, self.reconstruction_input) != ("everything", "all"):
            raise ValueError("cumulative blocks need layer_input everything and reconstruction_input all")
        carried = (self.layer_input, self.block_input, self.reconstruction_input) == ("everything", "previous", "all")
        if carried and not self.cumulative_blocks:
            raise ValueError(
                "blocks that carry their input on reach reconstruction_input all only as cumulative_blocks"
            )

    @property
    def scale(self) -> int:
        """Output pixels per input pixel and axis."""
        scale = 1
        for step in self.deconvolutions:
            scale *= step.stride
        for factor in self.pixel_shuffles:
            scale *= factor
        return scale

    @property
    def block_output(self) -> int:
        """New maps that a block makes."""
        return self.growth * self.layers

    def block_inputs(self) -> list[int]:
        """Return how many maps each block reads."""
        if self.block_input == "everything":
            return [self.low_level + index * self.block_output for index in range(self.blocks)]
        inputs = [self.low_level]
        while len(inputs) < self.blocks:
            inputs.append(self.block_output + (inputs[-1] if self.layer_input == "everything" else 0))
        return inputs

    def layer_inputs(self, block_input: int) -> list[int]:
        """Return how many maps each layer of a block reads, given what the block reads."""
        first = block_input if self.layer_input == "everything" else 0
        return [block_input, *(first + index * self.growth for index in range(1, self.layers))]

    def reconstruction_inputs(self) -> int:
        """Return how many maps reach the bottleneck (or the upsampling where there is none)."""
        last_read = self.block_inputs()[-1]
        leaving = self.block_output + (last_read if self.layer_input == "everything" else 0)
        match self.reconstruction_input:
            case "last":
                return leaving
            case "low_and_last":
                return self.low_level + leaving
            case "all" if self.cumulative_blocks:
                return self.low_level + sum(read + self.block_output for read in self.block_inputs())
            case "all":
                return self.low_level + self.blocks * self.block_output


def _paper_deconvolutions(scale: int) -> tuple[Deconvolution, ...]:
    steps = scale.bit_length() - 1
    if scale != 2**steps or scale < 2:
        raise ValueError(f"scale is {scale}, must be 2, 4 or 8: every deconvolution doubles the size")
    return (PAPER_DECONVOLUTION,) * steps


def srdensenet_all(scale: int = 4, channels: int = 1) -> SrDenseNetConfig:
    """Return SRDenseNet_All: every block reads all earlier ones. x4, one channel: 2,659,585 values, 69 layers."""
    return SrDenseNetConfig(
        growth=16,
        layers=8,
        blocks=8,
        low_level=128,
        bottleneck=256,
        upsampled=256,
        channels=channels,
        deconvolutions=_paper_deconvolutions(scale),
    )


def srdensenet_hl(scale: int = 4, channels: int = 1) -> SrDenseNetConfig:
    """Return SRDenseNet_HL: blocks in a chain; the first convolution's and the last block's maps are used."""
    return SrDenseNetConfig(
        growth=16,
        layers=8,
        blocks=8,
        low_level=128,
        bottleneck=256,
        upsampled=256,
        channels=channels,
        reconstruction_input="low_and_last",
        block_input="previous",
        deconvolutions=_paper_deconvolutions(scale),
    )


def srdensenet_h(scale: int = 4, channels: int = 1) -> SrDenseNetConfig:
    """Return SRDenseNet_H: blocks in a chain; only the last block's maps are used."""
    return SrDenseNetConfig(
        growth=16,
        layers=8,
        blocks=8,
        low_level=128,
        bottleneck=256,
        upsampled=256,
        channels=channels,
        reconstruction_input="last",
        block_input="previous",
        deconvolutions=_paper_deconvolutions(scale),
    )


def srdensenet_batchnorm(scale: int = 4, channels: int = 1) -> SrDenseNetConfig:
    """Return the variant with a batch normalisation on each block's input and five layers of 32 maps per block.

    The maps of a block grow as 32, 64, 96, 128, 160, and the activation is repeated on each concatenation.
    """
    return SrDenseNetConfig(
        growth=32,
        layers=5,
        blocks=4,
        low_level=32,
        bottleneck=128,
        upsampled=128,
        channels=channels,
        reactivate_concatenations=True,
        normalisation="block_input",
        deconvolutions=_paper_deconvolutions(scale),
    )


class SrDenseNet(nn.Module):
    """SRDenseNet, as configured."""

    def __init__(self, config: SrDenseNetConfig) -> None:
        super().__init__()
        self.config = config
        if config.mean_shift == "matrix":
            self.sub_mean = MeanShift([0.0] * config.channels)
            self.add_mean = MeanShift([0.0] * config.channels)
        self.first = convolution_3x3(config.channels, config.low_level)
        self.first_activation = _activation(config) if config.first_activation else None
        self.blocks = nn.ModuleList(_Block(config, inputs) for inputs in config.block_inputs())
        maps = config.reconstruction_inputs()
        self.bottleneck: nn.Conv2d | None = None
        self.bottleneck_activation: nn.Module | None = None
        if config.bottleneck is not None:
            self.bottleneck = Convolution(maps, config.bottleneck, 1, bias=config.bottleneck_bias)
            self.bottleneck_activation = _activation(config) if config.bottleneck_activation else None
            maps = config.bottleneck
        self.upsampler = nn.ModuleList()
        for step in config.deconvolutions or config.pixel_shuffles:
            self.upsampler.append(_Upsampling(config, maps, step))
            maps = config.upsampled
        self.last = convolution_3x3(maps, config.channels, bias=config.last_bias)

    def forward(self, image: Tensor) -> Tensor:
        """Upscale.

        Args:
            image: (N, C, H, W) float in [0, value_range], Y or RGB.

        Returns:
            (N, C, scale * H - trim, scale * W - trim), same range, not clamped; trim as specified.
        """
        config = self.config
        if config.mean_shift == "matrix":
            image = self.sub_mean(image)
        low = self.first(image)
        if self.first_activation is not None:
            low = self.first_activation(low)
        maps = self._reconstruction_maps(low)
        if self.bottleneck is not None:
            maps = self.bottleneck(maps)
        if self.bottleneck_activation is not None:
            maps = self.bottleneck_activation(maps)
        for step in self.upsampler:
            maps = step(maps)
        output: Tensor = self.last(maps)
        return self.add_mean(output) if config.mean_shift == "matrix" else output

    def _reconstruction_maps(self, low: Tensor) -> Tensor:
        """Run the dense blocks: low-level maps (N, low_level, H, W) to what the bottleneck reads."""
        config = self.config
        read, outputs = low, [low]
        for block in self.blocks:
            leaving = block(read)
            outputs.append(leaving)
            if config.block_input == "previous" or config.layer_input == "everything":
                read = leaving  # it holds all that the next block reads
            elif config.block_order == "old_first":
                read = torch.cat((read, leaving), 1)
            else:
                read = torch.cat((leaving, read), 1)
        if config.reconstruction_input == "last":
            return outputs[-1]
        if config.reconstruction_input == "low_and_last":
            return torch.cat((low, outputs[-1]), 1)
        if config.cumulative_blocks:
            return torch.cat(outputs, 1)
        if config.block_input == "previous":
            return torch.cat(outputs if config.block_order == "old_first" else outputs[::-1], 1)
        return read


class _Block(nn.Module):
    """A dense block: (N, inputs, H, W) to its new maps, with its input in front when layers read everything."""

    def __init__(self, config: SrDenseNetConfig, inputs: int) -> None:
        super().__init__()
        self.config = config
        reads = config.layer_inputs(inputs)
        self.layers = nn.ModuleList(convolution_3x3(read, config.growth) for read in reads)
        # One activation for the whole block: where it is learned, the public code shares its slope like this.
        self.activation = _activation(config)
        self.norm = nn.BatchNorm2d(inputs) if config.normalisation == "block_input" else None
        self.norms: nn.ModuleList | None = None
        if config.normalisation in ("before_layers", "after_convolutions"):
            before = config.normalisation == "before_layers"
            self.norms = nn.ModuleList(nn.BatchNorm2d(read if before else config.growth) for read in reads)

    def forward(self, maps: Tensor) -> Tensor:
        config = self.config
        if self.norm is not None:
            maps = self.norm(maps)
        made = [maps] if config.layer_input == "everything" else []
        for index in range(len(self.layers)):
            read = maps if index == 0 else self._join(made)
            new = self._layer(index, read)
            made.append(new if config.layer_scale == 1.0 else new * config.layer_scale)
        return self._join(made)

    def _join(self, made: list[Tensor]) -> Tensor:
        if len(made) == 1:
            return made[0]
        joined = torch.cat(made, 1)
        return self.activation(joined) if self.config.reactivate_concatenations else joined

    def _layer(self, index: int, maps: Tensor) -> Tensor:
        convolution = self.layers[index]
        if self.config.normalisation == "before_layers":
            assert self.norms is not None
            return convolution(self.activation(self.norms[index](maps)))  # type: ignore[no-any-return]
        maps = convolution(maps)
        if self.config.normalisation == "after_convolutions":
            assert self.norms is not None
            maps = self.norms[index](maps)
        return self.activation(maps)  # type: ignore[no-any-return]


class _Upsampling(nn.Module):
    """One deconvolution, or one convolution + pixel shuffle, and its activation."""

    def __init__(self, config: SrDenseNetConfig, inputs: int, step: Deconvolution | int) -> None:
        super().__init__()
        outputs, bias = config.upsampled, config.upsampler_bias
        self.convolution: nn.Conv2d | nn.ConvTranspose2d
        if isinstance(step, Deconvolution):
            self.convolution = TransposedConvolution(
                inputs, outputs, step.kernel, step.stride, step.padding, step.output_padding, bias=bias
            )
            self.shuffle = None
        else:
            self.convolution = convolution_3x3(inputs, outputs * step**2, bias=bias)
            self.shuffle = nn.PixelShuffle(step)
        self.norm = nn.BatchNorm2d(outputs) if config.upsampler_normalisation else None
        self.activation = _activation(config) if config.upsampler_activation else None

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.convolution(maps)
        if self.shuffle is not None:
            maps = self.shuffle(maps)
        if self.norm is not None:
            maps = self.norm(maps)
        return maps if self.activation is None else self.activation(maps)


def _activation(config: SrDenseNetConfig) -> nn.Module:
    return make_activation(config.activation, config.leaky_slope)
