"""srdeploy's own layout: the canonical names, and the whole configuration as metadata. Nothing is left open.

`srdeploy.models.checkpoint.save.save_checkpoint` writes it. It is the way to deploy a network that was trained with
the classes of this package, variants included that no public training code has.
"""

from dataclasses import dataclass, fields

import torch

from srdeploy.core.errors import InputError
from srdeploy.models.dialects.base import Dialect, Hints, Reading, Survey
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import NetworkConfig, config_from_json, network_of
from srdeploy.models.networks.srdensenet import SrDenseNetConfig

ARCHITECTURE = "architecture"
"""Metadata entry beside the configuration's fields."""

_LARGEST_SCALE = 64


@dataclass(frozen=True)
class NativeLayout:
    """Every tensor is under its own name."""

    def modules(self, config: NetworkConfig) -> dict[str, str]:
        """Return every tensor's name by itself."""
        with torch.device("meta"):
            return {name: name for name in network_of(config).state_dict()}

    def copies(self, config: NetworkConfig) -> dict[str, str]:
        """Return no copies."""
        return {}

    def templates(self) -> tuple[str, ...]:
        """Return the names that every file has."""
        return "first", "last"


def read(survey: Survey, hints: Hints) -> Reading:
    """Read a file of srdeploy's own."""
    if ARCHITECTURE not in hints.metadata:
        raise survey.refuse("its metadata do not name an architecture", "the configuration that srdeploy writes")
    architecture = str(hints.metadata[ARCHITECTURE])
    kind = SrDenseNetConfig if architecture == "srdensenet" else RcanConfig
    missing = [entry.name for entry in fields(kind) if entry.name not in hints.metadata]
    if missing:
        raise survey.refuse(f"its metadata lack {', '.join(missing[:3])}", "the whole configuration")
    try:
        config = config_from_json(architecture, {k: v for k, v in hints.metadata.items() if k != ARCHITECTURE})
    except InputError as error:
        raise survey.refuse(error.found, error.expected) from error
    _check_size(survey, config)
    survey.sources.update({entry.name: "the file's metadata" for entry in fields(config)})
    return Reading(config)


def _check_size(survey: Survey, config: NetworkConfig) -> None:
    """Refuse a configuration that speaks of more than the file holds, before a network of that size is laid out."""
    layers = config.blocks * (config.groups if isinstance(config, RcanConfig) else config.layers)
    if layers > len(survey.tensors):
        raise survey.refuse(f"its metadata speak of {layers} layers and it holds {len(survey.tensors)} tensors")
    values = sum(tensor.numel() for tensor in survey.tensors.values())
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, int) and value > values:
            raise survey.refuse(f"its metadata has {entry.name} {value} and it holds {values} values")
    if config.scale > _LARGEST_SCALE or getattr(config, "unshuffle", 1) > _LARGEST_SCALE:
        raise survey.refuse(f"its metadata speak of scale {config.scale}", f"at most {_LARGEST_SCALE}")


DIALECT = Dialect(
    name="native",
    title="srdeploy's own layout",
    source="srdeploy.models.checkpoint.save",
    signature=("first.weight", "last.weight"),
    read=read,
    layout=NativeLayout(),
)
