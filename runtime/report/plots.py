"""The report's plots, drawn from its JSON document alone, so that an old report.json draws the same page again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from srdeploy.runtime.report.svg import Axis, Plot, padded_linear, padded_log

Document = Mapping[str, Any]

CEILING_DB = 140.0
"""Fidelity is drawn at most this high: float32 outputs of equal value up to their last bits lie there."""


def pareto_fidelity(document: Document) -> str | None:
    """Draw fidelity against latency, one dot per engine, with the front of those that nothing beats in both."""
    points = [
        (line["name"], latency, _capped(line["fidelity_min_db"]), line["status"] == "passed")
        for line in document["engines"]
        if (latency := _median(line)) and line["fidelity_min_db"] is not None and line["fidelity_min_db"] != "nan"
    ]
    return _pareto(document, points, "fidelity to the eager network, dB (worst image)", "Fidelity against latency")


def pareto_psnr(document: Document) -> str | None:
    """Draw mean Y PSNR against ground truth over latency; None without ground truth."""
    psnr = {
        verdict["name"]: verdict["candidate_quality"]["psnr_y_db"]
        for verdict in document["verification"]
        if verdict["candidate_quality"] and isinstance(verdict["candidate_quality"]["psnr_y_db"], (int, float))
    }
    points = [
        (line["name"], latency, psnr[line["name"]], line["status"] == "passed")
        for line in document["engines"]
        if (latency := _median(line)) and line["name"] in psnr
    ]
    return _pareto(document, points, "Y PSNR against ground truth, dB (mean)", "PSNR against latency", least=0.02)


def latency_strips(bench: Mapping[str, Any], kind: str) -> str | None:
    """Draw every measured run of one kind: specks, whiskers from the fastest to p90, a dot at the median."""
    rows = [row for row in bench["rows"] if row["kind"] == kind]
    if not rows:
        return None
    most = max(min(row["p99_ms"], 3 * row["median_ms"]) for row in rows)
    names = [row["runner"]["name"] for row in rows][::-1]
    plot = Plot(
        f"Latency of {len(rows)} runners, {kind}, shape {bench['shape']}",
        Axis(f"milliseconds per run, {kind}, shape {bench['shape']}", 0.0, most * 1.12),
        Axis("", -0.6, len(rows) - 0.4),
        height=74 + 34 * len(rows),
        left=18 + int(7.4 * max(len(name) for name in names)),
        y_labels=names,
    )
    for index, row in enumerate(reversed(rows)):
        series = len(rows) - 1 - index
        for time in row["times_ms"][:200]:
            if time <= most * 1.12:
                plot.speck(time, index, series=series)
        plot.line([(row["min_ms"], index), (row["p90_ms"], index)], series=series, kind="whisker")
        words = f"{row['median_ms']:.3g} ms" if row["stable"] else "unstable"
        hint = f"{row['runner']['name']}: median {row['median_ms']:.4g}, p90 {row['p90_ms']:.4g}, n {row['n']}"
        plot.point(row["median_ms"], index, series=series, hint=hint, hollow=not row["stable"])
        near_edge = row["median_ms"] > 0.8 * most
        room = 0.012 * most
        plot.text(
            row["median_ms"] - room if near_edge else row["median_ms"] + room,
            index + 0.27,
            words,
            anchor="end" if near_edge else "start",
        )
    return plot.svg()


def sensitivity_bars(document: Document, limit: int = 30) -> str | None:
    """Draw what quantizing each single layer costs, in the given order; None when it was not measured."""
    entries = list(document["sensitivity"])[:limit]
    if not entries:
        return None
    key = "drop_db" if "drop_db" in entries[0] else "fidelity_db"
    values = [float(entry[key]) for entry in entries if key in entry]
    values = [value if math.isfinite(value) else 0.0 for value in values]
    what = "loss" if key == "drop_db" else "fidelity (shorter is more sensitive)"
    names = [_shortened(str(entry["layer"])) for entry in entries][::-1]
    low, high = min(0.0, *values), max(0.0, *values)
    plot = Plot(
        "Sensitivity per layer",
        Axis(f"{what} when only this layer is quantized, dB", low, high * 1.1 or 1.0),
        Axis("", -0.7, len(entries) - 0.3),
        height=70 + 22 * len(entries),
        left=18 + int(7.0 * max(len(name) for name in names)),
        y_labels=names,
    )
    for index, (entry, value) in enumerate(zip(reversed(entries), reversed(values), strict=True)):
        kept = entry.get("kept")
        hint = f"{entry['layer']}: {value:.4g} dB" + (f", kept in {kept}" if kept else "")
        plot.bar(0.0, value, index, series=1 if kept else 0, thickness=13, hint=hint)
    return plot.svg()


def search_points(search: Mapping[str, Any]) -> str | None:
    """Draw the loss of every graph that was measured on the way to a bound; None for a single graph.

    The loss stands over latency where the target's engine ran, else over the share of multiply-adds left in float.
    """
    points = search["points"]
    if len(points) < 2:
        return None
    timed = all(point["latency_ms"] is not None for point in points)
    across = [point["latency_ms"] if timed else 100 * (1 - point["int8_macs_share"]) for point in points]
    losses = [float(point["drop_db"]) for point in points]
    bound = search["bound_db"]
    plot = Plot(
        f"Loss of the graphs tried for {search['graph']}",
        Axis("latency, milliseconds (a guide)" if timed else "multiply-adds left in float, %", *padded_linear(across)),
        Axis("loss of Y PSNR, dB", *padded_linear([*losses, bound], 0.15, 0.1 * bound)),
        height=300,
    )
    plot.line([(plot.x.low, bound), (plot.x.high, bound)], kind="dashed")
    plot.text(plot.x.high, bound, f"bound, {bound:g} dB ", anchor="end", kind="note below")
    for index, (point, position, loss) in enumerate(zip(points, across, losses, strict=True)):
        label = f"{index + 1}: {100 * point['int8_macs_share']:.1f} % INT8" + (", taken" if point["taken"] else "")
        hint = f"{label}, {loss:.4f} dB, fidelity {float(point['fidelity_db']):.2f} dB"
        plot.point(position, loss, series=0, label=label, hint=hint, hollow=not point["taken"])
    return plot.svg()


def scaling_lines(study: Mapping[str, Any]) -> str | None:
    """Draw latency over image size on logarithmic axes, with the floors that the machine's measured peaks set."""
    lines = [entry for entry in study.get("runners", ()) if entry["points"]]
    if not lines:
        return None
    pixels = [point["pixels"] for entry in lines for point in entry["points"]]
    times = [point["median_ms"] for entry in lines for point in entry["points"]]
    floors = {
        words: [(point["pixels"], point["ms"]) for point in study.get(key, ())]
        for key, words in (("floor", "floor: multiply-adds"), ("memory_floor", "floor: memory traffic"))
    }
    times += [ms for points in floors.values() for _, ms in points]
    plot = _curves(
        "Latency over image size",
        Axis("low-resolution pixels", *padded_log(pixels, 1.2), "log"),
        Axis("milliseconds (median)", *padded_log(times, 1.5), "log"),
        [*floors, *(entry["name"] for entry in lines)],
    )
    for words, points in floors.items():
        if points:
            plot.line(points, kind="floor")
            plot.label(*points[-1], words)
    for index, entry in enumerate(lines):
        plot.line([(point["pixels"], point["median_ms"]) for point in entry["points"]], series=index)
        for number, point in enumerate(entry["points"]):
            x, y, stable = point["pixels"], point["median_ms"], point.get("stable", True)
            label = entry["name"] if number == len(entry["points"]) - 1 else ""
            hint = f"{entry['name']}: {x} pixels, {y:.4g} ms" + ("" if stable else ", unstable")
            plot.point(x, y, series=index, label=label, hint=hint, hollow=not stable)
    return plot.svg()


