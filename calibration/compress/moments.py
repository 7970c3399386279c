"""Means and covariances of what layers read on real images, in the original graph and in the compressed one.

Those of convolutions are about the mean, since the bias takes up what the mean changes. Those of deconvolutions are
about zero: an output pixel sees one phase of the taps, so a change of the mean differs from phase to phase, which no
bias corrects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from srdeploy.calibration.compress.factors import Array
from srdeploy.calibration.observe import run_outputs
from srdeploy.calibration.windows import random_places, windows_at
from srdeploy.core.contract import INPUT
from srdeploy.core.onnx_graph import Graph, Layer

WINDOWS = 256
"""Windows taken of every layer and image, at least."""
WINDOWS_PER_INPUT = 16
"""Windows of all images together per weight of an output channel, where a layer has so many: with fewer, least squares
follow their noise."""
MAX_WEIGHTS = 2304
"""Weights per output channel whose covariance is taken whole, 256 channels of 3x3; of wider layers, the channels'."""


@dataclass(frozen=True)
class Moments:
    """Of x, which a layer reads in the original graph, and z, which it reads in the other one.

    Kept as summed, in float32: a network of full size has hundreds of layers.

    Attributes:
        mean_x, mean_z: (d,), (e,); zeros where the moments are about zero.
        cross32: (d, e), covariance of x with z; where z is x, the same array as `covariance32`.
        covariance32: (e, e), of z.
        windows: how many were seen; fewer than e leave directions that were never seen.
    """

    mean_x: Array
    mean_z: Array
    cross32: NDArray[np.float32]
    covariance32: NDArray[np.float32]
    windows: int

    @property
    def cross(self) -> Array:
        """`cross32` as float64."""
        return self.cross32.astype(np.float64)

    @property
    def covariance(self) -> Array:
        """`covariance32` as float64."""
        return self.covariance32.astype(np.float64)

    @property
    def same(self) -> bool:
        """Whether z is x: both were taken from the original graph."""
        return self.cross32 is self.covariance32 or bool(np.array_equal(self.cross32, self.covariance32))

    def about_zero(self) -> "Moments":
        """Return the same moments about zero instead of the mean."""
        covariance = (self.covariance + np.outer(self.mean_z, self.mean_z)).astype(np.float32)
        cross = (self.cross + np.outer(self.mean_x, self.mean_z)).astype(np.float32)
        return replace(
            self,
            mean_x=np.zeros_like(self.mean_x),
            mean_z=np.zeros_like(self.mean_z),
            cross32=covariance if self.same else cross,
            covariance32=covariance,
        )


def is_channelwise(graph: Graph, layer: Layer) -> bool:
    """Return True if a layer's moments are those of single pixels, (in,), instead of whole windows, (in * kh * kw,)."""
    kernel = graph.initializers[layer.weight].dims[2:]
    return layer.op == "ConvTranspose" or layer.channels_in * kernel[0] * kernel[1] > MAX_WEIGHTS


def collect_moments(
    original: Graph, other: Graph | None, layers: Sequence[Layer], batches: Sequence[NDArray[np.float32]], seed: int = 0
) -> dict[str, Moments]:
    """Run both graphs over images and return the moments of layers by name; `other` None means the original itself.

    Args:
        original: the graph that the layers are of.
        other: a graph with the same tensor names; a tensor may have fewer channels there.
        layers: convolutions and deconvolutions without groups.
        batches: small images (1, C, H, W): the inputs of all layers are held in memory for one of them.
        seed: for the places of the windows.
    """
    random = np.random.default_rng(seed)
    tensors = [name for name in dict.fromkeys(layer.input for layer in layers) if name != INPUT]
    sums: dict[str, _Sums] = {}
    others = run_outputs(other.model, tensors, batches) if other is not None else None
    for batch, maps in zip(batches, run_outputs(original.model, tensors, batches), strict=True):
        changed = maps if others is None else next(others)
        for layer in layers:
            pair = [batch if layer.input == INPUT else found[layer.input] for found in (maps, changed)]
            height, width = original.initializers[layer.weight].dims[2:]
            kernel = (1, 1) if is_channelwise(original, layer) else (height, width)
            weights = layer.channels_in * kernel[0] * kernel[1]
            count = max(WINDOWS, -(-WINDOWS_PER_INPUT * weights // len(batches)))
            places = random_places(pair[0][0], kernel, count, random)
            x = windows_at(pair[0][0], kernel, places)
            z = x if others is None else windows_at(pair[1][0], kernel, places)
            sums.setdefault(layer.name, _Sums.for_first(x, z)).add(x, z)
    found = {name: entry.moments() for name, entry in sums.items()}
    return found | {layer.name: found[layer.name].about_zero() for layer in layers if layer.op == "ConvTranspose"}


@dataclass
class _Sums:
    """Sums relative to offsets near the means."""

    offset_x: NDArray[np.float32]
    offset_z: NDArray[np.float32]
    total_x: Array
    total_z: Array
    cross: NDArray[np.float32]
    square: NDArray[np.float32]
    count: int = 0

    @classmethod
    def for_first(cls, x: NDArray[np.float32], z: NDArray[np.float32]) -> "_Sums":
        d, e = x.shape[1], z.shape[1]
        square = np.zeros((e, e), dtype=np.float32)
        cross = square if x is z else np.zeros((d, e), dtype=np.float32)  # one array where both are the same
        return cls(x.mean(axis=0), z.mean(axis=0), np.zeros(d), np.zeros(e), cross, square)

    def add(self, x: NDArray[np.float32], z: NDArray[np.float32]) -> None:
        same = x is z
        x, z = x - self.offset_x, z - self.offset_z
        self.square += z.T @ z
        if not same:
            self.cross += x.T @ z
        self.total_x += x.sum(axis=0, dtype=np.float64)
        self.total_z += z.sum(axis=0, dtype=np.float64)
        self.count += len(x)

    def moments(self) -> Moments:
        """Return the moments; the sums become theirs."""
        x, z = self.total_x / self.count, self.total_z / self.count
        square = _centered(self.square, self.count, z, z)
        return Moments(
            mean_x=x + self.offset_x,
            mean_z=z + self.offset_z,
            cross32=_centered(self.cross, self.count, x, z) if self.cross is not self.square else square,
            covariance32=square,
            windows=self.count,
        )


def _centered(total: NDArray[np.float32], count: int, x: Array, z: Array) -> NDArray[np.float32]:
    """Turn a sum of products into a covariance, in place."""
    total /= count
    total -= np.outer(x, z)
    return total
