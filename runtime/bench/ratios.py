"""Speed-ups with their confidence: what ran in the same round is compared, round by round.

A machine that is slow for a second is slow for every candidate of that round, so the ratio of two durations of one
round varies much less than either duration. The speed-up is the median of these ratios. Its 95 % confidence interval
comes from the medians of consecutive blocks of rounds (batch means): blocks absorb what lasts longer than a round, such
as a busy neighbor, a clock that falls, or the place where an engine's buffers happen to be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 10
"""Number of blocks that rounds are divided into, fewer when there are fewer visits."""

# Quantiles of Student's t for 95 % (two-sided) by degrees of freedom, from 1.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one runner is than another, with its 95 % confidence interval.

    Attributes:
        value: median over the rounds; above 1 is faster.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The larger distance from the value to an end of the interval, as a share of the value."""
        return max(self.high - self.value, self.value - self.low) / self.value

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1: the two runners are not equally fast."""
        return self.low > 1.0 or self.high < 1.0

    @property
    def label(self) -> str:
        """The ratio for people, such as "5.1x, 4.9 to 5.3"."""
        return ratio_label(self.value, self.low, self.high)


def ratio_of_rounds(base_ms: Sequence[float], times_ms: Sequence[float], *, visit: int = 1) -> Ratio:
    """Return how many times faster `times_ms` is than `base_ms`.

    Args:
        base_ms, times_ms: milliseconds by round, at least two; entry i of both was measured in the same round.
        visit: rounds between two openings of an engine; a block holds whole visits.

    Raises:
        ValueError: the sequences differ in length, or hold fewer than two rounds.
    """
    logs = np.log(np.asarray(base_ms, np.float64)) - np.log(np.asarray(times_ms, np.float64))
    rounds = len(logs)
    if len(base_ms) != len(times_ms) or rounds < 2:
        raise ValueError(f"{len(base_ms)} and {len(times_ms)} rounds")
    starts = np.arange(0, rounds, max(1, min(visit, rounds // 2)))
    blocks = np.array_split(starts, min(BLOCKS, len(starts)))
    medians = [float(np.median(part)) for part in np.split(logs, [int(block[0]) for block in blocks[1:]])]
    reach = _T95[len(medians) - 2] * float(np.std(medians, ddof=1)) / math.sqrt(len(medians))
    middle = float(np.median(logs))
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def ratio_label(value: float, low: float | None, high: float | None) -> str:
    """Write a ratio with as many digits as its interval supports; without an interval, with two."""
    if low is None or high is None:
        return f"{value:.2f}x"
    width = high - low
    digits = 2 if width < 0.1 else 1 if width < 10 else 0
    return f"{value:.{digits}f}x, {low:.{digits}f} to {high:.{digits}f}"


def median_label(median_ms: float, ci_share: float, *, stable: bool) -> str:
    """Write a median in milliseconds; one that is not known well enough carries its uncertainty: "24 ms ±12 %"."""
    rounded = float(f"{median_ms:.3g}" if stable else f"{median_ms:.2g}")
    text = f"{rounded:g} ms"  # the second time without an exponent: 120, not 1.2e+02
    return text if stable else f"{text} ±{100 * ci_share:.0f} %"


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence: "A", "A and B", "A, B and C"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
