"""Sizes in bytes: parsed with one meaning everywhere, written one way everywhere."""

import pytest

from srdeploy.core.errors import UsageError
from srdeploy.core.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8G", 8 << 30),
        ("8GB", 8 << 30),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        (" 1.5k ", 1536),
        ("800M", 800 << 20),
        ("2T", 2 << 40),
        ("7b", 7),
        ("12345", 12345),
    ],
    ids=str,
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1G", "lots", "1.5X", "GiB", "5 PiB", "1e400", "nan", "inf", "3 apples", "0.1", "٣G"], ids=repr
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--memory .*; expected a size such as 8GiB"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1_234_567, "1.18 MiB"),
        (1023 << 20, "0.999 GiB"),
        (24 << 30, "24 GiB"),
        (5e15, "4.55e+03 TiB"),
    ],
    ids=str,
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text
