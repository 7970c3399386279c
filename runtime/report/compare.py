"""Two reports side by side: what improved, what got worse, and what got worse by more than is allowed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.bench.exchange import Exchange
from srdeploy.runtime.bench.ratios import ratio_label

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Tolerances:
    """How much worse the second report may be before it counts as a regression.

    Attributes:
        fidelity_db: loss of fidelity, where it is below `fidelity_ceiling_db`.
        psnr_db: loss of the Y PSNR change against ground truth.
        latency: share by which a duration may rise: a stable median, and the duration relative to the eager network.
            A rise within the confidence intervals is no regression. Only one shape and machine are compared.
        size: share by which a file may grow.
        memory: share by which the memory of a run may grow.
        fidelity_ceiling_db: above it fidelity is rounding noise; 120 dB and 130 dB do not differ in quality.
    """

    fidelity_db: float = 0.5
    psnr_db: float = 0.01
    latency: float = 0.10
    size: float = 0.05
    memory: float = 0.25
    fidelity_ceiling_db: float = 100.0


@dataclass(frozen=True)
class Change:
    """One figure of one engine in both reports.

    Attributes:
        engine: its name; "(all)" for what concerns the whole report.
        what: which figure.
        before, after: both values, as text.
        change: the difference, as text; empty where there is none to report.
        regression: worse by more than the tolerance.
    """

    engine: str
    what: str
    before: str
    after: str
    change: str
    regression: bool


@dataclass(frozen=True)
class Comparison:
    """All figures of two reports that can be compared."""

    changes: tuple[Change, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The figures that got worse by more than the tolerance."""
        return tuple(change for change in self.changes if change.regression)

    def to_json(self) -> dict[str, Any]:
        """Return all changes as JSON values."""
        return {"regressions": len(self.regressions), "changes": [asdict(change) for change in self.changes]}


def compare(before: Document, after: Document, tolerances: Tolerances | None = None) -> Comparison:
    """Compare two reports, engine by engine, by name.

    An engine that is missing from the second report, or has a worse status there (passed, then failed), is a
    regression whatever the tolerances are. An engine that is new in it is listed and never one.
    """
    tolerances = tolerances or Tolerances()
    old = {line["name"]: line for line in before["engines"]}
    new = {line["name"]: line for line in after["engines"]}
    comparable = True
    changes: list[Change] = []
    for what, of in (("bench shape", _shape), ("machine", _machine)):
        if before["bench"] and after["bench"] and of(before) != of(after):
            comparable = False
            changes.append(Change("(all)", what, of(before), of(after), "latency not compared", False))
    state, other = _exchange(before), _exchange(after)
    if state and other and state.differs_from(other):
        comparable = False
        what = "exchange between processors"
        changes.append(Change("(all)", what, state.label, other.label, "latency not compared", False))
    for name, line in old.items():
        if name not in new:
            changes.append(Change(name, "engine", line["status"], "missing", "", line["status"] == "passed"))
        else:
            changes += _engine_changes(name, line, new[name], tolerances, comparable=comparable)
    changes += [Change(name, "engine", "missing", new[name]["status"], "new", False) for name in new if name not in old]
    return Comparison(tuple(changes))


def _engine_changes(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], tolerances: Tolerances, *, comparable: bool
) -> list[Change]:
    fell = before["status"] == "passed" and after["status"] != "passed"
    changes = [Change(name, "status", before["status"], after["status"], "", fell)]
    changes += _decibels(name, before, after, tolerances)
    sizes = (
        ("size", "size_bytes", tolerances.size),
        ("memory", "memory_bytes", tolerances.memory),
        ("GPU memory", "device_memory_bytes", tolerances.memory),
    )
    for what, key, allowed in sizes:
        # Lower bounds of one run and peaks of another, or reports of older versions, are not the same figure.
        same_kind = before.get(key.replace("_bytes", "_note")) == after.get(key.replace("_bytes", "_note"))
        if before.get(key) and after.get(key) and same_kind:
            rise = after[key] / before[key] - 1.0
            changes.append(
                Change(name, what, format_bytes(before[key]), format_bytes(after[key]), f"{rise:+.1%}", rise > allowed)
            )
    for kind in ("end-to-end", "compute"):
        old, new = before["latency"].get(kind), after["latency"].get(kind)
        if comparable and old and new:
            changes += _speed_changes(name, kind, old, new, tolerances.latency)
    return changes


