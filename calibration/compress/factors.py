"""The arithmetic of compression: low-rank factors and channel selection in the metric of a layer's inputs.

A layer computes y = W x, x being the window (or the channels of the pixel) that it reads. Approximating W by its
truncated singular value decomposition treats all inputs alike; what counts is the error of y, which is
trace((W - W') C (W - W')^T) with the covariance C of x. In that metric the best factors are found by an eigenvalue
problem. Denton et al., "Exploiting Linear Structure Within Convolutional Networks", NeurIPS 2014, factor weights;
Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2015, fit the factors to the layer's responses;
He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, let readers absorb removed channels.

Only arrays here, no graphs. Covariances are about the mean; what the mean changes goes into the bias.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DAMPING = 1e-6
"""Added to a covariance's diagonal, relative to its mean, before it is inverted: directions never seen keep finite."""

FIT_DAMPING = 1e-3
"""The same where layers are fitted to what compressed ones produce: without it, the fit follows the windows' noise."""


def error_power(weights: Array, approximation: Array, covariance: Array) -> float:
    """Return the mean squared error of all outputs together: trace(D C D^T) with D = weights - approximation."""
    difference = weights - approximation
    return float(np.einsum("ij,ij->", difference @ covariance, difference))


def refit(weights: Array, cross: Array, covariance: Array, prior: Array, *, damping: float = DAMPING) -> Array:
    """Return weights on new inputs z that reproduce W x by least squares.

    Args:
        weights: (out, d), on the original inputs x.
        cross: (d, e), covariance of x with z.
        covariance: (e, e), of z.
        prior: (d, e), what x is in z as far as that is known: the identity, or the columns of the channels that are
            left. In directions that were not seen, the weights stay `weights @ prior`.
        damping: how strongly they stay there; `FIT_DAMPING` where x and z are different samples of noise.
    """
    start = weights @ prior
    missing = weights @ (cross - prior @ covariance)
    return start + np.asarray(np.linalg.solve(damped(covariance, damping), missing.T).T)


def damped(covariance: Array, damping: float = DAMPING) -> Array:
    """Return a covariance that can be inverted."""
    size = len(covariance)
    return covariance + np.eye(size) * max(damping * float(np.trace(covariance)) / size, 1e-12)


def reduce_outputs(weights: Array, covariance: Array) -> tuple[Array, Array]:
    """Find the directions in which a layer's outputs vary: for few outputs, and a 1x1 layer that spreads them.

    Args:
        weights: (out, d).
        covariance: (d, d).

    Returns:
        Directions (out, out), the most important first, and for each number of them (0 to out) the error that is left:
        (out + 1,). Factors of rank r are `directions[:, :r].T @ weights` and `directions[:, :r]`.
    """
    values, vectors = np.linalg.eigh(weights @ covariance @ weights.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    return vectors, _tails(values)


def reduce_inputs(weights: Array, covariance: Array) -> tuple[Array, Array, Array]:
    """Find the mixtures of input channels that a layer's outputs depend on: for a 1x1 layer in front of it.

    Args:
        weights: (out * taps, in), all taps reading the same channels.
        covariance: (in, in), of the channels.

    Returns:
        Projections (in, in), the most important first; the channels that they stand for (in, in); and the error left
        for each number of them, (in + 1,). The first factor of rank r is `projections[:r]`, and the second
        `weights @ basis[:, :r]`.
    """
    values, vectors = np.linalg.eigh(damped(covariance))
    values = np.maximum(values, DAMPING * max(float(values[-1]), 1e-12))  # rounding makes the smallest ones negative
    root = vectors * np.sqrt(values)
    inverse = (vectors / np.sqrt(values)).T
    found, directions = np.linalg.eigh(root.T @ weights.T @ weights @ root)
    found, directions = np.maximum(found[::-1], 0.0), directions[:, ::-1]
    return directions.T @ inverse, root @ directions, _tails(found)


def select_channels(weights: Array, covariance: Array, taps: int) -> tuple[NDArray[np.int64], Array]:
    """Order a layer's input channels by how well its outputs can do without them, the others making good.

    Channels are taken away one at a time, each time the one whose loss, absorbed by least squares, costs least
    (Hassibi & Stork, "Optimal Brain Surgeon", 1993, for groups of weights).

    Args:
        weights: (out, in * taps), the taps of a channel next to each other.
        covariance: (in * taps, in * taps).
        taps: weights per channel and output.

    Returns:
        Channels in the order in which they are taken away, (in,), and the error after each, (in,).
    """
    size = len(covariance) // taps
    inverse = np.linalg.inv(damped(covariance))
    left = weights.copy()
    remaining = np.ones(size, dtype=bool)
    order, errors, total = [], [], 0.0
    for _ in range(size):
        best, cheapest = -1, np.inf
        for channel in np.flatnonzero(remaining).tolist():
            part = slice(channel * taps, (channel + 1) * taps)
            own = left[:, part]
            cost = float(np.einsum("oi,oi->", np.linalg.solve(inverse[part, part], own.T).T, own))
            if cost < cheapest:
                best, cheapest = channel, cost
        part = slice(best * taps, (best + 1) * taps)
        gain = np.linalg.solve(inverse[part, part], inverse[part])  # (taps, d)
        left -= left[:, part] @ gain
        inverse -= inverse[:, part] @ gain
        left[:, part] = 0.0
        inverse[part] = inverse[:, part] = 0.0
        inverse[part, part] = np.eye(taps)  # stays invertible; the channel is never looked at again
        remaining[best] = False
        total += cheapest
        order.append(best)
        errors.append(total)
    return np.array(order), np.array(errors)


def _tails(values: Array) -> Array:
    """Return the sums of all but the first n values, n from 0 to all."""
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
