"""Verification: an engine and the eager FP32 network on the same images, compared in decibels.

Two kinds of cases are run. *Images* are the engine's purpose: real images, whole or cropped to its profile, with the
quality of both sides against ground truth where there is one. The *grid* consists of small crops of these images in odd
and tiny shapes and several batches: it finds constants baked into a graph, wrong padding and mixed-up batches, which
whole images of one size never show.

NaN, infinity, a constant output or a wrong shape always fail. Otherwise each case must reach the gate of its precision
in fidelity (see `Gates`), and with ground truth the mean PSNR may fall by at most the allowed drop.
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
from srdeploy.runtime.verify.crops import Crop, detailed_crop, worst_crop
from srdeploy.runtime.verify.difference import Difference, difference, eight_bit
from srdeploy.runtime.verify.quality import Quality, mean_quality, quality

GRID = ((1, 1, 1), (1, 1, 7), (2, 17, 22), (3, 33, 12), (1, 64, 48))
"""Batch, height and width of the grid: tiny, odd, wide and tall, several batches."""

_QUANTIZED = (Precision.INT8, Precision.FP8)


@dataclass(frozen=True)
class Gates:
    """The limits that an engine has to keep.

    Attributes:
        min_fidelity_db: minimum PSNR between engine and reference, for every image.
        grid_fidelity_db: the same for the shape grid.
        max_psnr_drop_db: maximum loss of mean Y PSNR against ground truth; None for no limit.
    """

    min_fidelity_db: float
    grid_fidelity_db: float
    max_psnr_drop_db: float | None = None

    @classmethod
    def of(
        cls, precision: Precision, *, min_fidelity_db: float | None = None, max_psnr_drop_db: float | None = None
    ) -> "Gates":
        """Return the gates of a precision; a given number replaces the default.

        The error of quantized layers depends on the content, so a small crop of texture may be 10 dB below its
        image: the grid's gate is lowered by that for INT8 and FP8. A wrong shape shows at 25 dB and less.
        """
        images = MIN_FIDELITY_DB[precision] if min_fidelity_db is None else min_fidelity_db
        return cls(images, images - 10.0 if precision in _QUANTIZED else images, max_psnr_drop_db)

    @classmethod
    def of_contract(
        cls, contract: ModelContract, *, min_fidelity_db: float | None = None, max_psnr_drop_db: float | None = None
    ) -> "Gates":
        """Return the gates of a graph or engine; a given number replaces the default.

        A compressed graph is another network than the reference, so it has the low fidelity gates of INT8 in every
        precision. Its drop decides: without a given number, the bound that it was compressed with, except for
        quantized graphs, whose own loss comes on top.
        """
        precision, compression = contract.precision, contract.compression
        if compression is not None and precision not in _QUANTIZED:
            precision = Precision.INT8
            max_psnr_drop_db = compression.get("max_psnr_drop_db") if max_psnr_drop_db is None else max_psnr_drop_db
        return cls.of(precision, min_fidelity_db=min_fidelity_db, max_psnr_drop_db=max_psnr_drop_db)


@dataclass(frozen=True)
class Case:
    """The result on one image or grid shape.

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
        """Whether the output is usable, and at or above the floor."""
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
    """The result of one engine.

    Attributes:
        candidate: the engine.
        reference: the network it was compared with.
        gates: the limits it had to keep.
        images: one case per image.
        grid: one case per shape.
        skipped: images and shapes that were not run, with the reason.
        crops: one of each of the first images, for the report; see `srdeploy.runtime.verify.crops`.
        worst: the crop where the engine differs most, in the worst image.
    """

    candidate: RunnerInfo
    reference: RunnerInfo
    gates: Gates
    images: tuple[Case, ...]
    grid: tuple[Case, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    crops: tuple[Crop, ...] = ()
    worst: Crop | None = None

    @property
    def min_fidelity_db(self) -> float:
        """The minimum fidelity of an image; nan when an output is not finite."""
        return _minimum([case.difference.fidelity_db for case in self.images])

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
        """The image with a problem, else the one with the lowest fidelity."""
        return min(self.images, key=_badness)

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons for which the engine is refused; empty when it passed."""
        reasons = [_reason(case, "image") for case in sorted(self.images, key=_badness) if not case.passed]
        reasons += [_reason(case, "shape") for case in sorted(self.grid, key=_badness) if not case.passed]
        drop, allowed = self.psnr_drop_db, self.gates.max_psnr_drop_db
        if allowed is not None and drop is not None and not drop <= allowed:
            reasons.append(f"mean Y PSNR falls by {drop:.3f} dB; {allowed:g} dB is allowed")
        return tuple(reasons)

    @property
    def passed(self) -> bool:
        """Whether every gate was reached."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values (inf and nan stay floats), without crops."""
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


def verify_all(
    candidates: Sequence[Runner],
    reference: Runner,
    images: Sequence[Sample],
    *,
    gates: Sequence[Gates | None] | None = None,
    grid: Sequence[tuple[int, int, int]] = GRID,
    keep_crops: int = 0,
    progress: Progress = SILENT,
) -> list[VerifyResult]:
    """Evaluate several engines against one run of the reference.

    Args:
        candidates: opened engines, in their parity modes.
        reference: the eager FP32 network, on the device of the candidates.
        images: iterated once, one image in memory at a time; images larger than an engine's profile are cropped to
            it, and the reference computes the same crop.
        gates: one per candidate; None takes the defaults of its precision.
        grid: (batch, height, width) of the shape grid; shapes outside an engine's profile are skipped, and two
            shapes at the lower end of its profile are added.
        keep_crops: number of images, from the first, whose crops are kept for the report.
        progress: advanced after every image.

    Returns:
        One verdict per candidate. Failures are verdicts, not exceptions.

    Raises:
        UsageError: no image is within an engine's profile.
        MissingExtraError: there is ground truth, and scikit-image is not installed.
    """
    given = gates or [None] * len(candidates)
    evaluators = [_Evaluator(runner, reference.info, gate) for runner, gate in zip(candidates, given, strict=True)]
    first_images: list[NDArray[np.float32]] = []
    with progress.task("verifying", total=len(images) + len(grid)) as advance:
        for index, sample in enumerate(images):
            expected: dict[tuple[int, ...], NDArray[np.float32]] = {}  # by shape: crops to a profile are few
            for evaluator in evaluators:
                fitted = evaluator.fitted(sample)
                if fitted is None:
                    continue
                shape = fitted.image.shape
                if shape not in expected:
                    expected[shape] = run_image(reference, fitted.image)
                evaluator.add_image(fitted, expected[shape], keep=index < keep_crops)
            if len(first_images) < 3:
                first_images.append(sample.image)
            advance(note=sample.name)
        shapes = dict.fromkeys(grid)
        for runner in candidates:
            for profile in runner.info.profiles:
                shapes |= dict.fromkeys(profile_grid(profile))
        for batch in grid_batches(first_images, list(shapes)):
            answer = run_image(reference, batch)
            for evaluator in evaluators:
                evaluator.add_shape(batch, answer)
            advance(note=format_shape(batch.shape))
    return [evaluator.verdict() for evaluator in evaluators]


def grid_batches(
    images: Sequence[NDArray[np.float32]], grid: Sequence[tuple[int, int, int]]
) -> Iterator[NDArray[np.float32]]:
    """Cut batches of the grid's shapes out of real images, each item from another place.

    Args:
        images: (1, C, H, W) float32 each; one smaller than a shape is continued by reflection.
        grid: (batch, height, width).
    """
    generator = np.random.default_rng(0)  # the same places in every run
    for batch, height, width in grid:
        items = []
        for index in range(batch):
            image = images[index % len(images)][0]  # (C, H, W)
            missing = [(0, 0), (0, max(0, height - image.shape[1])), (0, max(0, width - image.shape[2]))]
            image = np.pad(image, missing, mode="symmetric")
            top = int(generator.integers(0, image.shape[1] - height + 1))
            left = int(generator.integers(0, image.shape[2] - width + 1))
            items.append(image[:, top : top + height, left : left + width])
        yield np.ascontiguousarray(np.stack(items))  # (N, C, H, W)


def profile_grid(profile: ShapeProfile) -> list[tuple[int, int, int]]:
    """Return the grid shapes that a profile adds: its minimum, and one step above it at the largest batch."""
    steps = [min(low + 1, high) for low, high in zip(profile.min[2:], profile.max[2:], strict=True)]
    return [(profile.min[0], *profile.min[2:]), (profile.max[0], steps[0], steps[1])]


class _Evaluator:
    """Collects the cases of one engine."""

    def __init__(self, runner: Runner, reference: RunnerInfo, gates: Gates | None) -> None:
        self._runner = runner
        self._reference = reference
        self._gates = gates or Gates.of_contract(runner.info.contract)
        self._images: list[Case] = []
        self._grid: list[Case] = []
        self._skipped: dict[str, str] = {}
        self._crops: list[Crop] = []
        self._worst: tuple[tuple[bool, float], Crop] | None = None

    def fitted(self, sample: Sample) -> Sample | None:
        """Return the sample, cropped to the engine's profile where it is larger; None where it cannot fit."""
        info = self._runner.info
        if info.profile is not None:
            sample = _cropped(sample, info.profile.max[2], info.profile.max[3], info.contract.scale)
        if reason := _outside(sample.image.shape, info):
            self._skipped[sample.name] = reason
            return None
        return sample

    def add_image(self, sample: Sample, expected: NDArray[np.float32], *, keep: bool) -> None:
        """Run an image and evaluate it."""
        contract = self._runner.info.contract
        output = run_image(self._runner, sample.image)
        case = _case(sample.name, sample.image, output, expected, self._gates.min_fidelity_db)
        if sample.truth is not None:
            case = _with_quality(case, output, expected, sample.truth, contract.scale)
        self._images.append(case)
        if output.shape != expected.shape:
            return
        if keep:
            self._crops.append(detailed_crop(sample, expected, output))
        if self._worst is None or _badness(case) < self._worst[0]:
            self._worst = _badness(case), worst_crop(sample, expected, output)

    def add_shape(self, batch: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Run a batch of the grid and evaluate it."""
        name = format_shape(batch.shape)
        if reason := _outside(batch.shape, self._runner.info):
            self._skipped[name] = reason
            return
        self._grid.append(_case(name, batch, run_image(self._runner, batch), expected, self._gates.grid_fidelity_db))

    def verdict(self) -> VerifyResult:
        """Return the result over all cases."""
        if not self._images:
            reasons = "; ".join(sorted(set(self._skipped.values()))) or "none was given"
            raise UsageError(
                f"{self._runner.info.name} could be evaluated on no image ({reasons})",
                next_step="give images within the engine's profile, or build it for other shapes",
            )
        return VerifyResult(
            candidate=self._runner.info,
            reference=self._reference,
            gates=self._gates,
            images=tuple(self._images),
            grid=tuple(self._grid),
            skipped=self._skipped,
            crops=tuple(self._crops),
            worst=None if self._worst is None else self._worst[1],
        )


def _cropped(sample: Sample, height: int, width: int, scale: int) -> Sample:
    """Crop a sample at the top left to at most a height and width of input pixels, truth included."""
    if sample.image.shape[2] <= height and sample.image.shape[3] <= width:
        return sample
    image = np.ascontiguousarray(sample.image[:, :, :height, :width])
    rows, columns = (scale * side for side in image.shape[2:])
    return Sample(sample.name, image, None if sample.truth is None else sample.truth[:rows, :columns])


def _outside(shape: tuple[int, ...], info: RunnerInfo) -> str | None:
    if min(shape[2:]) < info.contract.min_size:
        return f"smaller than the network's minimum size {info.contract.min_size}"
    if not info.accepts(shape):
        return f"outside the engine's profile {' or '.join(map(str, info.profiles))}"
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
    # deviation of sqrt(2 / n). Three of them are allowed, 3.5 dB for 12 values and 0.1 dB for 16,000.
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


def _minimum(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else min(values)
