"""Choose tiles that fit the memory budget and the shapes of the engine."""

import math
from dataclasses import dataclass
from typing import Literal

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import UsageError
from srdeploy.core.memory import bytes_per_pixel, default_memory
from srdeploy.core.shapes import ShapeProfile, format_shape
from srdeploy.core.sizes import format_bytes
from srdeploy.upscale.tiles import TilePlan, plan_tiles

Mode = Literal["auto", "whole", "overlapped", "exact"]

DEFAULT_OVERLAP = 16
"""Overlap on each side if no overlap is exact (channel attention); measured, see docs/upscaling.md."""
MAX_SIDE = 1024
"""Maximum side of automatic tiles: larger ones save little and make progress and Ctrl-C coarse."""
INDEX_LIMIT = 2**31 - 1
"""Maximum number of tensor elements that convolution kernels can index."""
_SHARE_OF_STRIPS = 0.5
_STRIP_COPIES = 3  # the outputs, the part that waits for the next row of tiles, and temporaries


@dataclass(frozen=True)
class TileSettings:
    """Options for tiles; None selects automatically.

    Attributes:
        mode: "auto" (whole image if it fits, else tiles), "whole", "overlapped", or "exact" (tiles that equal the
            whole image: by the receptive radius, or in lock-step for networks with channel attention).
        side: height and width of the tiles.
        overlap: input pixels on each side of a seam.
        batch: tiles per run.
        memory_bytes: budget of a run.
    """

    mode: Mode = "auto"
    side: int | None = None
    overlap: int | None = None
    batch: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Decision:
    """How one image will be run.

    Attributes:
        plan: the windows.
        batch: windows per run.
        fill_batches: whether incomplete batches are filled.
        exact: whether the result equals the whole image's.
        lock_step: whether the network runs stage by stage over all tiles.
        reason: one line for the user.
        maps_in_memory: whether feature maps are kept in memory between stages (lock-step only).
    """

    plan: TilePlan
    batch: int
    fill_batches: bool
    exact: bool
    lock_step: bool
    reason: str
    maps_in_memory: bool = True


def gpu_memory(device: str) -> int | None:
    """Return half of the memory that is free now on an engine's GPU ("cuda:N"); None for the CPU."""
    if not device.startswith("cuda"):
        return None
    from srdeploy.runtime.engines.gpu import find_gpu

    found = find_gpu(device)
    return None if found is None else found.free_bytes() // 2


def decide(
    height: int,
    width: int,
    contract: ModelContract,
    profile: ShapeProfile | None,
    settings: TileSettings,
    *,
    groups: int = 1,
) -> Decision:
    """Choose between the whole image and tiles, and their size.

    Args:
        height, width: of the image.
        contract: of the network.
        profile: shapes the engine takes, None for all.
        settings: the options given.
        groups: network inputs per picture, 2 with alpha.

    Raises:
        UsageError: the options do not fit the engine, or the budget is too small for a single tile.
    """
    bounds = _Bounds.of(contract, profile, settings)
    if contract.min_size > 1:
        bounds = bounds.at_least(contract.min_size)
    fits = bounds.hold(height, width)
    if settings.mode == "whole" or (settings.mode == "auto" and fits and settings.side is None):
        return _whole(height, width, bounds, fits, settings)
    halo, blend, exact = _overlap(contract, settings)
    window = _window(height, width, bounds, halo, settings, _strip_rows(width, contract, bounds, groups))
    plan = plan_tiles(
        height,
        width,
        window=window,
        halo=halo,
        blend=blend,
        smallest=bounds.smallest,
        fixed=bounds.fixed or profile is not None,
        multiple=int(contract.configuration.get("unshuffle", 1) or 1),
    )
    exact = exact or plan.whole
    batch = _batch(plan, bounds, settings, groups)
    if plan.whole:
        return Decision(plan, batch, bounds.fill, exact, False, f"whole image (fits in {format_bytes(bounds.budget)})")
    kind = "exact" if exact else "overlapped"
    why = f"{width}x{height} does not fit" if not fits else "asked for"
    reason = (
        f"{plan.tiles} {kind} tiles of {plan.columns.window}x{plan.rows.window}, overlap {halo}, "
        f"batch {batch} ({why}; memory {format_bytes(bounds.budget)})"
    )
    return Decision(plan, batch, bounds.fill, exact, False, reason)


def needs_tiles(
    height: int, width: int, contract: ModelContract, profile: ShapeProfile | None, settings: TileSettings
) -> bool:
    """Return True if an image does not fit as a whole, or a tile size is given."""
    return settings.side is not None or not _Bounds.of(contract, profile, settings).hold(height, width)


