"""What an engine reports that it runs, compared with what the graph requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srdeploy.calibration.int8.placement import Placement, macs_share_of
from srdeploy.core.errors import BuildError
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.runner import RunnerInfo

TOLERANCE = 0.005
"""Shares of multiply-adds are counted at different probe shapes; they may differ by this."""


@dataclass(frozen=True)
class Readback:
    """What an engine runs in 8 bits.

    Attributes:
        engine: name and version.
        asked: 8-bit convolutions in the graph.
        ran: convolutions that the engine computes in 8 bits.
        total: all its convolutions.
        macs: share of the multiply-adds that are computed in 8 bits, 0..1.
    """

    engine: str
    asked: int
    ran: int
    total: int
    macs: float

    def line(self) -> str:
        """Return "61 of 67 convolutions, 97.0 % of multiply-adds in INT8"."""
        return f"{self.ran} of {self.total} convolutions, {100 * self.macs:.1f} % of multiply-adds in INT8"

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "engine": self.engine,
            "asked": self.asked,
            "ran_int8": self.ran,
            "convolutions": self.total,
            "int8_macs_share": round(self.macs, 4),
            "line": self.line(),
        }


def read_back(info: RunnerInfo, graph: Graph, placement: Placement) -> Readback | None:
    """Compare what an engine built with the placement it was given; None if the engine does not report it.

    Raises:
        BuildError: fewer convolutions became 8-bit than the graph asks for.
    """
    convolutions: Mapping[str, int] = info.built.get("convolutions") or {}
    if not convolutions:
        return None
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    shares: Mapping[str, float] = info.built.get("macs_share") or {}
    ran, total = int(convolutions.get("int8", 0)), int(sum(convolutions.values()))
    asked, wanted = len(placement.layers), macs_share_of(graph, placement.layers)
    # Where an engine cannot count multiply-adds (shapes that depend on data), its layers were counted all the same.
    counted = shares.get("int8", 0.0) > 0
    macs = float(shares["int8"]) if counted else wanted * min(1.0, ran / max(asked, 1))
    result = Readback(versions or info.engine, asked, ran, total, macs)
    if ran < asked or result.macs < wanted - TOLERANCE:
        raise BuildError(
            f"{info.engine} computes {result.line()}",
            expected=f"{asked} convolutions and {100 * wanted:.1f} % as the graph says",
            next_step="leave the others float (srdeploy quantize --keep), or quantize for another --target",
        )
    return result
