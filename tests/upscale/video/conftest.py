"""A network that repeats pixels, and the maker of clips."""

from collections.abc import Callable
from pathlib import Path

import pytest
from clips import Clips

from srdeploy.upscale.upscaler import Upscaler


@pytest.fixture
def up(nearest_onnx: Callable[..., Path]) -> Upscaler:
    return Upscaler.open(nearest_onnx(), threads=1)


@pytest.fixture
def clips() -> Clips:
    return Clips()
