"""Verification: an engine and the eager FP32 network on the same images, judged in decibels.

Two kinds of cases are run. *Images* are what the engine is for: real pictures, whole or cropped to its profile, with
the quality against ground truth of both sides where there is one. The *grid* are small crops of these pictures in odd
and tiny shapes and several batches: it finds constants baked into a graph, wrong padding and mixed-up batches, which
whole pictures of one size never show.

What decides: NaN, infinity, a constant picture or a wrong shape always fail. Otherwise each case must reach the gate of
its precision in fidelity (see `Gates`), and with ground truth the mean PSNR may fall by at most the allowed drop.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import UsageError
from srdeploy.core.precision import MIN_FIDELITY_DB, Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner, RunnerInfo, run_image
from srdeploy.core.samples import Sample
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape
from srdeploy.runtime.verify.difference import Difference, difference, eight_bit
from srdeploy.runtime.verify.quality import Quality, mean_quality, quality
from srdeploy.runtime.verify.views import View, make_view, worst_view

GRID = ((1, 1, 1), (1, 1, 7), (2, 17, 22), (3, 33, 12), (1, 64, 48))
"""Batch, height and width of the grid: tiny, odd, wide and tall, several batches."""

_QUANTIZED = (Precision.INT8, Precision.FP8)


@dataclass(frozen=True)
class Gates:
    """What an engine has to reach.

    Attributes:
        min_fidelity_db: least PSNR between engine and reference, for every image.
        grid_fidelity_db: the same for the shape grid.
        max_psnr_drop_db: largest loss of mean Y PSNR against ground truth; None to not judge by it.
    """

    min_fidelity_db: float
    grid_fidelity_db: float
    max_psnr_drop_db: float | None = None

    @classmethod
    def of(
        cls, precision: Precision, *, min_fidelity_db: float | None = None, max_psnr_drop_db: float | None = None
    ) -> "Gates":
        """Return the gates of a precision; a stated number replaces the default.

        The error of quantized layers depends on the content, so a small crop of texture may lie 10 dB below its
        picture: the grid's gate is lowered by that for INT8 and FP8. A wrong shape shows at 25 dB and less.
        """
        images = MIN_FIDELITY_DB[precision] if min_fidelity_db is None else min_fidelity_db
        return cls(images, images - 10.0 if precision in _QUANTIZED else images, max_psnr_drop_db)


@dataclass(frozen=True)
class Case:
    """One image or grid shape, judged.

    Attributes:
        name: the image's name, or the shape of a grid case.
        shape: of the input, (N, C, H, W).
        difference: engine against reference.
        floor_db: fidelity this case had to reach.
        reference_quality: reference against ground truth; None without.
        candidate_quality: engine against ground truth; None without, or when its output is not finite.
    """

    name: str
    shape: Shape
    difference: Difference
    floor_db: float
    reference_quality: Quality | None = None
    candidate_quality: Quality | None = None

    @property
    def passed(self) -> bool:
        """Usable, and at or above the floor."""
        return self.difference.problem is None and self.difference.fidelity_db >= self.floor_db

    def to_json(self) -> dict[str, Any]:
        """Return the case as JSON values (inf and nan are left as floats)."""
        return {
            "name": self.name,
            "shape": format_shape(self.shape),
            "passed": self.passed,
            "floor_db": self.floor_db,
            **self.difference.to_json(),
            "reference_quality": None if self.reference_quality is None else self.reference_quality.to_json(),
            "candidate_quality": None if self.candidate_quality is None else self.candidate_quality.to_json(),
        }


@dataclass(frozen=True, eq=False)
class VerifyResult:
    """The verdict on one engine.

    Attributes:
        candidate: what was judged.
        reference: what it was compared with.
        gates: what it had to reach.
        images: one case per image.
        grid: one case per shape.
        skipped: images and shapes that were left out, with the reason.
        views: pictures for the report, of the first images; see `srdeploy.runtime.verify.views`.
        worst: the crop where the engine differs most, in the worst image.
    """

    candidate: RunnerInfo
    reference: RunnerInfo
    gates: Gates
    images: tuple[Case, ...]
    grid: tuple[Case, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    views: tuple[View, ...] = ()
    worst: View | None = None

    @property
    def min_fidelity_db(self) -> float:
        """The least fidelity of an image; nan when an output is not finite."""
        return _least([case.difference.fidelity_db for case in self.images])

    @property
    def mean_fidelity_db(self) -> float:
        """The mean of the images' fidelities."""
        return math.fsum(case.difference.fidelity_db for case in self.images) / len(self.images)

    @property
    def reference_quality(self) -> Quality | None:
        """Mean of the reference over the images that have ground truth."""
        return mean_quality([case.reference_quality for case in self.images if case.reference_quality is not None])

    @property
    def candidate_quality(self) -> Quality | None:
        """Mean of the engine over the images that have ground truth."""
        return mean_quality([case.candidate_quality for case in self.images if case.candidate_quality is not None])

    @property
    def psnr_drop_db(self) -> float | None:
        """Loss of mean Y PSNR in dB (negative: the engine is better); None without ground truth."""
        if self.reference_quality is None:
            return None
        if self.candidate_quality is None or any(case.difference.problem for case in self.images):
            return math.nan
        return self.reference_quality.psnr_y_db - self.candidate_quality.psnr_y_db

    @property
    def ssim_drop(self) -> float | None:
        """Loss of mean SSIM; None without ground truth or for images smaller than the SSIM window."""
        before, after = self.reference_quality, self.candidate_quality
        if before is None or after is None or before.ssim_y is None or after.ssim_y is None:
            return None
        return before.ssim_y - after.ssim_y

    @property
    def worst_case(self) -> Case:
        """The image with a problem, else the one with the least fidelity."""
        return min(self.images, key=_badness)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the engine is refused, one sentence part per reason; empty when it passed."""
        reasons = [_reason(case, "image") for case in sorted(self.images, key=_badness) if not case.passed]
        reasons += [_reason(case, "shape") for case in sorted(self.grid, key=_badness) if not case.passed]
        drop, allowed = self.psnr_drop_db, self.gates.max_psnr_drop_db
        if allowed is not None and drop is not None and not drop <= allowed:
            reasons.append(f"mean Y PSNR falls by {drop:.3f} dB; {allowed:g} dB is allowed")
        return tuple(reasons)

    @property
    def passed(self) -> bool:
        """No failure."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values (inf and nan are left as floats), pictures left out."""
        before, after = self.reference_quality, self.candidate_quality
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "candidate": self.candidate.to_json(),
            "reference": self.reference.to_json(),
            "gates": {
                "min_fidelity_db": self.gates.min_fidelity_db,
                "grid_fidelity_db": self.gates.grid_fidelity_db,
                "max_psnr_drop_db": self.gates.max_psnr_drop_db,
            },
            "min_fidelity_db": self.min_fidelity_db,
            "mean_fidelity_db": self.mean_fidelity_db,
            "reference_quality": None if before is None else before.to_json(),
            "candidate_quality": None if after is None else after.to_json(),
            "psnr_drop_db": self.psnr_drop_db,
            "ssim_drop": self.ssim_drop,
            "worst_image": self.worst_case.name,
            "worst_crop": None if self.worst is None else self.worst.box_json(),
            "images": [case.to_json() for case in self.images],
            "grid": [case.to_json() for case in self.grid],
            "skipped": dict(self.skipped),
        }


