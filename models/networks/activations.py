"""The activations found in public super-resolution checkpoints, by name."""

from typing import Literal, get_args

from torch import nn

Activation = Literal["relu", "leaky_relu", "elu", "silu", "gelu", "prelu", "identity"]
"""Name of an activation. "prelu" has one learned slope; the others have no values."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def make_activation(kind: Activation, leaky_slope: float) -> nn.Module:
    """Return a new activation module; `leaky_slope` counts for "leaky_relu" alone."""
    match kind:
        case "relu":
            return nn.ReLU()
        case "leaky_relu":
            return nn.LeakyReLU(leaky_slope)
        case "elu":
            return nn.ELU()
        case "silu":
            return nn.SiLU()
        case "gelu":
            return nn.GELU()
        case "prelu":
            return nn.PReLU(1)
        case "identity":
            return nn.Identity()


def is_positively_homogeneous(kind: Activation) -> bool:
    """Tell whether f(a x) = a f(x) for every a > 0, which is what lets a scale move through the activation."""
    return kind in ("relu", "leaky_relu", "prelu", "identity")
