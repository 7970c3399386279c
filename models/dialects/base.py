"""What a checkpoint dialect is: key names, how the configuration follows from shapes, and what shapes leave open.

A dialect is data plus one function. Its layout names where each tensor of the canonical network is in the source's
key set; its `read` function turns shapes into a configuration and lists the open questions. Everything else, that is
matching, renaming, checking that every key is used and every tensor filled, and answering the questions, is done once
for all dialects (`srdeploy.models.checkpoint.recognise`, `srdeploy.models.checkpoint.resolve`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from srdeploy.core.errors import InputError
from srdeploy.models.networks.spec import NetworkConfig

AnsweredBy = Literal["metadata", "flag", "wrapper", "tensors", "probe", "default", "open"]
"""Who settled a question: the file's own metadata, the user, the wrapper around the tensors, the values of tensors, a
run on real images, the default of the source's own code, or nobody ("open")."""


@dataclass(frozen=True)
class Answer:
    """A value for an open question, where it comes from and why."""

    value: Any
    by: AnsweredBy
    reason: str


@dataclass(frozen=True)
class Question:
    """Something that decides the arithmetic and does not follow from the tensors' names and shapes.

    Attributes:
        choice: name of the choice; the flag is the same word with dashes.
        fields: configuration fields that take the value.
        meaning: what it is about, as a sentence part for people.
        candidates: values found in public code.
        answer: a reliable answer from the file (metadata, wrapper or tensor values), if there is one.
        usual: the default of the source's own code; taken when nothing better is known, and reported. None where
            public files differ so that no value is safe.
        any_value: the user may state a value that is not among the candidates.
        probed: candidates differ enough for real images to distinguish them.
        contested: public files are known to differ, so that taking `usual` is reported as an assumption.
    """

    choice: str
    fields: tuple[str, ...]
    meaning: str
    candidates: tuple[Any, ...]
    answer: Answer | None = None
    usual: Answer | None = None
    any_value: bool = False
    probed: bool = True
    contested: bool = True

    @property
    def flag(self) -> str:
        """The command line flag that answers it."""
        return "--" + self.choice.replace("_", "-")


@dataclass(frozen=True)
class Hints:
    """What a file contains beside its tensors.

    Attributes:
        file_name: without folders.
        members: names that lay beside the weights in the wrapper ("optimizer", "ema_state_dict", ...).
        metadata: constructor arguments or other values that the file's writer put in on purpose.
        neighbor: the configuration file that a publisher puts next to the weights.
    """

    file_name: str = ""
    members: frozenset[str] = frozenset()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    neighbor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What a dialect made of a key set.

    Attributes:
        config: with every open question at some candidate.
        questions: what is still open, most important first.
        constants: keys whose values went into the configuration.
        notes: what a user should know, one sentence each.
    """

    config: NetworkConfig
    questions: tuple[Question, ...] = ()
    constants: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class Layout(Protocol):
    """Where the canonical network's tensors lie in a source's key set."""

    def modules(self, config: Any) -> dict[str, str]:
        """Return the source's path of every module or lone tensor, by its canonical path."""

    def copies(self, config: Any) -> dict[str, str]:
        """Return keys that hold the same value under a second name: the copy's key to the canonical tensor's name."""

    def templates(self) -> tuple[str, ...]:
        """Return the templates of all module paths, whatever the configuration."""


@dataclass(frozen=True)
class Dialect:
    """One family of checkpoints.

    Attributes:
        name: short name for evidence and JSON.
        title: what people call it.
        source: where its code lives.
        signature: keys that are all present in every file of the family.
        absent: keys that are never present; they distinguish families with similar keys.
        read: from shapes and hints to a configuration.
        layout: where the tensors lie.
    """

    name: str
    title: str
    source: str
    signature: tuple[str, ...]
    read: Callable[["Survey", Hints], Reading]
    layout: Layout
    absent: tuple[str, ...] = ()

    def matches(self, keys: Collection[str]) -> bool:
        """Return True if a key set carries this family's signature."""
        return all(key in keys for key in self.signature) and not any(key in keys for key in self.absent)


