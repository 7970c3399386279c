"""The report as one HTML page: self-contained, with a content security policy that forbids to load anything."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srdeploy.core import compression as compression_labels
from srdeploy.core.extras import import_extra
from srdeploy.runtime.bench.memory import LOWER_BOUND, ON_CPU
from srdeploy.runtime.bench.ratios import listed
from srdeploy.runtime.report import plots
from srdeploy.runtime.report.crop_images import RAMP_CSS
from srdeploy.runtime.report.labels import (
    change_label,
    count_label,
    db_label,
    difference_label,
    gates_label,
    median_label,
    ms_label,
    percent_label,
    rates_label,
    ratio_label,
    size_label,
)

Document = Mapping[str, Any]

_HERE = Path(__file__).parent
_STATUS_LABELS = {
    "passed": "passed",
    "failed": "failed",
    "measured": "not verified",
    "not-run": "not run here",
    "left-out": "excluded",
}
_VERDICTS = {
    "passed": ("passed", "Passed"),
    "partial": ("partial", "Passed, with engines excluded"),
    "failed": ("failed", "Failed"),
    "not-verified": ("partial", "Nothing verified"),
}


_NEWER = {
    "memory_bytes": None, "memory_note": "", "device_memory_bytes": None, "device_memory_note": "",
    "first_run_ms": None, "floor": None, "floor_distance": None,
}  # fmt: skip
"""What a row lacks in a report that was written before these figures were kept."""


def page(document: Document, pictures: Mapping[str, bytes]) -> str:
    """Return the page of a document.

    Args:
        document: as `report_document` returns it, or read from report.json.
        pictures: the WebP files by picture key.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2: Any = import_extra("jinja2", "report")
    markup: Any = import_extra("markupsafe", "report").Markup
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "size": size_label,
        "db": db_label,
        "change": change_label,
        "median": median_label,
        "ms": ms_label,
        "ratio": ratio_label,
        "percent": percent_label,
        "difference": difference_label,
        "gates": gates_label,
        "rates": rates_label,
        "device": lambda name: "the CPU" if name == "cpu" else name,
    }
    sources = {
        key: "data:image/webp;base64," + base64.b64encode(data).decode("ascii") for key, data in pictures.items()
    }
    values = _values(document, sources, markup)
    html: str = environment.get_template("report.html.j2").render(**values)
    return html


def _values(document: Document, sources: Mapping[str, str], markup: Any) -> dict[str, Any]:
    verdict_class, verdict_label = _VERDICTS[document["verdict"]["status"]]
    pareto = [plots.fidelity_over_speed(document), plots.psnr_over_speed(document)]
    drawn = [markup(drawing) for drawing in pareto if drawing]
    sensitivity = plots.sensitivity_bars(document)
    values: dict[str, Any] = {
        "doc": document,
        "style": markup((_HERE / "report.css").read_text(encoding="utf-8").replace("RAMP", RAMP_CSS)),
        "script": markup((_HERE / "report.js").read_text(encoding="utf-8")),
        "status_labels": _STATUS_LABELS,
        "verdict_class": verdict_class,
        "verdict_label": verdict_label,
        "figures": _figures(document),
        "model_line": _model_line(document),
        "engines_caption": _engines_caption(document),
        "has_truth": any(verdict["psnr_drop_db"] is not None for verdict in document["verification"]),
        "pareto": drawn,
        "views": [_view(entry, sources, document) for entry in document["images"] if entry["kind"] == "view"],
        "worst": [_worst(entry, sources) for entry in document["images"] if entry["kind"] == "worst"],
        "benches": [_bench(bench, markup) for bench in document["bench"]],
        "studies": _studies(document, markup),
        "sensitivity": markup(sensitivity) if sensitivity else None,
        "searches": [_search(search, markup) for search in document.get("searches", ())],
        "calibration": _calibration(document["calibration"]) if document["calibration"] else None,
        "compression": _compression(document),
        "model_facts": _model_facts(document),
        "model_tables": _records(document["model"]["checkpoint"]),
        "configuration": _facts(
            {**document["model"]["configuration"], **document["model"]["provenance"], "compression": None}
        ),
        "environment": _facts(_readable_environment(document["environment"])),
        "memory_note": _memory_note(document),
        "stages": [{"seconds": None, "note": None, **stage} for stage in document["stages"]],
    }
    values["sections"] = _sections(values, document)
    return values


