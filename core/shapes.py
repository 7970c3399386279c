"""Image shapes in text form (1x3x180x320), and the ranges of shapes that an engine is built for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srdeploy.core.errors import UsageError

Shape = tuple[int, int, int, int]
"""(N, C, H, W), all at least 1."""


def parse_shape(text: str) -> Shape:
    """Parse "1x3x180x320" into (1, 3, 180, 320).

    Raises:
        UsageError: the text is not four positive whole numbers joined by "x".
    """
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"shape {text!r}", expected="batch x channels x height x width such as 1x3x180x320")
    n, c, h, w = (int(part) for part in parts)
    return n, c, h, w


def format_shape(shape: tuple[int, ...]) -> str:
    """Format a shape in the form that `parse_shape` reads."""
    return "x".join(str(size) for size in shape)


@dataclass(frozen=True)
class ShapeProfile:
    """The smallest, the tuned and the largest input shape of an engine, each (N, C, H, W).

    Raises:
        UsageError: a minimum is above its optimum or an optimum above its maximum, or the channels differ.
    """

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        for axis, low, middle, high in zip("NCHW", self.min, self.opt, self.max, strict=True):
            if not low <= middle <= high:
                raise UsageError(
                    f"profile {self} has min {low}, opt {middle}, max {high} on axis {axis}",
                    expected="min <= opt <= max on every axis",
                )
        if self.min[1] != self.max[1]:
            raise UsageError(f"profile {self} changes the number of channels", expected="one number of channels")

    def __str__(self) -> str:
        return f"{format_shape(self.min)}..{format_shape(self.opt)}..{format_shape(self.max)}"

    def contains(self, shape: tuple[int, ...]) -> bool:
        """Return True if a shape is between the minimum and the maximum on every axis."""
        return len(shape) == 4 and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type ("float32", ...) and shape of an input or output; -1 marks a dynamic size."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = "x".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.name!r} {self.dtype} {sizes}"

    def to_json(self) -> dict[str, Any]:
        """Return name, type and shape as JSON values."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TensorSpec":
        """Read `to_json` back."""
        return cls(str(value["name"]), str(value["dtype"]), tuple(int(size) for size in value["shape"]))


def elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)
