"""The state of the processors that a measurement records."""

import os

import pytest

from srdeploy.runtime.bench import exchange
from srdeploy.runtime.bench.exchange import Exchange, exchange_cost


def test_the_cost_of_reading_anothers_data_is_measured_without_moving_the_caller() -> None:
    before = os.sched_getaffinity(0)

    cost = exchange_cost()

    assert os.sched_getaffinity(0) == before
    assert (cost is None) == (len(before) < 2)
    assert cost is None or cost > 0


def test_the_fastest_reading_of_each_kind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs on the machine disturbs some of them; another's data and one's own are read in turns."""
    times = iter([2.0, 9.0, 8.0, 1.0, 7.0, 1.0, 2.2, 5.0, 2.0, 1.1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(exchange, "_move_to", lambda processor: None)
    monkeypatch.setattr(exchange, "_reading_time", lambda values: next(times))

    assert exchange_cost() == 2.0


def test_one_processor_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})

    assert exchange_cost() is None


@pytest.mark.parametrize(
    ("costs", "changed", "label"),
    [([1.1, 1.2, 1.15], False, "1.1x"), ([2.1, 2.2, 2.2], False, "2.2x"), ([1.1, 1.1, 2.2], True, "1.1x to 2.2x")],
    ids=["neighbors", "far apart", "moved meanwhile"],
)
def test_a_change_of_state_is_told_from_noise(costs: list[float], changed: bool, label: str) -> None:
    exchange = Exchange.of_costs(costs)

    assert exchange is not None
    assert exchange.changed is changed
    assert exchange.label == label
    assert Exchange.of_environment({"processor_exchange": exchange.to_json()}) == exchange


def test_measurements_in_different_states_differ() -> None:
    near, far = Exchange(1.1, 1.1, 1.2), Exchange(1.1, 2.1, 2.2)

    assert near.differs_from(far)
    assert not near.differs_from(Exchange(1.0, 1.2, 2.2))
    assert Exchange.of_costs([]) is None
    assert Exchange.of_environment({}) is None
