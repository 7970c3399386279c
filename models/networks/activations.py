"""The activations found in public super-resolution checkpoints, by name."""

from torch import nn

from srdeploy.models.choices import Activation


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
    """Return True if f(a x) = a f(x) for every a > 0, so that a scale can move through the activation."""
    return kind in ("relu", "leaky_relu", "prelu", "identity")