def verify(
    candidate: Runner,
    reference: Runner,
    images: Sequence[Sample],
    *,
    gates: Gates | None = None,
    grid: Sequence[tuple[int, int, int]] = GRID,
    keep_views: int = 0,
    progress: Progress = SILENT,
) -> VerifyResult:
    """Judge one engine; see `verify_all`."""
    return verify_all(
        [candidate], reference, images, gates=[gates], grid=grid, keep_views=keep_views, progress=progress
    )[0]


def verify_all(
    candidates: Sequence[Runner],
    reference: Runner,
    images: Sequence[Sample],
    *,
    gates: Sequence[Gates | None] | None = None,
    grid: Sequence[tuple[int, int, int]] = GRID,
    keep_views: int = 0,
    progress: Progress = SILENT,
) -> list[VerifyResult]:
    """Judge several engines against one run of the reference.

    Args:
        candidates: opened engines, in their parity modes.
        reference: the eager FP32 network.
        images: what to judge by; iterated once, one image in memory at a time.
        gates: one per candidate; None takes the defaults of its precision.
        grid: (batch, height, width) of the shape grid; an engine is spared the shapes outside its profile, and two
            shapes at the lower end of its profile are added.
        keep_views: of how many images, from the first, pictures are kept for the report.
        progress: told about every image.

    Returns:
        One verdict per candidate. Failures are verdicts, not exceptions.

    Raises:
        UsageError: no image lies within an engine's profile.
        MissingExtraError: there is ground truth, and scikit-image is not installed.
    """
    stated = gates or [None] * len(candidates)
    judges = [_Judge(runner, reference.info, gate) for runner, gate in zip(candidates, stated, strict=True)]
    pictures: list[NDArray[np.float32]] = []
    with progress.task("verifying", total=len(images) + len(grid)) as advance:
        for index, sample in enumerate(images):
            expected = run_image(reference, sample.image)
            for judge in judges:
                judge.see_image(sample, expected, keep=index < keep_views)
            if len(pictures) < 3:
                pictures.append(sample.image)
            advance(note=sample.name)
        shapes = dict.fromkeys(grid)
        for runner in candidates:
            shapes |= dict.fromkeys(profile_grid(runner.info.profile))
        for batch in grid_batches(pictures, list(shapes)):
            expected = run_image(reference, batch)
            for judge in judges:
                judge.see_shape(batch, expected)
            advance(note=format_shape(batch.shape))
    return [judge.verdict() for judge in judges]


