"""Find the network's tensors in what a training script saved: wrappers, EMA copies, pickled modules, prefixes.

Every step that is taken is recorded, and a file with two different candidates is refused rather than guessed at. A
state dict kept as a moving average ("ema") and the plain weights ("raw") are both returned; the caller chooses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import Record, TensorRecord
from srdeploy.models.checkpoint.pickled_network import LONGEST_NAME, ModuleRecord, as_tensor, is_pickled_network, lift
from srdeploy.models.checkpoint.plain import plain_dict

# How training scripts name the network among the things they save, in plain and in averaged form.
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
)
EMA_KEYS = ("params_ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "net_g_ema", "ema")
# torch's wrappers, then those of training frameworks; stripped when every name carries them.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "net_g.", "netG.", "generator.")

MOST_TENSORS = 100_000
_DEEPEST_WRAPPER = 4
_MOST_PREFIXES = 4
_TRAINING_STATE = (
    "optim",
    "sched",
    "scaler",
    "loss",
    "metadata",
    "args",
    "config",
    "hparams",
    "callback",
    "discriminator",
    "model_d",
    "net_d",
    "netd",
)


@dataclass(frozen=True)
class FoundState:
    """A state dict that was found.

    Attributes:
        path: keys that lead to it from the top of the file; "[0]" is the first item of a list.
        tensors: records by name, prefixes stripped.
        prefix: what was stripped from every name, "" if nothing.
        ignored: entries that are not part of the network (`n_averaged`, values that are no tensors).
        modules: for a pickled network, its modules by name; the network itself is "".
    """

    path: tuple[str, ...]
    tensors: dict[str, TensorRecord]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    modules: dict[str, ModuleRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Everything found: state dicts by "raw" and "ema", the outermost dict's keys, plain values beside the weights."""

    states: dict[str, FoundState]
    keys: tuple[str, ...]
    values: dict[str, Any]
    metadata: dict[str, Any]


def find_states(root: Any) -> Found:
    """Find the network's state dict, or its raw and EMA pair, in the tree of a container.

    Raises:
        RefusedError: there is none, it is empty, or there are several that could be meant.
    """
    states = _Search().states(root)
    if not any(state.tensors for state in states.values()):
        raise RefusedError(
            f"holds no network: {_summary(root)}",
            expected="a state_dict, a wrapper around one, or a pickled network",
        )
    used = {state.path[0] for state in states.values() if state.path}
    if not isinstance(root, dict):
        return Found(states, (), {}, {})
    values = plain_dict({key: value for key, value in root.items() if key not in used})
    metadata = root.get("metadata") if used else None
    if isinstance(metadata, dict):
        values.pop("metadata", None)
    return Found(
        states=states,
        keys=tuple(shown(key) for key in root if isinstance(key, str))[:100] if used else (),
        values=values,
        metadata=plain_dict(metadata) if isinstance(metadata, dict) else {},
    )


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers

_States = dict[str, FoundState]


