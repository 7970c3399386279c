"""What a user may decide about quantization; everything else is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from srdeploy.calibration.int8.placement import Recipe
from srdeploy.calibration.int8.ranges import Method
from srdeploy.calibration.search.bound import Bound
from srdeploy.core.environment import int8_sums_saturate
from srdeploy.core.errors import UsageError

Deconvolution = Literal["auto", "int8", "float", "rewrite"]
WeightBits = Literal["auto", "7", "8"]
Cost = Literal["latency", "macs"]


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of INT8 and FP8; None and "auto" mean: measure and take the best.

    Attributes:
        method: range method, one of `ranges.METHODS`.
        strength: of channel equalization, 0 (off) to 1.
        keep: names of layers to leave float.
        deconvolution: "int8" (scales per output channel), "float" or "rewrite" (an exact 2x2 convolution and pixel
            shuffle); "auto" takes the target's.
        weight_bits: "7" keeps weights within +-64, which overflow no processor's 8-bit sums; "8" uses the whole type,
            which x86 processors without VNNI compute wrongly; "auto" takes what this processor needs, 8 for GPUs.
        max_psnr_drop: the bound in dB on the loss of Y PSNR; None for no bound.
        max_worst_drop: the bound in dB on the loss of any single held-out image; None for no bound.
        min_fidelity: the bound in dB on the PSNR between output and FP32 output; None for no bound. Use it where the
            images at hand are softer than those that count: the sharper the image, the more an error costs.
        cost: what the search pays for exact layers: "latency" on the engine where it runs, or "macs", which results in
            the same graph every time; latencies vary from run to run, and with them the choice may.
        time_budget_s: the search stops trying after so many seconds and takes the best found.
        ranges: a `ranges.json` of this model to use instead of collecting ranges.
        seed: for the choice of measurements.
    """

    method: Method | None = None
    strength: float | None = None
    keep: tuple[str, ...] = ()
    deconvolution: Deconvolution = "auto"
    weight_bits: WeightBits = "auto"
    max_psnr_drop: float | None = None
    max_worst_drop: float | None = None
    min_fidelity: float | None = None
    cost: Cost = "latency"
    time_budget_s: float = 300.0
    ranges: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.bound  # checks its numbers
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"--equalize {self.strength}", expected="a number from 0 to 1")
        if not self.time_budget_s > 0:
            raise UsageError(f"--time-budget {self.time_budget_s}", expected="a positive number of seconds")

    def apply_to_recipe(self, recipe: Recipe) -> Recipe:
        """Return the target's recipe with what the user and this processor decide about it."""
        if self.deconvolution != "auto":
            recipe = replace(recipe, deconvolution=self.deconvolution)
        elif recipe.deconvolution == "int8" and int8_sums_saturate():
            # OpenVINO 2026.4 has INT8 deconvolutions for processors with VNNI only.
            recipe = replace(recipe, deconvolution="rewrite")
        if self.weight_bits != "auto":
            return replace(recipe, weight_bits=int(self.weight_bits))
        # Signed activations are GPUs' business, and GPUs add in 32 bits.
        return replace(recipe, weight_bits=7 if recipe.kind == "uint8" and int8_sums_saturate() else 8)

    def kept(self) -> Mapping[str, str]:
        """Return the layers the user wants float, with the reason."""
        return dict.fromkeys(self.keep, "asked for with --keep")

    @property
    def bound(self) -> Bound:
        """What the graph may lose."""
        return Bound(self.max_psnr_drop, self.max_worst_drop, self.min_fidelity)
