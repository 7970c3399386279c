"""What a network is from the outside: scale, colours, range, sizes, receptive field, cost.

Everything follows from the configuration by arithmetic; no network is built and no tensor is needed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from srdeploy.core.errors import InputError
from srdeploy.models.networks.rcan import Rcan, RcanConfig
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNet, SrDenseNetConfig

NetworkConfig = RcanConfig | SrDenseNetConfig
Colours = Literal["rgb", "y"]


@dataclass(frozen=True)
class ModelSpec:
    """What the stages need to know about a network.

    Attributes:
        architecture: "rcan" or "srdensenet".
        scale: output pixels per input pixel and axis.
        colours: "rgb" (3 channels) or "y" (1 channel, BT.601 luma in studio swing, (16..235)/255).
        value_range: 1.0 or 255.0, the largest value of the network's own input and output.
        mean: constant subtracted before and added after the network, on 0..1; None when there is none, or when it is
            a stored matrix.
        trim: output pixels missing at the bottom and right: H' = scale * H - trim.
        min_size: minimum height and width of the input.
        receptive_radius: LR pixels on each side of an output pixel's own LR pixel that it depends on; None when it
            depends on the whole image (channel attention).
        macs_per_pixel: multiply-adds of all convolutions per LR pixel, without the once-per-image attention gates
            and without the mean shift.
        largest_tensor_per_pixel: elements of the largest intermediate tensor per LR pixel.
        traffic_per_pixel: elements read and written per LR pixel when every convolution reads its input and writes its
            output once, with activations, pooling sums, concatenations and pixel shuffles done in passing; an addition
            or a gate reads its second operand. Weights are excluded.
    """

    architecture: str
    scale: int
    colours: Colours
    value_range: float
    mean: tuple[float, ...] | None
    trim: int
    min_size: int
    receptive_radius: int | None
    macs_per_pixel: float
    largest_tensor_per_pixel: int
    traffic_per_pixel: float


def spec_of(config: NetworkConfig) -> ModelSpec:
    """Return the specification that follows from a configuration."""
    return _spec_of_rcan(config) if isinstance(config, RcanConfig) else _spec_of_srdensenet(config)


def network_of(config: NetworkConfig) -> nn.Module:
    """Return a new network with PyTorch's initial weights; nothing is computed inside `torch.device("meta")`."""
    return Rcan(config) if isinstance(config, RcanConfig) else SrDenseNet(config)


