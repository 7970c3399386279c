"""Networks of convolutions with given names, and the comparison of what was loaded with a source's state dict."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.models.checkpoint.recognise import source_names
from srdeploy.models.dialects import DIALECTS


def tree(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Return a network of convolutions with these names and shapes."""
    root = nn.Module()
    for name, shape in shapes.items():
        if not name.endswith(".weight"):
            continue
        *parents, leaf = name.split(".")[:-1]
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        inputs, outputs = shape[1], shape[0]
        node.add_module(
            leaf, nn.Conv2d(inputs, outputs, shape[2], padding=shape[2] // 2, bias=name[:-6] + "bias" in shapes)
        )
    return root


def assert_network(loaded: LoadedCheckpoint, expected: Mapping[str, Tensor]) -> None:
    """Every tensor of the network has the values of the source's state dict, bit for bit."""
    dialect = next(each for each in DIALECTS if each.name == loaded.evidence.dialect)
    found = loaded.network.state_dict()
    for name, source in source_names(dialect, loaded.config).items():
        assert torch.equal(found[name], expected[source]), source


def save_distributed(path: Path, document: Mapping[str, Any]) -> Path:
    """Write a distributed checkpoint in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is needed
        dcp.save(dict(document), checkpoint_id=path)
    return path
