"""The report's plots, drawn from its JSON document alone, so that an old report.json draws the same page again."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from srdeploy.runtime.bench.ratios import median_label, ratio_label
from srdeploy.runtime.report.figure import (
    CARD,
    INK,
    SOFT,
    label_points,
    new_figure,
    plain_ticks,
    series_color,
    svg_of,
    tick_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]

CEILING_DB = 140.0
"""Fidelity is drawn at most this high: float32 outputs that agree up to their last bits reach it."""


def fidelity_over_speed(document: Document) -> str | None:
    """Draw fidelity over the speed-up: a dot with its interval per engine, and the front of those unbeaten in both."""
    points = [
        (line, min(float(line["fidelity_min_db"]), CEILING_DB))
        for line in document["engines"]
        if line["fidelity_min_db"] not in (None, "nan") and _ratio(line) is not None
    ]
    return _quality_over_speed(document, points, "fidelity to the eager network, dB (worst image)", margin=2.0)


def psnr_over_speed(document: Document) -> str | None:
    """Draw mean Y PSNR against ground truth over the speed-up; None without ground truth."""
    psnr = {
        verdict["name"]: verdict["candidate_quality"]["psnr_y_db"]
        for verdict in document["verification"]
        if verdict["candidate_quality"] and isinstance(verdict["candidate_quality"]["psnr_y_db"], (int, float))
    }
    points = [
        (line, float(psnr[line["name"]]))
        for line in document["engines"]
        if line["name"] in psnr and _ratio(line) is not None
    ]
    return _quality_over_speed(document, points, "Y PSNR against ground truth, dB (mean)", margin=0.02)


def speedup_bars(bench: Mapping[str, Any], kind: str) -> str | None:
    """Draw the speed-up of every runner over the first, with its 95 % interval; None for a single runner."""
    base = bench["rows"][0]["runner"]["name"]
    rows = [row for row in bench["rows"] if row["kind"] == kind and row["ratio"] is not None]
    rows = [row for row in rows if row["runner"]["name"] != base]
    if not rows:
        return None
    figure, axes = new_figure(0.75 + 0.36 * len(rows))
    hints = []
    for level, row in enumerate(reversed(rows)):
        color = series_color(_series(bench, row))
        low, high = row.get("ratio_low") or row["ratio"], row.get("ratio_high") or row["ratio"]
        axes.plot([low, high], [level, level], color=color, linewidth=3, solid_capstyle="round", alpha=0.55)
        label = ratio_label(row["ratio"], row.get("ratio_low"), row.get("ratio_high"))
        gid = f"speedup-{kind}-{level}"
        axes.plot([row["ratio"]], [level], "o", color=color, markersize=7, gid=gid)
        hints.append((gid, f"{row['runner']['name']}: {label}"))
        axes.annotate(label, (high, level), (8, 0), textcoords="offset points", va="center", color=color)
    axes.axvline(1.0, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [row["runner"]["name"] for row in reversed(rows)], color=INK)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0.0, 1.35 * max(row.get("ratio_high") or row["ratio"] for row in rows))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"times faster than {base}, {kind}, with the 95 % interval")
    return svg_of(figure, f"Speed-up of {len(rows)} runners over {base}, {kind}", hints)


def latency_strips(bench: Mapping[str, Any], kind: str) -> str | None:
    """Draw every measured run of one kind: specks, bars from the fastest to p90, a dot at the median."""
    rows = [row for row in bench["rows"] if row["kind"] == kind]
    if not rows:
        return None
    right = max(min(row["p99_ms"], 3 * row["median_ms"]) for row in rows) * 1.12
    figure, axes = new_figure(0.75 + 0.42 * len(rows))
    hints = []
    for level, row in enumerate(reversed(rows)):
        color = series_color(_series(bench, row))
        times = [time for time in row["times_ms"][:200] if time <= right]
        axes.plot(times, [level] * len(times), "o", color=color, markersize=3, alpha=0.3, markeredgewidth=0)
        axes.plot(
            [row["min_ms"], min(row["p90_ms"], right)], [level, level], color=color, linewidth=2.5, alpha=0.75,
            solid_capstyle="round",
        )  # fmt: skip
        gid = f"latency-{kind}-{level}"
        face = color if row["stable"] else CARD
        axes.plot([row["median_ms"]], [level], "o", color=color, markersize=8, markerfacecolor=face, gid=gid)
        label = median_label(row["median_ms"], row.get("ci_share", math.nan), stable=row["stable"])
        hints.append((gid, f"{row['runner']['name']}: {label}, p90 {row['p90_ms']:.4g} ms, {row['n']} runs"))
        near_edge = row["median_ms"] > 0.8 * right
        axes.annotate(
            label, (row["median_ms"], level), (0 if near_edge else 4, 7), textcoords="offset points", color=SOFT,
            ha="right" if near_edge else "left", size=9,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["runner"]["name"] for row in reversed(rows)], color=INK)
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.set_xlim(0.0, right)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"milliseconds per run, {kind}, shape {bench['shape']}")
    return svg_of(figure, f"Latency of {len(rows)} runners, {kind}, shape {bench['shape']}", hints)


def sensitivity_bars(document: Document, limit: int = 30) -> str | None:
    """Draw what quantizing each single layer costs, in the given order; None when it was not measured."""
    entries = list(document["sensitivity"])[:limit]
    if not entries:
        return None
    key = "drop_db" if "drop_db" in entries[0] else "fidelity_db"
    values = [float(entry[key]) for entry in entries if key in entry]
    values = [value if math.isfinite(value) else 0.0 for value in values]
    figure, axes = new_figure(0.75 + 0.24 * len(entries))
    hints = []
    for level, (entry, value) in enumerate(zip(reversed(entries), reversed(values), strict=True)):
        kept = entry.get("kept")
        gid = f"layer-{level}"
        axes.barh(level, value, 0.6, color=series_color(1 if kept else 0))[0].set_gid(gid)
        hints.append((gid, f"{entry['layer']}: {value:.4g} dB" + (f", kept in {kept}" if kept else "")))
    axes.set_yticks(
        range(len(entries)), [_shortened(str(entry["layer"])) for entry in reversed(entries)], color=INK, size=9
    )
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.grid(visible=False, axis="y")
    quantity = "loss" if key == "drop_db" else "fidelity (shorter is more sensitive)"
    axes.set_xlabel(f"{quantity} when only this layer is quantized, dB")
    return svg_of(figure, "Sensitivity per layer", hints)


def search_points(search: Mapping[str, Any]) -> str | None:
    """Draw the loss of every graph that was measured on the way to a bound; None for a single graph.

    The loss is drawn over latency where the target's engine ran, else over the share of multiply-adds in float.
    """
    points = search["points"]
    if len(points) < 2:
        return None
    timed = all(point["latency_ms"] is not None for point in points)
    bound = search["bound_db"]
    figure, axes = new_figure(3.6)
    labels, hints = [], []
    for index, point in enumerate(points):
        x = point["latency_ms"] if timed else 100 * (1 - point["int8_macs_share"])
        loss, gid = float(point["drop_db"]), f"graph-{index}"
        label = f"{index + 1}: {100 * point['int8_macs_share']:.1f} % INT8" + (", taken" if point["taken"] else "")
        _dot(axes, x, loss, series=0, filled=point["taken"], gid=gid)
        labels.append((x, loss, label, series_color(0)))
        hints.append((gid, f"{label}, {loss:.4f} dB, fidelity {float(point['fidelity_db']):.2f} dB"))
    axes.margins(0.15)
    axes.axhline(bound, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"bound, {bound:g} dB", (1, bound), (-4, -10), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color=SOFT, size=9,
    )  # fmt: skip
    axes.set_xlabel("latency, milliseconds (a guide)" if timed else "multiply-adds left in float, %")
    axes.set_ylabel("loss of Y PSNR, dB")
    label_points(axes, labels)
    return svg_of(figure, f"Loss of the graphs tried for {search['graph']}", hints)


def scaling_lines(study: Mapping[str, Any]) -> str | None:
    """Draw latency over image size on logarithmic axes, with the floors that the machine's measured peaks set."""
    if not any(entry["points"] for entry in study.get("runners", ())):
        return None
    figure, axes = new_figure(4.4)
    labels = []
    for key, label in (("floor", "floor: multiply-adds"), ("memory_floor", "floor: memory traffic")):
        points = study.get(key, ())
        if points:
            axes.plot(
                [point["pixels"] for point in points], [point["ms"] for point in points], color=SOFT, linewidth=1.2,
                linestyle=(0, (4, 3)),
            )  # fmt: skip
            labels.append((points[-1]["pixels"], points[-1]["ms"], label, SOFT))
    axes.set_xscale("log")
    axes.set_yscale("log")
    labels += _curves(axes, study, "pixels", "median_ms")
    for which in ("x", "y"):
        plain_ticks(axes, which)
    pixels = [point["pixels"] for entry in study["runners"] for point in entry["points"]]
    axes.set_xlim(min(pixels) / 1.2, max(pixels) * (max(pixels) / min(pixels)) ** 0.4 * 1.6)  # room for the labels
    axes.set_xlabel("low-resolution pixels")
    axes.set_ylabel("milliseconds (median)")
    label_points(axes, labels)
    return svg_of(figure, "Latency over image size")


