"""Two reports side by side: what got better, what got worse, and what got worse by more than is allowed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from srdeploy.core.sizes import format_bytes

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Tolerances:
    """How much worse the second report may be before it counts as a regression.

    Attributes:
        fidelity_db: loss of fidelity, where it lies below `fidelity_ceiling_db`.
        psnr_db: loss of the Y PSNR change against ground truth.
        latency: share by which a median may rise; only stable medians of one shape and machine are compared.
        size: share by which a file may grow.
        memory: share by which the memory of a run may grow.
        fidelity_ceiling_db: above it fidelity is rounding noise, 120 dB or 130 dB tell nothing.
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
        before, after: as words.
        change: as words; empty where there is no difference to state.
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

    An engine that is missing from the second report, or stands worse there (passed, then failed), is a regression
    whatever the tolerances say. An engine that is new in it is listed and never one.
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
        if comparable and old and new and old["stable"]:
            if not new["stable"]:
                changes.append(Change(name, f"latency {kind}", _ms(old), "unstable", "", True))
                continue
            rise = new["median_ms"] / old["median_ms"] - 1.0
            changes.append(
                Change(name, f"latency {kind}", _ms(old), _ms(new), f"{rise:+.1%}", rise > tolerances.latency)
            )
    return changes


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
    """Outputs that were numbers and are not any more; what was broken before is no regression."""
    return math.isnan(float(after)) and not math.isnan(float(before))


def _shape(document: Document) -> str:
    return str(document["bench"][0]["shape"]) if document["bench"] else "none"


def _machine(document: Document) -> str:
    """Processor, number of cores and GPUs, as far as the bench states them."""
    stated = document["bench"][0]["environment"]
    gpus = [str(gpu.get("name")) for gpu in stated.get("gpus") or ()]
    cores = [f"{stated['cpus']} cores"] if "cpus" in stated else []
    return ", ".join([str(stated.get("processor", "not stated")), *cores, *gpus])


def _db(value: float | str, digits: int = 1) -> str:
    return f"{float(value):.{digits}f} dB"


def _ms(latency: Mapping[str, Any]) -> str:
    return f"{latency['median_ms']:.3g} ms"
