"""Folders of samples: images meet their ground truth, or are made from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.samples import Sample, SampleFolder, windows_of

SCALE = 2


def contract(colours: Any = "rgb") -> ModelContract:
    return ModelContract("rcan", {}, SCALE, colours, Precision.FP32, None, 1.0, 1, "0" * 64)


def save(path: Path, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_images_meet_their_ground_truth_by_name(tmp_path: Path) -> None:
    for name in ("a_LRBI_x2", "ab", "c"):
        save(tmp_path / "lr" / f"{name}.png", 8, 6)
    truths = {name: save(tmp_path / "hr" / f"{name}.bmp", 17, 13, seed) for seed, name in enumerate(("a", "ab", "c"))}

    folder = SampleFolder(tmp_path / "lr", tmp_path / "hr", contract=contract())

    assert [sample.name for sample in folder] == ["a_LRBI_x2", "ab", "c"]
    for sample, truth in zip(folder, truths.values(), strict=True):
        assert sample.image.shape == (1, 3, 8, 6)
        np.testing.assert_array_equal(sample.truth, truth[:16, :12])


def test_ground_truth_alone_is_shrunk_as_the_benchmarks_do(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "a.png", 17, 13)

    (sample,) = SampleFolder(None, tmp_path / "hr", contract=contract("y"))

    assert sample.image.shape == (1, 1, 8, 6)
    assert sample.image.min() >= 16 / 255 - 1e-6


def test_limits_spread_and_crop(tmp_path: Path) -> None:
    for index in range(6):
        save(tmp_path / "lr" / f"{index}.png", 20, 30)

    folder = SampleFolder(tmp_path / "lr", None, contract=contract(), limit=3, max_side=24)

    assert [sample.name for sample in folder] == ["0", "2", "4"]
    assert folder[0].image.shape == (1, 3, 20, 24)


def test_an_image_without_ground_truth_is_named(tmp_path: Path) -> None:
    save(tmp_path / "lr" / "lonely.png", 8, 8)
    save(tmp_path / "hr" / "other.png", 16, 16)

    with pytest.raises(InputError, match="lonely.png has no ground truth"):
        SampleFolder(tmp_path / "lr", tmp_path / "hr", contract=contract())


def test_ambiguous_ground_truth_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "lr" / "a.png", 8, 8)
    save(tmp_path / "hr" / "a.png", 16, 16)
    save(tmp_path / "hr" / "a.bmp", 16, 16)

    with pytest.raises(InputError, match="several ground truths"):
        SampleFolder(tmp_path / "lr", tmp_path / "hr", contract=contract())


def test_too_small_ground_truth_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "lr" / "a.png", 8, 8)
    save(tmp_path / "hr" / "a.png", 15, 16)
    folder = SampleFolder(tmp_path / "lr", tmp_path / "hr", contract=contract())

    with pytest.raises(InputError, match="at least 2 times"):
        folder[0]


def test_nothing_given_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--images"):
        SampleFolder(None, None, contract=contract())


def test_windows_are_spread_over_a_set_and_cut() -> None:
    samples = [Sample(str(index), np.zeros((1, 3, 100, 40), np.float32)) for index in range(9)]

    windows = windows_of(samples, 3)

    assert [window.name for window in windows] == ["0", "3", "6"]
    assert {window.image.shape for window in windows} == {(1, 3, 64, 40)}
