"""The arithmetic of compression against closed forms."""

import numpy as np
import pytest

from srdeploy.calibration.compress.factors import (
    error_power,
    reduce_inputs,
    reduce_outputs,
    refit,
    select_channels,
)

RANDOM = np.random.default_rng(0)


def covariance(size: int, rank: int | None = None) -> np.ndarray:
    """A covariance whose directions differ a hundredfold in strength."""
    basis = RANDOM.standard_normal((size, rank or size)) * np.geomspace(1, 0.01, rank or size)
    return basis @ basis.T


def weighted_svd_floor(weights: np.ndarray, metric: np.ndarray, rank: int) -> float:
    """Eckart-Young in the metric: no factors of this rank can do better."""
    singular = np.linalg.svd(weights @ np.linalg.cholesky(metric + 1e-12 * np.eye(len(metric))), compute_uv=False)
    return float((singular[rank:] ** 2).sum())


def plain_svd(weights: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(weights, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("rank", [1, 4, 9, 12])
def test_reduced_outputs_reach_the_floor_and_the_error_is_known(rank: int) -> None:
    weights, metric = RANDOM.standard_normal((12, 30)), covariance(30)

    directions, errors = reduce_outputs(weights, metric)
    made = directions[:, :rank] @ (directions[:, :rank].T @ weights)

    power = error_power(weights, made, metric)
    assert power == pytest.approx(weighted_svd_floor(weights, metric, rank), rel=1e-6, abs=1e-9)
    assert power == pytest.approx(errors[rank], rel=1e-6, abs=1e-9)
    assert power <= error_power(weights, plain_svd(weights, rank), metric) + 1e-9


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_reduced_inputs_reach_the_floor(rank: int) -> None:
    weights, metric = RANDOM.standard_normal((40, 16)), covariance(16)

    projections, basis, errors = reduce_inputs(weights, metric)
    made = (weights @ basis[:, :rank]) @ projections[:rank]

    power = error_power(weights, made, metric)
    assert power == pytest.approx(weighted_svd_floor(weights, metric, rank), rel=1e-3, abs=1e-6)
    assert power == pytest.approx(errors[rank], rel=1e-3, abs=1e-4)
    assert power <= error_power(weights, plain_svd(weights, rank), metric) * (1 + 1e-6) + 1e-9


def test_full_rank_reproduces_the_layer() -> None:
    weights, metric = RANDOM.standard_normal((10, 16)), covariance(16)

    directions, _ = reduce_outputs(weights, metric)
    projections, basis, _ = reduce_inputs(weights, metric)

    np.testing.assert_allclose(directions @ (directions.T @ weights), weights, atol=1e-10)
    np.testing.assert_allclose((weights @ basis) @ projections, weights, atol=1e-8)


def test_a_layer_of_known_rank_is_found() -> None:
    weights, metric = RANDOM.standard_normal((20, 3)) @ RANDOM.standard_normal((3, 24)), covariance(24)

    for errors in (reduce_outputs(weights, metric)[1], reduce_inputs(weights, metric)[2]):
        assert errors[3] < 1e-9 * errors[0]
        assert errors[2] > 1e-6 * errors[0]


def test_refit_on_the_same_inputs_changes_nothing_and_on_a_mixture_undoes_it() -> None:
    weights, metric = RANDOM.standard_normal((5, 8)), covariance(8)
    mixture = np.eye(8) + 0.2 * RANDOM.standard_normal((8, 8))

    np.testing.assert_allclose(refit(weights, metric, metric, np.eye(8)), weights, atol=1e-9)
    refitted = refit(weights, metric @ mixture.T, mixture @ metric @ mixture.T, np.eye(8))
    assert error_power(weights, refitted @ mixture, metric) < 1e-6 * error_power(weights, 0 * weights, metric)


def test_refit_leaves_directions_alone_that_were_not_seen() -> None:
    weights, metric = RANDOM.standard_normal((5, 8)), covariance(8, rank=3)

    np.testing.assert_allclose(refit(weights, 0.9 * metric, metric, np.eye(8))[:, :] @ _unseen(metric),
                               weights @ _unseen(metric), atol=1e-3)  # fmt: skip


def _unseen(metric: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(metric)[1][:, :5]


def test_channels_that_others_repeat_go_first_and_cost_nothing() -> None:
    seen = RANDOM.standard_normal((4000, 6))
    inputs = np.concatenate(
        [seen, seen[:, [2]] * 3, seen[:, :2] @ RANDOM.standard_normal((2, 1))], axis=1
    )  # 8 channels
    weights = RANDOM.standard_normal((7, 8))

    order, errors = select_channels(weights, np.cov(inputs.T), taps=1)

    total = error_power(weights, 0 * weights, np.cov(inputs.T))
    assert errors[1] < 1e-4 * total
    assert errors[2] > 1e-3 * total
    assert sorted(order) == list(range(8))
    assert errors[-1] == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("removed", [1, 3])
def test_errors_of_removed_channels_are_those_of_least_squares(removed: int) -> None:
    weights, metric = RANDOM.standard_normal((6, 15)), covariance(15) + 0.01 * np.eye(15)

    order, errors = select_channels(weights, metric, taps=3)
    kept = np.setdiff1d(np.arange(5), order[:removed])
    columns = (kept[:, None] * 3 + np.arange(3)).ravel()

    spread = np.zeros_like(weights)
    spread[:, columns] = refit(weights, metric[:, columns], metric[np.ix_(columns, columns)], np.eye(15)[:, columns])
    assert error_power(weights, spread, metric) == pytest.approx(errors[removed - 1], rel=1e-3)


def test_channels_that_are_always_zero_leave_everything_finite() -> None:
    weights, metric = RANDOM.standard_normal((12, 8)), covariance(8, rank=5)
    metric[:3] = metric[:, :3] = 0.0
    metric[0, 0] = -1e-9  # rounding

    projections, basis, errors = reduce_inputs(weights, metric)

    assert all(np.isfinite(values).all() for values in (projections, basis, errors))
    assert errors[5] < 1e-3 * errors[0]
