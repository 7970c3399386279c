"""The 1x1 convolution that subtracts or adds the mean colour around a network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MeanShift(nn.Module):
    """A 1x1 convolution with stored matrix and bias: (N, C, H, W) to (N, C, H, W).

    The matrix is kept whole, not rebuilt from a mean: some public training codes left it trainable by accident, so
    a checkpoint may hold values that drifted from the identity. The tensors are buffers, as no training should move
    them.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, shift: Sequence[float]) -> None:
        """Start as the identity plus `shift`, one value per channel in the network's own value range."""
        super().__init__()
        channels = len(shift)
        self.register_buffer("weight", torch.empty(channels, channels, 1, 1))
        self.register_buffer("bias", torch.empty(channels))
        if not self.weight.is_meta:  # there, torch.eye alone would import two seconds of compiler
            self.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1))
            self.bias.copy_(torch.tensor([float(value) for value in shift]))

    def forward(self, image: Tensor) -> Tensor:
        """Return matrix * image + bias."""
        return F.conv2d(image, self.weight, self.bias)
