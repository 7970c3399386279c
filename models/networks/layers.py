"""Convolutions that are not initialised on the meta device.

A checkpoint's network is built on the meta device and then given the file's tensors. PyTorch would run its random
initialisation there too, on tensors without values, which took most of the time of loading an 800-convolution RCAN.
"""

from torch import nn


class Convolution(nn.Conv2d):
    """A 2-D convolution."""

    def reset_parameters(self) -> None:
        """Initialise as PyTorch does, unless there is no value to initialise."""
        if not self.weight.is_meta:
            super().reset_parameters()


class TransposedConvolution(nn.ConvTranspose2d):
    """A 2-D transposed convolution."""

    def reset_parameters(self) -> None:
        """Initialise as PyTorch does, unless there is no value to initialise."""
        if not self.weight.is_meta:
            super().reset_parameters()


def convolution_3x3(inputs: int, outputs: int, *, bias: bool = True) -> Convolution:
    """Return a 3x3 convolution that keeps the size."""
    return Convolution(inputs, outputs, 3, padding=1, bias=bias)
