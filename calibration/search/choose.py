"""Chooses how a graph is quantized by measuring, and keeps everything it measured.

Three questions, in this order, each with the least expensive measurement that answers it:

1. How are ranges and weights chosen? A few candidates are compared by fidelity on crops of the calibration images.
2. Does the result keep the bound? Evaluated on held-out images, on the target's engine where it runs here, and then on
   test images, which choose nothing.
3. If not, which layers become more exact? Quantizing each group of layers alone shows its error, and the engine's clock
   what it costs to split them or to leave them float. Independent errors add up, so the changes that remove most error
   per millisecond are made first until the bound is kept, which is then measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx

from srdeploy.calibration.images.effort import select_tuning_windows
from srdeploy.calibration.int8.builder import Decisions, GraphBuilder
from srdeploy.calibration.int8.placement import macs_share_of
from srdeploy.calibration.int8.ranges import Method
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.search.bound import Deadline
from srdeploy.calibration.search.evaluate import Evaluator, GraphQuality, OpenEngine, open_model
from srdeploy.calibration.search.sensitivity import (
    PAID_IN_MACS,
    SPLIT_ERROR_SHARE,
    Change,
    Costs,
    Sensitivity,
    journal_key,
    measure_costs,
    measure_fidelity,
    measure_sensitivities,
)
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import BuildError, GateError, PrecisionError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner
from srdeploy.core.samples import Sample

STRENGTHS = (0.5, 0.7)
AUTOMATIC_METHODS: tuple[Method, ...] = ("mse", "percentile")  # entropy lost everywhere it was measured
SENSITIVITY_TIME = 0.5
"""Share of the time left that goes into finding out which layers bring the error; the rest evaluates graphs."""
AS_WRITTEN_DB = 3.0
"""Engines differ from a graph's own arithmetic by codes rounded the other way, which halves the error power at most."""


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
            "errors_cancel": chosen.compensate,
            "bias_correction": chosen.correct_bias,
            "split_layers": list(chosen.splits),
            "fidelity_db": round(self.fidelity_db, 3),
        }


@dataclass(frozen=True)
class Point:
    """One point on the way from plain INT8 to float.

    Attributes:
        keep: layers kept float.
        splits: layers split into two 8-bit ones.
        int8_macs: share of the multiply-adds in INT8, 0..1.
        quality: on the held-out images.
        latency_ms: on the engine; None where it does not run here.
        test: on the test images, once the bound is kept on the held-out ones; None without a bound or test images.
    """

    keep: tuple[str, ...]
    splits: tuple[str, ...]
    int8_macs: float
    quality: GraphQuality
    latency_ms: float | None
    test: GraphQuality | None = None

    @property
    def deciding(self) -> GraphQuality:
        """The quality that decides whether the bound is kept, and that is reported."""
        return self.test or self.quality

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        return {
            "layers_kept_float": list(self.keep),
            "layers_split": list(self.splits),
            "int8_macs_share": round(self.int8_macs, 4),
            "latency_ms": None if self.latency_ms is None else round(self.latency_ms, 2),
            **self.quality.to_json(),
            "test": self.test.to_json() if self.test else None,
        }