def grid_batches(
    pictures: Sequence[NDArray[np.float32]], grid: Sequence[tuple[int, int, int]]
) -> Iterator[NDArray[np.float32]]:
    """Cut batches of the grid's shapes out of real pictures, each item from another place.

    Args:
        pictures: (1, C, H, W) float32 each; a picture smaller than a shape is continued by reflection.
        grid: (batch, height, width).
    """
    generator = np.random.default_rng(0)  # the same places in every run
    for batch, height, width in grid:
        items = []
        for index in range(batch):
            picture = pictures[index % len(pictures)][0]  # (C, H, W)
            missing = [(0, 0), (0, max(0, height - picture.shape[1])), (0, max(0, width - picture.shape[2]))]
            picture = np.pad(picture, missing, mode="symmetric")
            top = int(generator.integers(0, picture.shape[1] - height + 1))
            left = int(generator.integers(0, picture.shape[2] - width + 1))
            items.append(picture[:, top : top + height, left : left + width])
        yield np.ascontiguousarray(np.stack(items))  # (N, C, H, W)


def profile_grid(profile: ShapeProfile | None) -> list[tuple[int, int, int]]:
    """Return the grid shapes that a profile adds: its minimum, and one step above it at the largest batch."""
    if profile is None:
        return []
    steps = [min(low + 1, high) for low, high in zip(profile.min[2:], profile.max[2:], strict=True)]
    return [(profile.min[0], *profile.min[2:]), (profile.max[0], steps[0], steps[1])]