def _sections(values: Mapping[str, Any], document: Document) -> list[tuple[str, str]]:
    optional = [
        ("compression", "Compression", values["compression"]),
        ("tradeoff", "Trade-off", values["pareto"]),
        ("images", "Images", values["views"]),
        ("worst", "Worst crops", values["worst"]),
        ("latency", "Latency", values["benches"]),
        ("scaling", "Scaling", values["studies"]),
        ("search", "Bound", values["searches"]),
        ("sensitivity", "Sensitivity", values["sensitivity"]),
        ("verification", "Verification", True),
        ("calibration", "Calibration", values["calibration"]),
        ("origin", "Network", True),
        ("environment", "Environment", True),
        ("reproduce", "Reproduce", document["commands"]),
    ]
    return [("verdict", "Verdict"), ("engines", "Engines")] + [(a, label) for a, label, present in optional if present]


def _compression(document: Document) -> dict[str, Any] | None:
    """Return what the page shows of a compressed network: its summary, and a row per change; None for all others."""
    compression = document["model"]["provenance"].get("compression")
    if compression is None:
        return None
    bound = compression["max_psnr_drop_db"]
    rows = [
        {
            "layer": entry["layer"],
            "change": compression_labels.change_label(entry),
            "share": percent_label(entry["error_share"]),
        }
        for entry in sorted(compression["layers"], key=lambda entry: -entry["error_share"])
    ]
    return {
        "summary": compression_labels.summary(compression),
        "bound": "" if bound is None else f"at most {bound:g} dB lost",
        "notes": compression.get("notes", ()),
        "rows": rows,
    }


def _search(search: Mapping[str, Any], markup: Any) -> dict[str, Any]:
    """Return what the page shows of a search: its plot, and a row per graph."""
    drawing = plots.search_points(search)
    rows = [
        {
            **point,
            "number": index + 1,
            "milliseconds": "–" if point["latency_ms"] is None else ms_label(point["latency_ms"]),
            "kept": ", ".join(point["layers_kept_float"]) or "–",
            "split": ", ".join(point["layers_split"]) or "–",
        }
        for index, point in enumerate(search["points"])
    ]
    return {**search, "drawing": markup(drawing) if drawing else None, "rows": rows}


def _figures(document: Document) -> list[tuple[str, str, str]]:
    """Return the best engine's figures: label, value, unit."""
    best = next((line for line in document["engines"] if line["name"] == document["verdict"]["best"]), None)
    if best is None:
        return []
    latency = best["latency"]["end-to-end"]
    equals = document["verdict"].get("equally_fast", ())
    label = f"Fastest, with {listed(list(equals))}" if equals else "Fastest engine"
    figures = [(label, best["precision"].upper(), best["engine"])]
    if latency["ratio"] is not None:
        value, _, interval = ratio_label(latency).partition(", ")
        figures.append((f"Times {document['bench'][0]['rows'][0]['runner']['name']}", value, interval))
    figures.append(("Latency, median", *_split(median_label(latency))))
    figures.append(("Fidelity", *_split(db_label(best["fidelity_min_db"]))))
    if best["psnr_drop_db"] is not None:
        figures.append(("Y PSNR change", *_split(change_label(best["psnr_drop_db"]))))
    if best["size_bytes"] is not None:
        figures.append(("Size", *_split(size_label(best["size_bytes"]))))
    return figures


def _split(label: str) -> tuple[str, str]:
    value, _, unit = label.partition(" ")
    return value, unit


