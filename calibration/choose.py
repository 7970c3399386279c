"""Chooses how a graph is quantized by measuring, and keeps everything it measured.

Three questions in this order, each with the cheapest measurement that answers it:

1. How are ranges and weights chosen? Few candidates, judged by fidelity on crops of the calibration images.
2. Does the result keep the bound? Judged on images kept aside, on the target's engine where it runs here.
3. If not, which layers leave INT8? Quantizing groups of layers alone tells their error; errors of independent layers add
   up, so the layers that bring most error per multiply-add leave first until the bound is kept, which is then measured.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from srdeploy.calibration.dataset import Sample
from srdeploy.calibration.graph import Layer
from srdeploy.calibration.judge import Judge, OpenEngine, Verdict, opened
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.placement import share_of_macs
from srdeploy.calibration.workbench import Decisions, Workbench
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import GateError, UsageError
from srdeploy.core.progress import SILENT, Progress

STRENGTHS = (0.0, 0.3, 0.5, 0.7)
TUNING_SAMPLES = 8
TUNING_PIXELS = 64 * 64


@dataclass(frozen=True)
class Trial:
    """One measured set of decisions."""

    decisions: Decisions
    fidelity_db: float
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON values."""
        chosen = self.decisions
        return {
            "note": self.note,
            "equalization": chosen.strength,
            "method": chosen.method,
            "weight_search": chosen.weight_search,
            "bias_correction": chosen.correct_bias,
            "fidelity_db": round(self.fidelity_db, 3),
        }


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing some layers alone does: `error` is the mean squared error of the image, peak 1."""

    layers: tuple[str, ...]
    error: float
    macs_share: float


@dataclass(frozen=True)
class Point:
    """One point on the way from all-INT8 to all-float."""

    keep: tuple[str, ...]
    int8_macs: float
    verdict: Verdict
    latency_ms: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        return {
            "layers_kept_float": list(self.keep),
            "int8_macs_share": round(self.int8_macs, 4),
            "latency_ms": None if self.latency_ms is None else round(self.latency_ms, 2),
            **self.verdict.to_json(),
        }


@dataclass(frozen=True)
class Choice:
    """The decisions taken and everything that was measured for them."""

    decisions: Decisions
    trials: tuple[Trial, ...]
    points: tuple[Point, ...]
    sensitivities: tuple[Sensitivity, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the decisions, the trials and the Pareto table."""
        return {
            "decisions": Trial(self.decisions, 0.0, "taken").to_json() | {"fidelity_db": None},
            "trials": [trial.to_json() for trial in self.trials],
            "pareto": [point.to_json() for point in self.points],
        }

    def sensitivity_json(self) -> dict[str, Any]:
        """Return the document of `sensitivity.json`."""
        kept = set(self.decisions.keep)
        return {
            "schema": 1,
            "pareto": [point.to_json() for point in self.points],
            "groups": [
                {
                    "layers": list(entry.layers),
                    "image_mse": entry.error,
                    "macs_share": round(entry.macs_share, 5),
                    "kept_float": [name for name in entry.layers if name in kept],
                }
                for entry in self.sensitivities
            ],
        }


def choose(
    bench: Workbench,
    contract: ModelContract,
    options: QuantizeOptions,
    open_engine: OpenEngine | None,
    samples: Sequence[Sample],
    judges: Sequence[Sample],
    progress: Progress = SILENT,
) -> Choice:
    """Choose decisions for a graph.

    Args:
        bench: makes candidates.
        contract: of the network.
        options: what the user decided already, the bound and the time.
        open_engine: the target's engine; None judges on ONNX Runtime's plain kernels.
        samples: calibration samples, of which some are used to compare candidates.
        judges: images kept aside for the bound.
        progress: where to report.

    Raises:
        GateError: the bound was not met in the time given.
        UsageError: a layer to keep is not in the graph.
    """
    deadline = time.monotonic() + options.time_budget_s
    _check_kept(bench, options)
    tuning = Judge(bench.graph.model, tuning_samples(samples), contract)
    decisions, trials = _tuned(bench, tuning, options, deadline, progress)
    judge = Judge(bench.graph.model, judges, contract)
    first = _point(bench, judge, decisions, open_engine)
    if options.max_psnr_drop is None or first.verdict.drop_db <= options.max_psnr_drop:
        return Choice(decisions, tuple(trials), (first,))
    return _bounded(bench, tuning, judge, decisions, trials, first, options, open_engine, deadline, progress)


