"""Colors under transparent pixels: spread, kept, or scaled as a picture of their own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.upscale.alpha import REACH, SpreadSource, spread_colors
from srdeploy.upscale.planes import ArraySource
from srdeploy.upscale.upscaler import Upscaler

RANDOM = np.random.default_rng(0)


def cut_out(height: int = 40, width: int = 90, dtype: type = np.uint8) -> np.ndarray:
    """A visible gray square at the left, transparent green at its right."""
    pixels = np.zeros((height, width, 4), dtype)
    pixels[..., 1] = 200
    pixels[10:20, 5:15] = (90, 90, 90, 255)
    return pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_visible_color_is_spread_within_reach_and_hidden_color_beyond_it_survives(dtype: type) -> None:
    filled = spread_colors(cut_out(dtype=dtype))

    np.testing.assert_array_equal(filled[15, 5 : 15 + REACH], [[90, 90, 90, 255]] * 10 + [[90, 90, 90, 0]] * REACH)
    np.testing.assert_array_equal(filled[15, 15 + REACH :, :3], [[0, 200, 0]] * (90 - 15 - REACH))


def test_nearest_visible_colors_win_and_partly_transparent_ones_count_less() -> None:
    pixels = np.zeros((1, 5, 4), np.float32)
    pixels[0, 0] = (1, 0, 0, 1)
    pixels[0, 2] = (0, 0, 1, 0.25)

    filled = spread_colors(pixels)

    np.testing.assert_allclose(filled[0, 1, :3], [0.8, 0, 0.2], atol=1e-6)
    np.testing.assert_allclose(filled[0, 3, :3], [0, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(filled[0, [0, 2]], pixels[0, [0, 2]])


def test_rows_are_the_same_whatever_range_they_are_asked_in() -> None:
    pixels = RANDOM.integers(0, 256, (200, 20, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(RANDOM.random((200, 20)) < 0.01, 255, 0)
    source = SpreadSource(ArraySource(pixels))
    whole = spread_colors(pixels)

    for begin, end in [(0, 200), (0, 1), (63, 65), (90, 170), (199, 200)]:
        np.testing.assert_array_equal(source.rows(begin, end), whole[begin:end])


@pytest.mark.parametrize("alpha", [0, 255])
def test_nothing_changes_where_all_or_nothing_is_transparent(alpha: int) -> None:
    pixels = RANDOM.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    pixels[..., 3] = alpha

    np.testing.assert_array_equal(spread_colors(pixels), pixels)


def test_separate_alpha_keeps_every_hidden_color(nearest_onnx: Callable[..., Path]) -> None:
    texture = RANDOM.integers(0, 256, (12, 10, 4), dtype=np.uint8)
    texture[..., 3] = np.where(RANDOM.random((12, 10)) < 0.5, 0, 200)

    with Upscaler.open(nearest_onnx(), threads=1, alpha="separate") as up:
        np.testing.assert_array_equal(up(texture), texture.repeat(2, axis=0).repeat(2, axis=1))
    with Upscaler.open(nearest_onnx(), threads=1) as up:
        spread = up(texture)
    visible = (texture[..., 3] > 0).repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(spread[visible], texture.repeat(2, axis=0).repeat(2, axis=1)[visible])
    assert not np.array_equal(spread, texture.repeat(2, axis=0).repeat(2, axis=1))


def test_modes_of_alpha_are_told_apart_when_work_is_resumed(nearest_onnx: Callable[..., Path]) -> None:
    with Upscaler.open(nearest_onnx(), threads=1) as one, Upscaler.open(nearest_onnx(), alpha="separate") as other:
        assert one.identity != other.identity
