"""What a user may decide about quantization; everything else is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from srdeploy.calibration.placement import Recipe
from srdeploy.calibration.ranges import Method
from srdeploy.core.errors import UsageError

Deconvolution = Literal["auto", "int8", "float", "rewrite"]


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of INT8 and FP8; None and "auto" mean: measure and take the best.

    Attributes:
        method: range method, one of `ranges.METHODS`.
        strength: of channel equalization, 0 (off) to 1.
        keep: names of layers to leave float.
        deconvolution: "int8" (scales per output channel), "float" or "rewrite" (an exact 2x2 convolution and pixel
            shuffle); "auto" takes the target's.
        max_psnr_drop: the bound in dB on the loss of Y PSNR; None for no bound.
        time_budget_s: the search stops trying after so many seconds and takes the best found.
        ranges: a `ranges.json` of this model to use instead of collecting ranges.
        seed: for the choice of measurements.
    """

    method: Method | None = None
    strength: float | None = None
    keep: tuple[str, ...] = ()
    deconvolution: Deconvolution = "auto"
    max_psnr_drop: float | None = None
    time_budget_s: float = 600.0
    ranges: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_psnr_drop is not None and not self.max_psnr_drop > 0:
            raise UsageError(f"--max-psnr-drop {self.max_psnr_drop}", expected="a positive number of decibels")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"--equalize {self.strength}", expected="a number from 0 to 1")
        if not self.time_budget_s > 0:
            raise UsageError(f"--time-budget {self.time_budget_s}", expected="a positive number of seconds")

    def recipe_for(self, recipe: Recipe) -> Recipe:
        """Return the target's recipe with what the user decided about deconvolutions."""
        return recipe if self.deconvolution == "auto" else replace(recipe, deconvolution=self.deconvolution)

    def kept(self) -> Mapping[str, str]:
        """Return the layers the user wants float, with the reason."""
        return dict.fromkeys(self.keep, "asked for with --keep")
