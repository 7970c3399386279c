"""The report as one HTML page: nothing is loaded from anywhere, and the page forbids it to itself."""

import base64
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srdeploy.core.extras import import_extra
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.bench.memory import LOWER_BOUND, ON_CPU
from srdeploy.runtime.bench.ratios import listed, median_label, ratio_label
from srdeploy.runtime.report import plots
from srdeploy.runtime.report.crop_images import RAMP_CSS

Document = Mapping[str, Any]

_HERE = Path(__file__).parent
_STATUS_WORDS = {
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
        "size": size_words,
        "db": db_words,
        "change": change_words,
        "median": median_words,
        "ms": ms_words,
        "ratio": ratio_words,
        "percent": percent_words,
        "difference": difference_words,
        "gates": gates_words,
        "rates": rates_words,
        "device": lambda name: "the CPU" if name == "cpu" else name,
    }
    sources = {
        key: "data:image/webp;base64," + base64.b64encode(data).decode("ascii") for key, data in pictures.items()
    }
    values = _values(document, sources, markup)
    html: str = environment.get_template("report.html.j2").render(**values)
    return html


def _values(document: Document, sources: Mapping[str, str], markup: Any) -> dict[str, Any]:
    verdict_class, verdict_words = _VERDICTS[document["verdict"]["status"]]
    pareto = [plots.fidelity_over_speed(document), plots.psnr_over_speed(document)]
    drawn = [markup(drawing) for drawing in pareto if drawing]
    sensitivity = plots.sensitivity_bars(document)
    values: dict[str, Any] = {
        "doc": document,
        "style": markup((_HERE / "report.css").read_text(encoding="utf-8").replace("RAMP", RAMP_CSS)),
        "script": markup((_HERE / "report.js").read_text(encoding="utf-8")),
        "status_words": _STATUS_WORDS,
        "verdict_class": verdict_class,
        "verdict_words": verdict_words,
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
        "model_facts": _model_facts(document),
        "model_tables": _records(document["model"]["checkpoint"]),
        "configuration": _facts({**document["model"]["configuration"], **document["model"]["provenance"]}),
        "environment": _facts(_readable_environment(document["environment"])),
        "memory_words": _memory_words(document),
        "stages": [{"seconds": None, "note": None, **stage} for stage in document["stages"]],
    }
    values["sections"] = _sections(values, document)
    return values


def _sections(values: Mapping[str, Any], document: Document) -> list[tuple[str, str]]:
    optional = [
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
    return [("verdict", "Verdict"), ("engines", "Engines")] + [(a, words) for a, words, present in optional if present]


def _search(search: Mapping[str, Any], markup: Any) -> dict[str, Any]:
    """Return what the page shows of a search: its plot, and a row per graph."""
    drawing = plots.search_points(search)
    rows = [
        {
            **point,
            "number": index + 1,
            "milliseconds": "–" if point["latency_ms"] is None else ms_words(point["latency_ms"]),
            "kept": ", ".join(point["layers_kept_float"]) or "–",
            "split": ", ".join(point["layers_split"]) or "–",
        }
        for index, point in enumerate(search["points"])
    ]
    return {**search, "drawing": markup(drawing) if drawing else None, "rows": rows}


def _figures(document: Document) -> list[tuple[str, str, str]]:
    """Return the best engine's figures: words, value, unit."""
    best = next((line for line in document["engines"] if line["name"] == document["verdict"]["best"]), None)
    if best is None:
        return []
    latency = best["latency"]["end-to-end"]
    equals = document["verdict"].get("equally_fast", ())
    label = f"Fastest, with {listed(list(equals))}" if equals else "Fastest engine"
    figures = [(label, best["precision"].upper(), best["engine"])]
    if latency["ratio"] is not None:
        value, _, interval = ratio_words(latency).partition(", ")
        figures.append((f"Times {document['bench'][0]['rows'][0]['runner']['name']}", value, interval))
    figures.append(("Latency, median", *_split(median_words(latency))))
    figures.append(("Fidelity", *_split(db_words(best["fidelity_min_db"]))))
    if best["psnr_drop_db"] is not None:
        figures.append(("Y PSNR change", *_split(change_words(best["psnr_drop_db"]))))
    if best["size_bytes"] is not None:
        figures.append(("Size", *_split(size_words(best["size_bytes"]))))
    return figures


def _split(words: str) -> tuple[str, str]:
    value, _, unit = words.partition(" ")
    return value, unit


def _model_line(document: Document) -> str:
    model = document["model"]
    names = {"rcan": "RCAN", "srdensenet": "SRDenseNet"}
    colours = {"rgb": "RGB", "y": "luma only"}[model["colours"]]
    checkpoint = model["checkpoint"]
    words = [
        f"{names.get(model['architecture'], model['architecture'])} ×{model['scale']}",
        colours,
        f"{count_words(model['macs_per_pixel'])} multiply-adds per input pixel",
        f"checkpoint {checkpoint.get('name', '')} {checkpoint['sha256'][:12]}".replace("  ", " "),
        document["created"][:10],
    ]
    return " · ".join(words)


def _engines_caption(document: Document) -> str:
    if not document["bench"]:
        return "No latency was measured."
    bench = document["bench"][0]
    base = bench["rows"][0]["runner"]["name"]
    return f"Measured at {bench['shape']}; speed-up over {base} in the same rounds, with the 95 % interval."


def _memory_words(document: Document) -> str:
    """Say what the memory column holds, in the words of the figures themselves."""
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
        ("Multiply-adds", f"{count_words(model['macs_per_pixel'])} per input pixel"),
        ("Receptive radius", "whole image (channel attention)" if radius is None else f"{radius} input pixels"),
        ("Checkpoint SHA-256", str(checkpoint.pop("sha256"))),
    ]
    return rows + _facts({f"checkpoint {key}": value for key, value in checkpoint.items()})


