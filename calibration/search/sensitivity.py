"""What layers cost in 8 bits: their part of the image's error, and what it takes to make them more exact.

The error of a group of layers is measured by quantizing that group alone. What it costs to split a group into two 8-bit
convolutions, or to leave it float, is measured with the engine's clock, since it differs by processor.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from srdeploy.calibration.int8.builder import Decisions, GraphBuilder
from srdeploy.calibration.int8.placement import can_split, macs_share_of
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.search.bound import Deadline
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.core.onnx_graph import Layer
from srdeploy.core.progress import SILENT, Progress

PAID_IN_MACS = "exact layers were paid for in multiply-adds: nothing was timed on the target's engine"
SPLIT_ERROR_SHARE = 0.1
"""Splitting a layer takes its activations' error away; that of its weights stays, about a tenth in power."""


@dataclass(frozen=True)
class Change:
    """One way to make some layers more exact.

    Attributes:
        layers: their names.
        split: two 8-bit convolutions each; otherwise float.
        error: of the layers in plain 8 bits, as in `Sensitivity`.
        cost: part of the plain graph's latency that comes on top.
        measured: whether the cost was measured on the engine, or estimated from multiply-adds.
    """

    layers: tuple[str, ...]
    split: bool
    error: float
    cost: float
    measured: bool = False

    def worth(self, left: Mapping[tuple[str, ...], float]) -> float:
        """Return the error that the change removes per cost, when `left` is what the groups still bring."""
        return (left[self.layers] - self.error * (SPLIT_ERROR_SHARE if self.split else 0.0)) / max(self.cost, 1e-9)

    def applied(self, decisions: Decisions, reason: str) -> Decisions:
        """Return decisions with the change made; the reason is kept with layers that become float."""
        others = tuple(name for name in decisions.splits if name not in self.layers)
        if self.split:
            return replace(decisions, splits=(*others, *self.layers))
        return replace(decisions, splits=others, keep={**dict.fromkeys(self.layers, reason), **decisions.keep})


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing some layers alone does.

    Attributes:
        layers: their names.
        error: mean squared error of the image, peak 1, when only they are quantized.
        macs_share: their share of the multiply-adds, 0..1.
        changes: the ways to make them more exact; empty where no search was needed.
    """

    layers: tuple[str, ...]
    error: float
    macs_share: float
    changes: tuple[Change, ...] = ()

    @property
    def fidelity_db(self) -> float:
        """The error in decibels."""
        return -10 * math.log10(max(self.error, 1e-15))

    def decision(self, decisions: Decisions) -> str:
        """Return what became of the layers: "fp32", "split" or "int8"."""
        if set(decisions.keep).issuperset(self.layers):
            return "fp32"
        return "split" if set(decisions.splits).issuperset(self.layers) else "int8"

    def to_json(self, decisions: Decisions) -> dict[str, Any]:
        """Return the entry of `sensitivity.json`."""
        measured = {change.split: round(change.cost, 5) for change in self.changes if change.measured}
        return {
            "layers": list(self.layers),
            "image_mse": self.error,
            "fidelity_db": round(self.fidelity_db, 2),
            "macs_share": round(self.macs_share, 5),
            "latency_share_split": measured.get(True),
            "latency_share_float": measured.get(False),
            "decision": self.decision(decisions),
        }


def measure_sensitivities(
    builder: GraphBuilder,
    evaluator: Evaluator,
    decisions: Decisions,
    deadline: Deadline,
    journal: Journal,
    progress: Progress = SILENT,
) -> list[Sensitivity]:
    """Measure what quantizing groups of layers alone costs, splitting the worst groups as long as time lasts.

    Returns:
        Disjoint groups that cover all quantized layers, in graph order.
    """
    _, placement = builder.build(decisions)
    layers = [layer for layer in builder.graph.layers if layer.name in placement.layers]
    size = max(1, round(len(layers) ** 0.5))
    groups = [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]
    measured: dict[str, Sensitivity] = {}
    order = {layer.name: index for index, layer in enumerate(layers)}

    def measure(group: Sequence[Layer]) -> None:
        names = tuple(layer.name for layer in group)
        others = dict.fromkeys((layer.name for layer in layers if layer.name not in names), "not looked at")
        alone = decisions.keeping({**decisions.keep, **others})
        fidelity = journal.number(
            journal_key(f"alone:{names}", decisions), partial(measure_fidelity, builder, evaluator, alone)
        )
        error = 10.0 ** (-fidelity / 10)
        measured[names[0]] = Sensitivity(names, error, macs_share_of(builder.graph, names))

    with progress.task("measuring the sensitivity of layers", total=len(groups)) as advance:
        for group in groups:
            measure(group)
            advance()
        while not deadline.passed:
            worst = max((entry for entry in measured.values() if len(entry.layers) > 1), key=_error, default=None)
            if worst is None or worst.error < 0.01 * sum(entry.error for entry in measured.values()):
                break
            members = [layer for layer in layers if layer.name in worst.layers]
            half = max(1, len(members) // 2)
            measure(members[:half])
            measure(members[half:])
            advance(0, note=f"{len(measured)} groups")
    return sorted(measured.values(), key=lambda entry: order[entry.layers[0]])


class Costs(Protocol):
    """What changes cost on the engine."""

    @property
    def note(self) -> str:
        """What was measured, as a sentence."""

    def share(self, change: Change) -> float:
        """Return by which part of the plain graph's latency a change makes it slower, at least a thousandth."""


def measure_costs(
    builder: GraphBuilder,
    decisions: Decisions,
    sensitivities: Sequence[Sensitivity],
    costs: Costs | None,
    journal: Journal,
    progress: Progress,
) -> list[Sensitivity]:
    """Return each group with the ways to make it more exact, and their costs.

    Without `costs` they are multiply-adds, brought to the same scale: one more pass in 8 bits, or three more for a
    float layer, as with VNNI.
    """
    layers = {layer.name: layer for layer in builder.graph.layers}
    found = []
    with progress.task("measuring what exact layers cost", total=len(sensitivities)) as advance:
        for entry in sensitivities:
            kinds = [False]
            if builder.recipe.allow_splits and all(can_split(builder.graph, layers[name]) for name in entry.layers):
                kinds = [True, False]
            changes = []
            for split in kinds:
                change = Change(entry.layers, split, entry.error, entry.macs_share * (1.0 if split else 3.0))
                if costs is not None:
                    key = journal_key(f"cost:{split}:{entry.layers}", decisions)
                    change = replace(change, cost=journal.number(key, partial(costs.share, change)), measured=True)
                changes.append(change)
            found.append(replace(entry, changes=tuple(changes)))
            advance()
    return found


def measure_fidelity(builder: GraphBuilder, evaluator: Evaluator, decisions: Decisions) -> float:
    """Return the fidelity in dB of the graph that decisions lead to."""
    return evaluator.evaluate_model(builder.build(decisions)[0]).fidelity_db


def journal_key(kind: str, decisions: Decisions) -> str:
    """Return the name of a measurement in the journal."""
    return f"{kind}:{json.dumps(asdict(decisions), sort_keys=True)}"


def _error(entry: Sensitivity) -> float:
    return entry.error
