"""What a user decides about compression, and what is known about its result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srdeploy.calibration.compress.layers import Change
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.evaluate import GraphQuality
from srdeploy.core.errors import UsageError
from srdeploy.core.precision import Target


@dataclass(frozen=True)
class CompressOptions:
    """What a user decides about compression.

    Attributes:
        bound: what the graph may lose on images kept aside; it has a `max_psnr_drop`.
        target: the engine family that ranks are rounded for.
        time_budget_s: the search stops trying after so many seconds and takes the best found.
    """

    bound: Bound
    target: Target = Target.OPENVINO
    time_budget_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.time_budget_s > 0:
            raise UsageError(f"--time-budget {self.time_budget_s}", expected="a positive number of seconds")


@dataclass(frozen=True)
class Point:
    """One measured graph.

    Attributes:
        changes: what was changed.
        macs: multiply-adds per LR pixel.
        cost: of multiply-adds and activations, see `costs`.
        quality: on the images kept aside.
        staged: whether its layers were fitted in stages, each to what the changed ones before it produce.
    """

    changes: tuple[Change, ...]
    macs: float
    cost: float
    quality: GraphQuality
    staged: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        return {"layers": len(self.changes), "macs_per_pixel": round(self.macs, 1), **self.quality.to_json()}


@dataclass(frozen=True)
class CompressResult:
    """What was written and what is known about it.

    Attributes:
        output: the ONNX file.
        bound: what it was allowed to lose.
        changes: the changed layers.
        macs_before, macs_after: multiply-adds per LR pixel.
        quality: of the written graph, on images kept aside.
        points: all graphs that were measured.
        latency_ms: of the graph and of the original on the target's engine, the first held-out image, interleaved; None
            where it does not run here.
        errors: predicted share of each change in the output's error power.
        notes: what a user should know.
    """

    output: Path
    bound: str
    changes: tuple[Change, ...]
    macs_before: float
    macs_after: float
    quality: GraphQuality
    points: tuple[Point, ...]
    latency_ms: tuple[float, float] | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "output": str(self.output),
            "bound": self.bound,
            "macs_per_pixel": {"before": round(self.macs_before, 1), "after": round(self.macs_after, 1)},
            "fewer_macs": round(self.macs_before / self.macs_after, 3),
            "quality": self.quality.to_json(),
            "layers": [
                {
                    "layer": change.layer,
                    "kind": change.form,
                    "rank": change.rank,
                    "reader": change.reader,
                    "error_share": round(self.errors.get(change.key, 0.0), 4),
                }
                for change in self.changes
            ],
            "pareto": [point.to_json() for point in self.points],
            "latency_ms": dict(zip(("compressed", "original"), self.latency_ms, strict=True))
            if self.latency_ms
            else None,
            "notes": list(self.notes),
        }
