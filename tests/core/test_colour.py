"""BT.601 in studio swing: known values, and the way back."""

from typing import Any

import numpy as np
import pytest

from srdeploy.core.imaging.colour import rgb_from_ycbcr, y_from_rgb, ycbcr_from_rgb


@pytest.mark.parametrize(
    ("rgb", "ycbcr"),
    [
        ((0, 0, 0), (16, 128, 128)),
        ((1, 1, 1), (235, 128, 128)),
        ((1, 0, 0), (81.481, 90.203, 240)),
        ((0, 1, 0), (144.553, 53.797, 34.214)),
        ((0, 0, 1), (40.966, 240, 109.786)),
    ],
    ids=["black", "white", "red", "green", "blue"],
)
def test_primaries(rgb: tuple[float, ...], ycbcr: tuple[float, ...]) -> None:
    pixel = np.array(rgb, dtype=np.float64)

    np.testing.assert_allclose(ycbcr_from_rgb(pixel) * 255, ycbcr, atol=1e-9)
    np.testing.assert_allclose(y_from_rgb(pixel) * 255, ycbcr[0], atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-14)], ids=["float32", "float64"])
def test_round_trip(dtype: Any, tolerance: float) -> None:
    image = np.random.default_rng(0).random((6, 7, 3)).astype(dtype)

    back = rgb_from_ycbcr(ycbcr_from_rgb(image))

    assert back.dtype == dtype
    np.testing.assert_allclose(back, image, atol=tolerance)


def test_swapped_colours_change_the_luma() -> None:
    image = np.random.default_rng(1).random((4, 4, 3))

    assert np.abs(y_from_rgb(image) - y_from_rgb(image[..., ::-1])).max() > 0.01


@pytest.mark.parametrize("shape", [(3, 4), (4, 4, 1), ()], ids=str)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected floats"):
        y_from_rgb(np.zeros(shape))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ycbcr_from_rgb(np.zeros((2, 2, 3), dtype=np.uint8))  # type: ignore[type-var]
