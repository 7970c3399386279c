"""Evaluation of graphs: fidelity to the FP32 graph, and loss of PSNR against the ground truth."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from srdeploy.calibration.measurements import Measurements
from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.imaging.psnr import drop_for_fidelity, psnr_db, y_psnr_db
from srdeploy.core.imaging.read import to_uint8
from srdeploy.core.ort import cpu_session
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.samples import Sample

Truth = Literal["hr", "shrunk"]
OpenEngine = Callable[[Path], Runner]

TYPICAL_PSNR_DB = {1: 40.0, 2: 38.3, 3: 34.7, 4: 32.6, 8: 27.3}
"""PSNR on Set5 that good networks reach per scale: assumed where nothing can be measured. The sharper a network's
output, the more an error costs, so this overestimates the drop for everyday photographs."""
OTHER_KINDS_DB = 6.0
"""By how much images of one kind are restored better than those of another: published networks reach 5 to 6 dB more on
Set5 than on Urban100, at any scale."""
CORRELATION = 2.0
"""What an error costs relative to an independent one of the same power. On images of another kind than those that
layers were fitted to, the error resembles the network's own."""
HIGHEST_DB = 150.0
"""Fidelity is cut here: the PSNR of two equal outputs is infinite, and means over images should stay finite."""


@dataclass(frozen=True)
class GraphQuality:
    """What a graph costs.

    Attributes:
        fidelity_db: PSNR between its output and the FP32 graph's, peak 1, mean over the images.
        worst_db: the same of the worst image.
        drop_db: loss of Y PSNR against the truth, mean over the images; expected from the fidelity without any truth.
        psnr_db: Y PSNR of the FP32 graph; assumed by scale without any truth.
        truth: what the drop was measured against: "hr" images, or the images themselves, "shrunk" to be inputs; None if
            it was not measured.
        worst_drop_db: largest loss of a single image; None if the drop was not measured.
        images: how many images were looked at.
        tested: the images are those that nothing was chosen by.
    """

    fidelity_db: float
    worst_db: float
    drop_db: float
    psnr_db: float
    truth: Truth | None
    images: int
    worst_drop_db: float | None = None
    tested: bool = False

    @property
    def images_label(self) -> str:
        """How many images of which part of the calibration set."""
        return f"{self.images} {'test' if self.tested else 'held-out'} images"

    @property
    def other_kinds_drop_db(self) -> float:
        """The loss to expect on images of another kind: see `other_kinds_drop`."""
        return other_kinds_drop(self.psnr_db, self.worst_db, measured=self.truth is not None)

    @property
    def largest_drop_db(self) -> float:
        """The largest loss of a single image, or the expected loss where none was measured."""
        return self.drop_db if self.worst_drop_db is None else self.worst_drop_db

    def to_json(self) -> dict[str, Any]:
        """Return the figures, rounded to what they mean."""
        return {
            "fidelity_db": round(self.fidelity_db, 3),
            "worst_db": round(self.worst_db, 3),
            "drop_db": round(self.drop_db, 4),
            "psnr_db": round(self.psnr_db, 3),
            "worst_drop_db": None if self.worst_drop_db is None else round(self.worst_drop_db, 4),
            "measured_against_hr": self.truth == "hr",
            "truth": self.truth,
            "images": self.images,
            "tested": self.tested,
            "other_kinds_drop_db": round(self.other_kinds_drop_db, 4),
        }


def other_kinds_drop(psnr_db: float, worst_fidelity_db: float, *, measured: bool = True) -> float:
    """Return the loss of Y PSNR in dB to expect on images of another kind than those at hand.

    Such images may be restored better by `OTHER_KINDS_DB`, so that the same error costs more; they are taken to be
    changed as much as the worst image at hand, by an error that is not independent of the network's own.

    Args:
        psnr_db: Y PSNR of the FP32 graph, mean over the images at hand.
        worst_fidelity_db: the lowest fidelity of them.
        measured: False if `psnr_db` is assumed, which is the value of images that are restored well.
    """
    return CORRELATION * drop_for_fidelity(psnr_db + (OTHER_KINDS_DB if measured else 0.0), worst_fidelity_db)


