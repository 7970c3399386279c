"""Check every output tile for NaN, infinity, and one color where the input is not flat.

Half-precision engines that overflow produce exactly these, on some images only, and a black frame reported as success
is the worst failure of a deployment. A bad tile is run again on a fallback (the FP32 graph); without one the run stops.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import GateError, InputError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.upscale.tiles import Planes

MIN_INPUT_RANGE = 16 / 255
"""Minimum range of values for an input tile to count as not flat."""
MAX_COLLAPSED_RANGE = 1e-6
"""Maximum range of values, clamped to 0..1, for an output tile to count as one color."""
_VERIFY = (
    "nothing was written; check the checkpoint with: srdeploy verify MODEL.onnx --against CHECKPOINT --images IMAGES"
)
"""No other precision helps if FP32 fails."""

Run = Callable[[Planes], Planes]


@dataclass
class Tally:
    """Counts of tiles.

    Attributes:
        tiles: tiles that were run.
        repaired: number of tiles that were run again on the fallback, by fault.
    """

    tiles: int = 0
    repaired: dict[str, int] = field(default_factory=dict)

    @property
    def fallbacks(self) -> int:
        """Number of tiles that were run again."""
        return sum(self.repaired.values())


@dataclass
class Guard:
    """Runs batches of tiles and replaces bad outputs.

    Attributes:
        run: the engine: (N, C, h, w) to (N, C, h', w').
        info: the engine's name and precision, for messages.
        fallback: returns the `run` of the FP32 runner when first needed; None if there is none.
        tally: counts.
    """

    run: Run
    info: RunnerInfo
    fallback: Callable[[], Run] | None
    tally: Tally

    def __call__(self, tiles: Planes) -> Planes:
        """Run a batch.

        Raises:
            GateError: a tile is bad, and there is no fallback or its output is bad as well.
        """
        outputs = self.run(tiles)
        self.tally.tiles += len(tiles)
        faults = [fault_of(tile, output) for tile, output in zip(tiles, outputs, strict=True)]
        if not any(faults):
            return outputs
        outputs = outputs.copy()
        for index, fault in enumerate(faults):
            if fault is not None:
                outputs[index] = self._again(tiles[index : index + 1], fault)[0]
        return outputs

    def _again(self, tile: Planes, fault: str) -> Planes:
        if self.fallback is None:
            raise GateError(
                f"{self.info.name} returned {fault} for a tile",
                expected="a picture",
                next_step=_VERIFY
                if self.info.contract.precision is Precision.FP32
                else "nothing was written; use a bundle or --fallback model.fp32.onnx, or an FP32 engine",
            )
        output = self.fallback()(tile)
        if remaining := fault_of(tile[0], output[0]):
            raise GateError(
                f"{self.info.name} returned {fault} for a tile, and the FP32 fallback {remaining}",
                expected="a picture",
                next_step=_VERIFY,
            )
        self.tally.repaired[fault] = self.tally.repaired.get(fault, 0) + 1
        return output


def fault_of(tile: NDArray[np.float32], output: NDArray[np.float32]) -> str | None:
    """Return a description of the fault of an output tile; None if there is none.

    Args:
        tile: (C, h, w) in 0..1.
        output: (C, h', w'), not clamped.
    """
    low, high = float(output.min()), float(output.max())  # NaN and infinity both survive in the extremes
    if np.isnan(low) or np.isnan(high):
        return "NaN"
    if np.isinf(low) or np.isinf(high):
        return "infinite values"
    if min(max(high, 0.0), 1.0) - min(max(low, 0.0), 1.0) > MAX_COLLAPSED_RANGE:
        return None
    if float(tile.max()) - float(tile.min()) < MIN_INPUT_RANGE:
        return None
    return "a single colour"


def check_rows(rows: Planes, output: Planes, info: RunnerInfo) -> None:
    """Check finished rows of a picture run in lock-step, which cannot run single tiles again.

    Raises:
        GateError: they hold NaN, infinity, or one color where the input is not flat.
    """
    for group, made in zip(rows, output, strict=True):
        if fault := fault_of(group, made):
            raise GateError(
                f"{info.name} returned {fault}",
                expected="a picture",
                next_step=_VERIFY
                if info.contract.precision is Precision.FP32
                else "nothing was written; use --tiles overlapped with --fallback, or the FP32 model",
            )


def check_input(pixels: NDArray[np.generic], name: str = "the image") -> None:
    """Refuse floating-point images with NaN or infinite pixels.

    Raises:
        InputError: there is one.
    """
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise InputError(f"{name} holds NaN or infinite pixels", expected="numbers in 0..1")
