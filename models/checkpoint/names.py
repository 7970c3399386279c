"""Find a network among the names of a state dict: wrappers, counters, and the other parts of a training module.

Nothing here knows RCAN or SRDenseNet: a function recognizes the names of a known network.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

IsNetwork = Callable[[Collection[str]], bool]
"""Returns True if a set of names carries the signature of a known network."""

# Segments that wrappers put into names: torch.compile, activation checkpointing, FSDP and its predecessor in fairscale,
# Lightning Fabric, Opacus. None of them is an attribute of a network.
_WRAPPERS = frozenset(
    ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module", "_module"]
)
# thop's counters of multiply-adds, one of each in every module.
_COUNTERS = frozenset({"total_ops", "total_params"})
# Counters of averaging and of steps: torch's AveragedModel, ema-pytorch, LitEma, MMEditing.
_AVERAGING = frozenset({"n_averaged", "initted", "step", "step_counter", "decay", "num_updates"})
_TRAINING = re.compile(
    r"loss|criteri|metric|psnr|ssim|lpips|dists|(^|_)fid(_|$)|vgg|percept|discrim|critic|^(net|model)_?d$|^disc(_|$)|^d$"
    r"|optim|sched|scaler|augment"
)
_MAX_DEPTH = 4
"""A network is looked for this many attributes below the top of the module that embeds it."""
_MAX_PATTERNS = 6


@dataclass(frozen=True)
class Group:
    """The names of one network.

    Attributes:
        prefix: the prefix of all of them in the file, "" for nothing; "model_ema." for LitEma's names without dots.
        names: the network's own name to the name in the file.
    """

    prefix: str
    names: dict[str, str]


@dataclass(frozen=True)
class Split:
    """The names of a state dict, sorted.

    Attributes:
        groups: the networks.
        training: names of counters, losses, metrics and discriminators.
        unexplained: all other names.
    """

    groups: tuple[Group, ...]
    training: tuple[str, ...]
    unexplained: tuple[str, ...]


def split_names(names: Sequence[str], is_network: IsNetwork) -> Split:
    """Find the networks among the names of a state dict, and sort what is beside them."""
    counters = [name for name in names if name in _AVERAGING or name.rpartition(".")[2] in _COUNTERS]
    counted = set(counters)
    clean = _without_wrappers([name for name in names if name not in counted])
    groups = list(_groups("", clean, is_network, depth=0))
    rest = list(clean.values())
    used = {old for group in groups for old in group.names.values()}
    rest = [name for name in rest if name not in used]
    for group in tuple(groups):
        for average in _names_without_dots(group, rest):
            groups.append(average)
            averaged = set(average.names.values())
            rest = [name for name in rest if name not in averaged]
    training = [name for name in rest if _is_training(name)]
    unexplained = [name for name in rest if not _is_training(name)]
    return Split(tuple(groups), (*training, *counters), tuple(unexplained))


def is_training_name(segment: str) -> bool:
    """Return True if a name belongs to a loss, a metric, a discriminator or the like."""
    return _TRAINING.search(segment.lower()) is not None


def plain_names(names: Collection[str]) -> set[str]:
    """Return names as they are without pruning, weight norm and the like: `conv.weight_g` becomes `conv.weight`."""
    found = set()
    for name in names:
        matched = _REPARAMETRIZED.fullmatch(name) if name.endswith(("_orig", "_g", "original", "original0")) else None
        found.add(f"{matched['module']}{matched['old'] or matched['new']}" if matched else name)
    return found


_REPARAMETRIZED = re.compile(
    r"(?P<module>(?:.*\.)?)(?:(?P<old>weight|bias)_(?:orig|g)|parametrizations\.(?P<new>\w+)\.original0?)"
)


def _is_training(name: str) -> bool:
    return name.rpartition(".")[2] in _AVERAGING or any(map(is_training_name, name.split(".")[:2]))


def _without_wrappers(names: Sequence[str]) -> dict[str, str]:
    """Return the file's names by what they are without the segments of wrappers."""
    clean = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names}
    return clean if len(clean) == len(names) else {name: name for name in names}


def _groups(prefix: str, names: dict[str, str], is_network: IsNetwork, depth: int) -> Iterator[Group]:
    """Yield the networks among `names` (relative to `prefix`), outermost first."""
    for variant in _variants(names):
        if is_network(plain_names(variant)):
            yield Group(prefix, variant)
            return
    if depth >= _MAX_DEPTH:
        return
    children: dict[str, dict[str, str]] = {}
    for name, old in names.items():
        head, dot, tail = name.partition(".")
        if dot and not is_training_name(head):
            children.setdefault(head, {})[tail] = old
    for head, below in children.items():
        if len(below) > 1:
            yield from _groups(f"{prefix}{head}.", below, is_network, depth + 1)


def _variants(names: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield the names without "module" segments, as they are, and without those of some places only.

    DataParallel calls what it wraps "module", and so do some networks, hence the trials. A place is the path to the
    segment with every index replaced: all blocks of a network are wrapped alike, or none is.
    """
    places = {place: None for name in names for place in _places_of_module(name)}
    if not places:
        yield names
        return
    for chosen in (tuple(places), (), *_subsets(tuple(places))):
        changed = {_without_module(name, set(chosen)): old for name, old in names.items()}
        if len(changed) == len(names):
            yield changed


def _subsets(places: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if len(places) <= _MAX_PATTERNS:
        for size in range(1, len(places)):
            yield from combinations(places, size)


def _places_of_module(name: str) -> Iterator[str]:
    if "module" in name:
        parts = name.split(".")
        for index, part in enumerate(parts[:-1]):
            if part == "module":
                yield _place(parts[:index])


def _place(parts: Sequence[str]) -> str:
    return ".".join("#" if part.isdecimal() else part for part in parts)


def _without_module(name: str, places: set[str]) -> str:
    parts = name.split(".")
    kept = [
        part
        for index, part in enumerate(parts)
        if part != "module" or index == len(parts) - 1 or _place(parts[:index]) not in places
    ]
    return ".".join(kept)


def _names_without_dots(group: Group, rest: Sequence[str]) -> Iterator[Group]:
    """Yield the moving average that LitEma keeps beside a network, under its names without their dots."""
    below: dict[str, set[str]] = {}
    for name in rest:
        head, _, tail = name.partition(".")
        below.setdefault(head, set()).add(tail)
    for head, tails in below.items():
        names = {name: f"{head}.{name.replace('.', '')}" for name in group.names if name.replace(".", "") in tails}
        if len(names) == len(group.names):
            yield Group(f"{head}.", names)
