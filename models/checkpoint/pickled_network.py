"""Lift the tensors out of a pickled network: what `state_dict()` would have said, without its classes.

A pickled `nn.Module` is a record whose state has `_parameters`, `_buffers` and `_modules`; the names of the tensors
follow from those dicts alone, and so do plain attributes such as kernel_size. A hostile file can share one record under
endlessly many names, so every entry that is looked at is counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from srdeploy.models.checkpoint.filebytes import RefusedError
from srdeploy.models.checkpoint.inert import Record, TensorRecord
from srdeploy.models.checkpoint.plain import is_plain, plain

MAX_NAME_LENGTH = 512
_MAX_DEPTH = 32
_MAX_STEPS = 120_000
"""A default-size pickled RCAN takes 41,000 steps."""
_MAX_ATTRIBUTES = 64


@dataclass(frozen=True)
class ModuleRecord:
    """One module of a pickled network: its class by name, and its plain attributes (kernel_size, stride, ...)."""

    kind: str
    attributes: dict[str, Any]


def is_pickled_network(value: Any) -> bool:
    """Return True if a value is a pickled `nn.Module`."""
    return isinstance(value, Record) and isinstance(value.state, dict) and "_modules" in value.state


def lift(network: Record) -> tuple[dict[str, TensorRecord], dict[str, ModuleRecord]]:
    """Return the tensors and the modules of a pickled network by name; the network itself is module "".

    Raises:
        RefusedError: it contains itself, or is larger than any network.
    """
    walk = _Walk()
    tensors: dict[str, TensorRecord] = {}
    modules: dict[str, ModuleRecord] = {}
    for prefix, module in walk.modules(network):
        modules[prefix.removesuffix(".")] = ModuleRecord(str(module.kind), walk.attributes(module.state))
        passing = walk.transient_buffers(module.state)
        for member in ("_parameters", "_buffers"):
            for name, value in walk.named(module.state.get(member)):
                tensor = as_tensor(value)
                if tensor is not None and not (member == "_buffers" and name in passing):
                    tensors[prefix + name] = tensor
    return tensors, modules


def as_tensor(value: Any) -> TensorRecord | None:
    """Return the tensor that a value is: itself, or the data of a parameter or variable of PyTorch 0.1 to 0.3."""
    if isinstance(value, TensorRecord):
        return value
    if isinstance(value, Record) and value.kind.name in ("Parameter", "Variable"):
        state = value.state
        candidates = (*value.arguments[:1], *(state[:1] if isinstance(state, (tuple, list)) else ()))
        return next((each for each in candidates if isinstance(each, TensorRecord)), None)
    return None


class _Walk:
    """One walk through a network, with a bound on the entries looked at."""

    def __init__(self) -> None:
        self._steps = 0
        self._attributes: dict[int, dict[str, Any]] = {}

    def modules(self, network: Record) -> Iterator[tuple[str, Record]]:
        """Yield every module with its name prefix, in the order of state_dict(); a shared one comes once per name."""
        above: list[tuple[str, Iterator[tuple[str, Record]]]] = []
        holders: list[int] = []
        record, prefix = network, ""
        while True:
            if len(above) > _MAX_DEPTH or id(record) in holders:
                raise RefusedError("holds a network that contains itself", expected="a tree of modules")
            yield prefix, record
            above.append((prefix, self._children(record)))
            holders.append(id(record))
            child = next(above[-1][1], None)
            while child is None:
                above.pop()
                holders.pop()
                if not above:
                    return
                child = next(above[-1][1], None)
            name, record = child
            prefix = f"{above[-1][0]}{name}."

    def _children(self, record: Record) -> Iterator[tuple[str, Record]]:
        for name, child in self.named(record.state.get("_modules")):
            if isinstance(child, Record) and isinstance(child.state, dict):
                yield name, child

    def named(self, members: Any) -> Iterator[tuple[str, Any]]:
        """Yield the entries of a dict, or of a record of a dict's subclass, that are named by text."""
        if isinstance(members, Record):
            members = members.items
        if not isinstance(members, dict):
            return
        for name, value in members.items():
            self._step()
            if isinstance(name, str):
                if len(name) > MAX_NAME_LENGTH:
                    raise RefusedError(f"holds a network with a name of {len(name)} characters", expected="short names")
                yield name, value

    def attributes(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the plain attributes of a module, computed once per state."""
        found = self._attributes.get(id(state))
        if found is None:
            found = self._attributes[id(state)] = {}
            for name, value in state.items():
                self._step()
                wanted = isinstance(name, str) and len(name) <= MAX_NAME_LENGTH and not name.startswith("_")
                if wanted and name.isprintable() and len(found) < _MAX_ATTRIBUTES and is_plain(value, depth=1):
                    found[name] = plain(value)
        return found

    def transient_buffers(self, state: Mapping[Any, Any]) -> set[str]:
        """Return the names of the buffers that a state_dict leaves out."""
        names = state.get("_non_persistent_buffers_set")
        if not isinstance(names, (list, tuple)):
            return set()
        for _ in names:
            self._step()
        return {name for name in names if isinstance(name, str)}

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise RefusedError("holds a network of endlessly many parts", expected="RCAN or SRDenseNet")