@dataclass(frozen=True)
class Refusal:
    """A family that is known and cannot be represented by the canonical networks.

    Attributes:
        title: what people call it.
        signatures: key sets; all keys of one of them are present.
        reason: why it is refused.
    """

    title: str
    signatures: tuple[tuple[str, ...], ...]
    reason: str

    def matches(self, keys: Collection[str]) -> bool:
        """Return True if a key set is of this family."""
        return any(all(key in keys for key in signature) for signature in self.signatures)


class Survey:
    """Reads hyper-parameters off tensor shapes and remembers where each came from.

    Attributes:
        tensors: the key set.
        sources: hyper-parameter to the key and shape that it was read from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], title: str) -> None:
        self.tensors = tensors
        self.sources: dict[str, str] = {}
        self._title = title

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            InputError: it is missing, or has another number of axes.
        """
        if key not in self.tensors:
            raise InputError(f"looks like {self._title}, but {key} is missing")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != axes or 0 in shape:
            raise InputError(f"looks like {self._title}, but {key} has shape {shape}", expected=f"{axes} axes")
        return shape

    def values(self, key: str, axes: int) -> Tensor:
        """Return a tensor whose values go into the configuration, as float32.

        Raises:
            InputError: it is missing, has another number of axes, or holds anything but finite numbers.
        """
        self.shape(key, axes)
        tensor = self.tensors[key]
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise InputError(f"looks like {self._title}, but {key} holds values that are not finite numbers")
        return tensor.float()

    def size(self, name: str, key: str, axis: int) -> int:
        """Return one size of a convolution weight and remember it as the hyper-parameter `name`."""
        shape = self.shape(key, 4)
        self.sources[name] = f"{key} {shape_text(shape)}, axis {axis}"
        return shape[axis]

    def count(self, name: str, key: Callable[[int], str]) -> int:
        """Return how many of key(0), key(1), ... are present.

        Raises:
            InputError: one is missing that others follow, or not even the first is there.
        """
        number = self.steps(key)
        later = next((key(index) for index in range(number + 1, len(self.tensors)) if key(index) in self.tensors), None)
        if later is not None:
            raise InputError(f"looks like {self._title}, but {key(number)} is missing and {later} is there")
        if number == 0:
            raise InputError(f"looks like {self._title}, but {key(0)} is missing")
        self.sources[name] = key(0) if number == 1 else f"{key(0)} to {key(number - 1)}"
        return number

    def steps(self, key: Callable[[int], str]) -> int:
        """Return how many of key(0), key(1), ... are present without a gap, 0 included."""
        number = 0
        while key(number) in self.tensors:
            number += 1
        return number

    def shuffle_factors(self, key: Callable[[int], str], features: int) -> tuple[int, ...]:
        """Return the pixel shuffle factor of each upsampling convolution: its outputs are factor^2 * features.

        Raises:
            InputError: an output count is no such product.
        """
        keys = [key(step) for step in range(self.steps(key))]
        factors = []
        for name in keys:
            outputs = self.shape(name, 4)[0]
            factor = math.isqrt(outputs // features)
            if factor < 1 or factor**2 * features != outputs:
                raise InputError(
                    f"looks like {self._title}, but {name} makes {outputs} maps",
                    expected=f"{features} times the square of an upsampling factor",
                )
            factors.append(factor)
        shapes = ", ".join(f"{name} {shape_text(self.shape(name, 4))}" for name in keys)
        self.sources["upsampler"] = shapes or "no upsampling keys: scale 1"
        return tuple(factors)

    def refuse(self, found: str, expected: str | None = None) -> InputError:
        """Return the error for a file of this family whose sizes make no sense."""
        return InputError(f"looks like {self._title}, but {found}", expected=expected)


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as 64x3x3x3."""
    return "x".join(str(size) for size in shape) or "scalar"