def config_to_json(config: NetworkConfig) -> dict[str, Any]:
    """Return a configuration as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def config_from_json(architecture: str, values: Mapping[str, Any]) -> NetworkConfig:
    """Read a configuration back.

    Raises:
        InputError: unknown architecture or field, a value of another type, or values that do not fit together.
    """
    kinds: dict[str, type[NetworkConfig]] = {"rcan": RcanConfig, "srdensenet": SrDenseNetConfig}
    if architecture not in kinds:
        raise InputError(f"architecture {architecture!r}", expected=" or ".join(kinds))
    kind = kinds[architecture]
    types = get_type_hints(kind)
    unknown = set(values) - set(types)
    if unknown:
        raise InputError(f"{architecture} configuration has unknown fields {', '.join(sorted(unknown))}")
    try:
        return kind(**{name: _typed(value, types[name], name) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise InputError(f"{architecture} configuration does not fit together ({error})") from error


def _typed(value: Any, expected: Any, name: str) -> Any:
    """Return a JSON value as the type that a configuration field has.

    Raises:
        ValueError: it is of another type.
    """
    options = get_args(expected)
    if get_origin(expected) is Literal and isinstance(value, str) and value in options:
        return value
    if get_origin(expected) in (UnionType, Union):
        inner = next(option for option in options if option is not NoneType)
        return None if value is None else _typed(value, inner, name)
    if get_origin(expected) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(entry, options[0], name) for entry in value)
    if expected is Deconvolution and isinstance(value, Mapping):
        return Deconvolution(**{part: _typed(size, int, name) for part, size in value.items()})
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if expected in (int, bool) and type(value) is expected:
        return value
    raise ValueError(f"{name} is {value!r}")


def _spec_of_rcan(config: RcanConfig) -> ModelSpec:
    body_share = 1 / config.unshuffle**2  # body pixels per LR pixel
    features = config.features
    per_group = 2 * config.blocks + config.group_convolution
    macs = body_share * 9 * (config.channels * config.unshuffle**2 * features)
    macs += body_share * 9 * features**2 * (config.groups * per_group + 1)
    share = body_share
    largest = max(config.channels, math.ceil(features * share))
    # A block: two convolutions, then gate and skip, which wait for the mean of the whole map: a pass of its own.
    traffic = share * (config.channels * config.unshuffle**2 + features)
    traffic += share * features * config.groups * (7 * config.blocks + 2 * config.group_convolution + config.group_skip)
    traffic += share * features * 3
    for factor in config.upsampler:
        macs += share * 9 * features * features * factor**2
        traffic += share * features * (1 + factor**2)
        share *= factor**2
        largest = max(largest, math.ceil(features * share))
    macs += share * 9 * features * config.channels
    traffic += share * (features + config.channels)
    return ModelSpec(
        architecture="rcan",
        scale=config.scale,
        colours="rgb" if config.channels == 3 else "y",
        value_range=config.value_range,
        mean=config.mean,
        trim=0,
        # A reflection needs one pixel more than it adds.
        min_size=config.unshuffle // 2 + 1 if config.unshuffle > 1 else 1,
        receptive_radius=None,
        macs_per_pixel=macs,
        largest_tensor_per_pixel=max(largest, math.ceil(config.channels * config.scale**2)),
        traffic_per_pixel=traffic,
    )


def _spec_of_srdensenet(config: SrDenseNetConfig) -> ModelSpec:
    macs = 9.0 * config.channels * config.low_level
    traffic = float(config.channels + config.low_level)
    largest = max(config.low_level, config.reconstruction_inputs())
    for read in config.block_inputs():
        macs += 9 * config.growth * sum(config.layer_inputs(read))
        traffic += sum(config.layer_inputs(read)) + config.growth * len(config.layer_inputs(read))
        largest = max(largest, read + config.block_output if config.layer_input == "everything" else read)
    maps = config.reconstruction_inputs()
    if config.bottleneck is not None:
        macs += maps * config.bottleneck
        traffic += maps + config.bottleneck
        maps = config.bottleneck
    share, trim = 1, 0
    for step in config.deconvolutions:
        macs += share * maps * config.upsampled * step.kernel**2
        traffic += share * (maps + config.upsampled * step.stride**2)
        share *= step.stride**2
        trim = step.stride * trim - step.offset
        maps = config.upsampled
        largest = max(largest, maps * share)
    for factor in config.pixel_shuffles:
        macs += share * 9 * maps * config.upsampled * factor**2
        traffic += share * (maps + config.upsampled * factor**2)
        share *= factor**2
        maps = config.upsampled
        largest = max(largest, maps * share)
    macs += share * 9 * maps * config.channels
    traffic += share * (maps + config.channels)
    return ModelSpec(
        architecture="srdensenet",
        scale=config.scale,
        colours="rgb" if config.channels == 3 else "y",
        value_range=config.value_range,
        mean=None,
        trim=trim,
        min_size=1,
        receptive_radius=1 + config.blocks * config.layers + _upsampling_radius(config),
        macs_per_pixel=macs,
        largest_tensor_per_pixel=max(largest, config.channels * share),
        traffic_per_pixel=traffic,
    )


def _upsampling_radius(config: SrDenseNetConfig) -> int:
    """Return how far, in LR pixels, upsampling and last convolution reach beyond an output pixel's own LR pixel.

    The span of output rows 0..scale-1, which belong to LR row 0, is walked back: a 3x3 convolution widens it by one
    on both sides, a deconvolution maps output row y to the input rows x with
    y + padding - kernel < stride * x <= y + padding.
    """
    low, high = -1, config.scale  # what the last convolution reads for rows 0..scale-1
    for step in reversed(config.deconvolutions):
        low = -((step.kernel - 1 - step.padding - low) // step.stride)
        high = (high + step.padding) // step.stride
    for factor in reversed(config.pixel_shuffles):
        low, high = low // factor - 1, high // factor + 1
    return max(-low, high)
