"""PSNR: known values, the published protocol, and what it must refuse."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.core.imaging.psnr import (
    crop_to_multiple,
    drop_for_fidelity,
    fidelity_for_drop,
    luma_255,
    psnr_db,
    rgb_psnr_db,
    shaved,
    y_psnr_db,
)


def noise(seed: int, shape: tuple[int, ...] = (24, 20, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_equal_images_are_infinitely_faithful() -> None:
    image = np.random.default_rng(0).random((3, 5, 5))

    assert psnr_db(image, image.copy()) == math.inf


@pytest.mark.parametrize(("offset", "peak", "expected"), [(0.1, 1.0, 20.0), (1.0, 255.0, 48.1308), (0.01, 1.0, 40.0)])
def test_a_constant_offset_has_a_known_psnr(offset: float, peak: float, expected: float) -> None:
    assert psnr_db(np.zeros((4, 4)), np.full((4, 4), offset), peak=peak) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_value_that_is_not_finite_has_no_psnr(bad: float) -> None:
    image = np.zeros((2, 2))
    broken = image.copy()
    broken[0, 0] = bad

    assert math.isnan(psnr_db(image, broken))


@pytest.mark.parametrize(("first", "second"), [((2, 2), (2, 3)), ((0, 2), (0, 2))], ids=["unequal", "empty"])
def test_shapes_must_match(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        psnr_db(np.zeros(first), np.zeros(second))


def test_y_psnr_ignores_the_shaved_border_and_only_that() -> None:
    truth = noise(0)
    border = truth.copy()
    border[0] = 255 - border[0]
    inside = truth.copy()
    inside[2, 2] = 255 - inside[2, 2]

    assert y_psnr_db(border, truth, shave=2) == math.inf
    assert y_psnr_db(inside, truth, shave=2) < 60


def test_luma_is_kept_as_it_is_and_made_from_rgb() -> None:
    grey = noise(1, (6, 6))

    np.testing.assert_array_equal(luma_255(grey), grey)
    assert luma_255(np.full((2, 2, 3), 255, np.uint8)) == pytest.approx(np.full((2, 2), 235.0))


def test_y_and_rgb_psnr_are_different_numbers() -> None:
    truth = noise(2)
    output = np.clip(truth.astype(int) + np.random.default_rng(3).integers(-9, 10, truth.shape), 0, 255).astype(
        np.uint8
    )

    assert y_psnr_db(output, truth, shave=2) - rgb_psnr_db(output, truth, shave=2) > 1.0


def test_cropping_keeps_the_origin() -> None:
    image = noise(4, (11, 9, 3))

    cropped = crop_to_multiple(image, 4)

    np.testing.assert_array_equal(cropped, image[:8, :8])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8, 4), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((8,), np.uint8), r"\(H, W\)"),
    ],
    ids=["float", "alpha", "one-axis"],
)
def test_other_images_are_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        y_psnr_db(image, image, shave=1)


def test_shaving_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="shave"):
        shaved(np.zeros((8, 4)), 2)


@pytest.mark.parametrize(
    ("psnr", "drop", "fidelity"),
    [(26.82, 0.01, 53.2), (32.63, 0.05, 52.0), (38.27, 0.1, 54.6), (28.87, 0.5, 38.0)],
)
def test_fidelity_needed_for_a_drop(psnr: float, drop: float, fidelity: float) -> None:
    assert fidelity_for_drop(psnr, drop) == pytest.approx(fidelity, abs=0.06)
    assert drop_for_fidelity(psnr, fidelity_for_drop(psnr, drop)) == pytest.approx(drop, rel=1e-9)


def test_no_drop_at_all_is_not_a_gate() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        fidelity_for_drop(30.0, 0.0)


def test_the_predicted_drop_is_the_drop_of_added_noise() -> None:
    generator = np.random.default_rng(5)
    truth = generator.random((200, 200))
    reference = truth + generator.normal(0, 0.03, truth.shape)
    engine = reference + generator.normal(0, 0.01, truth.shape)

    drop = psnr_db(reference, truth) - psnr_db(engine, truth)

    predicted = drop_for_fidelity(psnr_db(reference, truth), psnr_db(engine, reference))
    assert predicted == pytest.approx(drop, abs=0.02)  # independent noises correlate by about 1/sqrt(40000)


def test_the_published_figures_of_rcan_are_reproduced(reference_data: Path) -> None:
    folder = reference_data / "data" / "Set5"
    published = re.findall(
        r"(\w+)_RCAN_x(\d)\.png: PSNR= (\S+)", (folder / "rcan_psnr_ssim.txt").read_text(encoding="utf-8")
    )
    assert len(published) == 10
    for name, scale, expected in published:
        truth = np.array(Image.open(folder / "HR" / f"{name}.bmp").convert("RGB"))
        output = np.array(Image.open(folder / f"RCAN_x{scale}" / f"{name}_RCAN_x{scale}.png").convert("RGB"))

        assert y_psnr_db(output, truth, shave=int(scale)) == pytest.approx(float(expected), abs=1e-6), name