def _speed_changes(
    name: str, kind: str, old: Mapping[str, Any], new: Mapping[str, Any], allowed: float
) -> list[Change]:
    """Compare the speed-up over the eager network, by the intervals of both sides, and the median in milliseconds."""
    changes = []
    intervals = all(latency.get("ratio_low") for latency in (old, new))
    if intervals:
        reach = math.hypot(*(math.log(entry["ratio_high"] / entry["ratio_low"]) / 2 for entry in (old, new)))
        change = math.log(new["ratio"] / old["ratio"])
        known = f"{math.expm1(change):+.1%}, {math.expm1(change - reach):+.1%} to {math.expm1(change + reach):+.1%}"
        slower = -change > reach and math.expm1(-change) > allowed  # certainly slower, and by more than allowed
        changes.append(Change(name, f"speed-up {kind}", _ratio(old), _ratio(new), known, slower))
    if not old["stable"]:
        return changes
    if not new["stable"]:
        changes.append(Change(name, f"latency {kind}", _ms(old), "unstable", "", not intervals))
        return changes
    rise = new["median_ms"] / old["median_ms"] - 1.0
    doubt = math.hypot(*(entry.get("ci_share", 0.0) for entry in (old, new)))
    worse = rise > max(allowed, doubt)
    return [*changes, Change(name, f"latency {kind}", _ms(old), _ms(new), f"{rise:+.1%}", worse)]


def _decibels(name: str, before: Mapping[str, Any], after: Mapping[str, Any], tolerances: Tolerances) -> list[Change]:
    changes = []
    old, new = before["fidelity_min_db"], after["fidelity_min_db"]
    if old is not None and new is not None:
        ceiling = tolerances.fidelity_ceiling_db
        loss = min(float(old), ceiling) - min(float(new), ceiling)
        worse = _newly_nan(old, new) or loss > tolerances.fidelity_db
        changes.append(Change(name, "fidelity", _db(old), _db(new), f"{0.0 - loss:+.2f} dB", worse))
    old, new = before["psnr_drop_db"], after["psnr_drop_db"]
    if old is not None and new is not None:
        loss = float(new) - float(old)
        worse = _newly_nan(old, new) or loss > tolerances.psnr_db
        change = Change(name, "Y PSNR change", _db(-float(old), 3), _db(-float(new), 3), f"{0.0 - loss:+.3f} dB", worse)
        changes.append(change)
    return changes


def _newly_nan(before: float | str, after: float | str) -> bool:
    """Return True if outputs were numbers and are not any more; what was broken before is no regression."""
    return math.isnan(float(after)) and not math.isnan(float(before))


def _shape(document: Document) -> str:
    return str(document["bench"][0]["shape"]) if document["bench"] else "none"


def _machine(document: Document) -> str:
    """Return processor, number of cores and GPUs, as far as the bench recorded them."""
    recorded = document["bench"][0]["environment"]
    gpus = [str(gpu.get("name")) for gpu in recorded.get("gpus") or ()]
    cores = [f"{recorded['cpus']} cores"] if "cpus" in recorded else []
    return ", ".join([str(recorded.get("processor", "not stated")), *cores, *gpus])


def _exchange(document: Document) -> Exchange | None:
    return Exchange.of_environment(document["bench"][0]["environment"]) if document["bench"] else None


def _db(value: float | str, digits: int = 1) -> str:
    return f"{float(value):.{digits}f} dB"


def _ratio(latency: Mapping[str, Any]) -> str:
    return ratio_label(latency["ratio"], latency["ratio_low"], latency["ratio_high"])


def _ms(latency: Mapping[str, Any]) -> str:
    return f"{latency['median_ms']:.3g} ms"
