"""The search for the graph of the lowest cost that keeps a bound in dB on images kept aside."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from srdeploy.calibration.compress.allocate import Option, allocate
from srdeploy.calibration.compress.costs import Costs
from srdeploy.calibration.compress.effects import measure_effects
from srdeploy.calibration.compress.layers import Change, candidates, channel_changes, factor_changes, readers
from srdeploy.calibration.compress.moments import WINDOWS_PER_INPUT, Moments, collect_moments
from srdeploy.calibration.compress.rebuild import apply_changes
from srdeploy.calibration.compress.result import MIN_GAIN, CompressOptions, NothingGainedError, Point
from srdeploy.calibration.images.dataset import MIN_FOR_TEST, CalibrationSet
from srdeploy.calibration.images.effort import select_rounding_windows
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.search.bound import Deadline
from srdeploy.calibration.search.evaluate import Evaluator, other_kinds_drop
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import Progress
from srdeploy.core.samples import windows_of

PROBE_IMAGES, PROBE_SIDE = 4, 48
"""Windows that the effect of a single layer on the output is measured on; one measurement per layer, so small ones."""
EFFECT_MACS = 2e13
"""Multiply-adds of all such measurements together; a larger network has its small layers measured several at once."""
EFFECT_TIME = 0.5
"""Share of the time that they may take."""
STAGES = 16
"""A stage of layers that are fitted together brings about one part in so many of the error."""
TRIALS = 10
REFINED_TRIALS = 4
REFINED_START = 2.0
"""Fitting in stages takes about half of the error away, so twice the budget is tried first."""
MULTIPLES = {Target.OPENVINO: 16, Target.ONNXRUNTIME: 16, Target.TENSORRT: 8, Target.TENSORRT_RTX: 8}
"""Channels that engines compute together: 16 32-bit lanes of AVX-512, 8 halves of a tensor core."""


class CompressionSearch:
    """Measures what layers contribute, chooses changes for a budget of error, and measures the graphs they make.

    Attributes:
        graph: the original graph.
        costs: of its layers.
        macs_before: its multiply-adds per LR pixel.
        bound: what a graph may lose.
        evaluator: evaluates on the held-out images.
        test: evaluates on the images that choose nothing; None with too few images.
        points: all graphs that were measured.
        notes: what a user should know.
    """

    def __init__(
        self,
        source: GraphFile,
        calibration: CalibrationSet,
        options: CompressOptions,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.graph = Graph(source.model)
        self.costs = Costs(self.graph)
        self.macs_before = sum(layer.macs for layer in self.graph.layers)
        self.bound = replace(options.bound, other_kinds=True)
        self.points: list[Point] = []
        self.notes: list[str] = []
        self._options = options
        self._factors = options.precision is not Precision.INT8  # 8 bits hold mixtures badly
        self._journal = journal
        self._progress = progress
        self._deadline = Deadline(options.time_budget_s)
        windows = select_rounding_windows(calibration.samples, self.macs_before)
        self._batches = [sample.image for sample in windows]
        probes = windows_of(windows, PROBE_IMAGES, PROBE_SIDE)
        self._probe_macs = self.macs_before * sum(sample.image[0, 0].size for sample in probes)
        self._probing = Evaluator(source.model, probes, source.contract)
        truth = calibration.truth or "hr"
        self.evaluator = Evaluator(source.model, calibration.held_out, source.contract, truth=truth)
        self.test: Evaluator | None = None
        if calibration.test:
            self.test = Evaluator(source.model, calibration.test, source.contract, truth=truth, tested=True)
        else:
            self.notes.append(
                f"fewer than {MIN_FOR_TEST} images: the loss is that of the {len(calibration.held_out)} that chose the "
                "graph; more images would test it on others"
            )
        self._staged: dict[Point, onnx.ModelProto] = {}
        self._moments = self._collect()
        self._options_by_slot = self._measure_layers()

    def run(self) -> tuple[Point, onnx.ModelProto]:
        """Find the graph of the lowest cost that keeps the bound on the held-out images, and on the test images.

        Raises:
            NothingGainedError: there is none with `MIN_GAIN` fewer multiply-adds.
        """
        budget, low, high = self._first_budget(), 0.0, math.inf
        best: Point | None = None
        with self._progress.task("searching the bound", total=TRIALS) as advance:
            for _ in range(TRIALS):
                changes = tuple(self._allocate(budget))
                known = next((point for point in self.points if point.changes == changes), None)
                point = known or self.measured(changes)[0]
                advance(note=self.label(point))
                if self.bound.is_satisfied_by(point.quality):
                    low = max(low, budget)
                    if best is None or point.cost < best.cost:
                        best = point
                else:
                    high = min(high, budget)
                late = self._deadline.passed and best is not None  # what keeps the bound is looked for in any case
                if late or (low and high < 1.1 * low) or not self._options_by_slot:
                    break
                # Ranks are coarse: a budget that leads to a known graph is followed by a much smaller one.
                used = self.bound.used_by(point.quality) if known is None else math.inf
                budget = self._next_budget(budget, low, high, used)
        if best is None or not self.is_worthwhile(best):
            raise self.nothing_found("the time budget was spent" if self._deadline.passed else "nothing to gain here")
        return self.confirmed([*self._refine(low), best])

    def confirmed(self, points: Sequence[Point]) -> tuple[Point, onnx.ModelProto]:
        """Return the graph of the lowest cost, with its quality on the test images, that keeps the bound there.

        The best of many graphs looks better on the images that chose it than it is.

        Args:
            points: graphs that keep the bound on the held-out images.

        Raises:
            GateError: none does.
        """
        for point in sorted(points, key=lambda point: point.cost):
            model = self._staged.get(point) or self.build(point.changes)
            found = self.tested(point, model)
            if self.bound.is_satisfied_by(found.quality):
                return found, model
        raise self.nothing_found("what keeps the bound on the held-out images misses it on the test images")

    def tested(self, point: Point, model: onnx.ModelProto) -> Point:
        """Return a graph's point with its quality on the test images; as it is where there are none."""
        if self.test is None:
            return point
        found = replace(point, quality=self.test.evaluate_model(model))
        self.points.append(found)
        self._progress.note(f"on images that chose nothing: {self.label(found)}")
        return found

    def error_shares(self, changes: Sequence[Change]) -> dict[str, float]:
        """Return each change's share of the predicted error power of the output."""
        known = {option.change: option.power for found in self._options_by_slot.values() for option in found}
        total = max(sum(known[change] for change in changes), 1e-30)
        return {change.key: known[change] / total for change in changes}

    def width(self, change: Change) -> int:
        """Return how many channels there are before a change."""
        layer = self.costs.layer(change.layer)
        return layer.channels_in if change.form == "inputs" else layer.channels_out

    def measured(self, changes: Sequence[Change], *, staged: bool = False) -> tuple[Point, onnx.ModelProto]:
        """Make a graph, measure it on the held-out images, and remember it; `staged` as of `Point`."""
        model = self.recalibrated(changes) if staged else self.build(changes)
        selection = {change.slot: change for change in changes}
        macs = sum(layer.macs for layer in Graph(model).layers)
        cost = self.costs.total - self.costs.saving(selection)
        point = Point(tuple(changes), macs, cost, self.evaluator.evaluate_model(model), staged)
        self.points.append(point)
        if staged:
            self._staged[point] = model  # takes long to make again
        return point, model

    def build(self, changes: Sequence[Change]) -> onnx.ModelProto:
        """Return the graph with changes made."""
        return apply_changes(self.graph, changes, self._moments)

    def recalibrated(self, changes: Sequence[Change]) -> onnx.ModelProto:
        """Make changes in stages: each layer is fitted to what the stages before it produce."""
        order = {layer.name: index for index, layer in enumerate(self.graph.layers)}
        by_name = {layer.name: layer for layer in self.graph.layers}
        shares = self.error_shares(changes)
        power: dict[str, float] = {}
        for change in changes:
            power.setdefault(change.layer, 0.0)
            name = change.reader or change.layer
            power[name] = power.get(name, 0.0) + shares[change.key]
        stages: list[list[str]] = [[]]
        for name in sorted(power, key=order.__getitem__):
            if sum(power[entry] for entry in stages[-1]) > 1 / STAGES:
                stages.append([])
            stages[-1].append(name)
        moments = dict(self._moments)
        done = set(stages[0])
        with self._progress.task(
            "fitting layers to what the changed ones before them produce", total=len(stages) - 1
        ) as advance:
            for stage in stages[1:]:
                # A layer that loses channels changes when its reader is fitted to what is left.
                before = [change for change in changes if {change.layer, change.reader} - {None} <= done]
                partly = Graph(apply_changes(self.graph, before, moments))
                moments |= collect_moments(self.graph, partly, [by_name[name] for name in stage], self._batches)
                done.update(stage)
                advance()
        return apply_changes(self.graph, changes, moments)

    def label(self, point: Point) -> str:
        """Return a point as a phrase."""
        return point.label(self.macs_before)

    def nothing_found(self, why: str) -> NothingGainedError:
        """Return the error that holds what was measured."""
        return NothingGainedError(why, bound=self.bound, macs_before=self.macs_before, points=self.points)

    def is_worthwhile(self, point: Point) -> bool:
        """Return True if a graph saves enough to be another network."""
        return self.macs_before >= MIN_GAIN * point.macs

    def _collect(self) -> dict[str, Moments]:
        removals = {layer.name for pair in readers(self.graph) for layer in pair}
        layers = [layer for layer in candidates(self.graph) if self._factors or layer.name in removals]
        with self._progress.task("collecting what layers read"):
            moments = collect_moments(self.graph, None, layers, self._batches)
        seen = {name: entry.windows / len(entry.covariance32) for name, entry in moments.items()}
        few = sorted((name for name in seen if seen[name] < WINDOWS_PER_INPUT), key=seen.__getitem__)
        if few:
            self.notes.append(
                f"the images are too few or too small for {len(few)} layers, which saw less than {WINDOWS_PER_INPUT} "
                f"windows per weight ({few[0]}: {seen[few[0]]:.1f}): their fit is regularized, and less accurate"
            )
        return moments

    def _measure_layers(self) -> dict[str, list[Option]]:
        multiple = MULTIPLES[self._options.target]
        changes: dict[str, list[Change]] = {}
        for layer in candidates(self.graph) if self._factors else ():
            changes[f"factor {layer.name}"] = factor_changes(self.graph, layer, self._moments[layer.name], multiple)
        for layer, reader in readers(self.graph):
            changes[f"channels {layer.name}"] = channel_changes(
                self.graph, layer, reader, self._moments[reader.name], multiple
            )
        changes = {slot: found for slot, found in changes.items() if found}
        found = measure_effects(
            self.graph,
            changes,
            self._moments,
            self.costs,
            self._probing,
            together=max(1, math.ceil(len(changes) * self._probe_macs / EFFECT_MACS)),
            deadline=self._deadline.part(EFFECT_TIME),
            journal=self._journal,
            progress=self._progress,
        )
        if len(found) < len(changes):
            self.notes.append(
                f"{len(changes) - len(found)} layers were not looked at: the time budget was spent; give more to try "
                "them"
            )
        return found

    def _first_budget(self) -> float:
        """Return the error power of the output at which the bound is about reached."""
        psnr = self.evaluator.evaluate_model(self.graph.model).psnr_db
        allowed = self.bound.max_psnr_drop or 1.0
        fidelity = next((db for db in np.arange(90.0, 20.0, -0.5) if other_kinds_drop(psnr, db) > allowed), 20.0)
        return float(10 ** (-fidelity / 10))

    def _allocate(self, budget: float) -> list[Change]:
        return [option.change for option in allocate(self._options_by_slot, self.costs, budget)]

    def _refine(self, budget: float) -> list[Point]:
        """Fit the layers in stages, which leaves room for more changes; return the graphs that keep the bound.

        Args:
            budget: error power of the best graph without stages.
        """
        kept: list[Point] = []
        low, high = budget, math.inf
        budget *= REFINED_START
        for _ in range(REFINED_TRIALS):
            if self._deadline.passed:
                break
            changes = tuple(self._allocate(budget))
            if any(point.staged and point.changes == changes for point in self.points):
                break  # ranks are coarse: budgets between lead to nothing new
            point, _ = self.measured(changes, staged=True)
            self._progress.note(f"fitted in stages: {self.label(point)}")
            if self.bound.is_satisfied_by(point.quality):
                low = budget
                kept.append(point)
            else:
                high = budget
            budget = self._next_budget(budget, low, high, self.bound.used_by(point.quality))
            if high < 1.1 * low:
                break
        return kept

    def _next_budget(self, budget: float, low: float, high: float, used: float) -> float:
        """Return the next budget to try: losses are about proportional to the error power, approached from below.

        Args:
            budget: what was tried.
            low, high: the largest that kept the bound (0: none) and the smallest that did not.
            used: part of the bound that was used, 1 for all.
        """
        step = 0.95 * budget / min(max(used, 0.25), 4.0)
        if 1.03 * low < step < high / 1.03:
            return step
        return math.sqrt(low * high) if low and high < math.inf else 1.5 * low if low else high / 4