def _view(entry: Mapping[str, Any], sources: Mapping[str, str], document: Document) -> dict[str, Any]:
    names = [engine["name"] for engine in entry["engines"]]
    best = document["verdict"]["best"]
    options = [
        {"key": "bicubic", "words": "input, bicubic", "source": sources[entry["bicubic"]]},
        {"key": "reference", "words": "eager FP32", "source": sources[entry["reference"]]},
    ]
    for index, engine in enumerate(entry["engines"]):
        options.append({"key": f"engine{index}", "words": engine["name"], "source": sources[engine["output"]]})
    if entry["truth"] is not None:
        options.append({"key": "truth", "words": "ground truth", "source": sources[entry["truth"]]})
    return {
        **entry,
        "options": options,
        "one": "bicubic",
        "two": f"engine{names.index(best) if best in names else 0}",
        "heats": [
            {
                "key": f"engine{index}",
                "words": _heat_words(engine),
                "peak": difference_words(engine["heat_peak"]),
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
    named.append((f"difference, 0 to {difference_words(engine['heat_peak'])}", engine["heat"]))
    return {
        **entry,
        "pictures": [{"words": words, "source": sources[key]} for words, key in named],
        "largest": difference_words(engine["max_abs"]),
    }


def _heat_words(engine: Mapping[str, Any]) -> str:
    return f"{engine['name']}: largest difference {difference_words(engine['max_abs'])}"


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
        {"drawing": markup(drawing), "words": studies[name].get("note", "")}
        for name, drawing in drawn.items()
        if drawing
    ]


def _readable_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    readable = dict(environment)
    if isinstance(readable.get("memory_bytes"), int):
        readable["memory"] = size_words(readable.pop("memory_bytes"))
    gpus = readable.pop("gpus", None) or []
    for index, gpu in enumerate(gpus):
        readable[f"GPU {index}"] = gpu
    if not gpus:
        readable["GPU"] = "none found"
    return readable


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flatten JSON values into lines of words; keys of nested mappings are joined, records are left to `_records`."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        words = str(key).replace("_", " ")
        if value in (None, "", []):  # says nothing
            continue
        if isinstance(value, Mapping):
            if all(not isinstance(entry, (Mapping, list)) for entry in value.values()):
                lines.append((words, ", ".join(f"{k} {_cell(v)}" for k, v in value.items()) or "–"))
            else:
                lines += [(f"{words}: {name}", text) for name, text in _facts(value)]
        elif _is_records(value):
            continue
        else:
            lines.append((words, _cell(value)))
    return lines


def _records(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lists of records among JSON values as tables: title, headers, rows of words."""
    tables = []
    for key, value in values.items():
        words = str(key).replace("_", " ")
        if _is_records(value):
            headers = list(dict.fromkeys(name for entry in value for name in entry))
            rows = [[_cell(entry.get(name)) for name in headers] for entry in value]
            headers = [name.replace("_", " ") for name in headers]
            tables.append({"title": words, "headers": headers, "rows": rows})
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
    for key, words in (("crops", "crops"), ("judges", "crops kept aside to judge by"), ("files", "images")):
        if _is_records(values.get(key)):
            facts.append((words, str(len(values[key]))))
    if "lr_pixels" in values:
        facts.append(("low-resolution pixels", f"{values['lr_pixels']:,}"))
    coverage = values.get("coverage")
    reached = coverage if isinstance(coverage, Mapping) else {}
    return {
        "facts": facts,
        "coverage": [{"name": name, "share": float(share), "words": f"{share:.0%}"} for name, share in reached.items()],
        "tables": _records(rest),
    }


def size_words(count: float | None) -> str:
    """Write bytes as "1.18 MiB"; a dash where the size is not known."""
    return "–" if count is None else format_bytes(count)


def count_words(count: float) -> str:
    """Write a count as "1.23 M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g}"


def db_words(value: float | str | None, digits: int = 1) -> str:
    """Write decibels; equal outputs have no finite value."""
    if value is None:
        return "–"
    number = float(value)
    if math.isnan(number):
        return "none"
    return "∞ (equal)" if math.isinf(number) else f"{number:.{digits}f} dB"


def change_words(drop: float | str | None) -> str:
    """Write a drop in dB as the signed change that it is."""
    if drop is None or math.isnan(float(drop)):
        return "–"
    change = -float(drop)
    return f"{0.0 if abs(change) < 5e-4 else change:+.3f} dB".replace("-", "−")


def ms_words(value: float) -> str:
    """Write milliseconds with three digits."""
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def median_words(latency: Mapping[str, Any] | None) -> str:
    """Write a median; one that is not stable carries its uncertainty."""
    if not latency:
        return "–"
    if latency["stable"]:
        return ms_words(latency["median_ms"])
    if "ci_share" not in latency:  # written before intervals were kept
        return "unstable"
    return median_label(latency["median_ms"], latency["ci_share"], stable=False)


def ratio_words(latency: Mapping[str, Any] | None) -> str:
    """Write how many times faster, with the interval: "5.1×, 4.9 to 5.3"."""
    if not latency or latency["ratio"] is None:
        return "–"
    return ratio_label(latency["ratio"], latency.get("ratio_low"), latency.get("ratio_high")).replace("x", "×")


def rates_words(rates: Mapping[str, Any]) -> str:
    """Write the measured rates that floors refer to."""
    types = [f"{precision.upper()} {rate / 1e9:.0f}" for precision, rate in rates["macs_per_second"].items()]
    return (
        f"× floor: latency over the time that its multiply-adds or its memory traffic alone would take at the rates "
        f"measured in this run, the larger of the two: {', '.join(types)} G multiply-adds/s, copies "
        f"{rates['bytes_per_second'] / 1e9:.0f} GB/s."
    )


def percent_words(value: float | str) -> str:
    """Write a share."""
    share = 100.0 * float(value)
    return f"{share:.2g} %" if 0 < share < 10 else f"{share:.0f} %"


def difference_words(value: float | str) -> str:
    """Write an absolute difference on 0..1 in grey levels of 8 bits."""
    number = float(value)
    if not math.isfinite(number):
        return "not finite"
    levels = number * 255.0
    if levels == 1.0:
        return "1 level"
    return f"{levels:.3g} levels" if levels >= 0.01 or levels == 0 else f"{number:.1e} of 1"


def gates_words(verdict: Mapping[str, Any]) -> str:
    """Write what an engine had to reach."""
    gates = verdict["gates"]
    words = [
        f"fidelity {gates['min_fidelity_db']:g} dB on images",
        f"{gates['grid_fidelity_db']:g} dB on the shape grid",
    ]
    if gates["max_psnr_drop_db"] is not None:
        words.append(f"PSNR drop at most {gates['max_psnr_drop_db']:g} dB")
    return ", ".join(words)
