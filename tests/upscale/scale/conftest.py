"""Fixtures of the tests with a Ray cluster; they are skipped where Ray is not installed."""

from collections.abc import Iterator

import pytest
from ray_cluster import Cluster, cluster

from srdeploy.core.extras import is_installed


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """A cluster that outlives one test; no test kills its machines."""
    if not is_installed("ray"):
        pytest.skip("Ray is not installed: pip install 'srdeploy[ray]' (make test-scale does)")
    with cluster() as made:
        yield made


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster that a test may break."""
    if not is_installed("ray"):
        pytest.skip("Ray is not installed: pip install 'srdeploy[ray]' (make test-scale does)")
    with cluster() as made:
        yield made