class _Judge:
    """Collects the cases of one engine."""

    def __init__(self, runner: Runner, reference: RunnerInfo, gates: Gates | None) -> None:
        self._runner = runner
        self._reference = reference
        self._gates = gates or Gates.of(runner.info.contract.precision)
        self._images: list[Case] = []
        self._grid: list[Case] = []
        self._skipped: dict[str, str] = {}
        self._views: list[View] = []
        self._worst: tuple[tuple[bool, float], View] | None = None

    def see_image(self, sample: Sample, expected: NDArray[np.float32], *, keep: bool) -> None:
        """Run an image and judge it."""
        contract = self._runner.info.contract
        if reason := _outside(sample.image.shape, contract, self._runner.info.profile):
            self._skipped[sample.name] = reason
            return
        output = run_image(self._runner, sample.image)
        case = _case(sample.name, sample.image, output, expected, self._gates.min_fidelity_db)
        if sample.truth is not None:
            case = _with_quality(case, output, expected, sample.truth, contract.scale)
        self._images.append(case)
        if output.shape != expected.shape:
            return
        if keep:
            self._views.append(make_view(sample, expected, output))
        if self._worst is None or _badness(case) < self._worst[0]:
            self._worst = _badness(case), worst_view(sample, expected, output)

    def see_shape(self, batch: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Run a grid batch and judge it."""
        name = format_shape(batch.shape)
        if reason := _outside(batch.shape, self._runner.info.contract, self._runner.info.profile):
            self._skipped[name] = reason
            return
        self._grid.append(_case(name, batch, run_image(self._runner, batch), expected, self._gates.grid_fidelity_db))

    def verdict(self) -> VerifyResult:
        """Return what was found."""
        if not self._images:
            reasons = "; ".join(sorted(set(self._skipped.values()))) or "none was given"
            raise UsageError(
                f"{self._runner.info.name} could be judged on no image ({reasons})",
                next_step="give images within the engine's profile, or build it for other shapes",
            )
        return VerifyResult(
            candidate=self._runner.info,
            reference=self._reference,
            gates=self._gates,
            images=tuple(self._images),
            grid=tuple(self._grid),
            skipped=self._skipped,
            views=tuple(self._views),
            worst=None if self._worst is None else self._worst[1],
        )


def _outside(shape: tuple[int, ...], contract: ModelContract, profile: ShapeProfile | None) -> str | None:
    if min(shape[2:]) < contract.min_size:
        return f"smaller than the network's least size {contract.min_size}"
    if profile is not None and not profile.contains(shape):
        return f"outside the engine's profile {profile}"
    return None


def _case(
    name: str,
    image: NDArray[np.float32],
    output: NDArray[np.float32],
    expected: NDArray[np.float32],
    floor_db: float,
) -> Case:
    n, c, h, w = image.shape
    # The PSNR of a few values scatters: for independent errors the mean square of n values has a relative standard
    # deviation of sqrt(2 / n). Three of them are granted, 3.5 dB for 12 values and 0.1 dB for 16,000.
    floor_db -= 10.0 * math.log10(1.0 + 3.0 * math.sqrt(2.0 / max(expected.size, 1)))
    return Case(name, (n, c, h, w), difference(output, expected), floor_db)


def _with_quality(
    case: Case,
    output: NDArray[np.float32],
    expected: NDArray[np.float32],
    truth: NDArray[np.uint8],
    scale: int,
) -> Case:
    height, width = expected.shape[2:]
    if min(height, width) <= 2 * scale:
        return case
    truth = truth[:height, :width]
    usable = case.difference.problem is None
    return Case(
        case.name,
        case.shape,
        case.difference,
        case.floor_db,
        quality(_pixels(expected), truth, shave=scale) if np.isfinite(expected).all() else None,
        quality(_pixels(output), truth, shave=scale) if usable else None,
    )


def _pixels(output: NDArray[np.float32]) -> NDArray[np.uint8]:
    pixels = eight_bit(output[0]).transpose(1, 2, 0)  # (H, W, C)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _badness(case: Case) -> tuple[bool, float]:
    """Sorts the worst first: problems, then by fidelity."""
    fidelity = case.difference.fidelity_db
    return case.difference.problem is None, -math.inf if math.isnan(fidelity) else fidelity


def _reason(case: Case, kind: str) -> str:
    if case.difference.problem is not None:
        return f"{kind} {case.name}: {case.difference.problem}"
    return f"{kind} {case.name}: fidelity {case.difference.fidelity_db:.1f} dB; the gate is {case.floor_db:.1f} dB"


def _least(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else min(values)
