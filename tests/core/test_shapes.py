"""Shapes are read as people write them, and profiles refuse what no engine could hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import Shape, ShapeProfile, elements, format_shape, parse_shape

SIZES = st.integers(1, 10**6)
SHAPES = st.tuples(SIZES, SIZES, SIZES, SIZES)


@given(SHAPES)
def test_every_shape_reads_back(shape: Shape) -> None:
    assert parse_shape(format_shape(shape)) == shape


def test_a_capital_x_is_a_times_sign_too() -> None:
    assert parse_shape("1X3x180X320") == (1, 3, 180, 320)


@pytest.mark.parametrize(
    "text",
    ["", "180x320", "1x3x180x320x1", "1x3x0x320", "1x3x-1x320", "1x3xAx320", "1x3x1.5x320", "1x3x²x3", "1,3,1,1"],
)
def test_other_texts_are_a_usage_error_that_shows_a_shape(text: str) -> None:
    with pytest.raises(UsageError, match="1x3x180x320") as caught:
        parse_shape(text)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (((1, 3, 64, 64), (1, 3, 32, 64), (1, 3, 64, 64)), "axis H"),
        (((1, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)), "axis N"),
        (((1, 1, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)), "number of channels"),
    ],
    ids=["opt below min", "opt above max", "channels"],
)
def test_impossible_profiles_are_refused(profile: tuple[Shape, Shape, Shape], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ShapeProfile(*profile)


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        ((1, 3, 16, 16), True),
        ((4, 3, 256, 256), True),
        ((2, 3, 17, 255), True),
        ((5, 3, 16, 16), False),
        ((1, 1, 16, 16), False),
        ((1, 3, 15, 16), False),
        ((1, 3, 16, 257), False),
        ((3, 16, 16), False),
    ],
)
def test_a_profile_contains_its_ends_and_nothing_beyond(shape: tuple[int, ...], inside: bool) -> None:
    profile = ShapeProfile((1, 3, 16, 16), (1, 3, 128, 128), (4, 3, 256, 256))

    assert profile.contains(shape) is inside
    assert str(profile) == "1x3x16x16..1x3x128x128..4x3x256x256"


def test_elements_counts_them() -> None:
    assert elements((2, 3, 5, 7)) == 210
