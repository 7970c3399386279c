"""Rounding of weights such that their errors cancel on the layer's real input.

Neighboring pixels and channels of feature maps are correlated, so rounding one weight down compensates most of the
error of rounding another one up. The covariance of the layer's input determines which: the weights of an output channel
are rounded one after the other, and the weights not yet rounded compensate each error as far as the covariance allows.
This is the method of Frantar et al., "GPTQ", ICLR 2023, and "Optimal Brain Compression", NeurIPS 2022
(https://arxiv.org/abs/2210.17323, https://arxiv.org/abs/2208.11580), applied to windows of feature maps. The mean error
is left to bias correction, so the covariance is about the mean.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from srdeploy.calibration.observe import run_outputs
from srdeploy.calibration.windows import random_places, windows_at
from srdeploy.core.contract import INPUT
from srdeploy.core.onnx_graph import Graph, Layer
from srdeploy.core.progress import SILENT, Progress

WINDOWS = 256
"""Windows taken of every layer and image. Fewer than a layer has weights per output channel are too few in all."""
LARGEST = 1152
"""Weights of an output channel that compensate each other's errors: 128 channels of 3x3. More are split into parts."""
MOMENTS_BYTES = 1 << 30
"""Covariances kept at a time; a network with more is passed over several times."""
DAMPING = 0.005
"""Added to the diagonal, relative to its mean: what was not seen is not trusted wholly."""
_STEP_FACTORS = (1.0, 0.93, 0.86, 0.8)
"""Steps tried, relative to the one that just holds the largest weight; clipped weights are compensated like others."""
_BLOCK = 32
_SMALLEST = 1e-12


Covariances = list[NDArray[np.float32]]
"""Of the windows that a layer reads: one matrix (d, d), or several of consecutive input channels."""


@dataclass
class _Moments:
    """Sums over windows, or parts of windows; they are taken relative to an `offset` near their mean."""

    offset: NDArray[np.float32]
    products: NDArray[np.float32]
    total: NDArray[np.float64]
    count: int = 0

    @classmethod
    def of(cls, windows: NDArray[np.float32]) -> "_Moments":
        size = windows.shape[1]
        return cls(windows.mean(axis=0), np.zeros((size, size), dtype=np.float32), np.zeros(size))

    def add(self, windows: NDArray[np.float32]) -> None:
        windows = windows - self.offset
        self.products += windows.T @ windows
        self.total += windows.sum(axis=0, dtype=np.float64)
        self.count += windows.shape[0]

    def covariance(self) -> NDArray[np.float32]:
        mean = self.total / self.count
        result = self.products.astype(np.float64) / self.count - np.outer(mean, mean)
        return result.astype(np.float32)


