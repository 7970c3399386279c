"""SSIM and set-level results: the published figures, an independent computation, and the mean."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from srdeploy.core.imaging.psnr import luma_255
from srdeploy.runtime.verify.quality import Quality, mean_quality, quality, ssim_y


def picture(seed: int, shape: tuple[int, ...] = (40, 36, 3)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def wang(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """SSIM by its definition, window by window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            x, y = first[top : top + 11, left : left + 11], second[top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
            cov = (window * x * y).sum() - mx * my
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_equals_its_definition() -> None:
    first, second = picture(0), picture(1)
    blended = (first * 0.8 + second * 0.2).astype(np.uint8)

    value = ssim_y(blended, first, shave=2)

    expected = wang(luma_255(blended)[2:-2, 2:-2], luma_255(first)[2:-2, 2:-2])
    assert value == pytest.approx(expected, abs=1e-10)
    assert value != pytest.approx(ssim_y(second, first, shave=2) or 0.0, abs=0.1)


def test_equal_images_are_perfect() -> None:
    image = picture(2)

    assert quality(image, image, shave=2) == Quality(math.inf, 1.0, math.inf)


def test_luma_has_no_rgb_figure() -> None:
    image = picture(3, (20, 20))

    assert quality(image, picture(4, (20, 20, 3)), shave=2).psnr_rgb_db is None


def test_an_image_below_the_window_has_no_ssim() -> None:
    small = picture(5, (12, 30, 3))

    assert quality(small, picture(6, (12, 30, 3)), shave=1).ssim_y is None
    assert quality(picture(7, (13, 30, 3)), picture(8, (13, 30, 3)), shave=1).ssim_y is not None


def test_the_mean_is_of_values_and_skips_what_is_missing() -> None:
    mean = mean_quality([Quality(30.0, 0.9, 28.0), Quality(40.0, None, 36.0), Quality(32.0, 0.8, None)])

    assert mean is not None
    assert (mean.psnr_y_db, mean.ssim_y, mean.psnr_rgb_db) == pytest.approx((34.0, 0.85, 32.0))
    assert mean_quality([]) is None


def test_the_published_figures_of_rcan_are_reproduced(reference_data: Path) -> None:
    folder = reference_data / "data" / "Set5"
    text = (folder / "rcan_psnr_ssim.txt").read_text(encoding="utf-8")
    means = {}
    for scale in (2, 4):
        results = []
        for name, psnr, ssim in re.findall(rf"(\w+)_RCAN_x{scale}\.png: PSNR= (\S+) SSIM= (\S+)", text):
            truth = np.array(Image.open(folder / "HR" / f"{name}.bmp").convert("RGB"))
            output = np.array(Image.open(folder / f"RCAN_x{scale}" / f"{name}_RCAN_x{scale}.png").convert("RGB"))
            result = quality(output, truth, shave=scale)
            assert result.psnr_y_db == pytest.approx(float(psnr), abs=1e-6)
            assert result.ssim_y == pytest.approx(float(ssim), abs=1e-6)
            results.append(result)
        assert len(results) == 5
        means[scale] = mean_quality(results)
    for scale, psnr, ssim in re.findall(r"\nx(\d): PSNR= (\S+) SSIM= (\S+)", text):
        mean = means[int(scale)]
        assert mean is not None
        assert mean.psnr_y_db == pytest.approx(float(psnr), abs=1e-6)
        assert mean.ssim_y == pytest.approx(float(ssim), abs=1e-6)
        assert mean.psnr_rgb_db is not None
        assert mean.psnr_y_db - mean.psnr_rgb_db > 1.5
