"""Read a checkpoint without running anything in it: from an untrusted file to named tensors.

    file --containers--> tree of inert values --wrappers--> state dicts of records --tensors--> tensors

Nothing here knows RCAN or SRDenseNet; `srdeploy.models.checkpoint.load` passes a function that recognises them.
"""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.container import Container, is_distributed
from srdeploy.models.checkpoint.containers import open_container
from srdeploy.models.checkpoint.distributed import Folder, open_distributed, open_folder
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, open_file_bytes
from srdeploy.models.checkpoint.names import IsNetwork
from srdeploy.models.checkpoint.pickled_network import ModuleRecord
from srdeploy.models.checkpoint.plain import plain_dict
from srdeploy.models.checkpoint.tensors import TensorBuilder
from srdeploy.models.checkpoint.wrappers import Found, find_states

_MAX_METADATA = 1 << 20


@dataclass(frozen=True)
class StateDict:
    """One set of weights of a checkpoint.

    Attributes:
        tensors: by name, in the file's order and dtypes, on the CPU, without gradients; read them, do not write.
        path: keys that lead to it in the file, () for the file itself.
        prefix: what was stripped from every name ("module." of DataParallel), "" if nothing.
        ignored: entries that are not part of the network: counters, losses, metrics, values that are no tensors.
        unexplained: tensors beside the network whose purpose is unknown.
        arrays: how many of the tensors are stored as NumPy arrays.
        modules: for a pickled network, class and plain attributes of each module by name; "" is the network itself.
    """

    tensors: dict[str, torch.Tensor]
    path: tuple[str, ...]
    prefix: str
    ignored: tuple[str, ...]
    unexplained: tuple[str, ...]
    arrays: int
    modules: dict[str, ModuleRecord]


@dataclass(frozen=True)
class Hints:
    """What the wrapper reveals about the training script that wrote it.

    Attributes:
        keys: of the outermost dict around the weights ("epoch", "best_psnr", "state_dict", "optimizer"), () if bare.
        values: plain values beside the weights (epoch, best_psnr), as JSON values.
    """

    keys: tuple[str, ...]
    values: dict[str, Any]


@dataclass(frozen=True)
class RawCheckpoint:
    """The content of a checkpoint file.

    Attributes:
        path: the file, or the folder of a distributed checkpoint.
        sha256: of the file's bytes.
        size_bytes: of the file.
        container: kind of file, see `srdeploy.models.checkpoint.container.Container`.
        weights: which of `alternatives` the properties below show: "raw" if there is one, else the first.
        alternatives: the plain weights ("raw"), their moving average ("ema"), and others by the keys that lead to them.
        metadata: constructor arguments that the trainer wrote beside the weights (traiNNer), as JSON values.
        hints: what the wrapper reveals about the training script.
    """

    path: Path
    sha256: str
    size_bytes: int
    container: str
    weights: str
    alternatives: dict[str, StateDict]
    metadata: dict[str, Any]
    hints: Hints
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the shown weights by name."""
        return self.alternatives[self.weights].tensors

    @property
    def wrapper_path(self) -> tuple[str, ...]:
        """The keys that lead to the shown weights, () for a bare state dict."""
        return self.alternatives[self.weights].path

    @property
    def modules(self) -> dict[str, ModuleRecord]:
        """Modules of a pickled network by name; empty for a state dict."""
        return self.alternatives[self.weights].modules

    @property
    def dtypes(self) -> dict[str, int]:
        """How many of the shown tensors have which dtype, such as {"float32": 370}."""
        return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()))


def read_checkpoint(path: Path, is_network: IsNetwork | None = None) -> RawCheckpoint:
    """Read a checkpoint of any container: safetensors, torch.save, torch.export, NumPy, or a distributed folder.

    Args:
        path: the file, or the folder of a distributed checkpoint.
        is_network: recognises a network by its names, so that it is found among other tensors; None takes every state
            dict for a network.

    Raises:
        InputError: the file cannot be read, is no checkpoint, is damaged, holds no network, or its pickle asks for
            what runs or loads something (the blocked name is in the message).
    """
    try:
        if is_distributed(path):
            with open_folder(path) as folder:
                return _read(path, folder, open_distributed(folder), is_network)
        with open_file_bytes(path) as file:
            if path.suffix == ".distcp":
                raise RefusedError(
                    "is one file of a distributed checkpoint", next_step=f"pass its folder {path.parent}"
                )
            return _read(path, file, open_container(file), is_network)
    except RefusedError as refused:
        raise InputError(f"{path} {refused.found}", expected=refused.expected, next_step=refused.next_step) from refused


def _read(path: Path, file: FileBytes | Folder, container: Container, is_network: IsNetwork | None) -> RawCheckpoint:
    found = find_states(container.root, is_network)
    builder = TensorBuilder(container.read_storage, file.size)
    alternatives: dict[str, StateDict] = {}
    for label, state in found.states.items():
        tensors = builder.build(state.tensors)
        if not any(_equal(tensors, other.tensors) for other in alternatives.values()):
            arrays = sum(record.storage.inline is not None for record in state.tensors.values())
            alternatives[label] = StateDict(
                tensors, state.path, state.prefix, state.ignored, state.unexplained, arrays, state.modules
            )
    return RawCheckpoint(
        path=path,
        sha256=file.sha256(),
        size_bytes=file.size,
        container=container.name,
        weights=next(iter(alternatives)),
        alternatives=alternatives,
        metadata=_metadata(container, found),
        hints=Hints(found.keys, found.values),
        notes=found.notes,
    )


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return True if two state dicts are the same network: then there is nothing to choose."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def _metadata(container: Container, found: Found) -> dict[str, Any]:
    """Return the constructor arguments: a dict beside the weights, or JSON text in the safetensors header."""
    text = container.metadata.get("metadata")
    if text is None:
        return found.metadata or plain_dict({name: _number(text) for name, text in container.metadata.items()})
    if len(text) > _MAX_METADATA:
        raise RefusedError(f"has {len(text)} characters of metadata", expected=f"at most {_MAX_METADATA}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise RefusedError("has metadata that is not JSON", next_step="save the weights without it") from None
    if not isinstance(document, dict):
        raise RefusedError("has metadata that is not a JSON object", next_step="save the weights without it")
    return plain_dict(document)


def _number(text: str) -> str | int | float:
    """Return the number that a text writes, else the text: a safetensors header can hold nothing but texts."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
