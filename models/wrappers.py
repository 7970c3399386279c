"""Find the network's tensors in what a training script saved: wrappers, EMA copies, pickled modules, prefixes.

Every step that is taken is recorded, and a file with two different candidates is refused rather than guessed at. A
state dict kept as a moving average ("ema") and the plain weights ("raw") are both returned; the caller chooses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from srdeploy.models.filebytes import RefusedError, shown
from srdeploy.models.inert import Global, Record, TensorRecord

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
_DEEPEST_MODULE = 64
_LONGEST_NAME = 512


@dataclass(frozen=True)
class ModuleRecord:
    """One module of a pickled network: its class by name, and its plain attributes (kernel_size, stride, ...)."""

    kind: str
    attributes: dict[str, Any]


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
    states = _states(root, ())
    if not states:
        raise RefusedError(
            f"holds no network: {_summary(root)}",
            expected="a state_dict, a wrapper around one, or a pickled network",
        )
    keys: tuple[str, ...] = ()
    values: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    if isinstance(root, dict):
        used = {state.path[0] for state in states.values() if state.path}
        if used:
            keys = tuple(shown(key) for key in root if isinstance(key, str))[:100]
        values = {
            shown(key): plain(value)
            for key, value in root.items()
            if isinstance(key, str) and key not in used and is_plain(value)
        }
        if used and isinstance(root.get("metadata"), dict):
            metadata = plain_dict(root["metadata"])
            values.pop("metadata", None)
    return Found(states, keys, values, metadata)


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers


def _states(node: Any, path: tuple[str, ...]) -> dict[str, FoundState]:
    if len(path) > _DEEPEST_WRAPPER:
        return {}
    if isinstance(node, Record):
        return _record_states(node, path)
    if isinstance(node, (list, tuple)):
        return _only([_states(item, (*path, f"[{index}]")) for index, item in enumerate(node[:4])], path)
    if not isinstance(node, dict):
        return {}
    raw = _only([_states(node[key], (*path, key)) for key in RAW_KEYS if _holds_more(node.get(key))], path)
    ema = _only([_states(node[key], (*path, key)) for key in EMA_KEYS if _holds_more(node.get(key))], path)
    if raw or ema:
        states = {"raw": raw["raw"]} if "raw" in raw else {}
        averaged = ema.get("ema", ema.get("raw", raw.get("ema")))
        return states if averaged is None else {**states, "ema": averaged}
    if any(isinstance(value, TensorRecord) for value in map(as_tensor, node.values())):
        return {"raw": _flat_state(node, path)}
    # A wrapper of a name we do not know: taken if exactly one of its members holds tensors named like a network's.
    inner = [
        _states(value, (*path, shown(key)))
        for key, value in node.items()
        if isinstance(key, str) and _holds_more(value) and not _is_training_state(key)
    ]
    return _only(inner, path)


def _record_states(record: Record, path: tuple[str, ...]) -> dict[str, FoundState]:
    if isinstance(record.state, dict) and isinstance(record.state.get("_modules"), dict):
        return {"raw": _module_state(record, path)}
    if isinstance(record.items, dict):  # a subclass of dict
        return _states(record.items, path)
    return {}


def _holds_more(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, Record)) and bool(value)


def _is_training_state(key: str) -> bool:
    words = ("optim", "sched", "scaler", "loss", "metadata", "args", "config", "hparams", "callback", "discriminator")
    return any(word in key.lower() for word in words) or key in ("model_d", "net_d", "netD")


def _only(candidates: list[dict[str, FoundState]], path: tuple[str, ...]) -> dict[str, FoundState]:
    """Return the one candidate that is a network; the same network under two names counts as one."""
    found = [candidate for candidate in candidates if candidate]
    if len(found) > 1:
        first = {name: _identity(state) for name, state in found[0].items()}
        if any({name: _identity(state) for name, state in other.items()} != first for other in found[1:]):
            names = " and ".join("/".join(next(iter(each.values())).path) for each in found[:4])
            raise RefusedError(
                f"holds several networks: {shown(names, 200)}",
                expected="one",
                next_step="save the one that you want alone",
            )
    return found[0] if found else {}


def _identity(state: FoundState) -> tuple[tuple[str, str, int], ...]:
    return tuple((name, record.storage.key, record.offset) for name, record in state.tensors.items())


# ----------------------------------------------------------------------------------------------------------------------
# State dicts


def _flat_state(node: Mapping[Any, Any], path: tuple[str, ...]) -> FoundState:
    tensors: dict[str, TensorRecord] = {}
    ignored: list[str] = []
    for key, value in node.items():
        tensor = as_tensor(value)
        if isinstance(key, str) and tensor is not None:
            tensors[_checked_name(key)] = tensor
        else:
            ignored.append(shown(key) if isinstance(key, (str, int)) else "(unnamed)")
    return _without_prefix(path, tensors, ignored, {})


def _without_prefix(
    path: tuple[str, ...], tensors: dict[str, TensorRecord], ignored: list[str], modules: dict[str, ModuleRecord]
) -> FoundState:
    if len(tensors) > MOST_TENSORS:
        raise RefusedError(f"holds {len(tensors)} tensors", expected=f"at most {MOST_TENSORS}")
    if "n_averaged" in tensors and len(tensors) > 1:  # the counter of torch's AveragedModel
        tensors = {name: record for name, record in tensors.items() if name != "n_averaged"}
        ignored = [*ignored, "n_averaged"]
    stripped = ""
    while prefix := next((each for each in PREFIXES if tensors and all(name.startswith(each) for name in tensors)), ""):
        if any(name == prefix for name in tensors):
            break
        tensors = {name.removeprefix(prefix): record for name, record in tensors.items()}
        modules = {name.removeprefix(prefix): module for name, module in modules.items() if name.startswith(prefix)}
        stripped += prefix
    return FoundState(path, tensors, stripped, tuple(ignored[:100]), modules)


def _checked_name(name: str) -> str:
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise RefusedError(f"names a tensor {shown(name)!r}", expected="a printable name")
    return name


def as_tensor(value: Any) -> TensorRecord | None:
    """Return the tensor that a value is: itself, or the data of a parameter or variable of PyTorch 0.1 to 0.3."""
    if isinstance(value, TensorRecord):
        return value
    if isinstance(value, Record) and value.kind.name in ("Parameter", "Variable"):
        state = value.state
        candidates = (*value.arguments[:1], *(state[:1] if isinstance(state, (tuple, list)) else ()))
        return next((each for each in candidates if isinstance(each, TensorRecord)), None)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Pickled networks


def _module_state(record: Record, path: tuple[str, ...]) -> FoundState:
    """Lift `_parameters`, `_buffers` and `_modules` of a pickled network, as its `state_dict()` would name them."""
    tensors: dict[str, TensorRecord] = {}
    modules: dict[str, ModuleRecord] = {}
    for prefix, module in _modules(record, "", ()):
        if len(modules) > MOST_TENSORS:
            raise RefusedError(f"holds a network of more than {MOST_TENSORS} modules", expected="a tree of modules")
        state = module.state
        modules[prefix.removesuffix(".")] = ModuleRecord(str(module.kind), _attributes(state))
        passing = state.get("_non_persistent_buffers_set")
        passing = {name for name in passing if isinstance(name, str)} if isinstance(passing, (list, tuple)) else set()
        for member in ("_parameters", "_buffers"):
            for name, value in _named(state.get(member)):
                tensor = as_tensor(value)
                if tensor is not None and not (member == "_buffers" and name in passing):
                    tensors[_checked_name(prefix + name)] = tensor
    return _without_prefix(path, tensors, [], modules)


def _modules(record: Record, prefix: str, above: tuple[Record, ...]) -> Iterator[tuple[str, Record]]:
    """Yield every module below and including `record` with its name prefix. A shared module comes once per name."""
    if len(above) > _DEEPEST_MODULE or any(record is other for other in above):
        raise RefusedError("holds a network that contains itself", expected="a tree of modules")
    if len(prefix) > _LONGEST_NAME:
        raise RefusedError("holds a module with an endless name", expected="a tree of modules")
    yield prefix, record
    for name, child in _named(record.state.get("_modules")):
        if isinstance(child, Record) and isinstance(child.state, dict):
            yield from _modules(child, f"{prefix}{name}.", (*above, record))


def _named(members: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(members, Record):
        members = members.items
    if isinstance(members, dict):
        yield from ((key, value) for key, value in members.items() if isinstance(key, str))


def _attributes(state: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        key: plain(value)
        for key, value in state.items()
        if isinstance(key, str) and not key.startswith("_") and key.isprintable() and is_plain(value)
    }


# ----------------------------------------------------------------------------------------------------------------------
# Plain values beside the weights


def is_plain(value: Any, depth: int = 2) -> bool:
    """Whether a value is a number, text, None or class name, or a short list or dict of these."""
    if value is None or isinstance(value, (bool, int, float, Global)) or (isinstance(value, str) and len(value) < 4096):
        return True
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 64 and all(is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return depth > 0 and len(value) <= 64 and all(is_plain(item, depth - 1) for item in value.values())
    return False


def plain(value: Any) -> Any:
    """Return a plain value as JSON values, texts fit for a terminal line."""
    if isinstance(value, (str, Global)):
        return shown(value, 200)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return plain_dict(value)
    return value


def plain_dict(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the plain entries of a dict as JSON values."""
    return {
        shown(key): plain(value)
        for key, value in list(values.items())[:256]
        if isinstance(key, (str, int)) and is_plain(value)
    }


def _summary(root: Any) -> str:
    if isinstance(root, dict):
        if not root:
            return "an empty dict"
        keys = ", ".join(shown(key, 32) for key in list(root)[:8] if isinstance(key, (str, int)))
        return f"a dict with the keys {keys}" if keys else "a dict"
    if isinstance(root, Record):
        return f"an object of class {root.kind}"
    return f"a {type(root).__name__}"