def tuning_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Take a few samples, evenly over the set, each cut to a small window: candidates are compared on these."""
    step = max(1, len(samples) // TUNING_SAMPLES)
    side = int(TUNING_PIXELS**0.5)
    return [Sample(s.name, s.pixels[:, :, :side, :side]) for s in samples[::step][:TUNING_SAMPLES]]


def _tuned(
    bench: Workbench, judge: Judge, options: QuantizeOptions, deadline: float, progress: Progress
) -> tuple[Decisions, list[Trial]]:
    """Answer the first question: one decision after the other, the best so far kept."""
    base = Decisions(keep=options.kept(), strength=options.strength or 0.0, method=options.method or "minmax")
    if bench.stored is not None:
        base = replace(base, strength=bench.stored.strength, method=bench.stored.method)
    trials: list[Trial] = []

    def best(candidates: Iterable[tuple[str, Decisions]], so_far: Decisions) -> Decisions:
        for note, candidate in candidates:
            if any(trial.decisions == candidate for trial in trials) or (trials and time.monotonic() > deadline):
                continue
            model, _ = bench.build(candidate)
            trials.append(Trial(candidate, judge.graph(model).fidelity_db, note))
            advance(note=f"{trials[-1].fidelity_db:.2f} dB: {note}")
        top = max(trials, key=lambda trial: trial.fidelity_db)
        return top.decisions if trials else so_far

    with progress.task("comparing ways to quantize") as advance:
        chosen = best([("the plainest: min-max, nothing else", base)], base)
        if options.strength is None and bench.stored is None:
            chosen = best(
                [(f"channels equalized, strength {s}", replace(chosen, strength=s)) for s in STRENGTHS if s], chosen
            )
        if options.method is None and bench.stored is None:
            others = ("mse", "percentile", "entropy")
            chosen = best([(f"ranges by {m}", replace(chosen, method=m)) for m in others], chosen)
        chosen = best([("without bias correction", replace(chosen, correct_bias=False))], chosen)
        chosen = best([("weights clipped for least error", replace(chosen, weight_search=True))], chosen)
    return chosen, trials


def _bounded(
    bench: Workbench,
    tuning: Judge,
    judge: Judge,
    decisions: Decisions,
    trials: Sequence[Trial],
    first: Point,
    options: QuantizeOptions,
    open_engine: OpenEngine | None,
    deadline: float,
    progress: Progress,
) -> Choice:
    """Answer the third question: take layers out of INT8 until the bound is kept."""
    assert options.max_psnr_drop is not None
    sensitivities = measure_sensitivities(bench, tuning, decisions, deadline, progress)
    ranking = sorted(sensitivities, key=lambda entry: -entry.error / max(entry.macs_share, 1e-9))
    points = [first]
    keep: dict[str, str] = dict(decisions.keep)
    total = sum(entry.error for entry in sensitivities)
    with progress.task("searching the bound", total=len(ranking)) as advance:
        for position, entry in enumerate(ranking):
            reason = f"its 8-bit error is {100 * entry.error / max(total, 1e-30):.1f} % of the image's"
            keep |= {name: reason for name in entry.layers if name not in keep}
            advance()
            if position + 1 < len(ranking) and not _worth_measuring(points[-1], sensitivities, keep, options):
                continue
            points.append(_point(bench, judge, decisions.keeping(keep), open_engine))
            advance(0, note=f"{points[-1].verdict.drop_db:.4f} dB")
            if points[-1].verdict.drop_db <= options.max_psnr_drop:
                return Choice(decisions.keeping(keep), tuple(trials), tuple(points), tuple(sensitivities))
            if time.monotonic() > deadline:
                break
    best = min(points, key=lambda point: point.verdict.drop_db)
    raise GateError(
        f"the best graph found loses {best.verdict.drop_db:.4f} dB with {100 * best.int8_macs:.1f} % of the "
        f"multiply-adds in INT8 ({len(points)} measured: {_table(points)})",
        expected=f"at most {options.max_psnr_drop} dB",
        next_step="allow a larger drop, give it more time with --time-budget, or use --precision fp16",
    )


def measure_sensitivities(
    bench: Workbench, judge: Judge, decisions: Decisions, deadline: float, progress: Progress = SILENT
) -> list[Sensitivity]:
    """Measure what quantizing groups of layers alone costs, splitting the worst groups as long as time lasts.

    Returns:
        Disjoint groups that cover all quantized layers, in graph order.
    """
    _, placement = bench.build(decisions)
    layers = [layer for layer in bench.graph.layers if layer.name in placement.layers]
    size = max(1, round(len(layers) ** 0.5))
    groups = [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]
    measured: dict[str, Sensitivity] = {}
    order = {layer.name: index for index, layer in enumerate(layers)}

    def measure(group: Sequence[Layer]) -> None:
        names = tuple(layer.name for layer in group)
        others = dict.fromkeys((layer.name for layer in layers if layer.name not in names), "not looked at")
        model, _ = bench.build(decisions.keeping({**decisions.keep, **others}))
        error = 10.0 ** (-judge.graph(model).fidelity_db / 10)
        measured[names[0]] = Sensitivity(names, error, share_of_macs(bench.graph, names))

    with progress.task("measuring the sensitivity of layers", total=len(groups)) as advance:
        for group in groups:
            measure(group)
            advance()
        while time.monotonic() < deadline:
            worst = max((entry for entry in measured.values() if len(entry.layers) > 1), key=_error, default=None)
            if worst is None or worst.error < 0.01 * sum(entry.error for entry in measured.values()):
                break
            members = [layer for layer in layers if layer.name in worst.layers]
            half = max(1, len(members) // 2)
            measure(members[:half])
            measure(members[half:])
            advance(0, note=f"{len(measured)} groups")
    return sorted(measured.values(), key=lambda entry: order[entry.layers[0]])


def _error(entry: Sensitivity) -> float:
    return entry.error


def _worth_measuring(
    last: Point, sensitivities: Sequence[Sensitivity], keep: Mapping[str, str], options: QuantizeOptions
) -> bool:
    """Tell whether the expected error has come near the bound since the last measurement.

    Errors add up in power; the drop is nearly proportional to the power while it is small.
    """
    assert options.max_psnr_drop is not None

    def expected(kept: Iterable[str]) -> float:
        names = set(kept)
        return sum(entry.error for entry in sensitivities if not set(entry.layers) <= names)

    before, now = expected(last.keep), expected(keep)
    return before <= 0 or last.verdict.drop_db * now / before <= 1.1 * options.max_psnr_drop


def _point(bench: Workbench, judge: Judge, decisions: Decisions, open_engine: OpenEngine | None) -> Point:
    model, placement = bench.build(decisions)
    latency = None
    if open_engine is None:
        verdict = judge.graph(model)
    else:
        with opened(model, open_engine) as runner:
            verdict = judge.runner(runner)
            latency = judge.latency_ms(runner)
    return Point(tuple(decisions.keep), share_of_macs(bench.graph, placement.layers), verdict, latency)


def _check_kept(bench: Workbench, options: QuantizeOptions) -> None:
    names = {layer.name for layer in bench.graph.layers}
    unknown = [name for name in options.keep if name not in names]
    if unknown:
        close = sorted(name for name in names if unknown[0].split(".")[0] in name)[:3] or sorted(names)[:3]
        raise UsageError(f"--keep {unknown[0]} names no layer", expected=f"names such as {', '.join(close)}")


def _table(points: Sequence[Point]) -> str:
    return ", ".join(f"{100 * point.int8_macs:.1f} %: {point.verdict.drop_db:.4f} dB" for point in points[-5:])
