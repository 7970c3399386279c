"""Find the networks in what a training script saved: wrappers, averages, pickled modules, parts of a training module.

Every candidate is returned with the keys that lead to it. A moving average ("ema") and the plain weights ("raw") get
these labels; every other candidate is labelled with its keys, and the caller chooses.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from srdeploy.models.checkpoint.arrays import tensor_of_array
from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import Record, TensorRecord
from srdeploy.models.checkpoint.names import IsNetwork, is_training_name, split_names
from srdeploy.models.checkpoint.pickled_network import (
    MAX_NAME_LENGTH,
    ModuleRecord,
    as_tensor,
    is_pickled_network,
    lift,
)
from srdeploy.models.checkpoint.plain import plain_dict

# How training scripts name the network among the things they save; searched before other names.
RAW_KEYS = (
    "state_dict",
    "params",
    "model_state_dict",
    "model_state",
    "model",
    "model_g",
    "net",
    "net_g",
    "netG",
    "network",
    "network_g",
    "generator",
    "weights",
    "module",
)
_EMA_NAME = re.compile(r"^ema|ema$|_ema_|averaged|shadow")
# Names that identify certain weights, so that they are neither "the" weights nor their average.
_SPECIAL_NAME = re.compile(r"best|swa|last|final|teacher|student|old|prev|init|pretrain|latest|target|backup")
_PLAIN_NAMES = ("online", "current", "raw")
_TRAINING_STATE = (
    "optim",
    "sched",
    "scaler",
    "metadata",
    "args",
    "config",
    "hparams",
    "hyper",
    "callback",
    "rng",
    "loops",
)

MAX_TENSORS = 100_000
_MAX_WRAPPERS = 4
_SHADOW = "shadow_params"
# Shifts of the mean colour are frozen in several training codes, and averages of parameters then leave them out.
_FROZEN = ("sub_mean.", "add_mean.")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class FoundState:
    """A state dict that was found.

    Attributes:
        path: keys that lead to it from the top of the file; "[0]" is the first item of a list.
        tensors: records by name, without prefixes and wrappers.
        prefix: what was stripped from every name, "" if nothing.
        ignored: entries that are not part of the network (counters, losses, values that are no tensors).
        unexplained: names beside the network whose purpose is unknown.
        modules: for a pickled network, its modules by name; the network itself is "".
    """

    path: tuple[str, ...]
    tensors: dict[str, TensorRecord]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    unexplained: tuple[str, ...] = ()
    modules: dict[str, ModuleRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Everything found: state dicts by label, the outermost dict's keys, plain values beside the weights."""

    states: dict[str, FoundState]
    keys: tuple[str, ...]
    values: dict[str, Any]
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()


