"""Many small matrix computations at once.

A product of small matrices gains little from the threads of the BLAS library behind numpy, and on a machine with other
work they wait for each other: a Cholesky factor of 576x576 then takes five times as long, and the whole rounding of a
layer fifteen times. With one thread per computation, and as many computations at once as there are processors, both
a quiet and a busy machine are used fully; and the order of sums, so the result, does not depend on their number.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from srdeploy.core.environment import cpu_count

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_small(compute: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield a result per item, in order; several are computed at once, each with one BLAS thread.

    Args:
        compute: safe to call from several threads; most of its time is spent in numpy.
        items: consumed at once.
    """
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cpu_count()) as pool:
        yield from pool.map(compute, items)
