"""How far an engine's output is from the reference's, in numbers that say what a viewer would see of it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.imaging.psnr import psnr_db


@dataclass(frozen=True)
class Difference:
    """An output against the reference output, both (N, C, H, W) floats on the 0..1 scale, compared before clamping.

    Attributes:
        max_abs: largest absolute difference; nan when a value is not finite.
        mean_abs: mean absolute difference.
        fidelity_db: PSNR between the two with peak 1; inf when equal, nan when a value is not finite.
        changed_share: share of pixels that differ in at least one channel after clamping and rounding to 8 bits.
        changed_levels_max: largest difference of an 8-bit sample in grey levels.
        changed_levels_mean: mean difference in levels of the samples that differ; 0 when none does.
        samples: number of output values compared.
        problem: what makes the output unusable whatever the numbers say (shape, NaN, infinity, constant), or None.
    """

    max_abs: float
    mean_abs: float
    fidelity_db: float
    changed_share: float
    changed_levels_max: int
    changed_levels_mean: float
    samples: int
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values (inf and nan are left as floats)."""
        return asdict(self)


def difference(candidate: NDArray[np.float32], reference: NDArray[np.float32]) -> Difference:
    """Compare two outputs (N, C, H, W); never raises for what an engine can produce."""
    problem = _problem(candidate, reference)
    if candidate.shape != reference.shape or not (np.isfinite(candidate).all() and np.isfinite(reference).all()):
        return Difference(math.nan, math.nan, math.nan, 1.0, 255, 255.0, candidate.size, problem)
    gap = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    levels = np.abs(eight_bit(candidate).astype(np.int16) - eight_bit(reference).astype(np.int16))
    changed = levels[levels > 0]
    return Difference(
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean()),
        fidelity_db=psnr_db(candidate, reference),
        changed_share=float(np.mean(np.any(levels > 0, axis=1))),
        changed_levels_max=int(levels.max()),
        changed_levels_mean=float(changed.mean()) if changed.size else 0.0,
        samples=candidate.size,
        problem=problem,
    )


def snr_db(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    """Return the signal-to-noise ratio in dB: inf when equal, -inf when shapes differ or a value is not finite."""
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return -math.inf
    noise = float(np.mean(np.square(expected.astype(np.float64) - actual)))
    signal = float(np.mean(np.square(expected.astype(np.float64))))
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def eight_bit(output: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Clamp to 0..1 and round to uint8, in any layout; the caller has made sure that all values are finite."""
    scaled: NDArray[np.uint8] = np.rint(np.clip(output, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
    return scaled


def _problem(candidate: NDArray[np.float32], reference: NDArray[np.float32]) -> str | None:
    if candidate.shape != reference.shape:
        return f"output shape {candidate.shape} instead of {reference.shape}"
    if not np.isfinite(reference).all():
        return f"the reference itself has {_bad_values(reference)}"
    if not np.isfinite(candidate).all():
        return _bad_values(candidate)
    # Rounding noise of a constant image differs between engines: only a picture that had contrast can lose it.
    if candidate.size > 1 and np.ptp(candidate) == 0.0 and np.ptp(reference) > 1e-3:
        return f"constant output ({float(candidate.flat[0]):g} everywhere)"
    return None


def _bad_values(output: NDArray[np.float32]) -> str:
    bad = np.argwhere(~np.isfinite(output))
    (_, _, top, left), (_, _, bottom, right) = bad.min(axis=0), bad.max(axis=0)
    count_nan = int(np.isnan(output).sum())
    return (
        f"{count_nan} NaN and {len(bad) - count_nan} infinite values of {output.size}, "
        f"in rows {top}..{bottom} and columns {left}..{right}"
    )