@dataclass(frozen=True)
class _Bounds:
    """Limits of one run: window sizes (height, width), total pixels of all windows, number of windows."""

    smallest: tuple[int, int]
    largest: tuple[int, int]
    tuned: tuple[int, int] | None
    pixels: int
    batches: tuple[int, int]
    budget: int
    index_pixels: int

    @property
    def fixed(self) -> bool:
        return self.smallest == self.largest

    @property
    def fill(self) -> bool:
        return self.batches[0] > 1

    def hold(self, height: int, width: int) -> bool:
        """Return True if a whole image fits."""
        return height <= self.largest[0] and width <= self.largest[1] and height * width <= self.pixels

    def at_least(self, size: int) -> "_Bounds":
        smallest = (max(self.smallest[0], size), max(self.smallest[1], size))
        return _Bounds(smallest, self.largest, self.tuned, self.pixels, self.batches, self.budget, self.index_pixels)

    @classmethod
    def of(cls, contract: ModelContract, profile: ShapeProfile | None, settings: TileSettings) -> "_Bounds":
        budget = settings.memory_bytes or default_memory()
        elements = max(1, contract.largest_tensor_per_pixel)
        index_pixels = INDEX_LIMIT // elements
        pixels = min(index_pixels, int(budget / max(bytes_per_pixel(contract), 1.0)))
        if profile is None:
            endless = (1 << 30, 1 << 30)
            return cls((1, 1), endless, None, pixels, (1, 1 << 30), budget, index_pixels)
        low, middle, high = profile.min, profile.opt, profile.max
        return cls(low[2:], high[2:], middle[2:], pixels, (low[0], high[0]), budget, index_pixels)


def _whole(height: int, width: int, bounds: _Bounds, fits: bool, settings: TileSettings) -> Decision:
    if settings.mode == "whole" and (
        height > bounds.largest[0] or width > bounds.largest[1] or height * width > bounds.index_pixels
    ):
        limit = f"{bounds.largest[1]}x{bounds.largest[0]}" if bounds.largest[0] < 1 << 30 else "2^31 elements a tensor"
        raise UsageError(
            f"{width}x{height} pixels as a whole",
            expected=f"at most {limit}",
            next_step="leave out --tiles whole",
        )
    window = (max(height, bounds.smallest[0]), max(width, bounds.smallest[1]))
    plan = plan_tiles(height, width, window=window, halo=0, smallest=bounds.smallest, fixed=True)
    padded = plan.rows.padding or plan.columns.padding
    shape = format_shape((1, 1, *window))[4:]
    how = f"whole image, padded to the engine's smallest size {shape}" if padded else "whole image"
    note = f"fits in {format_bytes(bounds.budget)}" if fits else "asked for"
    return Decision(plan, max(1, bounds.batches[0]), bounds.fill, not padded, False, f"{how} ({note})")


def _overlap(contract: ModelContract, settings: TileSettings) -> tuple[int, int, bool]:
    """Return overlap, crossfade and whether tiles are exact."""
    radius = contract.receptive_radius
    if settings.mode == "exact" and radius is not None:
        return max(radius, settings.overlap or 0), 0, True
    halo = settings.overlap if settings.overlap is not None else (DEFAULT_OVERLAP if radius is None else radius)
    exact = radius is not None and halo >= radius
    # Half of the overlap is outside the crossfade: errors are largest at the borders of a tile.
    return halo, 0 if exact else halo, exact


def _strip_rows(width: int, contract: ModelContract, bounds: _Bounds, groups: int) -> int:
    """Return the maximum height of a row of tiles, whose outputs over the whole width are held in memory as floats."""
    row_bytes = 4 * groups * contract.channels * width * contract.scale**2
    return max(1, int(bounds.budget * _SHARE_OF_STRIPS / (row_bytes * _STRIP_COPIES)))


def _window(
    height: int, width: int, bounds: _Bounds, halo: int, settings: TileSettings, most_rows: int
) -> tuple[int, int]:
    """Return the largest sensible window within the bounds."""
    if settings.side is not None:
        side = settings.side
        if side < min(bounds.smallest) or side > max(bounds.largest):
            raise UsageError(
                f"tiles of {side} pixels",
                expected=f"{bounds.smallest[1]}x{bounds.smallest[0]} to {bounds.largest[1]}x{bounds.largest[0]}",
                next_step="choose a --tile within the engine's shapes",
            )
        return side, side
    if bounds.tuned is not None and bounds.tuned[0] * bounds.tuned[1] <= bounds.pixels:
        tall, wide = bounds.tuned
        # The tuned shape is fastest; use the largest only if the overlap leaves too little of the tuned one.
        return bounds.tuned if min(tall, wide) >= 4 * halo else bounds.largest
    most_rows = max(most_rows, 2 * halo + 2)
    side = min(MAX_SIDE, math.isqrt(bounds.pixels))
    short = min(height, width, side)
    long = min(MAX_SIDE, bounds.pixels // max(short, 1))  # an image that is short or narrow gets longer tiles
    tall, wide = (short, long) if height <= width else (long, short)
    if tall > most_rows:
        tall, wide = most_rows, min(MAX_SIDE, bounds.pixels // most_rows)
    return (
        max(bounds.smallest[0], min(tall, bounds.largest[0])),
        max(bounds.smallest[1], min(wide, bounds.largest[1])),
    )


def _batch(plan: TilePlan, bounds: _Bounds, settings: TileSettings, groups: int) -> int:
    if settings.batch is not None:
        if not 1 <= settings.batch <= bounds.batches[1]:
            raise UsageError(f"batches of {settings.batch}", expected=f"1 to {bounds.batches[1]} for this engine")
        return max(settings.batch, bounds.batches[0])
    # An engine without a profile computes on the CPU, where batches only cost memory.
    wanted = plan.tiles * groups if bounds.tuned is not None else 1
    room = bounds.pixels // (plan.rows.window * plan.columns.window)
    return max(bounds.batches[0], min(wanted, room, bounds.batches[1]), 1)
