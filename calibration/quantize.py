"""The one public function of this stage: from an FP32 ONNX file and real images to a typed or quantized one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from srdeploy.calibration.fp32 import read_fp32_graph
from srdeploy.calibration.half import Island, convert_to_half, emulate_half, find_islands
from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.images.effort import select_half_held_out, select_overflow_samples
from srdeploy.calibration.int8.builder import Decisions, GraphBuilder
from srdeploy.calibration.int8.placement import RECIPES, macs_share_of
from srdeploy.calibration.int8.ranges import Ranges, read_ranges
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.measurements import Measurements
from srdeploy.calibration.observe import observe_magnitudes
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.rewrites.deconvolution import rewrite_deconvolutions
from srdeploy.calibration.rewrites.streams import add_reader_scales
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.choose import Choice, choose
from srdeploy.calibration.search.evaluate import Evaluator, GraphQuality, OpenEngine, open_model
from srdeploy.calibration.search.layer_times import Clock, EngineClock, LayerTimes, with_files
from srdeploy.calibration.search.readback import Readback, read_back
from srdeploy.calibration.search.sensitivity import Costs
from srdeploy.core.artifact import atomic_files, sha256_of_bytes
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import int8_weights_overflow, package_versions
from srdeploy.core.errors import BuildError, GateError, InputError, UsageError
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.onnx_file import GraphFile, set_contract
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.samples import Sample
from srdeploy.core.tail import merge_tail

CPU_TARGETS = (Target.OPENVINO, Target.ONNXRUNTIME)
DECONVOLUTIONS_REWRITTEN = "OpenVINO has no INT8 kernel for these deconvolutions: they became exact convolutions"
NOT_RUN_HERE = (
    "this processor lacks VNNI, which 8-bit weights need: the graph is for others, was evaluated by emulation "
    "alone, and what engines do with it was not read back"
)
_PACKAGES = ("onnx", "onnxruntime", "openvino", "numpy")


@dataclass(frozen=True)
class QuantizeResult:
    """What was written and what is known about it.

    Attributes:
        output: the ONNX file; its manifest is next to it.
        precision: of the heavy layers.
        target: the engine family it is laid out for.
        quality: fidelity and drop; None without images.
        int8_layers: names of the layers that are 8-bit in the graph; empty for FP16 and BF16.
        int8_macs: their share of the multiply-adds, 0..1.
        weight_bits: 8, or 7 for weights within +-64; None for graphs that are not INT8.
        floats: layer -> reason, for the layers of an 8-bit graph that stay float.
        merged: layers of the network that are one layer in the graph (see core/tail.py).
        islands: nodes of a 16-bit graph that stay FP32, with reasons.
        readback: what the engine reports that it runs; None when no engine of the target runs here.
        choice: the search and all it measured; None for FP16 and BF16.
        latency_ms: of the graph and of the float graph on the engine, first held-out image, interleaved; an
            indication, not a benchmark. On a GPU of the two engines, only with a bound. None where the engine does not
            run here.
        notes: what a user should know, one sentence each.
        artifacts: further files written: name -> path.
    """

    output: Path
    precision: Precision
    target: Target
    quality: GraphQuality | None
    int8_layers: tuple[str, ...] = ()
    int8_macs: float = 0.0
    weight_bits: int | None = None
    floats: Mapping[str, str] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    islands: tuple[Island, ...] = ()
    readback: Readback | None = None
    choice: Choice | None = None
    latency_ms: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    artifacts: Mapping[str, Path] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "output": str(self.output),
            "precision": self.precision.value,
            "target": self.target.value,
            "quality": self.quality.to_json() if self.quality else None,
            "int8_layers": len(self.int8_layers),
            "int8_macs_share": round(self.int8_macs, 4),
            "weight_bits": self.weight_bits,
            "float_layers": dict(self.floats),
            "merged_layers": list(self.merged),
            "fp32_islands": [{"node": island.node, "reason": island.reason} for island in self.islands],
            "readback": self.readback.to_json() if self.readback else None,
            "search": self.choice.to_json() if self.choice else None,
            "latency_ms": dict(zip(("quantized", "float"), self.latency_ms, strict=True)) if self.latency_ms else None,
            "notes": list(self.notes),
            "artifacts": {name: str(path) for name, path in self.artifacts.items()},
        }


@dataclass(frozen=True)
class _Job:
    """What a graph is made from and for; see `quantize`."""

    model: onnx.ModelProto
    contract: ModelContract
    sha256: str
    precision: Precision
    target: Target
    calibration: CalibrationSet | None
    options: QuantizeOptions
    ranges: Ranges | None
    open_engine: OpenEngine | None
    clock: Clock | None
    measurements: Measurements
    progress: Progress
    reference: GraphFile

    def key(self, form: str) -> str:
        """Name what decides a measurement: the network, the images and the form that the graph was rewritten to."""
        return f"{self.sha256}:{self.calibration.sha256 if self.calibration else ''}:{form}"

    def evaluator(self, samples: Sequence[Sample], *, tested: bool = False) -> Evaluator:
        """Return an evaluator whose reference outputs are shared by all graphs of this network."""
        truth = (self.calibration.truth if self.calibration else None) or "hr"
        key = replace(self, sha256=self.reference.sha256).key("any")
        return Evaluator(
            self.reference.model,
            samples,
            self.contract,
            truth=truth,
            measurements=self.measurements,
            key=key,
            tested=tested,
        )


@dataclass(frozen=True)
class _Outcome:
    """A finished graph before it is written."""

    model: onnx.ModelProto
    result: QuantizeResult
    ranges: Ranges | None = None
    journal: Journal | None = None


def quantize(
    onnx: Path,  # the name the command line and other stages use
    output: Path,
    *,
    precision: Precision,
    target: Target,
    calibration: CalibrationSet | None,
    options: QuantizeOptions | None = None,
    open_engine: OpenEngine | None = None,
    clock: Clock | None = None,
    force: bool = False,
    progress: Progress = SILENT,
    shared: Measurements | None = None,
    reference: Path | None = None,
) -> QuantizeResult:
    """Bring an FP32 graph to another precision and write it with a manifest.

    Args:
        onnx: an FP32 graph that `srdeploy export` wrote.
        output: the ONNX file to write; `output.json` and the folder `output stem.calibration/` go beside it.
        precision: FP16, BF16, INT8 or FP8.
        target: the engine family that the graph is for.
        calibration: real images; may be None for FP16 and BF16 only.
        options: see `QuantizeOptions`.
        open_engine: opens an ONNX file with the target's engine, where it runs on this machine: quality, speed and
            what really became 8-bit are then measured on it.
        clock: times graphs on the GPU that the target is for, where there is one: a search pays for exact layers in
            its milliseconds, and the graph of a bound is timed next to the FP16 one.
        force: replace existing outputs.
        progress: where to report.
        reference: the FP32 graph that losses on held-out images are measured against; None for `onnx` itself. For a
            compressed graph, the one that it was made from: the bound then holds for both losses together.
        shared: measurements to share with other graphs of the same network and images; see `Measurements`.

    Raises:
        InputError: the graph or the images do not fit, or an activation is not finite.
        UsageError: no images for INT8 or FP8, options that do not fit, or an output that exists.
        GateError: `max_psnr_drop` cannot be met within the time; it names the best that was found.
        BuildError: the engine does not run as 8-bit what the graph asks for.
    """
    options = options or QuantizeOptions()
    _check(precision, target, calibration)
    source = read_fp32_graph(onnx)
    model, contract, sha256 = source.model, source.contract, source.sha256
    folder = artifacts_folder(output)
    paths = {"set": folder / "set.json", "ranges": folder / "ranges.json", "sensitivity": folder / "sensitivity.json"}
    with atomic_files(output, manifest_path(output), *paths.values(), force=force) as temporaries:
        job = _Job(
            model=model,
            contract=contract,
            sha256=sha256,
            precision=precision,
            target=target,
            calibration=calibration,
            options=options,
            ranges=read_ranges(options.ranges, model_sha256=sha256) if options.ranges else None,
            open_engine=open_engine,
            clock=clock,
            measurements=shared or Measurements(),
            progress=progress,
            reference=read_fp32_graph(reference) if reference else source,
        )
        made = _make_half(job) if precision in (Precision.FP16, Precision.BF16) else _make_quantized(job)
        _describe(made.model, contract, precision, target, made.result, calibration, sha256)
        data = made.model.SerializeToString()
        temporaries[0].write_bytes(data)
        documents = {
            "set": calibration.to_json() if calibration else None,
            "ranges": made.ranges.to_json() if made.ranges else None,
            "sensitivity": made.result.choice.sensitivity_json() if made.result.choice else None,
        }
        for document, temporary in zip(documents.values(), temporaries[2:], strict=True):
            if document is not None:
                temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        written = {name: paths[name] for name, document in documents.items() if document is not None}
        result = replace(made.result, output=output, artifacts=written)
        manifest = Manifest(
            kind="onnx",
            sha256=sha256_of_bytes(data),
            sources=(Source("onnx", onnx.name, sha256),),
            details=result.to_json() | {"calibration": calibration.to_json() if calibration else None},
            versions=package_versions(_PACKAGES),
        )
        temporaries[1].write_text(manifest.to_json(), encoding="utf-8")
    if made.journal is not None:
        made.journal.close()
    return result


def artifacts_folder(output: Path) -> Path:
    """Return the folder beside an output that holds set.json, ranges.json and sensitivity.json."""
    return output.with_name(f"{output.stem}.calibration")


def _check(precision: Precision, target: Target, calibration: CalibrationSet | None) -> None:
    if precision == Precision.FP32:
        raise UsageError("precision fp32", expected="fp16, bf16, int8 or fp8; the exported file is FP32 already")
    if precision in (Precision.INT8, Precision.FP8) and calibration is None:
        raise UsageError(
            f"no images for {precision.value}",
            expected="real images to take ranges from",
            next_step="pass --images DIR; random data would give random ranges",
        )
    if precision == Precision.FP8 and target in CPU_TARGETS:
        raise UsageError(f"precision fp8 for {target.value}", expected="target tensorrt or tensorrt-rtx")


def _make_half(job: _Job) -> _Outcome:
    notes = []
    model, precision, calibration = job.model, job.precision, job.calibration
    if precision == Precision.BF16 and job.target not in CPU_TARGETS:
        model, rewritten = rewrite_deconvolutions(model, phases=False)
        if rewritten:
            notes.append(f"{rewritten} deconvolutions became 2x2 convolutions: TensorRT has no BF16 deconvolution")
    graph = Graph(model)
    largest = None
    if calibration is not None:
        samples = select_overflow_samples(calibration.samples, job.contract.macs_per_pixel)
        batches = (sample.image for sample in samples)
        largest = observe_magnitudes(graph, batches, count=len(samples), progress=job.progress)
    else:
        notes.append("no images were given: that no activation overflows was not checked")
    islands = find_islands(graph, precision, largest)
    typed = convert_to_half(model, precision, islands)
    quality = None
    if calibration is not None:
        held_out = select_half_held_out(calibration.held_out, job.contract.macs_per_pixel)
        quality = job.evaluator(held_out).evaluate_model(emulate_half(model, precision, islands))
    result = QuantizeResult(Path(), precision, job.target, quality, islands=islands, notes=tuple(notes))
    return _Outcome(typed, result)


def _make_quantized(job: _Job) -> _Outcome:
    """Quantize; where the engine leaves deconvolutions float, quantize again with exact 2x2 convolutions instead."""
    try:
        return _quantize_graph(job)
    except BuildError:
        has = any(node.op_type == "ConvTranspose" for node in job.model.graph.node)
        if job.target != Target.OPENVINO or job.options.deconvolution != "auto" or not has:
            raise
    job.progress.note(DECONVOLUTIONS_REWRITTEN)
    made = _quantize_graph(replace(job, options=replace(job.options, deconvolution="rewrite"), ranges=None))
    return replace(made, result=replace(made.result, notes=(*made.result.notes, DECONVOLUTIONS_REWRITTEN)))


def _quantize_graph(job: _Job) -> _Outcome:
    options, target, calibration, model = job.options, job.target, job.calibration, job.model
    assert calibration is not None
    recipe = options.apply_to_recipe(RECIPES[target])
    form = "as exported"
    if recipe.deconvolution == "rewrite":
        phases = target in CPU_TARGETS
        model, rewritten = rewrite_deconvolutions(model, phases=phases)
        recipe = replace(recipe, deconvolution="int8")
        form = f"deconvolutions rewritten, phases {phases}" if rewritten else form
    merged: tuple[str, ...] = ()
    if recipe.merge_tail:
        model, merged = merge_tail(model, apart=options.keep)
        recipe = replace(recipe, merge_tail=bool(merged))
    journal = Journal(job.sha256, calibration.sha256, repr(recipe), job.precision.value)
    if recipe.reader_scales:
        model = add_reader_scales(model)
    if journal.resumed:
        job.progress.note("resuming: measurements of an interrupted run are used")
    builder = GraphBuilder(
        model, recipe, job.precision, calibration, job.progress, job.ranges, journal, job.measurements, job.key(form)
    )
    _check_ranges(builder, job)
    # An engine that is known to compute this graph wrongly here cannot evaluate it.
    foreign = target in CPU_TARGETS and int8_weights_overflow(recipe.weight_bits)
    runnable = job.open_engine if target in CPU_TARGETS and not foreign else None
    evaluator = job.evaluator(calibration.held_out)
    # Without a bound the held-out images choose nothing, and test the graph themselves.
    bounded = options.bound != Bound() and calibration.test
    test = job.evaluator(calibration.test, tested=True) if bounded else None

    def islands_of(decisions: Decisions) -> tuple[Island, ...]:
        strength = decisions.strength
        return find_islands(builder.equalized(strength)[0], Precision.FP16, builder.magnitudes(strength))

    def costs_of(decisions: Decisions) -> Costs | None:
        if options.cost == "macs":
            return None
        int8, plain = builder.build(decisions)[0], model
        if job.clock is not None:
            islands = islands_of(decisions)
            int8, plain = (convert_to_half(graph, Precision.FP16, islands) for graph in (int8, plain))
            return LayerTimes(builder.graph.layers, int8, plain, job.clock)
        if runnable is not None:
            clock = EngineClock(runnable, evaluator.samples[0].image, target.value)
            return LayerTimes(builder.graph.layers, int8, plain, clock)
        return None

    choice = choose(
        builder, job.contract, options, runnable, calibration.samples, evaluator, journal, costs_of, job.progress, test
    )
    quantized, placement = builder.build(choice.decisions)
    islands: tuple[Island, ...] = ()
    quality = choice.taken.deciding
    if recipe.half:
        islands = islands_of(choice.decisions)
        quality = (test or evaluator).evaluate_model(emulate_half(quantized, Precision.FP16, islands))
        quantized = convert_to_half(quantized, Precision.FP16, islands)
        _check_bound(options, quality)
    readback, latency = None, None
    if job.clock is not None and options.bound != Bound():
        int8_ms, float_ms = with_files(
            (quantized, convert_to_half(model, Precision.FP16, islands)), job.clock.latencies_ms
        )
        latency = int8_ms, float_ms
    if runnable is not None:
        with open_model(quantized, runnable) as runner, open_model(model, runnable) as float_runner:
            int8_ms, float_ms = evaluator.latencies_ms(runner, float_runner)
            latency = int8_ms, float_ms
            readback = read_back(runner.info, builder.graph, placement)
    result = QuantizeResult(
        output=Path(),
        precision=job.precision,
        target=target,
        quality=quality,
        int8_layers=placement.layers,
        int8_macs=macs_share_of(builder.graph, placement.layers),
        weight_bits=recipe.weight_bits if job.precision == Precision.INT8 else None,
        floats=placement.floats,
        islands=islands,
        readback=readback,
        choice=choice,
        latency_ms=latency,
        merged=merged,
        notes=(*_notes(target, latency, job.clock), *((NOT_RUN_HERE,) if foreign else ())),
    )
    return _Outcome(quantized, result, builder.ranges(choice.decisions, model_sha256=job.sha256), journal)


def _check_ranges(builder: GraphBuilder, job: _Job) -> None:
    missing = [tensor for tensor in builder.tensors if job.ranges is not None and tensor not in job.ranges.ranges]
    if missing:
        raise InputError(
            f"{job.options.ranges} has no range of {missing[0]}: it was made for a graph laid out otherwise",
            expected="the --target, --keep and --deconvolution of the run that wrote it",
            next_step="leave --ranges out to collect new ones",
        )


def _check_bound(options: QuantizeOptions, quality: GraphQuality) -> None:
    """Refuse a graph that FP16 around its 8-bit layers has brought below the bound."""
    if not options.bound.is_satisfied_by(quality):
        raise GateError(
            f"the finished graph loses {quality.drop_db:.4f} dB at a fidelity of {quality.fidelity_db:.2f} dB",
            expected=str(options.bound),
            next_step="allow a larger drop, or use FP16",
        )


def _notes(target: Target, latency: tuple[float, float] | None, clock: Clock | None) -> tuple[str, ...]:
    notes = []
    if target == Target.TENSORRT_RTX:
        notes.append(
            "on TensorRT for RTX FP16 is the recommended precision: its INT8 convolutions write floats and need "
            "another kernel for scale, bias and ReLU; take INT8 there only when you have measured it to be faster"
        )
    if latency is not None and latency[0] >= latency[1]:
        where, other = ("here", "float") if clock is None else (f"with {clock.place}", "FP16")
        notes.append(
            f"not recommended on {target.value}: {latency[0]:.3g} ms {where}, the {other} graph {latency[1]:.3g} ms"
        )
    return tuple(notes)


def _describe(
    model: onnx.ModelProto,
    contract: ModelContract,
    precision: Precision,
    target: Target,
    result: QuantizeResult,
    calibration: CalibrationSet | None,
    sha256: str,
) -> None:
    """Write the contract of the new precision into the graph's metadata."""
    provenance = dict(contract.provenance) | {
        "quantization": {
            "target": target.value,
            "fp32_sha256": sha256,
            "quality": result.quality.to_json() if result.quality else None,
            "int8_macs_share": round(result.int8_macs, 4),
            "weight_bits": result.weight_bits,
            "calibration_sha256": calibration.sha256 if calibration else None,
            "calibration_images": sorted(calibration.image_hashes) if calibration else [],
        }
    }
    set_contract(model, replace(contract, precision=precision, provenance=provenance))


__all__: Sequence[str] = ("QuantizeOptions", "QuantizeResult", "artifacts_folder", "quantize")
