"""Cut an image into windows of one shape, and stitch their outputs together.

All windows of a plan have the same shape, so an engine that specializes by shape (CUDA graphs, JIT kernels) does so
once, and they are spread evenly, without a sliver at the far side. Windows never extend beyond the image unless the
engine's minimum shape does, so the network's zero padding is applied where it is on the whole image. Neighbors overlap
by at least twice the `halo`. With `blend` 0 the overlap is cut in its middle: if the halo is the network's receptive
radius, the window contains everything that a kept pixel depends on, and tiles equal the whole image. Otherwise the
middle of the overlap is crossfaded.

Lengths here are input (low-resolution) pixels unless a name says output.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import UsageError

Planes = NDArray[np.float32]
"""(G, C, H, W): G groups of network channels that belong to one picture (color; color and alpha)."""


@dataclass(frozen=True)
class AxisPlan:
    """The windows along one axis.

    Attributes:
        size: length of the image.
        window: length of every window.
        starts: where each begins; if the last extends beyond the image, the image is padded.
        blend: length of the crossfade between neighbors; 0 cuts.
    """

    size: int
    window: int
    starts: tuple[int, ...]
    blend: int = 0

    @property
    def padding(self) -> int:
        """Pixels of padding at the far end, if the last window extends beyond the image."""
        return max(0, self.starts[-1] + self.window - self.size)

    @property
    def seams(self) -> tuple[float, ...]:
        """Positions of the seams: the middles of the overlaps."""
        return tuple((left + self.window + right) / 2 for left, right in itertools.pairwise(self.starts))

    def support(self, index: int, scale: int, output_size: int) -> tuple[int, int]:
        """Return the output pixels, begin and end, that window `index` contributes to."""
        seams = self.seams
        begin = 0 if index == 0 else _output_seam(seams[index - 1], scale) - self.blend * scale // 2
        end = output_size if index == len(seams) else _output_seam(seams[index], scale) + self.blend * scale // 2
        return begin, end

    def weights(self, index: int, scale: int, output_size: int) -> NDArray[np.float32] | None:
        """Return the window's weight for each output pixel of its support; None when all are 1."""
        width = 2 * (self.blend * scale // 2)
        if width == 0 or len(self.starts) == 1:
            return None
        begin, end = self.support(index, scale, output_size)
        weights = np.ones(end - begin, np.float32)
        ramp = ((np.arange(width) + 0.5) / width).astype(np.float32)
        if index > 0:
            weights[:width] = ramp
        if index < len(self.starts) - 1:
            weights[-width:] = 1 - ramp
        return weights


@dataclass(frozen=True)
class TilePlan:
    """The windows over an image: rows x columns of one shape."""

    rows: AxisPlan
    columns: AxisPlan
    halo: int

    @property
    def tiles(self) -> int:
        """Number of windows."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def whole(self) -> bool:
        """Whether one window covers the image."""
        return self.tiles == 1

    @property
    def work(self) -> float:
        """Pixels computed per pixel of the image: 1.0 for the whole image, more with overlaps."""
        return self.tiles * self.rows.window * self.columns.window / (self.rows.size * self.columns.size)


def plan_tiles(
    height: int,
    width: int,
    *,
    window: tuple[int, int],
    halo: int,
    blend: int = 0,
    smallest: tuple[int, int] = (1, 1),
    fixed: bool = False,
    multiple: int = 1,
) -> TilePlan:
    """Cut an image into even windows.

    Args:
        height, width: of the image.
        window: maximum window, (height, width).
        halo: minimum overlap on each side of a seam.
        blend: length of the crossfade, at most `halo` * 2.
        smallest: minimum window that the engine accepts.
        fixed: use exactly `window`, not the smallest windows that need as few tiles.
        multiple: windows begin at multiples of this, for networks that look at blocks of pixels.

    Raises:
        UsageError: the window has no room for two halos and at least one pixel, so no number of tiles is enough.
    """
    blend = min(blend, 2 * halo)
    return TilePlan(
        rows=_plan_axis(height, window[0], halo, blend, smallest[0], fixed, multiple),
        columns=_plan_axis(width, window[1], halo, blend, smallest[1], fixed, multiple),
        halo=halo,
    )


def stitch(
    plan: TilePlan,
    *,
    scale: int,
    trim: int,
    read_rows: Callable[[int, int], Planes],
    run: Callable[[Planes], Planes],
    batch: int = 1,
    fill_batches: bool = False,
    done: Callable[[int], None] = lambda tiles: None,
) -> Iterator[Planes]:
    """Run a plan from top to bottom and yield finished rows of the output, each row once and in order.

    Only one row of windows is in memory at a time.

    Args:
        plan: where the windows are.
        scale, trim: output pixels per input pixel, and output pixels missing at the bottom and right.
        read_rows: returns input rows begin..end as (G, C, end - begin, W); called with increasing, overlapping ranges.
        run: the network on a batch, (N, C, h, w) to (N, C, scale * h - trim, scale * w - trim).
        batch: maximum windows per run (groups count as windows).
        fill_batches: repeat the last window if a batch is incomplete, for engines of one batch size.
        done: receives the number of finished windows.

    Yields:
        (G, C, rows, W') float32.
    """
    rows, columns = plan.rows, plan.columns
    height, width = (scale * axis.size - trim for axis in (rows, columns))
    carry: Planes | None = None
    for index, start in enumerate(rows.starts):
        last = min(start + rows.window, rows.size)
        strip = _padded(read_rows(start, last), start + rows.window - last, columns.padding)
        begin, end = rows.support(index, scale, height)
        band = _band(
            strip, plan, (begin - scale * start, end - scale * start), scale, width, run, batch, fill_batches, done
        )
        weights = rows.weights(index, scale, height)
        if weights is not None:
            band *= weights[:, None]
        if carry is not None:
            band[:, :, : carry.shape[2]] += carry
        following = rows.support(index + 1, scale, height)[0] if index + 1 < len(rows.starts) else end
        finished = following - begin
        carry = band[:, :, finished:].copy() if finished < end - begin else None
        yield band[:, :, :finished]


class SeamProbe:
    """One more window across the seams in the middle of a picture, to measure how much the choice of tiles matters.

    Where tiles differ from the whole image (channel attention, overlaps below the receptive radius), the whole image
    does not fit, so there is no reference. But a window centered on the seams is as good as the tiles around it and
    has other surroundings: the two differ about as much as either differs from the whole image.
    """

    def __init__(self, plan: TilePlan, *, scale: int, trim: int, multiple: int = 1) -> None:
        """Place the window; arguments as for `stitch` and `plan_tiles`."""
        axes = plan.rows, plan.columns
        self._size = plan.rows.window, plan.columns.window
        self._place = _across(plan.rows, multiple), _across(plan.columns, multiple)
        # The evaluated part, in output pixels: near its border the window is no better than a tile.
        self._box = []
        for axis, place in zip(axes, self._place, strict=True):
            edge = axis.window // 4 if axis.seams else 0
            begin, end = place + edge, place + axis.window - edge
            self._box.append((scale * begin, min(scale * end, scale * axis.size - trim)))
        self._scale = scale
        self._input: Planes | None = None
        self._output: Planes | None = None

    def see(self, begin: int, strip: Planes) -> None:
        """Copy the needed part of input rows (G, C, rows, W) from `begin` on."""
        (top, left), (height, width) = self._place, self._size
        if self._input is None:
            self._input = np.zeros((*strip.shape[:2], height, width), np.float32)
        _copy_rows(strip[..., left : left + width], begin, self._input, top)

    def take(self, begin: int, band: Planes) -> None:
        """Copy the needed part of finished output rows (G, C, rows, W') from `begin` on."""
        (top, bottom), (left, right) = self._box
        if self._output is None:
            self._output = np.zeros((*band.shape[:2], bottom - top, right - left), np.float32)
        _copy_rows(band[..., left:right], begin, self._output, top)

    def fidelity_db(self, run: Callable[[Planes], Planes]) -> float | None:
        """Run the window and return its PSNR to the finished picture, in its inner part; None if they are equal."""
        assert self._input is not None
        assert self._output is not None
        inner = [
            slice(begin - self._scale * place, end - self._scale * place)
            for place, (begin, end) in zip(self._place, self._box, strict=True)
        ]
        made = np.concatenate([run(self._input[index : index + 1]) for index in range(len(self._input))])
        error = float(np.mean((made[:, :, *inner].astype(np.float64) - self._output) ** 2))
        return None if error == 0 else -10 * math.log10(error)


def seam_score(image: NDArray[np.floating], plan: TilePlan, scale: int) -> float | None:
    """Return how visible the seams of a finished picture are; see `seam_score_at`."""
    return seam_score_at(image, plan.rows.seams, plan.columns.seams, scale)


def seam_score_at(
    image: NDArray[np.floating], rows: Sequence[float], columns: Sequence[float], scale: int
) -> float | None:
    """Return how visible seams are, without a reference.

    The step across each seam is compared with steps one to three input pixels away, caused by the picture alone, at the
    same place within an input pixel because upsampling has a pattern of its own. 1.0 means that seams look like the
    rest; a visible grid is well above.

    Args:
        image: (H', W', C) finished output, any range.
        rows, columns: where tiles meet, in input pixels.
        scale: output pixels per input pixel.

    Returns:
        The ratio of the mean absolute step at the seams to that next to them; None without seams.
    """
    at_seams: list[float] = []
    nearby: list[float] = []
    for axis, seams in ((0, rows), (1, columns)):
        length = image.shape[axis]
        for seam in seams:
            position = _output_seam(seam, scale)
            reach = 3 * scale
            if not reach + 1 <= position < length - reach:
                continue
            near = np.take(image, range(position - reach - 1, position + reach + 1), axis=axis).astype(np.float64)
            steps = np.abs(np.diff(near, axis=axis)).mean(axis=tuple({0, 1, 2} - {axis}))[::scale]  # 7, the 4th crosses
            at_seams.append(float(steps[3]))
            nearby.append(float(np.delete(steps, 3).mean()))
    if not at_seams:
        return None
    return float((np.mean(at_seams) + 1e-12) / (np.mean(nearby) + 1e-12))


def _plan_axis(size: int, window: int, halo: int, blend: int, smallest: int, fixed: bool, multiple: int) -> AxisPlan:
    if size <= window:
        return AxisPlan(size, window if fixed else max(size, smallest), (0,))
    # Rounding the begin of a window down to a multiple costs up to multiple - 1 pixels of overlap: plan with more.
    reach = halo + (multiple - 1)
    if window < 2 * reach + 1:
        raise UsageError(
            f"tiles of {window} pixels with an overlap of {halo} on each side",
            expected=f"tiles of at least {2 * reach + 1}",
            next_step="allow more memory (--memory) or larger tiles (--tile), or choose a smaller --overlap",
        )
    count = 1 + math.ceil((size - window) / (window - 2 * reach))
    if not fixed:
        even = math.ceil((size + (count - 1) * 2 * reach) / count)
        window = min(window, max(math.ceil(even / multiple) * multiple, smallest, 2 * reach + 1))
    inner = [index * (size - window) / (count - 1) for index in range(1, count - 1)]
    starts = (0, *(round(start / multiple) * multiple for start in inner), size - window)
    if (size - window) % multiple:
        # The last window would begin off the grid: start it earlier and pad the image at its end.
        starts = (*starts[:-1], math.ceil((size - window) / multiple) * multiple)
    # A crossfade longer than the distance to the next seam would make three windows overlap.
    nearest = min(right - left for left, right in itertools.pairwise(starts))
    return AxisPlan(size, window, starts, min(blend, nearest))


def _across(axis: AxisPlan, multiple: int) -> int:
    """Return the begin of a window centered on the middle seam."""
    if not axis.seams:
        return 0
    seam = axis.seams[len(axis.seams) // 2]
    begin = round((seam - axis.window / 2) / multiple) * multiple
    return max(0, min(begin, (axis.size - axis.window) // multiple * multiple))


def _copy_rows(source: Planes, begin: int, target: Planes, first: int) -> None:
    """Copy the rows that two ranges share: `source` holds rows from `begin` on, `target` from `first` on."""
    low, high = max(begin, first), min(begin + source.shape[2], first + target.shape[2])
    if low < high:
        target[:, :, low - first : high - first] = source[:, :, low - begin : high - begin]


def _output_seam(seam: float, scale: int) -> int:
    return math.floor(seam * scale)


def _padded(strip: Planes, bottom: int, right: int) -> Planes:
    if bottom == 0 and right == 0:
        return strip
    for axis, count in ((2, bottom), (3, right)):
        # Mirror, which leaves no step to sharpen. An axis too short for that repeats its edge too.
        widths = [(0, count if index == axis else 0) for index in range(4)]
        strip = np.pad(strip, widths, mode="reflect" if count < strip.shape[axis] else "symmetric")
    return strip


def _band(
    strip: Planes,
    plan: TilePlan,
    rows: tuple[int, int],
    scale: int,
    width: int,
    run: Callable[[Planes], Planes],
    batch: int,
    fill_batches: bool,
    done: Callable[[int], None],
) -> Planes:
    """Run one row of windows: (G, C, window, W) to (G, C, rows, W'), crossfaded from left to right."""
    groups, channels = strip.shape[:2]
    columns = plan.columns
    band = np.zeros((groups, channels, rows[1] - rows[0], width), np.float32)
    windows = [(group, index) for index in range(len(columns.starts)) for group in range(groups)]
    for first in range(0, len(windows), batch):
        members = windows[first : first + batch]
        tiles = np.stack([strip[g, :, :, columns.starts[i] : columns.starts[i] + columns.window] for g, i in members])
        if fill_batches and len(members) < batch:
            tiles = np.concatenate([tiles, np.repeat(tiles[-1:], batch - len(members), axis=0)])
        outputs = run(tiles)
        for output, (group, index) in zip(outputs[: len(members)], members, strict=True):
            begin, end = columns.support(index, scale, width)
            offset = scale * columns.starts[index]
            part = output[:, rows[0] : rows[1], begin - offset : end - offset]
            weights = columns.weights(index, scale, width)
            band[group, :, :, begin:end] += part if weights is None else part * weights
            done(1)
    return band
