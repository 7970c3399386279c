"""From the observation of a tensor to the range of its 8-bit codes, and `ranges.json`, which stores ranges.

Covering every value that was seen (min-max) spends codes on outliers; clipping spends image on codes. Which is better
differs by network, so the four ways are computed from the same histogram and the one with the best measured fidelity is
taken (see `choose.py`); no method is assumed to be best.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from srdeploy.calibration.int8.arithmetic import Kind, fake_quantize, params_for_range
from srdeploy.calibration.observe import Observation
from srdeploy.core.errors import InputError, UsageError

Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
PERCENTILE = 1e-5
"""Share of the values that percentile ranges clip on either side."""
_FACTORS = np.linspace(1.0, 0.3, 36)
SCHEMA = 1


def compute_range(seen: Observation, method: Method, kind: Kind) -> tuple[float, float]:
    """Return the range (low, high) that codes of a kind should cover, 0.0 included.

    Args:
        seen: what was seen of the tensor.
        method: "minmax" covers everything; "percentile" clips 1e-5 of the values on either side; "mse" has the
            minimum mean squared error; "entropy" keeps the distribution's shape (minimum Kullback-Leibler divergence).
        kind: the codes. Symmetric kinds clip both sides alike.
    """
    low, high = seen.range
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or seen.counts is None:
        return low, high
    values, counts = seen.histogram()
    if values.size < 2:
        return low, high
    if method == "percentile":
        cumulative = np.cumsum(counts) / counts.sum()
        bottom = float(values[int(np.searchsorted(cumulative, PERCENTILE))])
        top = float(values[min(int(np.searchsorted(cumulative, 1 - PERCENTILE)), values.size - 1)])
        return max(low, min(bottom, 0.0)), min(high, max(top, 0.0))
    # Values sampled into the histogram never reach the outermost extremes that min-max saw; add those once.
    values, counts = np.append(values, (low, high)), np.append(counts, (1.0, 1.0))
    cost = _squared_error if method == "mse" else _kl_divergence
    if kind != "uint8":
        reach = max(-low, high)
        factor = _best(lambda f: cost(values, counts, -f * reach, f * reach, kind))
        return -factor * reach, factor * reach
    if high > 0:
        high *= _best(lambda f: cost(values, counts, low, f * high, kind))
    if low < 0:
        low *= _best(lambda f: cost(values, counts, f * low, high, kind))
    return low, high


def _best(cost: Callable[[float], float]) -> float:
    return min((float(factor) for factor in _FACTORS), key=cost)


def _squared_error(
    values: NDArray[np.float64], counts: NDArray[np.float64], low: float, high: float, kind: Kind
) -> float:
    difference = values - fake_quantize(values, params_for_range(low, high, kind))
    return float((counts * difference**2).sum())


def _kl_divergence(
    values: NDArray[np.float64], counts: NDArray[np.float64], low: float, high: float, kind: Kind
) -> float:
    """Kullback-Leibler divergence between the clipped distribution and what its codes represent."""
    params = params_for_range(low, high, kind)
    clipped = np.clip(values, params.low, params.high)
    fine = np.unique(clipped, return_inverse=True)[1]
    truth = np.bincount(fine, weights=counts)
    inside = np.bincount(fine, weights=counts * ((values >= params.low) & (values <= params.high)))
    codes = np.rint(np.unique(clipped) / params.scale).astype(np.int64)
    codes -= codes.min()
    present = inside > 0
    members = np.bincount(codes, weights=present.astype(np.float64))
    mass = np.bincount(codes, weights=inside)
    model = np.where(present, mass[codes] / np.maximum(members[codes], 1.0), 0.0)
    truth, model = truth / truth.sum(), np.maximum(model / max(model.sum(), 1e-300), 1e-12)
    positive = truth > 0
    return float((truth[positive] * np.log(truth[positive] / model[positive])).sum())


@dataclass(frozen=True)
class Ranges:
    """The ranges of one graph, as they were chosen.

    Attributes:
        model_sha256: of the FP32 ONNX file they belong to.
        set_sha256: identity of the calibration set.
        method: how clipping was decided.
        strength: of the channel equalization that the ranges hold for; 0 for none.
        factors: per tensor the factor per channel that equalization applied.
        ranges: tensor -> (low, high) in the equalized graph.
        channels: tensor -> {"low", "high", "mean"} per channel in the graph as it was given.
    """

    model_sha256: str
    set_sha256: str
    method: Method
    strength: float
    ranges: Mapping[str, tuple[float, float]]
    channels: Mapping[str, Mapping[str, list[float]]]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `ranges.json`."""
        return {
            "schema": SCHEMA,
            "model_sha256": self.model_sha256,
            "set_sha256": self.set_sha256,
            "method": self.method,
            "strength": self.strength,
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "channels": {name: dict(values) for name, values in self.channels.items()},
        }


def read_ranges(path: Path, *, model_sha256: str) -> Ranges:
    """Read `ranges.json` for a model.

    Raises:
        InputError: it is not one of ours, or belongs to another model.
        UsageError: it does not exist.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist", expected="a ranges.json that srdeploy quantize wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise InputError(f"{path} has schema {data['schema']}", expected=f"schema {SCHEMA}")
        ranges = Ranges(
            model_sha256=str(data["model_sha256"]),
            set_sha256=str(data["set_sha256"]),
            method=data["method"],
            strength=float(data["strength"]),
            ranges={name: (float(low), float(high)) for name, (low, high) in data["ranges"].items()},
            channels=data["channels"],
        )
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{path} is not a ranges.json of srdeploy ({error})") from error
    if ranges.model_sha256 != model_sha256:
        raise InputError(
            f"{path} holds the ranges of a model with SHA-256 {ranges.model_sha256[:16]}…",
            expected=f"those of {model_sha256[:16]}…",
            next_step="leave --ranges out to calibrate this model",
        )
    return ranges
