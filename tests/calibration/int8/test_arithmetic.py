"""8-bit numbers as functions of arrays."""

import ml_dtypes
import numpy as np
import pytest

from srdeploy.calibration.int8.arithmetic import (
    fake_quantize,
    params_for_range,
    quantize_weights,
    round_to_e4m3,
    weight_scales,
)


@pytest.mark.parametrize(
    ("low", "high", "kind", "zero_point"),
    [
        pytest.param(0.0, 2.0, "uint8", 0, id="after ReLU nothing is spent below zero"),
        pytest.param(-1.0, 1.0, "uint8", 128, id="a centred range has its zero in the middle"),
        pytest.param(0.5, 2.0, "uint8", 0, id="zero is always inside, for zero padding"),
        pytest.param(-3.0, 1.0, "int8", 0, id="int8 is symmetric"),
    ],
)
def test_zero_is_exact_and_the_range_is_covered(low: float, high: float, kind: str, zero_point: int) -> None:
    params = params_for_range(low, high, kind)  # type: ignore[arg-type]

    assert abs(params.zero_point - zero_point) <= 1
    assert fake_quantize(np.zeros(1), params)[0] == 0.0
    assert params.low <= min(low, 0) + params.scale
    assert params.high >= high - params.scale


def test_rounding_errs_by_at_most_half_a_step_inside_and_clips_outside() -> None:
    params = params_for_range(-1.0, 3.0, "uint8")
    values = np.linspace(-1.0, 3.0, 999)

    inside = np.abs(fake_quantize(values, params) - values)

    assert inside.max() <= params.scale * 0.5001 + 1e-6
    assert fake_quantize(np.array([9.0]), params)[0] == pytest.approx(params.high)


def test_an_image_of_8_bits_survives_its_own_scale_exactly() -> None:
    image = np.arange(256) / np.float32(255)

    back = fake_quantize(image, params_for_range(0.0, 1.0, "uint8"))

    assert np.abs(back - image).max() < 1e-6


def test_e4m3_agrees_with_the_reference_type() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 50, 4000), [448.0, 0.0, 2.0**-9, 1e-4, -460.0]])

    ours = round_to_e4m3(values)

    assert np.array_equal(ours, np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))


@pytest.mark.parametrize("axis", [pytest.param(0, id="convolution"), pytest.param(1, id="deconvolution")])
def test_weights_use_the_whole_code_of_their_own_channel(axis: int) -> None:
    weights = np.random.default_rng(1).normal(size=(4, 5, 3, 3)).astype(np.float32)
    weights = weights * np.array([1e-3, 1, 10, 100, 5], dtype=np.float32)[:5].reshape(1, 5, 1, 1)

    scales = weight_scales(weights, axis)
    codes = quantize_weights(weights, scales, axis)

    rows = np.abs(np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1).astype(int)).max(axis=1)
    assert scales.shape == (weights.shape[axis],)
    assert (rows == 127).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    weights = np.zeros((2, 1, 1, 1), dtype=np.float32)

    codes = quantize_weights(weights, weight_scales(weights, 0), 0)

    assert not codes.any()
