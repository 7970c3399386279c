"""imresize against exact arithmetic, an independent library where they must agree, and the Set5 files."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from srdeploy.core.imaging.resize import axis_weights, imresize


def exact_row(values: list[int], scale: Fraction) -> list[Fraction]:
    """The definition in rational arithmetic, sample by sample: slow, and free of rounding."""

    def cubic(x: Fraction) -> Fraction:
        x = abs(x)
        if x <= 1:
            return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
        return -Fraction(1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2 if x <= 2 else Fraction(0)

    shrink = min(scale, Fraction(1))
    result = []
    for index in range(math.ceil(scale * len(values))):
        centre = (index + Fraction(1, 2)) / scale - Fraction(1, 2)  # counted from 0
        reach = math.ceil(2 / shrink) + 1
        taps = range(math.floor(centre) - reach, math.floor(centre) + reach + 2)
        weights = [cubic(shrink * (centre - tap)) for tap in taps]
        samples = [values[min(max(tap, 0), len(values) - 1)] for tap in taps]
        total = sum((w * s for w, s in zip(weights, samples, strict=True)), Fraction(0))
        result.append(total / sum(weights, Fraction(0)))
    return result


@pytest.mark.parametrize(
    "scale",
    [Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(2), Fraction(3), Fraction(4), Fraction(5, 7)],
    ids=str,
)
def test_a_row_equals_rational_arithmetic(scale: Fraction) -> None:
    values = [0, 255, 255, 3, 128, 64, 250, 17, 99, 200, 1]

    row = imresize(np.array([values] * 8, dtype=np.float64), scale=float(scale))[0]

    np.testing.assert_allclose(row, [float(value) for value in exact_row(values, scale)], atol=1e-9)


def test_whole_numbers_are_rounded_and_clamped_between_the_passes() -> None:
    image = np.random.default_rng(0).integers(0, 2, (12, 10), dtype=np.uint8) * np.uint8(255)

    result = imresize(image, scale=0.5)

    rows = np.clip(np.floor(imresize(image.astype(np.float64), size=(6, 10)) + 0.5), 0, 255)
    both = np.clip(np.floor(imresize(rows, size=(6, 5)) + 0.5), 0, 255)
    np.testing.assert_array_equal(result, both)
    at_the_end = np.clip(np.floor(imresize(image.astype(np.float64), scale=0.5) + 0.5), 0, 255)
    assert np.any(result != at_the_end), "the case does not tell the two orders of rounding apart"


def test_floats_are_not_clamped() -> None:
    step = np.repeat(np.array([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]], dtype=np.float32), 6, axis=0)

    result = imresize(step, scale=3)

    assert result.dtype == np.float32
    assert result.min() < -0.01
    assert result.max() > 1.01


def test_shrinking_agrees_with_torch_away_from_the_border() -> None:
    image = np.random.default_rng(1).random((40, 48), dtype=np.float32)

    ours = imresize(image, scale=0.25)
    tensor = torch.from_numpy(image)[None, None]
    theirs = torch.nn.functional.interpolate(tensor, size=(10, 12), mode="bicubic", antialias=True)[0, 0].numpy()

    np.testing.assert_allclose(ours[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-5)
    assert np.abs(ours - theirs).max() > 1e-3, "the border is treated differently, and ours is the benchmark's"


@pytest.mark.parametrize(
    ("shape", "scale", "expected"),
    [
        ((1, 1), 4.0, (4, 4)),
        ((7, 5), 0.5, (4, 3)),
        ((7, 5, 3), 3.0, (21, 15, 3)),
        ((9, 4), 1.0, (9, 4)),
        ((3, 3), 0.1, (1, 1)),
        ((10, 10, 1), 1.37, (14, 14, 1)),
    ],
    ids=str,
)
def test_any_scale_and_size(shape: tuple[int, ...], scale: float, expected: tuple[int, ...]) -> None:
    image = np.full(shape, 200, dtype=np.uint8)

    result = imresize(image, scale=scale)

    assert result.shape == expected
    assert np.all(result == 200), "a constant image stays constant"


def test_scale_one_changes_nothing() -> None:
    image = np.random.default_rng(2).integers(0, 65536, (5, 6, 3), dtype=np.uint16)

    np.testing.assert_array_equal(imresize(image, scale=1.0), image)


def test_channels_are_independent() -> None:
    image = np.random.default_rng(3).integers(0, 256, (9, 8, 3), dtype=np.uint8)

    whole = imresize(image, scale=2.5)

    for channel in range(3):
        np.testing.assert_array_equal(whole[..., channel], imresize(image[..., channel], scale=2.5))


def test_weights_are_normalised_and_indices_inside() -> None:
    indices, weights = axis_weights(17, 6, 6 / 17)

    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert indices.min() == 0
    assert indices.max() == 16


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((4, 4), np.uint8), {}, "exactly one"),
        (np.zeros((4, 4), np.uint8), {"scale": 2.0, "size": (8, 8)}, "exactly one"),
        (np.zeros((4, 4), np.uint8), {"scale": 0.0}, "positive"),
        (np.zeros((4, 4), np.uint8), {"scale": math.nan}, "positive"),
        (np.zeros((4, 4), np.uint8), {"size": (0, 3)}, "1x1"),
        (np.zeros((4,), np.uint8), {"scale": 2.0}, "shape"),
        (np.zeros((0, 4), np.uint8), {"scale": 2.0}, "shape"),
        (np.zeros((4, 4), np.int32), {"scale": 2.0}, "type"),
    ],
    ids=["nothing", "both", "zero", "nan", "empty-size", "one-axis", "no-pixels", "int32"],
)
def test_wrong_calls_are_refused(image: NDArray[np.uint8], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imresize(image, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [2, 4])
def test_the_benchmark_files_are_reproduced_bit_for_bit(reference_data: Path, scale: int) -> None:
    folder = reference_data / "data" / "Set5"
    names = sorted(path.stem for path in (folder / "HR").glob("*.bmp"))
    assert len(names) == 5
    for name in names:
        truth = np.array(Image.open(folder / "HR" / f"{name}.bmp").convert("RGB"))
        expected = np.array(Image.open(folder / f"LR_x{scale}" / f"{name}_LRBI_x{scale}.png").convert("RGB"))

        np.testing.assert_array_equal(imresize(truth, scale=1 / scale), expected, err_msg=name)
