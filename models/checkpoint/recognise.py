"""From named tensors to a dialect, a configuration and the canonical network's tensors; or a refusal with evidence.

Strict on purpose: every key is consumed and every tensor filled. HAN, for one, holds every key of the official RCAN
with the right shape; a permissive loader would run another network without complaint.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.causes import cause_of
from srdeploy.models.checkpoint.filebytes import shown
from srdeploy.models.dialects import DIALECTS
from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey, shape_text
from srdeploy.models.dialects.refused import REFUSED
from srdeploy.models.networks.rcan import Rcan
from srdeploy.models.networks.spec import NetworkConfig, network_of

_COUNTER = "num_batches_tracked"
"""Batch normalisation counts its training steps under this name; inference does not use it."""


@dataclass(frozen=True)
class Recognised:
    """A key set that was understood.

    Attributes:
        dialect: the family.
        reading: configuration and open questions.
        tensors: by canonical name, float32, contiguous.
        sources: hyper-parameter to the key and shape that it was read from.
        converted: number of tensors that were stored in another floating type.
    """

    dialect: Dialect
    reading: Reading
    tensors: dict[str, Tensor]
    sources: dict[str, str]
    converted: int


def recognise(tensors: Mapping[str, Tensor], hints: Hints) -> Recognised:
    """Find the dialect of a key set, read its configuration and rename its tensors.

    Args:
        tensors: as the checkpoint names them, without a wrapper's prefix.
        hints: what the file contains beside its tensors.

    Raises:
        InputError: no dialect or a refused one, left-over or missing keys, or shapes that do not fit together.
    """
    for refusal in REFUSED:
        if refusal.matches(tensors):
            raise InputError(f"the checkpoint is {refusal.title}: {refusal.reason}")
    dialect = next((dialect for dialect in DIALECTS if dialect.matches(tensors)), None)
    cause = cause_of(tensors)
    if cause is not None:
        raise cause
    if dialect is None:
        raise _unknown(tensors)
    survey = Survey(tensors, dialect.title)
    try:
        reading = dialect.read(survey, hints)
    except ValueError as error:
        raise survey.refuse(f"its sizes do not fit together ({error})") from error
    filled, converted = _fill(dialect, reading, tensors)
    return Recognised(dialect, reading, filled, survey.sources, converted)


def is_network(names: Collection[str]) -> bool:
    """Return True if a set of names carries the signature of a known family, or of one that is refused by name."""
    return any(dialect.matches(names) for dialect in DIALECTS) or any(known.matches(names) for known in REFUSED)


def build_network(config: NetworkConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the canonical network around existing tensors, in evaluation mode, without gradients.

    It is built on the meta device, so no weight is initialised only to be overwritten, and it shares the tensors'
    memory.
    """
    with torch.device("meta"):
        network = network_of(config)
    counters = {name: torch.zeros((), dtype=torch.long) for name in network.state_dict() if name.endswith(_COUNTER)}
    network.load_state_dict({**tensors, **counters}, strict=True, assign=True)
    if isinstance(network, Rcan):
        network.set_constants()
    return network.eval().requires_grad_(False)


def source_names(dialect: Dialect, config: NetworkConfig) -> dict[str, str]:
    """Return the source's key of every tensor of the canonical network, by its canonical name."""
    modules = dialect.layout.modules(config)
    return {name: _source_name(name, modules) for name in tensor_shapes(config)}