def throughput_lines(study: Mapping[str, Any], key: str = "batch") -> str | None:
    """Draw images per second over the batch size, or with another `key` over the "streams"."""
    if not any(entry["points"] for entry in study.get("runners", ())):
        return None
    titles = {
        "batch": ("Throughput over batch size", "images in one batch"),
        "streams": ("Throughput over runs at once", "runs at once"),
    }
    figure, axes = new_figure(4.4)
    axes.set_xscale("log")
    labels = _curves(axes, study, key, "images_per_second")
    counts = sorted({point[key] for entry in study["runners"] for point in entry["points"]})
    axes.set_xticks(counts, [tick_label(count) for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlim(counts[0] / 1.1, counts[-1] * (counts[-1] / counts[0]) ** 0.4 * 1.6)  # room for the labels
    axes.set_ylim(0.0, None)
    axes.set_xlabel(titles[key][1])
    axes.set_ylabel("images per second")
    label_points(axes, labels)
    return svg_of(figure, titles[key][0])


def _curves(axes: "Axes", study: Mapping[str, Any], x: str, y: str) -> list[tuple[float, float, str, str]]:
    """Draw one curve per runner and return the labels of their last points."""
    labels = []
    for series, entry in enumerate(entry for entry in study["runners"] if entry["points"]):
        points = entry["points"]
        axes.plot([point[x] for point in points], [point[y] for point in points], color=series_color(series))
        for point in points:
            _dot(axes, point[x], point[y], series=series, filled=point.get("stable", True))
        labels.append((points[-1][x], points[-1][y], entry["name"], series_color(series)))
    return labels


def _quality_over_speed(
    document: Document, points: Sequence[tuple[Mapping[str, Any], float]], label: str, *, margin: float
) -> str | None:
    if not points:
        return None
    base = document["bench"][0]["rows"][0]["runner"]["name"]
    figure, axes = new_figure(3.8, 5.6)
    labels, hints = [], []
    unbeaten = []
    for series, (line, quality) in enumerate(points):
        ratio, low, high = _ratio(line) or (math.nan,) * 3
        passed = line["status"] == "passed"
        axes.plot(
            [low, high], [quality, quality], color=series_color(series), linewidth=3, alpha=0.5,
            solid_capstyle="round",
        )  # fmt: skip
        gid = f"engine-{series}-{'psnr' if 'PSNR' in label else 'fidelity'}"
        _dot(axes, ratio, quality, series=series, filled=passed, gid=gid)
        labels.append((ratio, quality, line["name"], series_color(series)))
        failed = "" if passed else ", failed"
        hints.append((gid, f"{line['name']}: {ratio_label(ratio, low, high)}, {quality:.2f} dB{failed}"))
        unbeaten += [(ratio, quality)] if passed else []
    front = _front(unbeaten)
    axes.plot([x for x, _ in front], [y for _, y in front], color=SOFT, linewidth=1.2, alpha=0.7, zorder=1)
    axes.axvline(1.0, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        base, (1.0, 1.0), (-4, -10), xycoords=("data", "axes fraction"), textcoords="offset points", ha="right",
        color=SOFT, size=9,
    )  # fmt: skip
    values = [quality for _, quality in points]
    room = max(margin, 0.15 * (max(values) - min(values)))
    axes.set_ylim(min(values) - room, max(values) + room)
    right = max(high for line, _ in points for _, _, high in [_ratio(line) or (1.0, 1.0, 1.0)])
    axes.set_xlim(0.0, 1.15 * max(right, 1.0))
    axes.set_xlabel(f"times faster than {base}, end to end, with the 95 % interval")
    axes.set_ylabel(label)
    label_points(axes, labels, below=True)
    return svg_of(figure, f"{label.partition(',')[0]} over speed-up", hints)


def _dot(axes: "Axes", x: float, y: float, *, series: int, filled: bool, gid: str | None = None) -> None:
    color = series_color(series)
    axes.plot([x], [y], "o", color=color, markersize=7, markerfacecolor=color if filled else CARD, gid=gid)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both speed-up and quality (more is better), the fastest first."""
    front: list[tuple[float, float]] = []
    for ratio, value in sorted(points, key=lambda point: (-point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((ratio, value))
    return front


def _ratio(line: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return an engine's end-to-end speed-up with its interval; None where it was not measured."""
    latency = line["latency"].get("end-to-end")
    if not latency or latency["ratio"] is None:
        return None
    ratio = float(latency["ratio"])
    return ratio, float(latency.get("ratio_low") or ratio), float(latency.get("ratio_high") or ratio)


def _series(bench: Mapping[str, Any], row: Mapping[str, Any]) -> int:
    """Return the series of a row's runner: one color per runner in all plots of a measurement."""
    names = list(dict.fromkeys(entry["runner"]["name"] for entry in bench["rows"]))
    return names.index(row["runner"]["name"])


def _shortened(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else "…" + name[-(limit - 1) :]
