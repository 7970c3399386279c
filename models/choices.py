"""What a user can state about a checkpoint, and the names and values that are allowed. Imports no PyTorch."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from srdeploy.core.errors import UsageError

Activation = Literal["relu", "leaky_relu", "elu", "silu", "gelu", "prelu", "identity"]
"""Name of an activation. "prelu" has one learned slope; the others have no values."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

VALUE_RANGES = (1.0, 255.0)
"""Largest values of a network's own input and output."""

COLOUR_ORDERS = ("rgb", "bgr")

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean RGB of the DIV2K training images on 0..1, as the public training codes write it."""

MEANS: dict[str, tuple[float, ...]] = {
    "div2k": DIV2K_MEAN,
    "df2k": (0.4690, 0.4490, 0.4036),  # DIV2K and Flickr2K together
    "none": (0.0, 0.0, 0.0),
}
"""Means that public training codes use, on 0..1, by the name that the command line gives them."""


@dataclass(frozen=True)
class Choices:
    """What the user states about a checkpoint; None means not stated.

    Attributes:
        value_range: 255 or 1: the largest value of the network's own input and output.
        res_scale: factor on every block's branch.
        activation: name of an activation.
        weights: which network of a file with several: "raw", "ema", or the keys that lead to it ("best_model").
        mean: mean colour on 0..1, one value per channel.
        colours: "rgb" or "bgr": the order of the network's own channels.
        group_skip: whether a group adds its input to its output (RCAN-it).
        layer_scale: factor on every dense layer's maps (RDST).

    Raises:
        UsageError: a value is not allowed.
    """

    value_range: float | None = None
    res_scale: float | None = None
    activation: str | None = None
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    colours: str | None = None
    group_skip: bool | None = None
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "value_range": VALUE_RANGES,
            "activation": ACTIVATIONS,
            "colours": COLOUR_ORDERS,
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise UsageError(f"{flag_of(name)} {flag_value(value)}", expected=" or ".join(map(flag_value, values)))
        for name in ("res_scale", "layer_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 100:  # also refuses NaN
                raise UsageError(f"{flag_of(name)} {flag_value(value)}", expected="a factor above 0, at most 100")

    def stated(self) -> dict[str, Any]:
        """Return what the user stated, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def flag_of(choice: str) -> str:
    """Return the command line flag of a choice."""
    return "--" + choice.replace("_", "-")


def flag_value(value: Any) -> str:
    """Write a value the way its flag takes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