def throughput_lines(study: Mapping[str, Any], key: str = "batch") -> str | None:
    """Draw images per second over the batch size, or with another `key` over the "streams"."""
    lines = [entry for entry in study.get("runners", ()) if entry["points"]]
    if not lines:
        return None
    titles = {
        "batch": ("Throughput over batch size", "images in one batch"),
        "streams": ("Throughput over runs at once", "runs at once"),
    }
    counts = [point[key] for entry in lines for point in entry["points"]]
    rates = [point["images_per_second"] for entry in lines for point in entry["points"]]
    plot = _curves(
        titles[key][0],
        Axis(titles[key][1], *padded_log(counts, 1.15), "log", tuple(sorted(set(counts)))),
        Axis("images per second", 0.0, max(rates) * 1.15),
        [entry["name"] for entry in lines],
    )
    for index, entry in enumerate(lines):
        plot.line([(point[key], point["images_per_second"]) for point in entry["points"]], series=index)
        for number, point in enumerate(entry["points"]):
            x, y, stable = point[key], point["images_per_second"], point.get("stable", True)
            label = entry["name"] if number == len(entry["points"]) - 1 else ""
            hint = f"{entry['name']}: {key} {x}, {y:.4g} images/s" + ("" if stable else ", unstable")
            plot.point(x, y, series=index, label=label, hint=hint, hollow=not stable)
    return plot.svg()


