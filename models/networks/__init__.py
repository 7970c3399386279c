"""The two networks, RCAN and SRDenseNet, their configurations, and what follows from these for the outside."""

from typing import TYPE_CHECKING

from srdeploy.core.lazy import lazy_names

if TYPE_CHECKING:
    from srdeploy.models.networks.rcan import Rcan, RcanConfig
    from srdeploy.models.networks.spec import (
        ModelSpec,
        NetworkConfig,
        config_from_json,
        config_to_json,
        network_of,
        spec_of,
    )
    from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNet, SrDenseNetConfig

__all__ = [
    "Deconvolution",
    "ModelSpec",
    "NetworkConfig",
    "Rcan",
    "RcanConfig",
    "SrDenseNet",
    "SrDenseNetConfig",
    "config_from_json",
    "config_to_json",
    "network_of",
    "spec_of",
]

__getattr__ = lazy_names(
    __name__,
    {
        "rcan": ("Rcan", "RcanConfig"),
        "spec": ("ModelSpec", "NetworkConfig", "config_from_json", "config_to_json", "network_of", "spec_of"),
        "srdensenet": ("Deconvolution", "SrDenseNet", "SrDenseNetConfig"),
    },
)
