"""Many small matrix computations at once."""

import pytest
from threadpoolctl import threadpool_info

from srdeploy.core.blas import map_small


def blas_threads() -> set[int]:
    return {int(entry["num_threads"]) for entry in threadpool_info() if entry["user_api"] == "blas"}


def test_results_keep_their_order_and_each_computation_has_one_thread() -> None:
    before = blas_threads()

    results = list(map_small(lambda item: (item, blas_threads()), range(20)))

    assert [item for item, _ in results] == list(range(20))
    assert all(threads <= {1} for _, threads in results)
    assert blas_threads() == before


def test_an_error_reaches_the_caller_and_the_threads_come_back() -> None:
    before = blas_threads()

    with pytest.raises(ZeroDivisionError):
        list(map_small(lambda item: 1 / item, [1, 0]))

    assert blas_threads() == before