def _curves(title: str, x: Axis, y: Axis, labels: Sequence[str]) -> Plot:
    """Return a plot for curves that leaves room for their labels behind the last points."""
    return Plot(title, x, y, width=760, height=420, right=24 + int(7.2 * max(len(label) for label in labels)))


def _pareto(
    document: Document, points: Sequence[tuple[str, float, float, bool]], label: str, title: str, least: float = 2.0
) -> str | None:
    if not points:
        return None
    latencies = [latency for _, latency, _, _ in points]
    baseline = _baseline(document)
    if baseline is not None:
        latencies.append(baseline[1])
    low, high = padded_log(latencies, 1.5)
    plot = Plot(
        title,
        Axis("latency, milliseconds (median, end to end)", low, high, "log"),
        Axis(label, *padded_linear([value for _, _, value, _ in points], 0.15, least)),
    )
    if baseline is not None:
        name, latency = baseline
        plot.line([(latency, plot.y.low), (latency, plot.y.high)], kind="dashed")
        plot.text(latency, plot.y.high, f"{name} ", anchor="end", kind="note below")
    plot.line(_front([(latency, value) for _, latency, value, passed in points if passed]), kind="front")
    for index, (name, latency, value, passed) in enumerate(points):
        hint = f"{name}: {latency:.4g} ms, {value:.2f} dB" + ("" if passed else ", failed")
        plot.point(latency, value, series=index, label=name, hint=hint, hollow=not passed)
    return plot.svg()


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both latency (less) and quality (more), by latency."""
    front: list[tuple[float, float]] = []
    for latency, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((latency, value))
    return front


def _baseline(document: Document) -> tuple[str, float] | None:
    """Return name and latency of the first runner of the bench, unless it is one of the engines."""
    names = {line["name"] for line in document["engines"]}
    for bench in document["bench"][:1]:
        for row in bench["rows"]:
            if row["kind"] == "end-to-end" and row["runner"]["name"] not in names and row["stable"]:
                return row["runner"]["name"], row["median_ms"]
    return None


def _median(line: Mapping[str, Any]) -> float | None:
    latency = line["latency"].get("end-to-end")
    return float(latency["median_ms"]) if latency and latency["stable"] else None


def _capped(value: float | str) -> float:
    return min(float(value), CEILING_DB)


def _shortened(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else "…" + name[-(limit - 1) :]
