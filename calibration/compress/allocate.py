"""Which changes to make for a budget of error: errors of layers add up, and each costs what it saves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srdeploy.calibration.compress.costs import Costs
from srdeploy.calibration.compress.layers import Change

_PASSES = 4
"""Rounds over all layers at one price; what a change saves depends on the changes next to it."""


@dataclass(frozen=True)
class Option:
    """A change and what it does to the image.

    Attributes:
        change: the change.
        power: mean squared error of the network's output that it causes, peak 1.
    """

    change: Change
    power: float


def allocate(options: Mapping[str, Sequence[Option]], costs: Costs, budget: float) -> list[Option]:
    """Return the changes of the highest saving whose error powers together stay within a budget.

    A price of cost is searched at which every layer takes what is best for itself.

    Args:
        options: changes that exclude each other, by slot.
        costs: of the graph.
        budget: error power of the output.
    """
    low, high = 1e-30, 1e-30
    while _power(_at_price(options, costs, high)) <= budget and high < 1e6:
        low, high = high, high * 100
    for _ in range(30):
        middle = math.sqrt(low * high)
        if _power(_at_price(options, costs, middle)) <= budget:
            low = middle
        else:
            high = middle
    return list(_at_price(options, costs, low).values())


def _at_price(options: Mapping[str, Sequence[Option]], costs: Costs, price: float) -> dict[str, Option]:
    taken: dict[str, Option] = {}
    selection: dict[str, Change] = {}
    for _ in range(_PASSES):
        before = dict(taken)
        for slot, alternatives in options.items():
            first = alternatives[0].change
            touched = [name for name in (first.layer, first.reader) if name]
            taken.pop(slot, None)
            selection.pop(slot, None)
            best, lowest = None, price * costs.of_layers(touched, selection)
            for option in alternatives:
                selection[slot] = option.change
                value = option.power + price * costs.of_layers(touched, selection)
                if value < lowest:
                    best, lowest = option, value
            selection.pop(slot, None)
            if best is not None:
                taken[slot], selection[slot] = best, best.change
        if taken == before:
            break
    return taken


def _power(taken: Mapping[str, Option]) -> float:
    return sum(option.power for option in taken.values())
