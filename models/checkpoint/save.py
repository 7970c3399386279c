"""Write a network that was trained with the classes of this package as a checkpoint that leaves nothing open."""

import json
from pathlib import Path

from safetensors.torch import save

from srdeploy.core.artifact import atomic_file
from srdeploy.models.dialects.native import ARCHITECTURE
from srdeploy.models.networks.rcan import Rcan
from srdeploy.models.networks.spec import config_to_json, spec_of
from srdeploy.models.networks.srdensenet import SrDenseNet


def save_checkpoint(network: Rcan | SrDenseNet, path: Path, *, force: bool = False) -> None:
    """Write tensors and configuration as safetensors; every verb that takes a checkpoint reads the file.

    Args:
        network: trained; its tensors are written as float32, from whatever device they are on.
        path: by convention NAME.safetensors.
        force: replace an existing file.

    Raises:
        UsageError: the file exists and `force` is false.
        OutputError: disk full or folder not writable.
    """
    tensors = {
        name: tensor.detach().cpu().float().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    values = {ARCHITECTURE: spec_of(network.config).architecture, **config_to_json(network.config)}
    data = save(tensors, metadata={"metadata": json.dumps(values)})
    with atomic_file(path, force=force) as temporary:
        temporary.write_bytes(data)
