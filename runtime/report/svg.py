"""Plots as inline SVG: no script, no font, no network; colours come from the page's style, so they follow its theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Kind = Literal["linear", "log"]

SERIES = 8
"""Number of series colours in the style sheet: classes s0 to s7."""


@dataclass(frozen=True)
class Axis:
    """One axis: its label, range and kind, and the values to mark; none marks round ones."""

    label: str
    low: float
    high: float
    kind: Kind = "linear"
    marks: tuple[float, ...] = ()

    def position(self, value: float) -> float:
        """Return where a value lies, 0 at `low` and 1 at `high`; values beyond are held at the ends."""
        if self.kind == "log":
            share = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Return the values to mark, else round ones inside the range."""
        if self.marks:
            return list(self.marks)
        return log_ticks(self.low, self.high) if self.kind == "log" else linear_ticks(self.low, self.high)


@dataclass
class Plot:
    """A drawing area with two axes; elements are added in data coordinates.

    Attributes:
        title: read out to those who do not see the drawing.
        x, y: the axes.
        width, height: of the whole drawing in SVG units, at which text is drawn at 13 units.
        left: room for the labels of the y axis.
        right: room for labels of points at the right end.
    """

    title: str
    x: Axis
    y: Axis
    width: int = 640
    height: int = 380
    left: int = 64
    right: int = 18
    y_labels: Sequence[str] | None = None
    _parts: list[str] = field(default_factory=list)
    _labels: list[tuple[float, float, str, str]] = field(default_factory=list)
    _dots: list[tuple[float, float]] = field(default_factory=list)

    @property
    def _area(self) -> tuple[float, float, float, float]:
        return self.left, 14, self.width - self.right, self.height - 50

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the SVG coordinates of a point in data coordinates."""
        left, top, right, bottom = self._area
        return left + self.x.position(x) * (right - left), bottom - self.y.position(y) * (bottom - top)

    def point(self, x: float, y: float, *, series: int, label: str = "", hint: str = "", hollow: bool = False) -> None:
        """Draw a dot, with a label beside it and a hint shown on hovering."""
        cx, cy = self.at(x, y)
        kind = f"dot s{series % SERIES}" + (" hollow" if hollow else "")
        hint_part = f"<title>{escape(hint)}</title>" if hint else ""
        self._parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="6">{hint_part}</circle>')
        self._dots.append((cx, cy))
        if label:
            self._labels.append((cx, cy, label, f"s{series % SERIES}"))

    def label(self, x: float, y: float, words: str) -> None:
        """Write beside a point without drawing a dot, where no other label stands."""
        self._labels.append((*self.at(x, y), words, "plain"))

    def speck(self, x: float, y: float, *, series: int) -> None:
        """Draw one faint small dot of a cloud."""
        cx, cy = self.at(x, y)
        self._parts.append(f'<circle class="speck s{series % SERIES}" cx="{cx:.1f}" cy="{cy:.1f}" r="2"/>')

    def line(self, points: Sequence[tuple[float, float]], *, series: int | None = None, kind: str = "line") -> None:
        """Draw a polyline; `kind` is a style class ("line", "dashed", "floor", "whisker")."""
        path = " ".join(f"{cx:.1f},{cy:.1f}" for cx, cy in (self.at(x, y) for x, y in points))
        colour = "" if series is None else f" s{series % SERIES}"
        self._parts.append(f'<polyline class="{kind}{colour}" points="{path}"/>')

    def bar(self, low: float, high: float, y: float, *, series: int, thickness: float, hint: str = "") -> None:
        """Draw a horizontal bar from x = low to x = high, centred on y."""
        (x0, cy), (x1, _) = self.at(low, y), self.at(high, y)
        hint_part = f"<title>{escape(hint)}</title>" if hint else ""
        self._parts.append(
            f'<rect class="bar s{series % SERIES}" x="{min(x0, x1):.1f}" y="{cy - thickness / 2:.1f}" '
            f'width="{max(abs(x1 - x0), 1):.1f}" height="{thickness:.1f}" rx="2">{hint_part}</rect>'
        )

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", kind: str = "note") -> None:
        """Write at a point in data coordinates."""
        cx, cy = self.at(x, y)
        self._parts.append(
            f'<text class="{kind}" x="{cx:.1f}" y="{cy:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        """Return the whole drawing."""
        return (
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
            f"<title>{escape(self.title)}</title>{self._frame()}{''.join(self._parts)}{self._placed_labels()}</svg>"
        )

    def _frame(self) -> str:
        left, top, right, bottom = self._area
        parts = []
        for value in self.x.ticks():
            cx = self.at(value, self.y.low)[0]
            parts.append(f'<line class="grid" x1="{cx:.1f}" x2="{cx:.1f}" y1="{top}" y2="{bottom}"/>')
            parts.append(
                f'<text class="tick" x="{cx:.1f}" y="{bottom + 18}" text-anchor="middle">{number(value)}</text>'
            )
        if self.y_labels is None:
            for value in self.y.ticks():
                cy = self.at(self.x.low, value)[1]
                parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{cy:.1f}" y2="{cy:.1f}"/>')
                parts.append(_text("tick", left - 8, cy + 4, number(value), "end"))
            middle = (top + bottom) / 2
            parts.append(
                f'<text class="axis" transform="translate(15 {middle:.0f}) rotate(-90)" text-anchor="middle">'
                f"{escape(self.y.label)}</text>"
            )
        else:
            for index, words in enumerate(self.y_labels):
                cy = self.at(self.x.low, index)[1]
                parts.append(
                    f'<text class="row" x="{left - 10}" y="{cy + 4:.1f}" text-anchor="end">{escape(words)}</text>'
                )
        parts.append(f'<line class="base" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(_text("axis", (left + right) / 2, self.height - 10, self.x.label, "middle"))
        return "".join(parts)

    def _placed_labels(self) -> str:
        """Place the labels beside their points, each moved down until it touches no dot and no earlier one."""
        left, top, _, _ = self._area
        right = self.width - 4
        taken: list[tuple[float, float, float]] = [(cx - 8, cx + 8, cy + 4) for cx, cy in self._dots]
        parts = []
        for cx, cy, words, series in sorted(self._labels, key=lambda entry: (entry[1], entry[0])):
            width = 7.2 * len(words)
            to_left = cx + 12 + width > right
            start = cx - 12 - width if to_left else cx + 12
            start = max(left, start)
            y = max(cy + 4, top + 10)
            while any(abs(y - other) < 16 and start < end and begin < start + width for begin, end, other in taken):
                y += 4
            taken.append((start, start + width, y))
            anchor, x = ("end", start + width) if to_left else ("start", start)
            parts.append(
                f'<text class="label {series}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
            )
        return "".join(parts)


def _text(kind: str, x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def number(value: float) -> str:
    """Write a tick's value briefly: 0.02, 5, 12.5, 30k, 2M."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` round values in [low, high]."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / count)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 times powers of ten in [low, high]; only the powers when the range is wide."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 300 else (1,)
    if high / low < 6:
        factors = (1, 1.5, 2, 3, 4, 5, 7)  # type: ignore[assignment]
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def padded_log(values: Sequence[float], margin: float = 1.35) -> tuple[float, float]:
    """Return a range around positive values with room on both sides."""
    return min(values) / margin, max(values) * margin


def padded_linear(values: Sequence[float], share: float = 0.12, least: float = 1.0) -> tuple[float, float]:
    """Return a range around values with room on both sides, at least `least` wide on either."""
    room = max(least, share * (max(values) - min(values)))
    return min(values) - room, max(values) + room
