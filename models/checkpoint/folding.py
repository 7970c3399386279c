"""Fold pruning masks, weight norm and spectral norm into the weights that they describe, as PyTorch computes them.

A network that was pruned or normalized stores the parts of a weight; what its convolutions use is their product, and
that is what is read. Both styles of PyTorch are known: hooks (`weight_g`, `weight_v`) and parametrizations
(`parametrizations.weight.original0`). https://docs.pytorch.org/docs/stable/nn.html#utilities
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.filebytes import shown

_OLD = re.compile(r"((?:.*\.)?(?:weight|bias))_(orig|mask|g|v|u)")
_NEW = re.compile(r"((?:.*\.)?)parametrizations\.(\w+)\.(original[01]?|\d+\._?\w+)")


class Folded(NamedTuple):
    """Tensors by name with every reparametrized weight folded, and how many were by kind ("weight norm")."""

    tensors: dict[str, Tensor]
    kinds: dict[str, int]


def fold(tensors: Mapping[str, Tensor]) -> Folded:
    """Replace the parts of reparametrized weights by the weights, in float32.

    Raises:
        InputError: the parts are of a parametrization that is not known, or do not fit together.
    """
    plain: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place = _place(name)
        if place is None:
            plain[name] = tensor
        else:
            weight, part = place
            parts.setdefault(weight, {})[part] = tensor
            plain.setdefault(weight, tensor)  # keeps the order of the file; replaced below
    kinds: dict[str, int] = {}
    for weight, found in parts.items():
        kind = _kind(set(found))
        if kind is None or any(not part.is_floating_point() for part in found.values()):
            names = ", ".join(sorted(map(shown, found)))
            raise InputError(
                f"{shown(weight)} is stored as {names}, which is no known parametrization",
                expected="pruning, weight norm or spectral norm of PyTorch",
                next_step=(
                    "remove it before saving, with torch.nn.utils.parametrize.remove_parametrizations or "
                    "torch.nn.utils.prune.remove"
                ),
            )
        values = {part: tensor.detach().float() for part, tensor in found.items()}
        try:
            plain[weight] = _FOLDS[kind](values)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in values.items())
            raise InputError(f"the parts of {shown(weight)} do not fit together ({shapes})") from error
        kinds[kind] = kinds.get(kind, 0) + 1
    return Folded(plain, kinds)


def _place(name: str) -> tuple[str, str] | None:
    """Return the weight that a name is a part of, and which part; None for a plain name."""
    if name.endswith(("_orig", "_mask", "_g", "_v", "_u")) and (old := _OLD.fullmatch(name)):
        return old[1], old[2]
    if "parametrizations." in name and (new := _NEW.fullmatch(name)):
        return new[1] + new[2], new[3]
    return None


def _kind(parts: set[str]) -> str | None:
    return next((kind for kind, needed in _PARTS.items() if needed == parts), None)


def _pruned(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["mask"] * parts["orig"]


def _weight_norm(length: Tensor, direction: Tensor) -> Tensor:
    """Return direction / |direction| * length, the norm over all axes along which `length` has one value."""
    if length.ndim == 0:
        return torch._weight_norm(direction, length, -1)
    if length.ndim != direction.ndim:
        raise ValueError("length and direction have different axes")
    axes = [axis for axis, size in enumerate(length.shape) if size > 1]
    if len(axes) > 1 or any(length.shape[axis] != direction.shape[axis] for axis in axes):
        raise ValueError("the length is not one value per slice")
    return torch._weight_norm(direction, length, axes[0] if axes else 0)


def _spectral_norm(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return weight / sigma in evaluation mode, sigma from the stored singular vectors.

    Whether the rows of the matrix are axis 0 or axis 1 (transposed convolutions) is not stored. It follows from the
    vectors' sizes, and for square weights from their meaning: a step of training leaves left = matrix right / |...|.
    """
    found = []
    for rows in (weight, weight.transpose(0, 1)):
        matrix = rows.reshape(rows.shape[0], -1)
        if matrix.shape == (left.numel(), right.numel()):
            product = torch.mv(matrix, right)
            sigma = torch.dot(left, product)
            found.append((float(sigma / product.norm()), sigma))
    if not found:
        raise ValueError("the singular vectors have other sizes than the weight")
    return weight / max(found, key=lambda pair: pair[0])[1]


_PARTS: dict[str, set[str]] = {
    "pruning": {"orig", "mask"},
    "weight norm": {"g", "v"},
    "weight norm (parametrization)": {"original0", "original1"},
    "spectral norm": {"orig", "u", "v"},
    "spectral norm (parametrization)": {"original", "0._u", "0._v"},
}
_FOLDS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "pruning": _pruned,
    "weight norm": lambda parts: _weight_norm(parts["g"], parts["v"]),
    "weight norm (parametrization)": lambda parts: _weight_norm(parts["original0"], parts["original1"]),
    "spectral norm": lambda parts: _spectral_norm(parts["orig"], parts["u"], parts["v"]),
    "spectral norm (parametrization)": lambda parts: _spectral_norm(parts["original"], parts["0._u"], parts["0._v"]),
}
