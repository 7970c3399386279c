"""Numbers of a report as text for people."""

import math
from collections.abc import Mapping
from typing import Any

from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.bench.ratios import median_label as bench_median_label
from srdeploy.runtime.bench.ratios import ratio_label as bench_ratio_label


def size_label(count: float | None) -> str:
    """Write bytes as "1.18 MiB"; a dash where the size is not known."""
    return "–" if count is None else format_bytes(count)


def count_label(count: float) -> str:
    """Write a count as "1.23 M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g}"


def db_label(value: float | str | None, digits: int = 1) -> str:
    """Write decibels; equal outputs have no finite value."""
    if value is None:
        return "–"
    number = float(value)
    if math.isnan(number):
        return "none"
    return "∞ (equal)" if math.isinf(number) else f"{number:.{digits}f} dB"


def change_label(drop: float | str | None) -> str:
    """Write a drop in dB as the signed change that it is."""
    if drop is None or math.isnan(float(drop)):
        return "–"
    change = -float(drop)
    return f"{0.0 if abs(change) < 5e-4 else change:+.3f} dB".replace("-", "−")


def ms_label(value: float) -> str:
    """Write milliseconds with three digits."""
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def median_label(latency: Mapping[str, Any] | None) -> str:
    """Write a median; one that is not stable carries its uncertainty."""
    if not latency:
        return "–"
    if latency["stable"]:
        return ms_label(latency["median_ms"])
    if "ci_share" not in latency:  # written before intervals were kept
        return "unstable"
    return bench_median_label(latency["median_ms"], latency["ci_share"], stable=False)


def ratio_label(latency: Mapping[str, Any] | None) -> str:
    """Write how many times faster, with the interval: "5.1×, 4.9 to 5.3"."""
    if not latency or latency["ratio"] is None:
        return "–"
    return bench_ratio_label(latency["ratio"], latency.get("ratio_low"), latency.get("ratio_high")).replace("x", "×")


def rates_label(rates: Mapping[str, Any]) -> str:
    """Write the measured rates that floors refer to."""
    types = [f"{precision.upper()} {rate / 1e9:.0f}" for precision, rate in rates["macs_per_second"].items()]
    return (
        f"× floor: latency over the time that its multiply-adds or its memory traffic alone would take at the rates "
        f"measured in this run, the larger of the two: {', '.join(types)} G multiply-adds/s, copies "
        f"{rates['bytes_per_second'] / 1e9:.0f} GB/s."
    )


def percent_label(value: float | str) -> str:
    """Write a share."""
    share = 100.0 * float(value)
    return f"{share:.2g} %" if 0 < share < 10 else f"{share:.0f} %"


def difference_label(value: float | str) -> str:
    """Write an absolute difference on 0..1 in grey levels of 8 bits."""
    number = float(value)
    if not math.isfinite(number):
        return "not finite"
    levels = number * 255.0
    if levels == 1.0:
        return "1 level"
    return f"{levels:.3g} levels" if levels >= 0.01 or levels == 0 else f"{number:.1e} of 1"


def gates_label(verdict: Mapping[str, Any]) -> str:
    """Write what an engine had to reach."""
    gates = verdict["gates"]
    parts = [
        f"fidelity {gates['min_fidelity_db']:g} dB on images",
        f"{gates['grid_fidelity_db']:g} dB on the shape grid",
    ]
    if gates["max_psnr_drop_db"] is not None:
        parts.append(f"PSNR drop at most {gates['max_psnr_drop_db']:g} dB")
    return ", ".join(parts)