class Evaluator:
    """Compares graphs with the FP32 graph on fixed samples; its outputs, `expected`, are computed once."""

    def __init__(
        self,
        reference: onnx.ModelProto,
        samples: Sequence[Sample],
        contract: ModelContract,
        *,
        truth: Truth = "hr",
        measurements: Measurements | None = None,
        key: str = "",
        tested: bool = False,
    ) -> None:
        self._tested = tested
        self.samples = tuple(samples)
        self._contract = contract
        self._truth = truth
        self.expected = (measurements or Measurements()).reference_outputs(key, reference, self.samples)

    def first(self, count: int) -> "Evaluator":
        """Return a evaluator of the first images only."""
        fewer = copy(self)
        fewer.samples, fewer.expected = self.samples[:count], self.expected[:count]
        return fewer

    def evaluate_model(self, model: onnx.ModelProto, open_engine: OpenEngine | None = None) -> GraphQuality:
        """Evaluate a graph on an engine; on ONNX Runtime's plain CPU kernels when none is given."""
        if open_engine is None:
            session = cpu_session(model, arithmetic="float")
            return self._quality(session.run([OUTPUT], {INPUT: sample.image})[0] for sample in self.samples)
        with open_model(model, open_engine) as runner:
            return self.evaluate_runner(runner)

    def evaluate_runner(self, runner: Runner) -> GraphQuality:
        """Evaluate an open engine."""
        return self._quality(run_image(runner, sample.image) for sample in self.samples)

    def latencies_ms(self, *runners: Runner, repeats: int = 5, fastest: bool = False) -> tuple[float, ...]:
        """Return each runner's median time in milliseconds for the first sample, interleaved: no benchmark, a guide.

        The `fastest` instead of the median is what a processor can do; others on the machine only ever add to it.
        """
        pixels = self.samples[0].image
        times: list[list[float]] = [[] for _ in runners]
        for _ in range(repeats):
            for own, runner in zip(times, runners, strict=True):
                start = time.perf_counter()
                run_image(runner, pixels)
                own.append(1e3 * (time.perf_counter() - start))
        return tuple(float(min(own) if fastest else np.median(own)) for own in times)

    def _quality(self, outputs: Iterable[NDArray[np.float32]]) -> GraphQuality:
        fidelities, truths, losses = [], [], []
        scale = self._contract.scale
        for output, expected, sample in zip(outputs, self.expected, self.samples, strict=True):
            if not np.isfinite(output).all():
                fidelities.append(-HIGHEST_DB)  # an overflow: as bad as can be
                losses.append(math.inf)
                continue
            fidelities.append(min(psnr_db(output, expected), HIGHEST_DB))
            if sample.truth is not None:
                truth = sample.truth[: output.shape[2], : output.shape[3]]
                before, after = (y_psnr_db(to_uint8(image), truth, shave=scale) for image in (expected, output))
                truths.append(before)
                losses.append(before - after)
        fidelity = float(np.mean(fidelities))
        psnr = float(np.mean(truths)) if truths else TYPICAL_PSNR_DB.get(scale, 35.0)
        drop = float(np.mean(losses)) if losses else drop_for_fidelity(psnr, fidelity)
        return GraphQuality(
            fidelity_db=fidelity,
            worst_db=float(min(fidelities)),
            drop_db=drop,
            psnr_db=psnr,
            truth=self._truth if truths else None,
            images=len(fidelities),
            worst_drop_db=float(max(losses)) if truths else None,
            tested=self._tested,
        )


class open_model(AbstractContextManager[Runner]):  # noqa: N801  # used like a function
    """Write a graph to a temporary file and open it with an engine for the block."""

    def __init__(self, model: onnx.ModelProto, open_engine: OpenEngine) -> None:
        self._folder = TemporaryDirectory()
        path = Path(self._folder.name) / "candidate.onnx"
        try:
            path.write_bytes(model.SerializeToString())
            self._runner = open_engine(path)
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Runner:
        return self._runner.__enter__()

    def __exit__(self, *details: Any) -> None:
        try:
            self._runner.__exit__(*details)
        finally:
            self._folder.cleanup()
