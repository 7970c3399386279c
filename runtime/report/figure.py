"""Matplotlib figures as inline SVG that follows the page's theme.

Matplotlib draws with the fixed colors below; in the SVG they become the custom properties of the page's style sheet,
so one drawing serves the light and the dark theme. Text stays text, in the font of the page.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from srdeploy.core.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Number of series colors in the style sheet: --s0 to --s7."""

INK, SOFT, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
_PROPERTIES = {INK: "--ink", SOFT: "--soft", LINE: "--line", CARD: "--card"} | {
    f"#0a0a0{index}": f"--s{index}" for index in range(SERIES)
}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srdeploy",  # ids are the same in every run
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
}


def series_color(index: int) -> str:
    """Return the color of a series; colors repeat after `SERIES`."""
    return f"#0a0a0{index % SERIES}"


def new_figure(height: float, width: float = 7.2) -> "tuple[Figure, Axes]":
    """Return an empty figure and its axes, in inches of 72 SVG units.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    figures = import_extra("matplotlib.figure", "report")
    with matplotlib.rc_context(_STYLE):
        figure: Figure = figures.Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def plain_ticks(axes: "Axes", which: str) -> None:
    """Write the ticks of a logarithmic axis as plain numbers at 1, 2 and 5."""
    ticker = import_extra("matplotlib.ticker", "report")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: tick_label(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def tick_label(value: float) -> str:
    """Write a tick's value: 0.02, 5, 12.5, 30k, 2M."""
    for limit, factor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.4g}"


def label_points(axes: "Axes", points: Sequence[tuple[float, float, str, str]], *, below: bool = False) -> None:
    """Write (x, y, label, color) next to their points, each moved down until it covers no dot and no other label.

    Args:
        axes: with its final limits.
        points: in data coordinates.
        below: start under the point instead of beside it, where a horizontal bar goes through the point.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where the points are
    pixels = 72.0 / figure.dpi
    right = axes.transAxes.transform((1.0, 0.0))[0] * pixels
    dots = [axes.transData.transform((x, y)) * pixels for x, y, _, _ in points]
    taken = [(cx - 6, cx + 6, cy) for cx, cy in dots]
    for (cx, cy), (x, y, label, color) in sorted(
        zip(dots, points, strict=True), key=lambda entry: (-entry[0][1], entry[0][0])
    ):
        width = 6.0 * len(label)
        gap = -5 if below else 10
        leftward = cx + gap + width > right
        start = cx - gap - width if leftward else cx + gap
        level = cy - 13 if below else cy
        while any(abs(level - other) < 12 and start < end and begin < start + width for begin, end, other in taken):
            level -= 3
        taken.append((start, start + width, level))
        axes.annotate(
            label, (x, y), (-gap if leftward else gap, level - cy), textcoords="offset points",
            ha="right" if leftward else "left", va="center", color=color, weight="bold", annotation_clip=False,
        )  # fmt: skip


def svg_of(figure: "Figure", title: str, hints: Sequence[tuple[str, str]] = ()) -> str:
    """Return a figure as an inline SVG element.

    Args:
        figure: drawn with the colors of this module.
        title: read out to those who do not see the drawing.
        hints: (gid of an artist, text shown when the pointer rests on it).
    """
    matplotlib = import_extra("matplotlib", "report")
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own
    for color, name in _PROPERTIES.items():
        svg = svg.replace(color, f"var({name})")
    for gid, hint in hints:
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(hint)}</title>', 1)
    attributes = f'class="plot" role="img" aria-label="{escape(title)}"'
    return re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg {attributes} viewBox="\1">', svg, count=1).strip()
