"""The named inputs and outputs of an engine, and the check of what a caller feeds it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import ShapeProfile, TensorSpec, format_shape


def check_feeds(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec], *, engine: str) -> None:
    """Check that every input is there, with the right type and a shape the engine can take.

    Raises:
        UsageError: names the tensor, what came and what was expected.
    """
    wanted = ", ".join(str(spec) for spec in inputs)
    missing = [spec.name for spec in inputs if spec.name not in feeds]
    unknown = sorted(set(feeds) - {spec.name for spec in inputs})
    if missing or unknown:
        came = ", ".join(repr(name) for name in feeds) or "none"
        raise UsageError(f"{engine} got inputs {came}", expected=wanted)
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
    """Check one shape against the engine's declared one.

    Raises:
        UsageError: another number of axes, an empty axis, or a fixed size that differs.
    """
    fits = len(shape) == len(spec.shape) and all(
        size > 0 and want in (-1, size) for size, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"input {spec.name!r} of {engine} has shape {format_shape(shape) or 'scalar'}", expected=str(spec)
        )


def check_profile(shape: tuple[int, ...], profiles: Sequence[ShapeProfile], *, engine: str) -> int:
    """Return the index of the first profile that takes a shape.

    Raises:
        UsageError: no profile takes it; says by how much it is out, and what to do.
    """
    for index, profile in enumerate(profiles):
        if profile.contains(shape):
            return index
    wider = format_shape(tuple(max(size, profiles[-1].max[axis]) for axis, size in enumerate(shape)))
    raise UsageError(
        f"input shape {format_shape(shape)} is outside every profile of {engine}",
        expected=" or ".join(f"{format_shape(profile.min)} to {format_shape(profile.max)}" for profile in profiles),
        next_step=f"tile the image (srdeploy upscale does), or build again with --max-shape {wider}",
    )
