"""How a picture was run: tiles or whole, what was repaired, what could not be kept."""

from dataclasses import dataclass, field
from typing import Any

from srdeploy.upscale.budget import Decision
from srdeploy.upscale.guards import Tally


@dataclass
class ImageReport:
    """How one picture was run.

    Attributes:
        size: (H, W) of the input.
        output_size: (H', W').
        decision: tiles or whole, and why.
        tally: number of tiles run, and of tiles repaired on the fallback.
        seam_score: see `srdeploy.upscale.tiles.seam_score`; None without seams or if the output was not kept.
        fidelity_db: see `srdeploy.upscale.tiles.SeamProbe`; None if tiles equal the whole image or
            extend beyond it, and for engines that only take full batches.
        notes: one line for each part of the input that could not be kept.
    """

    size: tuple[int, int]
    output_size: tuple[int, int]
    decision: Decision
    tally: Tally = field(default_factory=Tally)
    seam_score: float | None = None
    fidelity_db: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        plan = self.decision.plan
        return {
            "size": list(self.size),
            "output_size": list(self.output_size),
            "mode": self.decision.reason,
            "tiles": plan.tiles,
            "tile": [plan.rows.window, plan.columns.window],
            "overlap": plan.halo,
            "batch": self.decision.batch,
            "work": round(plan.work, 3),
            "equals_whole_image": self.decision.exact,
            "tiles_run_again": dict(self.tally.repaired),
            "seam_score": None if self.seam_score is None else round(self.seam_score, 4),
            "fidelity_db": None if self.fidelity_db is None else round(self.fidelity_db, 2),
            "not_kept": self.notes,
        }