@dataclass(frozen=True)
class Choice:
    """The decisions taken and everything that was measured for them.

    Attributes:
        decisions: of the graph that is written.
        trials: ways to quantize that were compared.
        points: graphs evaluated on the held-out images, in order.
        taken: the point of `decisions`.
        sensitivities: of groups of layers; empty when no search was needed.
        costs: what the search paid in for exact layers, as a sentence; None when no search was needed.
    """

    decisions: Decisions
    trials: tuple[Trial, ...]
    points: tuple[Point, ...]
    taken: Point
    sensitivities: tuple[Sensitivity, ...] = ()
    costs: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the decisions, the trials and the Pareto table."""
        return {
            "decisions": Trial(self.decisions, 0.0, "taken").to_json() | {"fidelity_db": None},
            "trials": [trial.to_json() for trial in self.trials],
            "pareto": [point.to_json() for point in self.points],
        }

    def sensitivity_json(self) -> dict[str, Any]:
        """Return the document of `sensitivity.json`."""
        return {
            "schema": 2,
            "costs": self.costs,
            "pareto": [point.to_json() for point in self.points],
            "groups": [entry.to_json(self.decisions) for entry in self.sensitivities],
        }


def choose(
    builder: GraphBuilder,
    contract: ModelContract,
    options: QuantizeOptions,
    open_engine: OpenEngine | None,
    samples: Sequence[Sample],
    evaluator: Evaluator,
    journal: Journal,
    costs_of: Callable[[Decisions], Costs | None],
    progress: Progress = SILENT,
    test: Evaluator | None = None,
) -> Choice:
    """Choose decisions for a graph.

    Args:
        builder: makes candidates.
        contract: of the network.
        options: what the user decided already, the bound and the time.
        open_engine: the target's engine; None evaluates with ONNX Runtime, in float.
        samples: calibration samples, of which some are used to compare candidates.
        evaluator: evaluates on the held-out images.
        journal: remembers what was measured.
        costs_of: returns what changes of decisions cost on the engine; None for multiply-adds.
        progress: where to report.
        test: evaluates on images that nothing is chosen by: a graph that keeps the bound on the held-out images has to
            keep it on these too, or the search goes on.

    Raises:
        GateError: the bound was not met in the time given.
        UsageError: a layer to keep is not in the graph.
    """
    deadline = Deadline(options.time_budget_s)
    _check_kept(builder, options)
    tuning = Evaluator(
        builder.graph.model,
        select_tuning_windows(samples, contract.macs_per_pixel),
        contract,
        measurements=builder.measurements,
        key=builder.key,
    )
    decisions, trials = _tune(builder, tuning, options, deadline, journal, progress)

    def measure(decisions: Decisions, *, check: bool = False) -> Point:
        point = _measure_point(builder, evaluator, decisions, open_engine, check=check)
        if test is None or not options.bound.is_satisfied_by(point.quality):
            return point
        return replace(point, test=_measure_point(builder, test, decisions, open_engine).quality)

    first = measure(decisions, check=True)
    if options.bound.is_satisfied_by(first.deciding):
        return Choice(decisions, tuple(trials), (first,), first)
    return _meet_bound(
        builder,
        tuning,
        measure,
        decisions,
        trials,
        first,
        options,
        deadline,
        journal,
        costs_of(decisions),
        progress,
    )


def _tune(
    builder: GraphBuilder,
    evaluator: Evaluator,
    options: QuantizeOptions,
    deadline: Deadline,
    journal: Journal,
    progress: Progress,
) -> tuple[Decisions, list[Trial]]:
    """Answer the first question: one decision after the other, the best so far kept."""
    base = Decisions(keep=options.kept(), strength=options.strength or 0.0, method=options.method or "minmax")
    if builder.stored is not None:
        base = replace(base, strength=builder.stored.strength, method=builder.stored.method)
    trials: list[Trial] = []

    def best(candidates: Iterable[tuple[str, Decisions]], so_far: Decisions) -> Decisions:
        for note, candidate in candidates:
            if any(trial.decisions == candidate for trial in trials) or (trials and deadline.passed):
                continue
            fidelity = journal.number(
                journal_key("trial", candidate), partial(measure_fidelity, builder, evaluator, candidate)
            )
            trials.append(Trial(candidate, fidelity, note))
            advance(note=f"{trials[-1].fidelity_db:.2f} dB: {note}")
        top = max(trials, key=lambda trial: trial.fidelity_db)
        return top.decisions if trials else so_far

    free = (1 if options.strength is not None else len(STRENGTHS), 1 if options.method else len(AUTOMATIC_METHODS))
    with progress.task("comparing ways to quantize", total=3 + sum(free)) as advance:
        chosen = best([("the plainest: min-max, nothing else", base)], base)
        if options.strength is None and builder.stored is None:
            chosen = best(
                [(f"channels equalized, strength {s}", replace(chosen, strength=s)) for s in STRENGTHS], chosen
            )
        if options.method is None and builder.stored is None:
            chosen = best([(f"ranges by {m}", replace(chosen, method=m)) for m in AUTOMATIC_METHODS], chosen)
        if builder.precision == Precision.INT8:
            chosen = best([("weights' errors cancel", replace(chosen, compensate=True))], chosen)
        chosen = best([("without bias correction", replace(chosen, correct_bias=False))], chosen)
    return chosen, trials


def _meet_bound(
    builder: GraphBuilder,
    tuning: Evaluator,
    measure: Callable[[Decisions], Point],
    decisions: Decisions,
    trials: Sequence[Trial],
    first: Point,
    options: QuantizeOptions,
    deadline: Deadline,
    journal: Journal,
    costs: Costs | None,
    progress: Progress,
) -> Choice:
    """Answer the third question: change the layers that bring most error per cost until the bound is kept.

    A group of layers can be split into two 8-bit convolutions each, where the target allows it, which see 16-bit
    activations, or become float. What that costs is measured on the engine, since it differs by processor: with VNNI
    two 8-bit convolutions are much faster than a float one, without it they are not.
    """
    sensitivities = measure_sensitivities(
        builder, tuning, decisions, deadline.part(SENSITIVITY_TIME), journal, progress
    )
    sensitivities = measure_costs(builder, decisions, sensitivities, costs, journal, progress)
    paid_in = costs.note if costs is not None else PAID_IN_MACS
    points = [first]
    done: list[Change] = []
    left = {entry.layers: entry.error for entry in sensitivities}
    total = max(sum(left.values()), 1e-30)
    forecast = Forecast(first.quality.fidelity_db)
    changes = [change for entry in sensitivities for change in entry.changes]
    with progress.task("searching the bound", total=len(changes)) as advance:
        while changes:
            best = max(changes, key=lambda change: change.worth(left))
            changes.remove(best)
            advance()
            done.append(best)
            left[best.layers] = best.error * (SPLIT_ERROR_SHARE if best.split else 0.0)
            others = [change for change in changes if change.layers != best.layers]
            if best.split:  # the way from there to float is what is left to pay
                others += [
                    replace(change, cost=max(change.cost - best.cost, 0.001))
                    for change in changes
                    if change.layers == best.layers
                ]
            changes = others
            share = sum(left.values()) / total
            if changes and not options.bound.may_be_satisfied_by(first.deciding, forecast(share)):
                continue
            points.append(measure(_apply_changes(decisions, done, total)))
            forecast.learn(share, points[-1].quality.fidelity_db)
            advance(0, note=f"{points[-1].deciding.drop_db:.4f} dB")
            if options.bound.is_satisfied_by(points[-1].deciding):
                taken = points[-1]
                needed = remove_superfluous(done, first.quality, points[-1].quality, options)
                if len(needed) < len(done) and not deadline.passed:
                    points.append(measure(_apply_changes(decisions, needed, total)))
                    if options.bound.is_satisfied_by(points[-1].deciding):
                        done, taken = needed, points[-1]
                chosen = _apply_changes(decisions, done, total)
                return Choice(chosen, tuple(trials), tuple(points), taken, tuple(sensitivities), paid_in)
            if deadline.passed:
                break
    best_point = max(points, key=lambda point: point.quality.fidelity_db)
    raise GateError(
        f"the best graph found loses {best_point.deciding.drop_db:.4f} dB at a fidelity of "
        f"{best_point.deciding.fidelity_db:.2f} dB with {100 * best_point.int8_macs:.1f} % of the multiply-adds in "
        f"INT8 ({len(points)} measured: {_table(points)})",
        expected=str(options.bound),
        next_step="allow a larger drop, search longer with srdeploy quantize --time-budget, or use FP16",
    )


class Forecast:
    """Predicts which share of a graph's error power is left after changes, and learns from what they did.

    Errors of single layers add up to the graph's only if they are independent. In decibels, what changes gain is taken
    to be a fixed part of what the sum of errors promises: all of it at first, then what the last graph gained.

    Args:
        fidelity_db: of the graph before any change.
    """

    def __init__(self, fidelity_db: float) -> None:
        self._start = fidelity_db
        self._kept = 1.0

    def __call__(self, promised: float) -> float:
        """Return the share to expect where the sum of errors promises a share, both 0..1."""
        return float(promised**self._kept)

    def learn(self, promised: float, fidelity_db: float) -> None:
        """Take what a graph measured into account."""
        if promised < 1:
            gained, expected = fidelity_db - self._start, -10 * math.log10(max(promised, 1e-9))
            self._kept = min(max(gained / expected, 0.1), 1.0)


def _apply_changes(decisions: Decisions, changes: Iterable[Change], total: float) -> Decisions:
    """Return decisions with changes made; layers that become float get their part of the `total` error as reason."""
    for change in changes:
        decisions = change.applied(decisions, f"its 8-bit error is {100 * change.error / total:.1f} % of the image's")
    return decisions


def remove_superfluous(
    done: Sequence[Change], first: GraphQuality, reached: GraphQuality, options: QuantizeOptions
) -> list[Change]:
    """Return those of the changes made that the bound needs.

    The last change is often a large one, and makes cheaper ones before it superfluous. Error powers add up, so what
    taking a change back costs is known well enough to try it; the most expensive changes are reverted first.

    Args:
        done: in the order made; together they keep the bound.
        first: what was measured before the first of them.
        reached: what was measured after the last of them.
        options: the bound.
    """
    total = sum({change.layers: change.error for change in done}.values())
    lost = 10 ** (-first.fidelity_db / 10) - 10 ** (-reached.fidelity_db / 10)  # error power that all of them removed
    gained = first.drop_db - reached.drop_db
    kept, quality = list(done), reached
    for change in sorted(done, key=lambda change: -change.cost):
        others = [other for other in kept if other is not change]
        siblings = [other for other in others if other.layers == change.layers]
        if any(not other.split for other in siblings):  # a split under a float layer costs nothing any more
            continue
        before, after = SPLIT_ERROR_SHARE if siblings else 1.0, SPLIT_ERROR_SHARE if change.split else 0.0
        part = change.error * (before - after) / max(total, 1e-30)
        power = 10 ** (-quality.fidelity_db / 10) + part * lost
        without = replace(
            quality, fidelity_db=-10 * math.log10(power), drop_db=quality.drop_db + part * max(gained, 0.0)
        )
        if options.bound.is_satisfied_by(without):
            kept, quality = others, without
    return kept


def _measure_point(
    builder: GraphBuilder,
    evaluator: Evaluator,
    decisions: Decisions,
    open_engine: OpenEngine | None,
    *,
    check: bool = False,
) -> Point:
    """Measure a graph; `check` whether the engine computes it as written before anything else is asked of it."""
    model, placement = builder.build(decisions)
    latency = None
    if open_engine is None:
        quality = evaluator.evaluate_model(model)
    else:
        with open_model(model, open_engine) as runner:
            if check:
                _check_as_written(evaluator.first(1), model, runner)
            quality = evaluator.evaluate_runner(runner)
            (latency,) = evaluator.latencies_ms(runner)
    return Point(
        tuple(decisions.keep), decisions.splits, macs_share_of(builder.graph, placement.layers), quality, latency
    )


def _check_as_written(evaluator: Evaluator, model: onnx.ModelProto, runner: Runner) -> None:
    """Refuse an engine that computes a graph otherwise than it is written; a search would only hide that.

    Raises:
        BuildError: on the held-out images the engine is far from the graph's own arithmetic.
    """
    written, computed = evaluator.evaluate_model(model), evaluator.evaluate_runner(runner)
    if computed.fidelity_db < written.fidelity_db - AS_WRITTEN_DB:
        raise BuildError(
            f"{runner.info.engine} computes this INT8 graph otherwise than it is written: a fidelity of "
            f"{computed.fidelity_db:.2f} dB where its arithmetic results in {written.fidelity_db:.2f} dB",
            expected=f"a difference of at most {AS_WRITTEN_DB:g} dB",
            next_step="try srdeploy quantize with --weight-bits 7, --deconvolution rewrite or another --target",
        )


def _check_kept(builder: GraphBuilder, options: QuantizeOptions) -> None:
    if not builder.tensors:
        raise PrecisionError(
            f"no layer of this network fits {builder.precision.value} on this target",
            expected="wider layers",
            next_step="use --precision fp16",
        )
    names = {layer.name for layer in builder.graph.layers}
    unknown = [name for name in options.keep if name not in names]
    if unknown:
        close = sorted(name for name in names if unknown[0].split(".")[0] in name)[:3] or sorted(names)[:3]
        raise UsageError(f"--keep {unknown[0]} names no layer", expected=f"names such as {', '.join(close)}")


def _table(points: Sequence[Point]) -> str:
    return ", ".join(f"{100 * point.int8_macs:.1f} %: {point.deciding.drop_db:.4f} dB" for point in points[-5:])
