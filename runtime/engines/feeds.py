"""The named inputs and outputs of an engine, and checks of the arrays that a caller passes in."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import ShapeProfile, TensorSpec, format_shape


def check_feeds(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec], *, engine: str) -> None:
    """Check that every input is present, with the right type and number of axes.

    Raises:
        UsageError: names the tensor, what was found and what was expected.
    """
    expected = ", ".join(str(spec) for spec in inputs)
    missing = [spec.name for spec in inputs if spec.name not in feeds]
    unknown = sorted(set(feeds) - {spec.name for spec in inputs})
    if missing or unknown:
        found = ", ".join(repr(name) for name in feeds) or "none"
        raise UsageError(f"{engine} got inputs {found}", expected=expected)
    for spec in inputs:
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise UsageError(
                f"input {spec.name!r} of {engine} is a {type(array).__name__}", expected=f"a numpy array, {spec}"
            )
        if array.dtype != np.dtype(spec.dtype):
            raise UsageError(
                f"input {spec.name!r} of {engine} has type {array.dtype}",
                expected=str(spec),
                next_step=f"convert it with .astype(numpy.{spec.dtype})",
            )
        check_shape(array.shape, spec, engine=engine)


def check_shape(shape: tuple[int, ...], spec: TensorSpec, *, engine: str) -> None:
    """Compare one shape with the engine's declared shape.

    Raises:
        UsageError: another number of axes, an empty axis, or a fixed size that differs.
    """
    fits = len(shape) == len(spec.shape) and all(
        size > 0 and declared in (-1, size) for size, declared in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"input {spec.name!r} of {engine} has shape {format_shape(shape) or 'scalar'}", expected=str(spec)
        )


def check_profile(
    shape: tuple[int, ...], profiles: Sequence[ShapeProfile], *, engine: str, rebuilds: bool = True
) -> int:
    """Return the index of the first profile that contains a shape.

    `rebuilds` is True if the engine is a file that can be built for other shapes.

    Raises:
        UsageError: no profile contains it; names the profiles and the option to change.
    """
    for index, profile in enumerate(profiles):
        if profile.contains(shape):
            return index
    last = profiles[-1]
    lower = tuple(map(min, shape, last.min))
    upper = tuple(map(max, shape, last.max))
    wider = [f"--min-shape {format_shape(lower)}"] if lower != last.min else []
    wider += [f"--max-shape {format_shape(upper)}"] if upper != last.max else []
    raise UsageError(
        f"input shape {format_shape(shape)} is outside every profile of {engine}",
        expected=" or ".join(f"{format_shape(profile.min)} to {format_shape(profile.max)}" for profile in profiles),
        next_step=f"use srdeploy upscale, which tiles and pads, or build again with {' and '.join(wider)}"
        if rebuilds
        else "use srdeploy upscale, which tiles and pads",
    )