@lru_cache(maxsize=4)
def tensor_shapes(config: NetworkConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of the canonical network, by its name."""
    with torch.device("meta"):
        state = network_of(config).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(_COUNTER)}


def check_geometry(
    network: nn.Module, dialect: Dialect, config: NetworkConfig, attributes: Mapping[str, Mapping[str, Any]]
) -> int:
    """Compare stride and padding with a pickled network's own convolutions.

    State dicts do not hold them, so the family decides; a file that does hold them must agree.

    Args:
        network: the canonical network.
        attributes: plain attributes of the pickled modules, by the source's name.

    Returns:
        How many convolutions were compared.

    Raises:
        InputError: one of them differs.
    """
    compared = 0
    modules = dict(network.named_modules())
    for canonical, source in dialect.layout.modules(config).items():
        module = modules.get(canonical) if source in attributes else None
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            continue
        for name in ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"):
            stored, expected = attributes[source].get(name), getattr(module, name)
            if stored is not None and _pair(stored) != _pair(expected):
                raise InputError(
                    f"looks like {dialect.title}, but {source} has {name} {_pair(stored)}",
                    expected=str(_pair(expected)),
                )
        compared += 1
    return compared


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _source_name(name: str, modules: Mapping[str, str]) -> str:
    if name in modules:  # a lone tensor
        return modules[name]
    module, _, leaf = name.rpartition(".")
    return f"{modules[module]}.{leaf}"


def _fill(dialect: Dialect, reading: Reading, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Take every tensor of the canonical network from the file, and see that nothing is left over."""
    config = reading.config
    names = source_names(dialect, config)
    expected = tensor_shapes(config)
    missing = [source for source in names.values() if source not in tensors]
    copies = dialect.layout.copies(config)
    used = {*names.values(), *copies, *reading.constants}
    leftover = [key for key in tensors if key not in used and not _is_counter(key, used)]
    if missing or leftover:
        raise _incomplete(dialect.title, leftover, missing)
    filled, converted = {}, 0
    for name, source in names.items():
        tensor = tensors[source]
        if tensor.shape != expected[name]:
            raise InputError(
                f"looks like {dialect.title}, but {source} has shape {shape_text(tensor.shape)}",
                expected=shape_text(expected[name]),
            )
        filled[name] = _usable(source, tensor)
        converted += tensor.dtype != torch.float32
    for copy, original in copies.items():
        if not torch.equal(tensors[copy].float(), filled[original]):
            raise InputError(
                f"looks like {dialect.title}, but {copy} differs from {names[original]}",
                expected="one shared value, as this family's code has it",
            )
    return filled, converted


def _is_counter(key: str, used: set[str]) -> bool:
    return key.endswith("." + _COUNTER) and key.removesuffix(_COUNTER) + "running_mean" in used


def _usable(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise InputError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} values", expected="floating point")
    values = tensor.detach().to(torch.float32).contiguous()
    # NumPy looks with one thread: waking PyTorch's pool for each of 1,600 small tensors takes longer than looking.
    if not np.isfinite(values.numpy()).all():
        raise InputError(
            f"{name} holds values that are not finite",
            expected="a trained network",
            next_step="use an earlier checkpoint: the training diverged, or the file is damaged",
        )
    return values


def _incomplete(title: str, leftover: Sequence[str], missing: Sequence[str]) -> InputError:
    parts = []
    if leftover:
        parts.append(f"{_keys(leftover)} left over")
    if missing:
        parts.append(f"{_keys(missing)} missing")
    return InputError(
        f"looks like {title}, but {' and '.join(parts)}",
        expected="every key used and every tensor filled",
        next_step="docs/checkpoints.md lists the families that are read, docs/adding.md how to add one",
    )


def _keys(keys: Sequence[str]) -> str:
    some = ", ".join(map(shown, keys[:3])) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} key{'s' if len(keys) > 1 else ''} ({some}) {'are' if len(keys) > 1 else 'is'}"


def _unknown(tensors: Mapping[str, Tensor]) -> InputError:
    """Return the error for a key set without a known signature, with the nearest dialect as evidence."""
    here = {_pattern(key) for key in tensors}
    best, shared = max(((dialect, len(here & _patterns(dialect))) for dialect in DIALECTS), key=lambda pair: pair[1])
    if shared * 4 < len(here):
        some = ", ".join(map(shown, list(tensors)[:4]))
        return InputError(
            f"the checkpoint's {len(tensors)} tensors ({some}, …) are of no known network",
            expected="an RCAN or SRDenseNet",
            next_step="docs/checkpoints.md lists the families that are read, docs/adding.md how to add one",
        )
    missing = [key for key in best.signature if key not in tensors]
    leftover = [key for key in tensors if _pattern(key) not in _patterns(best)]
    leftover += [key for key in best.absent if key in tensors and key not in leftover]
    return _incomplete(best.title, leftover, missing)


def _pattern(key: str) -> str:
    """Return a key with every number replaced, so that networks of all sizes compare."""
    return re.sub(r"\d+", "#", key)


def _patterns(dialect: Dialect) -> set[str]:
    modules = [re.sub(r"\{\w+\}", "#", template) for template in dialect.layout.templates()]
    modules = [_pattern(module) for module in (*modules, "sub_mean", "add_mean")]
    leaves = ("weight", "bias", "running_mean", "running_var", _COUNTER)
    return {*modules, *(f"{module}.{leaf}" for module in modules for leaf in leaves)}
