"""The bound in decibels that a search keeps, and the time that it may take."""

import math
import time
from dataclasses import dataclass

from srdeploy.calibration.search.evaluate import GraphQuality
from srdeploy.core.errors import UsageError


@dataclass(frozen=True)
class Bound:
    """What a graph may lose on images kept aside.

    Attributes:
        max_psnr_drop: the largest mean loss of Y PSNR in dB; None for no bound.
        max_worst_drop: the largest loss of any single image in dB; None for no bound.
        min_fidelity: the smallest PSNR in dB between output and FP32 output; None for no bound.
        other_kinds: the mean loss to expect on images of another kind stays within `max_psnr_drop` too.
    """

    max_psnr_drop: float | None = None
    max_worst_drop: float | None = None
    min_fidelity: float | None = None
    other_kinds: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--max-psnr-drop", self.max_psnr_drop), ("--max-worst-drop", self.max_worst_drop)):
            if value is not None and not value > 0:
                raise UsageError(f"{option} {value}", expected="a positive number of decibels")

    def is_satisfied_by(self, quality: GraphQuality) -> bool:
        """Return True if a graph keeps the bound."""
        drop, worst, fidelity = self.max_psnr_drop, self.max_worst_drop, self.min_fidelity
        return (
            (drop is None or self._drop(quality) <= drop)
            and (worst is None or quality.largest_drop_db <= worst)
            and (fidelity is None or quality.fidelity_db >= fidelity)
        )

    def may_be_satisfied_by(self, quality: GraphQuality, left: float) -> bool:
        """Return True if the bound may be kept once only a share `left` of a graph's error power is left.

        The drop is nearly proportional to the power while it is small, the fidelity is its logarithm. Both are allowed
        a tenth of optimism: a measurement costs less than a layer changed in vain.
        """
        fidelity = quality.fidelity_db - 10 * math.log10(max(left, 1e-9))
        drops = ((self._drop(quality), self.max_psnr_drop), (quality.largest_drop_db, self.max_worst_drop))
        drops_may = all(bound is None or drop * left <= 1.1 * bound for drop, bound in drops)
        return drops_may and (self.min_fidelity is None or fidelity >= self.min_fidelity - 0.4)

    def used_by(self, quality: GraphQuality) -> float:
        """Return how much of the drops that are allowed a graph uses, 1 for all; the larger of mean and worst."""
        pairs = ((self._drop(quality), self.max_psnr_drop), (quality.largest_drop_db, self.max_worst_drop))
        return max((drop / bound for drop, bound in pairs if bound is not None), default=0.0)

    def __str__(self) -> str:
        """Describe the bound in one line."""
        kinds = " (on images of another kind too, by expectation)" if self.other_kinds else ""
        parts = [f"at most {self.max_psnr_drop:g} dB lost{kinds}"] if self.max_psnr_drop is not None else []
        parts += [f"at most {self.max_worst_drop:g} dB lost by any image"] if self.max_worst_drop is not None else []
        parts += [f"a fidelity of at least {self.min_fidelity:g} dB"] if self.min_fidelity is not None else []
        return " and ".join(parts)

    def _drop(self, quality: GraphQuality) -> float:
        """Return the loss that `max_psnr_drop` bounds."""
        return max(quality.drop_db, quality.other_kinds_drop_db) if self.other_kinds else quality.drop_db


class Deadline:
    """When a search, or a part of it, stops trying.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() > self._end

    def part(self, share: float) -> "Deadline":
        """Return the deadline of a part that may take a share of the time that is left, 0..1."""
        return Deadline(share * max(self._end - time.monotonic(), 0.0))