def _model_line(document: Document) -> str:
    model = document["model"]
    names = {"rcan": "RCAN", "srdensenet": "SRDenseNet"}
    colours = {"rgb": "RGB", "y": "luma only"}[model["colours"]]
    checkpoint = model["checkpoint"]
    parts = [
        f"{names.get(model['architecture'], model['architecture'])} ×{model['scale']}",
        colours,
        f"{count_label(model['macs_per_pixel'])} multiply-adds per input pixel",
        *(["compressed"] if "compression" in model["provenance"] else []),
        f"checkpoint {checkpoint.get('name', '')} {checkpoint['sha256'][:12]}".replace("  ", " "),
        document["created"][:10],
    ]
    return " · ".join(parts)


def _engines_caption(document: Document) -> str:
    if not document["bench"]:
        return "No latency was measured."
    bench = document["bench"][0]
    base = bench["rows"][0]["runner"]["name"]
    return f"Measured at {bench['shape']}; speed-up over {base} in the same rounds, with the 95 % interval."


def _memory_note(document: Document) -> str:
    """Return what the memory column holds, from the notes of the figures."""
    notes = {
        f"{name} is the {line[note]}"
        for line in document["engines"]
        for name, size, note in (("Memory", "memory_bytes", "memory_note"),
                                 ("GPU memory", "device_memory_bytes", "device_memory_note"))
        if line.get(size) is not None and note in line
    }  # fmt: skip
    unknown = {
        f"GPU memory of {line['name']} is not known: {line['device_memory_note']}"
        for line in document["engines"]
        if line["latency"] and line.get("device_memory_bytes") is None
        and line.get("device_memory_note", ON_CPU) != ON_CPU
    }  # fmt: skip
    return " ".join(f"{sentence}." for sentence in (*sorted(notes, reverse=True), *sorted(unknown)))


def _model_facts(document: Document) -> list[tuple[str, str]]:
    model = document["model"]
    radius = model["receptive_radius"]
    checkpoint = dict(model["checkpoint"])
    rows = [
        ("Architecture", str(model["architecture"])),
        ("Scale", f"×{model['scale']}"),
        ("Multiply-adds", f"{count_label(model['macs_per_pixel'])} per input pixel"),
        ("Receptive radius", "whole image (channel attention)" if radius is None else f"{radius} input pixels"),
        ("Checkpoint SHA-256", str(checkpoint.pop("sha256"))),
    ]
    return rows + _facts({f"checkpoint {key}": value for key, value in checkpoint.items()})


def _view(entry: Mapping[str, Any], sources: Mapping[str, str], document: Document) -> dict[str, Any]:
    names = [engine["name"] for engine in entry["engines"]]
    best = document["verdict"]["best"]
    options = [
        {"key": "bicubic", "label": "input, bicubic", "source": sources[entry["bicubic"]]},
        {"key": "reference", "label": "eager FP32", "source": sources[entry["reference"]]},
    ]
    for index, engine in enumerate(entry["engines"]):
        options.append({"key": f"engine{index}", "label": engine["name"], "source": sources[engine["output"]]})
    if entry["truth"] is not None:
        options.append({"key": "truth", "label": "ground truth", "source": sources[entry["truth"]]})
    return {
        **entry,
        "options": options,
        "one": "bicubic",
        "two": f"engine{names.index(best) if best in names else 0}",
        "heats": [
            {
                "key": f"engine{index}",
                "label": _heat_label(engine),
                "peak": difference_label(engine["heat_peak"]),
                "source": sources[engine["heat"]],
            }
            for index, engine in enumerate(entry["engines"])
        ],
    }


