"""Shards: disjoint, complete, the same everywhere."""

import pytest

from srdeploy.core.errors import UsageError
from srdeploy.upscale.scale.shards import Shard, parse_shard, shard_index

NAMES = [f"sub {index % 7}/é{index}.png" for index in range(1000)]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_each_picture_belongs_to_one_shard(count: int) -> None:
    shards = [Shard(index, count) for index in range(count)]

    assert all(sum(shard.holds(name) for shard in shards) == 1 for name in NAMES)


def test_shards_are_about_equal() -> None:
    sizes = [sum(Shard(index, 4).holds(name) for name in NAMES) for index in range(4)]

    assert min(sizes) > 200  # a fair draw has a standard deviation of 14 around 250


def test_rule_is_the_documented_one() -> None:
    assert shard_index("a/b.png", 10) == 5  # printf a/b.png | sha256sum begins with 88f7ec79


def test_names_that_are_no_utf8_have_a_shard() -> None:
    assert shard_index("a\udcff.png", 3) in range(3)


def test_parse() -> None:
    assert parse_shard("3/8") == Shard(3, 8)
    assert str(parse_shard("0/1")) == "0/1"


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "2/2", "-1/2", "0/0", "1.5/2", "a/b", "1/2/3", "0/99999999999"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected I/N"):
        parse_shard(text)