def find_states(root: Any, is_network: IsNetwork | None = None) -> Found:
    """Find the networks in the tree of a container.

    Args:
        root: the tree.
        is_network: recognises a network by its names; None takes every state dict for one.

    Raises:
        RefusedError: there is none, or it is empty.
    """
    search = _Search(is_network)
    search.look(root, ())
    states = search.networks()
    if not states:
        raise RefusedError(
            f"holds no network: {_summary(root)}",
            expected="a state_dict, a wrapper around one, or a pickled network",
            next_step="save the network's state_dict() with torch.save",
        )
    labelled = _labelled(_distinct(states), root)
    notes = tuple(_add_shadow(labelled, path, shadow) for path, shadow in search.shadows)
    used = {state.path[0] for state in labelled.values() if state.path}
    if not isinstance(root, dict):
        return Found(labelled, (), {}, {}, notes)
    used = {key for key in used if key in root}
    values = plain_dict({key: value for key, value in root.items() if key not in used})
    metadata = root.get("metadata") if used else None
    if isinstance(metadata, dict):
        values.pop("metadata", None)
    return Found(
        states=labelled,
        keys=tuple(shown(key) for key in root if isinstance(key, str))[:100] if used else (),
        values=values,
        metadata=plain_dict(metadata) if isinstance(metadata, dict) else {},
        notes=tuple(filter(None, notes)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# The search


class _Search:
    """One search through a tree; every object is looked at once, however often the tree shares it."""

    def __init__(self, is_network: IsNetwork | None) -> None:
        self._is_network = is_network
        self._known: set[int] = set()
        self._states: list[FoundState] = []
        self.shadows: list[tuple[tuple[str, ...], list[TensorRecord]]] = []

    def look(self, node: Any, path: tuple[str, ...]) -> bool:
        """Collect the state dicts in `node`; return True if there is one."""
        if not isinstance(node, (dict, list, tuple, Record)) or len(path) > _MAX_WRAPPERS or id(node) in self._known:
            return False
        self._known.add(id(node))
        if isinstance(node, Record):
            if is_pickled_network(node):
                tensors, modules = lift(node)
                self._states.append(FoundState(path, tensors, modules=modules))
                return bool(tensors)
            return self.look(node.items, path)  # a subclass of dict or list
        if not isinstance(node, dict):
            items = [self.look(item, (*path, f"[{index}]")) for index, item in enumerate(node[:4])]
            return any(items)
        self._note_shadow(node, path)
        first = [key for key in RAW_KEYS if key in node]
        others = [key for key in node if isinstance(key, str) and key not in RAW_KEYS and not _is_training_state(key)]
        inside = [self.look(node[key], (*path, shown(key))) for key in (*first, *others)]
        if any(inside) and self._is_network is None:
            return True
        state = _flat_state(node, path)
        if state.tensors:
            self._states.append(state)
        return any(inside) or bool(state.tensors)

    def networks(self) -> list[FoundState]:
        """Return the networks in what was collected; when nothing is recognised, what is most likely meant as one."""
        found = [network for state in self._states if state.tensors for network in self._split(state)]
        if found or not self._states:
            return found
        likely = max(self._states, key=lambda state: len(state.tensors))
        return [_without_prefix(likely)] if likely.tensors else []

    def _split(self, state: FoundState) -> Iterator[FoundState]:
        _check_names(state.tensors)
        if self._is_network is None:
            yield _without_prefix(state)
            return
        split = split_names(tuple(state.tensors), self._is_network)
        for group in split.groups:
            embedded = len(split.groups) > 1 or bool(split.unexplained)
            path = (*state.path, *filter(None, group.prefix.split("."))) if embedded else state.path
            yield replace(
                state,
                path=path,
                tensors={name: state.tensors[old] for name, old in group.names.items()},
                prefix=group.prefix,
                ignored=(*state.ignored, *_summarized(split.training)),
                unexplained=_summarized(split.unexplained),
                modules=_modules_below(state.modules, group.prefix),
            )

    def _note_shadow(self, node: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        """Remember a list of averaged tensors without names, as torch_ema and diffusers save it."""
        shadow = node.get(_SHADOW)
        if isinstance(shadow, (list, tuple)):
            tensors = [tensor for tensor in map(as_tensor, shadow[:MAX_TENSORS]) if tensor is not None]
            if tensors:
                self.shadows.append(((*path, _SHADOW), tensors))


def _is_training_state(key: str) -> bool:
    short = key[:64].lower()
    return any(word in short for word in _TRAINING_STATE) or is_training_name(short)


def _flat_state(node: Mapping[Any, Any], path: tuple[str, ...]) -> FoundState:
    tensors: dict[str, TensorRecord] = {}
    ignored: list[str] = []
    for key, value in node.items():
        tensor = as_tensor(value) or tensor_of_array(value)
        if isinstance(key, str) and tensor is not None:
            tensors[key] = tensor
        else:
            ignored.append(shown(key) if isinstance(key, (str, int)) else "(unnamed)")
    return FoundState(path, tensors, ignored=tuple(ignored[:100]))


def _check_names(tensors: Mapping[str, TensorRecord]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise RefusedError(f"holds {len(tensors)} tensors", expected=f"at most {MAX_TENSORS}")
    for name in tensors:
        if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
            raise RefusedError(f"names a tensor {shown(name)!r}", expected="a printable name")


def _without_prefix(state: FoundState) -> FoundState:
    """Drop segments that all names share: those of wrappers, and those that lead to an embedded network."""
    names = [name for name in state.tensors if name != "n_averaged" or len(state.tensors) == 1]
    ignored = ("n_averaged",) if len(names) < len(state.tensors) else ()
    prefix = ""
    while all(name.startswith(prefix) and "." in name[len(prefix) :] for name in names):
        head = names[0][len(prefix) :].partition(".")[0]
        if head not in _PREFIXES or not all(name.startswith(f"{prefix}{head}.") for name in names):
            break
        prefix += f"{head}."
    return replace(
        state,
        tensors={name.removeprefix(prefix): state.tensors[name] for name in names},
        prefix=prefix,
        ignored=(*state.ignored, *ignored),
        modules=_modules_below(state.modules, prefix),
    )


_PREFIXES = ("module", "_orig_mod", "model", "net", "network", "net_g", "netG", "generator")


def _modules_below(modules: Mapping[str, ModuleRecord], prefix: str) -> dict[str, ModuleRecord]:
    if not prefix:
        return dict(modules)
    below = {name.removeprefix(prefix): module for name, module in modules.items() if name.startswith(prefix)}
    if prefix[:-1] in modules:
        below[""] = modules[prefix[:-1]]
    return below


def _summarized(names: Sequence[str]) -> tuple[str, ...]:
    """Return names for people: lone ones as they are, those that share a first segment as "criterion.* (12)"."""
    heads: dict[str, list[str]] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        head = f"*.{leaf}" if leaf in ("total_ops", "total_params") else name.partition(".")[0]
        heads.setdefault(head, []).append(name)
    return tuple(
        shown(members[0]) if len(members) == 1 else f"{shown(head)}{'' if '*' in head else '.*'} ({len(members)})"
        for head, members in heads.items()
    )[:100]


# ----------------------------------------------------------------------------------------------------------------------
# Which candidate is which


def _distinct(states: Sequence[FoundState]) -> list[FoundState]:
    """Return the states without those that are the very same tensors under another name."""
    distinct: dict[tuple[Any, ...], FoundState] = {}
    for state in states:
        places = tuple((name, record.storage.key, record.offset) for name, record in state.tensors.items())
        distinct.setdefault(places, state)
    return list(distinct.values())


def _labelled(states: Sequence[FoundState], root: Any) -> dict[str, FoundState]:
    """Label the candidates "raw" and "ema" where that is certain, and with their keys otherwise."""
    roles = [_role(state.path, root) for state in states]
    labelled = {
        role if role and roles.count(role) == 1 else "/".join(state.path) or "top": state
        for role, state in zip(roles, states, strict=True)
    }
    order = {"raw": 0, "ema": 1}
    return dict(sorted(labelled.items(), key=lambda item: order.get(item[0], 2)))


def _role(path: Sequence[str], root: Any) -> str:
    """Return "raw" or "ema" for a path, or "" if its names mean something else (best_model, swa_state_dict)."""
    if isinstance(root, dict) and "averaging_state" in root and "current_model_state" in root:  # Lightning's callback
        return "raw" if path[:1] == ("current_model_state",) else "ema"
    for part in reversed(path):
        short = part.lower()
        if any(word in short for word in _PLAIN_NAMES):
            return "raw"
        if _EMA_NAME.search(short):
            return "ema"
        if _SPECIAL_NAME.search(short):
            return ""
    return "raw"


def _add_shadow(states: dict[str, FoundState], path: tuple[str, ...], shadow: list[TensorRecord]) -> str:
    """Add an average that is a list of tensors without names; return a note if it fits no network's parameters."""
    raw = states.get("raw")
    if raw is not None and "ema" not in states:
        names = [name for name in raw.tensors if not name.endswith(_BUFFERS)]
        for order in (names, [name for name in names if not name.startswith(_FROZEN)]):
            if [raw.tensors[name].shape for name in order] == [tensor.shape for tensor in shadow]:
                averaged = {**raw.tensors, **dict(zip(order, shadow, strict=True))}
                states["ema"] = replace(raw, path=path, tensors=averaged, ignored=(), prefix="")
                return ""
    return f"{'/'.join(path)} holds {len(shadow)} averaged tensors without names, which fit no network here"


def _summary(root: Any) -> str:
    if isinstance(root, dict):
        keys = ", ".join(shown(key, 32) for key in list(root)[:8] if isinstance(key, (str, int)))
        return f"a dict with the keys {keys}" if keys else "an empty dict"
    if isinstance(root, Record):
        return f"an object of class {root.kind}"
    return f"a value of type {type(root).__name__}"