class _Search:
    """One search through a tree; every object is looked at once, however often the tree shares it."""

    def __init__(self) -> None:
        self._known: dict[int, _States] = {}

    def states(self, node: Any, depth: int = 0) -> _States:
        """Return the state dicts in `node` by "raw" and "ema", with paths from `node`; {} when there are none."""
        if not isinstance(node, (dict, list, tuple, Record)) or depth > _DEEPEST_WRAPPER:
            return {}
        if id(node) not in self._known:
            self._known[id(node)] = {}  # met again inside itself, it holds nothing more
            self._known[id(node)] = self._look(node, depth)
        return self._known[id(node)]

    def _look(self, node: Any, depth: int) -> _States:
        if isinstance(node, Record):
            if is_pickled_network(node):
                tensors, modules = lift(node)
                return {"raw": _without_prefix(FoundState((), tensors, modules=modules))}
            return self.states(node.items, depth + 1)  # a subclass of dict or list
        if not isinstance(node, dict):
            return self._one_of({f"[{index}]": item for index, item in enumerate(node[:4])}, depth)
        raw = self._one_of({key: node[key] for key in RAW_KEYS if key in node}, depth)
        ema = self._one_of({key: node[key] for key in EMA_KEYS if key in node}, depth)
        if raw or ema:
            averaged = ema.get("ema") or ema.get("raw") or raw.get("ema")
            return {
                **({"raw": raw["raw"]} if "raw" in raw else {}),
                **({"ema": averaged} if averaged else {}),
            }
        if any(as_tensor(value) is not None for value in node.values()):
            return {"raw": _flat_state(node)}
        # A wrapper under a name we do not know: taken if exactly one of its members is a network.
        strange = {key: node[key] for key in node if isinstance(key, str) and not _is_training_state(key)}
        return self._one_of(strange, depth)

    def _one_of(self, members: Mapping[str, Any], depth: int) -> _States:
        """Return the states of the one member that holds a network; the same one under two names counts as one."""
        found: list[_States] = []
        for key, member in members.items():
            states = self.states(member, depth + 1)
            if states:
                below = {weights: replace(state, path=(shown(key), *state.path)) for weights, state in states.items()}
                found.append(below)
        for other in found[1:]:
            if not _same(found[0], other):
                names = " and ".join("/".join(next(iter(each.values())).path) for each in (found[0], other))
                raise RefusedError(
                    f"holds several networks: {shown(names, 200)}",
                    expected="one",
                    next_step="save the one that you want alone",
                )
        return found[0] if found else {}


def _is_training_state(key: str) -> bool:
    short = key[:64].lower()
    return any(word in short for word in _TRAINING_STATE)


def _same(one: _States, other: _States) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(one[weights].tensors, other[weights].tensors) for weights in one]
    return all(left is right or _places(left) == _places(right) for left, right in pairs)


def _places(tensors: Mapping[str, TensorRecord]) -> list[tuple[str, str, int]]:
    return [(name, record.storage.key, record.offset) for name, record in tensors.items()]


# ----------------------------------------------------------------------------------------------------------------------
# State dicts


def _flat_state(node: Mapping[Any, Any]) -> FoundState:
    tensors: dict[str, TensorRecord] = {}
    ignored: list[str] = []
    for key, value in node.items():
        tensor = as_tensor(value)
        if isinstance(key, str) and tensor is not None:
            tensors[key] = tensor
        else:
            ignored.append(shown(key) if isinstance(key, (str, int)) else "(unnamed)")
    return _without_prefix(FoundState((), tensors, ignored=tuple(ignored[:100])))


def _without_prefix(state: FoundState) -> FoundState:
    """Drop what wrappers of the network added: the counter of an average, and a prefix on every name."""
    tensors, modules, ignored, stripped = state.tensors, state.modules, state.ignored, ""
    if len(tensors) > MOST_TENSORS:
        raise RefusedError(f"holds {len(tensors)} tensors", expected=f"at most {MOST_TENSORS}")
    for name in tensors:
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise RefusedError(f"names a tensor {shown(name)!r}", expected="a printable name")
    if "n_averaged" in tensors and len(tensors) > 1:  # the counter of torch's AveragedModel
        tensors = {name: record for name, record in tensors.items() if name != "n_averaged"}
        ignored = (*ignored, "n_averaged")
    for _ in range(_MOST_PREFIXES):
        prefix = next((each for each in PREFIXES if all(_below(name, each) for name in tensors)), "")
        if not prefix or not tensors:
            break
        tensors = {name.removeprefix(prefix): record for name, record in tensors.items()}
        modules = {
            name.removeprefix(prefix) if name != prefix[:-1] else "": module
            for name, module in modules.items()
            if _below(name, prefix) or name == prefix[:-1]
        }
        stripped += prefix
    return replace(state, tensors=tensors, modules=modules, ignored=ignored, prefix=stripped)


def _below(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name != prefix


def _summary(root: Any) -> str:
    if isinstance(root, dict):
        keys = ", ".join(shown(key, 32) for key in list(root)[:8] if isinstance(key, (str, int)))
        return f"a dict with the keys {keys}" if keys else "an empty dict"
    if isinstance(root, Record):
        return f"an object of class {root.kind}"
    return f"a value of type {type(root).__name__}"
