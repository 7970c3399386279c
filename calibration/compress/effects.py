"""What changing single layers does to the network's output: measured for a few changes, known for all of them."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from srdeploy.calibration.compress.allocate import Option
from srdeploy.calibration.compress.costs import Costs
from srdeploy.calibration.compress.layers import Change
from srdeploy.calibration.compress.moments import Moments
from srdeploy.calibration.compress.rebuild import apply_changes
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.search.bound import Deadline
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.progress import SILENT, Progress

PROBES = 4
"""Changes measured of a layer where much can be saved; of the others one."""
LARGE_SHARE = 0.03
"""Share of the network's cost from which a layer is measured so."""
_PROBE_AT = 0.4
"""Where in a list of changes, the largest saving first, the one probe of a layer is."""


def measure_effects(
    graph: Graph,
    changes: Mapping[str, Sequence[Change]],
    moments: Mapping[str, Moments],
    costs: Costs,
    evaluator: Evaluator,
    *,
    together: int,
    deadline: Deadline,
    journal: Journal,
    progress: Progress = SILENT,
) -> dict[str, list[Option]]:
    """Return changes with the error power that each causes at the network's output.

    A layer's own error is known in theory. What becomes of it on the way to the output is measured by changing the
    layer, and taken to be a factor that varies slowly with the error.

    Args:
        graph: the original graph.
        changes: those that exclude each other, by slot, the largest saving first.
        moments: of what layers read, by layer.
        costs: of the graph.
        evaluator: on a few small windows.
        together: layers where little can be saved are changed so many at a time, and share one factor.
        deadline: slots that it leaves unmeasured are missing in the result.
        journal: remembers what was measured.
        progress: where to report.
    """
    savings = {slot: costs.saving({slot: entries[0]}) for slot, entries in changes.items()}
    order = sorted(changes, key=lambda slot: -savings[slot])
    large = [slot for slot in order if savings[slot] >= LARGE_SHARE * costs.total]
    small = [slot for slot in changes if slot not in large]  # neighbors in the graph are alike
    groups = [small[start : start + together] for start in range(0, len(small), together)]
    probes = [[changes[slot][place]] for slot in large for place in _places(len(changes[slot]))]
    probes += [[changes[slot][int(_PROBE_AT * len(changes[slot]))] for slot in group] for group in groups]

    def effect(probe: Sequence[Change]) -> float:
        power = 10 ** (-evaluator.evaluate_model(apply_changes(graph, probe, moments)).fidelity_db / 10)
        return float(power / max(sum(change.error for change in probe), 1e-30))

    factors: dict[str, list[tuple[float, float]]] = {}  # (log error, log factor) of what was measured
    with progress.task("measuring what each layer does to the output", total=len(probes)) as advance:
        for probe in probes:
            if not deadline.passed:
                found = journal.number(f"effect {'; '.join(change.key for change in probe)}", partial(effect, probe))
                for change in probe:
                    factors.setdefault(change.slot, []).append((_log(change.error), _log(found)))
            advance()
    return {
        slot: [Option(change, change.error * _factor(factors[slot], change)) for change in changes[slot]]
        for slot in changes
        if slot in factors
    }


def _places(count: int) -> list[int]:
    """Return where to measure in a list: evenly, without the extremes."""
    return sorted({(2 * index + 1) * count // (2 * PROBES) for index in range(PROBES)})


def _factor(measured: Sequence[tuple[float, float]], change: Change) -> float:
    """Return the factor of a change: between measured ones that of a power law, beyond them the nearest."""
    errors, factors = zip(*sorted(measured), strict=True)
    return float(math.exp(np.interp(_log(change.error), errors, factors)))


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
