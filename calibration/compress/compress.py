"""From an FP32 graph and real images to one of fewer multiply-adds that keeps a bound in dB on images kept aside."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from srdeploy.calibration.compress.layers import (
    Change,
    candidates,
    channel_changes,
    factor_changes,
    matrix,
    pareto,
    readers,
)
from srdeploy.calibration.compress.moments import Moments, collect_moments
from srdeploy.calibration.compress.rebuild import apply_changes
from srdeploy.calibration.compress.result import CompressOptions, CompressResult, Point
from srdeploy.calibration.fp32 import read_fp32_graph
from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.search.evaluate import Evaluator, OpenEngine, open_model
from srdeploy.core.artifact import atomic_files, sha256_of_bytes
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import GateError
from srdeploy.core.imaging.psnr import drop_for_fidelity
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.onnx_file import set_contract
from srdeploy.core.onnx_graph import Graph, Layer
from srdeploy.core.precision import Target
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.samples import windows_of

IMAGES = 16
"""Windows of images that layers are fitted on, and SIDE pixels square each."""
SIDE = 64
TUNING_IMAGES, TUNING_SIDE = 4, 48
"""Windows that the effect of a single layer on the output is measured on; one measurement per layer, so small ones."""
STAGES = 8
"""Layers are fitted in so many stages, each to what the stages before it really produce."""
TRIALS = 8
MIN_GAIN = 1.02
"""A graph with less than 2 % fewer multiply-adds is not worth a network that is not quite the one that was trained."""
MULTIPLES = {Target.OPENVINO: 16, Target.ONNXRUNTIME: 16, Target.TENSORRT: 8, Target.TENSORRT_RTX: 8}
"""Channels that engines compute together: 16 32-bit lanes of AVX-512, 8 halves of a tensor core."""
_PROBE_ERROR = 0.01
_PACKAGES = ("onnx", "onnxruntime", "openvino", "numpy")


def compress(
    onnx: Path,  # the name the command line and other stages use
    output: Path,
    *,
    calibration: CalibrationSet,
    options: CompressOptions,
    open_engine: OpenEngine | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> CompressResult:
    """Compress an FP32 graph and write it with a manifest.

    Args:
        onnx: an FP32 graph that `srdeploy export` wrote.
        output: the ONNX file to write; `output.json` goes next to it.
        calibration: real images: those that layers are fitted to, and those kept aside for the bound.
        options: bound, target, time.
        open_engine: opens an ONNX file with the target's engine where it runs here: changes that are not faster on it
            are undone.
        force: replace existing outputs.
        progress: where to report.

    Raises:
        InputError: the graph is not an exported FP32 graph, or the images do not fit.
        UsageError: options that make no sense, or an output that exists.
        GateError: nothing with fewer multiply-adds keeps the bound; the message lists what was measured.
    """
    source = read_fp32_graph(onnx)
    with atomic_files(output, manifest_path(output), force=force) as (file, sidecar):
        journal = Journal(source.sha256, calibration.sha256, "compress", str(options.target))
        if journal.resumed:
            progress.note("resuming with what an earlier, interrupted run measured")
        search = _Search(source, calibration, options, journal, progress)
        point, model = search.run()
        latency = None
        if open_engine is not None:
            point, model, latency = search.undo_what_is_not_faster(point, model, open_engine)
        contract = _described(source.contract, point, source.sha256, calibration, search)
        set_contract(model, contract)
        data = model.SerializeToString()
        file.write_bytes(data)
        result = CompressResult(
            output=output,
            changes=point.changes,
            macs_before=search.macs_before,
            macs_after=point.macs,
            quality=point.quality,
            points=tuple(search.points),
            latency_ms=latency,
            errors=search.error_shares(point.changes),
            notes=tuple(search.notes),
        )
        manifest = Manifest(
            kind="onnx",
            sha256=sha256_of_bytes(data),
            sources=(Source("onnx", onnx.name, source.sha256),),
            details=result.to_json() | {"calibration": calibration.to_json()},
            versions=package_versions(_PACKAGES),
        )
        sidecar.write_text(manifest.to_json(), encoding="utf-8")
    journal.close()
    return result


class _Search:
    """Measures what layers contribute, chooses changes for a budget of error, and measures the graphs they make."""

    def __init__(
        self,
        source: Graph,
        calibration: CalibrationSet,
        options: CompressOptions,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self._graph = Graph(source.model)
        self._options = options
        self._journal = journal
        self._progress = progress
        self._deadline = time.monotonic() + options.time_budget_s
        contract: ModelContract = source.contract  # type: ignore[attr-defined]  # a GraphFile
        windows = windows_of(calibration.samples, IMAGES, SIDE)
        self._batches = [sample.image for sample in windows]
        self._tuning = Evaluator(source.model, windows_of(windows, TUNING_IMAGES, TUNING_SIDE), contract)
        self._evaluator = Evaluator(source.model, calibration.held_out, contract)
        self.macs_before = sum(layer.macs for layer in self._graph.layers)
        self.points: list[Point] = []
        self.notes: list[str] = []
        self._moments = self._collect()
        self._changes, self._weights = self._measure_layers()

    def run(self) -> tuple[Point, onnx.ModelProto]:
        """Find the graph of the lowest cost that keeps the bound.

        Raises:
            GateError: there is none with `MIN_GAIN` fewer multiply-adds.
        """
        budget = self._first_budget()
        low, high = 0.0, math.inf
        best: Point | None = None
        with self._progress.task("searching the bound", total=TRIALS) as advance:
            for _ in range(TRIALS):
                point = self._measure(self._choose(budget))
                kept = self._options.is_satisfied_by(point.quality)
                advance(note=self._label(point))
                if kept:
                    low = budget
                    if best is None or point.macs < best.macs:
                        best = point
                else:
                    high = budget
                budget = budget * 3 if high == math.inf else budget / 4 if low == 0 else math.sqrt(low * high)
                if (low and high / max(low, 1e-30) < 1.15) or time.monotonic() > self._deadline:
                    break
        return self._refine(best, low)

    def undo_what_is_not_faster(
        self, point: Point, model: onnx.ModelProto, open_engine: OpenEngine
    ) -> tuple[Point, onnx.ModelProto, tuple[float, float]]:
        """Time the graph without each kind of change on the engine, and undo those that it does not gain from."""
        kinds: dict[tuple[Any, ...], list[Change]] = {}
        layers = {layer.name: layer for layer in self._graph.layers}
        for change in point.changes:
            layer = layers[change.layer]
            key = (change.form, change.rank, layer.op, layer.channels_in, layer.channels_out, layer.resolution)
            kinds.setdefault(key, []).append(change)
        changes = list(point.changes)
        with self._progress.task("timing changes on the engine", total=len(kinds)) as advance:
            for kind in kinds.values():
                others = [change for change in changes if change not in kind]
                with (
                    open_model(self._build(changes), open_engine) as with_kind,
                    open_model(self._build(others), open_engine) as without,
                ):
                    fast, slow = self._evaluator.latencies_ms(with_kind, without, repeats=7, fastest=True)
                if fast >= slow:
                    changes = others
                    named = f"{kind[0].form} {kind[0].rank} of {kind[0].layer}" + (
                        f" and {len(kind) - 1} like it" if len(kind) > 1 else ""
                    )
                    self.notes.append(f"undone, since not faster on the engine: {named}")
                advance()
        if len(changes) < len(point.changes):
            model = self._recalibrated(changes)
            point = self._measured(model, changes)
            if self.macs_before < MIN_GAIN * point.macs:
                raise self._nothing("no change is faster on the engine")
        with open_model(model, open_engine) as ours, open_model(self._graph.model, open_engine) as original:
            latency = self._evaluator.latencies_ms(ours, original, repeats=7)
        return point, model, (latency[0], latency[1])

    def error_shares(self, changes: Sequence[Change]) -> dict[str, float]:
        """Return each change's share of the predicted error power of the output."""
        powers = {change.key: self._weights.get(_source_of_error(change), 0.0) * change.error for change in changes}
        total = max(sum(powers.values()), 1e-30)
        return {key: power / total for key, power in powers.items()}

    def _collect(self) -> dict[str, Moments]:
        layers = candidates(self._graph)
        with self._progress.task("collecting what layers read"):
            moments = collect_moments(self._graph, None, layers, self._batches)
        few = [name for name, entry in moments.items() if entry.windows < len(entry.covariance)]
        if few:
            self.notes.append(
                f"{len(few)} layers have more inputs than windows were seen ({few[0]}): their fit is regularized; "
                "more or larger images make it better"
            )
        return moments

    def _measure_layers(self) -> tuple[dict[str, list[Change]], dict[str, float]]:
        """Return the possible changes by what they exclude, and the output's error per error of each layer's own."""
        multiple = MULTIPLES[self._options.target]
        by_name = {layer.name: layer for layer in self._graph.layers}
        groups: dict[str, list[Change]] = {}
        for layer in candidates(self._graph):
            groups[f"factor {layer.name}"] = pareto(
                factor_changes(self._graph, layer, self._moments[layer.name], multiple)
            )
        for layer, reader in readers(self._graph):
            groups[f"channels {layer.name}"] = pareto(
                channel_changes(self._graph, layer, reader, self._moments[reader.name], multiple)
            )
        groups = {name: found for name, found in groups.items() if found}
        weights: dict[str, float] = {}
        order = sorted(groups, key=lambda name: -groups[name][-1].saving)
        share = self._deadline - (self._deadline - time.monotonic()) * 0.5
        skipped = 0
        with self._progress.task("measuring what each layer does to the output", total=len(groups)) as advance:
            for name in order:
                source = _source_of_error(groups[name][0])
                if source not in weights:
                    if time.monotonic() > share:
                        skipped += 1
                        del groups[name]
                        continue
                    target = _PROBE_ERROR * self._power_of(by_name[source])
                    probe = min(groups[name], key=partial(_distance, target))
                    weights[source] = self._journal.number(f"effect {probe.key}", partial(self._effect, probe))
                advance()
        if skipped:
            self.notes.append(f"{skipped} layers were not looked at: the time budget was spent; give more to try them")
        return groups, weights

    def _power_of(self, layer: Layer) -> float:
        """Return the power of a layer's outputs, in the units of `Change.error`."""
        weights = matrix(self._graph, layer)
        return max(float(np.einsum("ij,ij->", weights @ self._moments[layer.name].covariance, weights)), 1e-30)

    def _effect(self, change: Change) -> float:
        """Return the output's error power per error power of one layer."""
        quality = self._tuning.evaluate_model(apply_changes(self._graph, [change], self._moments, refitted=False))
        return float(10 ** (-quality.fidelity_db / 10) / max(change.error, 1e-30))

    def _first_budget(self) -> float:
        """Return the error power of the output at which the bound is about reached."""
        psnr = self._evaluator.evaluate_model(self._graph.model).psnr_db
        fidelity = next((db for db in np.arange(90.0, 20.0, -0.5)
                         if drop_for_fidelity(psnr, db) > self._options.max_psnr_drop), 20.0)  # fmt: skip
        return float(10 ** (-fidelity / 10))

    def _choose(self, budget: float) -> list[Change]:
        """Return the changes of the highest saving whose predicted error powers together stay within a budget.

        A price per saved cost is searched at which every layer takes what is best for itself: errors add up.
        """
        low, high = 1e-30, 1e-30
        while self._spent(self._at_price(high)) <= budget and high < 1e30:
            low, high = high, high * 10
        for _ in range(40):
            middle = math.sqrt(low * high)
            if self._spent(self._at_price(middle)) <= budget:
                low = middle
            else:
                high = middle
        return self._at_price(low)

    def _at_price(self, price: float) -> list[Change]:
        chosen = []
        for group in self._changes.values():
            best, value = None, 0.0
            for change in group:
                gain = price * change.saving - self._weights[_source_of_error(change)] * change.error
                if gain > value:
                    best, value = change, gain
            if best is not None:
                chosen.append(best)
        return chosen

    def _spent(self, changes: Sequence[Change]) -> float:
        return sum(self._weights[_source_of_error(change)] * change.error for change in changes)

    def _build(self, changes: Sequence[Change]) -> onnx.ModelProto:
        return apply_changes(self._graph, changes, self._moments)

    def _measure(self, changes: Sequence[Change]) -> Point:
        return self._measured(self._build(changes), changes)

    def _measured(self, model: onnx.ModelProto, changes: Sequence[Change]) -> Point:
        macs = sum(layer.macs for layer in Graph(model).layers)
        point = Point(tuple(changes), macs, self._evaluator.evaluate_model(model))
        self.points.append(point)
        return point

    def _refine(self, best: Point | None, budget: float) -> tuple[Point, onnx.ModelProto]:
        """Fit the layers in stages, and see whether that leaves room for more."""
        if best is None or self.macs_before < MIN_GAIN * best.macs:
            raise self._nothing("nothing to gain here")
        model = self._recalibrated(best.changes)
        point = self._measured(model, best.changes)
        if not self._options.is_satisfied_by(point.quality):  # fitted to fewer windows than the bound is measured on
            return best, self._build(best.changes)
        for _ in range(3):
            if time.monotonic() > self._deadline:
                break
            room = min(max(self._options.max_psnr_drop / max(point.quality.drop_db, 1e-6), 1.0), 3.0)
            if room < 1.05:
                break
            budget *= room
            changes = self._choose(budget)
            further = self._recalibrated(changes)
            tried = self._measured(further, changes)
            if not self._options.is_satisfied_by(tried.quality) or tried.macs >= point.macs:
                break
            point, model = tried, further
        return point, model

    def _recalibrated(self, changes: Sequence[Change]) -> onnx.ModelProto:
        """Make changes in stages: each layer is fitted to what the stages before it produce."""
        order = {layer.name: index for index, layer in enumerate(self._graph.layers)}
        by_name = {layer.name: layer for layer in self._graph.layers}
        # Where channels go, their reader changes: it is fitted in the stage of the layer that loses them or later.
        touched = sorted({name for change in changes for name in (change.layer, change.reader) if name}, key=order.get)  # type: ignore[arg-type]
        moments = dict(self._moments)
        size = -(-len(touched) // STAGES)
        for start in range(size, len(touched), size):
            done = set(touched[:start])
            before = [change for change in changes if {change.layer, change.reader} - {None} <= done]
            if not before:
                continue
            stage = [by_name[name] for name in touched[start : start + size]]
            partly = Graph(apply_changes(self._graph, before, moments))
            moments |= collect_moments(self._graph, partly, stage, self._batches)
        return apply_changes(self._graph, changes, moments)

    def _label(self, point: Point) -> str:
        return f"{self.macs_before / point.macs:.2f}x fewer multiply-adds: {point.quality.drop_db:.4f} dB"

    def _nothing(self, why: str) -> GateError:
        table = "; ".join(self._label(point) for point in sorted(self.points, key=lambda point: -point.macs))
        return GateError(
            f"{why}: no graph with at least {100 * (MIN_GAIN - 1):.0f} % fewer multiply-adds was found ({table})",
            expected=self._options.bound(),
            next_step="allow a larger --max-psnr-drop, or use the graph as it is",
        )


def _distance(error: float, change: Change) -> float:
    """Return how far a change's error is from another, in orders of magnitude."""
    return abs(math.log(max(change.error, 1e-30) / error))


def _source_of_error(change: Change) -> str:
    """Return the layer whose outputs a change's error is stated for."""
    return change.reader or change.layer


def _described(
    contract: ModelContract, point: Point, sha256: str, calibration: CalibrationSet, search: _Search
) -> ModelContract:
    compression = {
        "fp32_sha256": sha256,
        "fewer_macs": round(search.macs_before / point.macs, 3),
        "quality": point.quality.to_json(),
        "layers": {change.key: round(share, 4) for change, share in zip(
            point.changes, search.error_shares(point.changes).values(), strict=True)},
        "calibration_sha256": calibration.sha256,
    }  # fmt: skip
    return replace(
        contract,
        macs_per_pixel=contract.macs_per_pixel * point.macs / search.macs_before,
        provenance=dict(contract.provenance) | {"compression": compression},
    )