def _worst(entry: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    engine = entry["engines"][0]
    named = [("input, bicubic", entry["bicubic"]), ("eager FP32", entry["reference"]), ("engine", engine["output"])]
    if entry["truth"] is not None:
        named.append(("ground truth", entry["truth"]))
    named.append((f"difference, 0 to {difference_label(engine['heat_peak'])}", engine["heat"]))
    return {
        **entry,
        "pictures": [{"label": label, "source": sources[key]} for label, key in named],
        "largest": difference_label(engine["max_abs"]),
    }


def _heat_label(engine: Mapping[str, Any]) -> str:
    return f"{engine['name']}: largest difference {difference_label(engine['max_abs'])}"


def _bench(bench: Mapping[str, Any], markup: Any) -> dict[str, Any]:
    effort = bench["effort"]
    kinds = ("end-to-end", "compute")
    drawings = [draw(bench, kind) for draw in (plots.speedup_bars, plots.latency_strips) for kind in kinds]
    return {
        **bench,
        "rows": [{**_NEWER, **row, "lower_bound": row.get("memory_note") == LOWER_BOUND} for row in bench["rows"]],
        "plots": [markup(drawing) for drawing in drawings if drawing],
        "caption": (
            f"Runners took turns, after {effort['warmup_runs']} or more warm-up runs and "
            f"{effort['warmup_seconds']:g} s each. Speed-up: how many times faster than "
            f"{bench['rows'][0]['runner']['name']} in the same round, same kind: median over the rounds, 95 % interval."
        ),
    }


def _studies(document: Document, markup: Any) -> list[dict[str, Any]]:
    studies = document["studies"]
    drawn = {
        "scaling": plots.scaling_lines(studies.get("scaling", {})),
        "throughput": plots.throughput_lines(studies.get("throughput", {})),
        "streams": plots.throughput_lines(studies.get("streams", {}), "streams"),
    }
    return [
        {"drawing": markup(drawing), "label": studies[name].get("note", "")}
        for name, drawing in drawn.items()
        if drawing
    ]


def _readable_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    readable = dict(environment)
    if isinstance(readable.get("memory_bytes"), int):
        readable["memory"] = size_label(readable.pop("memory_bytes"))
    gpus = readable.pop("gpus", None) or []
    for index, gpu in enumerate(gpus):
        readable[f"GPU {index}"] = gpu
    if not gpus:
        readable["GPU"] = "none found"
    return readable


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten JSON values into (label, text) pairs; nested keys are joined, records are left to `_records`."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        label = str(key).replace("_", " ")
        if value in (None, "", []):  # says nothing
            continue
        if isinstance(value, Mapping):
            if all(not isinstance(entry, (Mapping, list)) for entry in value.values()):
                lines.append((label, ", ".join(f"{k} {_cell(v)}" for k, v in value.items()) or "–"))
            else:
                lines += [(f"{label}: {name}", text) for name, text in _facts(value)]
        elif _is_records(value):
            continue
        else:
            lines.append((label, _cell(value)))
    return lines


def _records(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lists of records among JSON values as tables: title, headers, rows of text."""
    tables = []
    for key, value in values.items():
        label = str(key).replace("_", " ")
        if _is_records(value):
            headers = list(dict.fromkeys(name for entry in value for name in entry))
            rows = [[_cell(entry.get(name)) for name in headers] for entry in value]
            headers = [name.replace("_", " ") for name in headers]
            tables.append({"title": label, "headers": headers, "rows": rows})
        elif isinstance(value, Mapping):
            tables += _records(value)
    return tables


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _cell(value: Any) -> str:
    """Write one JSON value; a SHA-256 by its beginning, a list by its first entries."""
    if isinstance(value, list):
        shown = ", ".join(str(entry) for entry in value[:12])
        return shown + (f" and {len(value) - 12} more" if len(value) > 12 else "") or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12] + "…"
    return "–" if value is None or value == "" else str(value)


def _calibration(values: Mapping[str, Any]) -> dict[str, Any]:
    """Split what a calibration set says into facts, how far it reaches towards the extremes, and tables."""
    rest = {key: value for key, value in values.items() if key not in ("schema", "coverage", "lr_pixels")}
    facts = _facts(rest)
    for key, label in (("crops", "crops"), ("judges", "held-out crops to evaluate on"), ("files", "images")):
        if _is_records(values.get(key)):
            facts.append((label, str(len(values[key]))))
    if "lr_pixels" in values:
        facts.append(("low-resolution pixels", f"{values['lr_pixels']:,}"))
    coverage = values.get("coverage")
    reached = coverage if isinstance(coverage, Mapping) else {}
    return {
        "facts": facts,
        "coverage": [{"name": name, "share": float(share), "label": f"{share:.0%}"} for name, share in reached.items()],
        "tables": _records(rest),
    }