def collect_covariances(
    graph: Graph,
    layers: Sequence[Layer],
    batches: Sequence[NDArray[np.float32]],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Iterator[tuple[Layer, Covariances]]:
    """Yield layers with the covariances of the windows that they read.

    A layer with d = in * kh * kw weights per output channel has one covariance (d, d); where that is more than LARGEST,
    it has several, of consecutive input channels.

    Args:
        graph: the float graph.
        layers: plain convolutions of it, see `Graph.is_plain_convolution`.
        batches: small images (1, C, H, W): the inputs of all layers are held in memory for one of them.
        seed: for the places of the windows.
        progress: where to report.
    """
    passes = list(_passes(graph, layers))
    with progress.task("rounding weights together", total=len(passes) * len(batches)) as advance:
        for members in passes:
            moments: dict[str, list[_Moments]] = {}
            tensors = [name for name in dict.fromkeys(layer.input for layer in members) if name != INPUT]
            for number, (batch, maps) in enumerate(
                zip(batches, run_outputs(graph.model, tensors, batches), strict=True)
            ):
                for layer in members:
                    random = np.random.default_rng((seed, number))  # the same places whatever other layers there are
                    values = batch if layer.input == INPUT else maps[layer.input]
                    height, width = graph.initializers[layer.weight].dims[2:]
                    places = random_places(values[0], (height, width), WINDOWS, random)
                    windows = windows_at(values[0], (height, width), places)
                    parts = [windows[:, start:end] for start, end in _bounds(graph, layer)]
                    entries = moments.setdefault(layer.name, [_Moments.of(part) for part in parts])
                    for entry, part in zip(entries, parts, strict=True):
                        entry.add(part)
                advance()
            for layer in members:
                yield layer, [entry.covariance() for entry in moments.pop(layer.name)]


def covariance_bytes(covariances: Iterable[Covariances]) -> int:
    """Return the memory that covariances take."""
    return sum(part.nbytes for parts in covariances for part in parts)


def scale_covariances(covariances: Covariances, factors: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return the covariances of windows whose channels are multiplied by a factor each.

    Args:
        covariances: as `collect_covariances` yields them.
        factors: (C,), per input channel, or (1,).
    """
    size = sum(len(part) for part in covariances)
    taps = np.repeat(np.broadcast_to(factors, factors.size), size // factors.size)  # a channel's taps are consecutive
    scaled, start = [], 0
    for part in covariances:
        own = taps[start : start + len(part)]
        scaled.append(part.astype(np.float64) * own[:, None] * own)
        start += len(part)
    return scaled


def round_with_compensation(
    weights: NDArray[np.float32],
    scales: NDArray[np.float32],
    covariances: Sequence[NDArray[np.float64]],
    top: int,
    representable: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda scales: scales,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round weights of a layer so that their errors cancel.

    Args:
        weights: (out, in, kh, kw).
        scales: (out,), the scale of each output channel that holds its largest weight.
        covariances: of the windows read, as `collect_covariances` yields them.
        top: the largest code.
        representable: brings scales to what the graph can hold.

    Returns:
        Codes in the layout of the weights, and the scales that they belong to, some smaller than those given.
    """
    rows = weights.reshape(weights.shape[0], -1).astype(np.float64)
    # All steps at once: rows of different steps are as independent as rows of different channels.
    steps = representable(np.concatenate([scales * np.float32(shrink) for shrink in _STEP_FACTORS]))
    copies = np.tile(rows, (len(_STEP_FACTORS), 1))
    codes, power, start = np.zeros_like(copies), np.zeros(len(copies)), 0
    for covariance in covariances:
        part = slice(start, start := start + len(covariance))
        codes[:, part] = _compensated(copies[:, part] / steps[:, None], covariance, top)
        errors = codes[:, part] * steps[:, None] - copies[:, part]
        power += np.einsum("ri,ri->r", errors @ covariance, errors)
    chosen = power.reshape(len(_STEP_FACTORS), -1).argmin(axis=0) * rows.shape[0] + np.arange(rows.shape[0])
    return codes[chosen].astype(np.int8).reshape(weights.shape), steps[chosen]


def _compensated(rows: NDArray[np.float64], covariance: NDArray[np.float64], top: int) -> NDArray[np.float64]:
    """Round rows, in units of their step, column by column; blocks of columns keep the updates small."""
    size = covariance.shape[0]
    order = np.argsort(-np.diag(covariance), kind="stable")  # what is read most strongly is rounded first
    damped = covariance + np.eye(size) * (DAMPING * np.diag(covariance).mean() + _SMALLEST)
    # Row j of the factor: how the columns after j compensate the rounding of column j.
    factor = _inverse_factor(damped[np.ix_(order, order)])
    left = np.ascontiguousarray(rows[:, order].T)  # (columns, rows): the loop reads contiguous memory
    codes = np.empty_like(left)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        done = np.empty((end - start, left.shape[1]))
        for column in range(start, end):
            code, error = codes[column], done[column - start]
            np.rint(left[column], out=code)
            np.minimum(code, top, out=code)  # np.clip is slower on few values
            np.maximum(code, -top, out=code)
            np.subtract(left[column], code, out=error)
            error /= factor[column, column]
            left[column + 1 : end] -= factor[column, column + 1 : end, None] * error
        left[end:] -= factor[start:end, end:].T @ done
    result = np.empty_like(rows)
    result[:, order] = codes.T
    return result


def _inverse_factor(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the upper triangular U with U.T @ U = inverse of a positive definite matrix."""
    # The Cholesky factor C of the matrix in reversed order gives U without inverting the matrix: U is the inverse of C,
    # reversed again.
    reversed_factor = np.asarray(np.linalg.cholesky(matrix[::-1, ::-1]), dtype=np.float64)
    return np.ascontiguousarray(_inverse_triangular(reversed_factor)[::-1, ::-1])


def _inverse_triangular(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inverse of a lower triangular matrix, by halves."""
    size = len(lower)
    if size <= _BLOCK:
        return np.asarray(np.linalg.inv(lower), dtype=np.float64)
    half = size // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = _inverse_triangular(lower[:half, :half])
    inverse[half:, half:] = _inverse_triangular(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def _bounds(graph: Graph, layer: Layer) -> list[tuple[int, int]]:
    """Return where the parts of a layer's windows begin and end: equal numbers of whole channels, as far as they go."""
    _, channels, height, width = graph.initializers[layer.weight].dims
    taps = height * width
    count = -(-channels // max(1, LARGEST // taps))
    edges = [taps * (channels * index // count) for index in range(count + 1)]
    return list(pairwise(edges))


def _passes(graph: Graph, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    members: list[Layer] = []
    held = 0
    for layer in layers:
        size = sum(4 * (end - start) ** 2 for start, end in _bounds(graph, layer))
        if members and held + size > MOMENTS_BYTES:
            yield members
            members, held = [], 0
        members.append(layer)
        held += size
    if members:
        yield members
