"""The eager reference runner: exact, on the 0..1 scale, without effects on the network or on PyTorch's settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import TimedRunner, run_image
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import network_of, spec_of
from srdeploy.runtime.engines.eager import _CUDNN_BENCHMARK, IEEE_FP32, EagerForm, open_eager

BF16 = EagerForm("eager bf16", torch.bfloat16)
NHWC = EagerForm("eager fp32 channels-last", channels_last=True)


@pytest.fixture
def checkpoint() -> LoadedCheckpoint:
    """A small RCAN x2 with random weights that computes on 0..255 inside."""
    torch.manual_seed(0)
    config = RcanConfig(scale=2, groups=1, blocks=1, features=8, attention_width=2, upsampler=(2,), mean_shift="none")
    return LoadedCheckpoint(
        path=Path("random.pt"),
        sha256="0" * 64,
        dialect="test",
        config=config,
        spec=spec_of(config),
        network=network_of(config).eval(),
        evidence=Evidence("test", "test", "test", "test", (), {}, ()),
    )


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((2, 3, 9, 7), dtype=np.float32)


def test_the_outside_is_0_to_1(checkpoint: LoadedCheckpoint) -> None:
    picture = image()
    with torch.inference_mode():
        native = checkpoint.network(torch.from_numpy(picture) * 255) / 255

    with open_eager(checkpoint, threads=1) as runner:
        output = run_image(runner, picture)
        info = runner.info

    # 1e-6: the same FP32 operations; the factors may be applied in another order
    np.testing.assert_allclose(output, native.numpy(), rtol=1e-5, atol=1e-6)
    assert output.shape == (2, 3, 18, 14)
    assert (info.engine, info.device, info.numeric_mode) == ("eager", "cpu", "FP32, TF32 off")


def test_half_precision_leaves_the_checkpoint_alone(checkpoint: LoadedCheckpoint) -> None:
    with open_eager(checkpoint, threads=1) as exact, open_eager(checkpoint, BF16, threads=1) as rough:
        first = run_image(exact, image())
        half = run_image(rough, image())

    assert next(checkpoint.network.parameters()).dtype == torch.float32
    assert rough.info.contract.precision == Precision.BF16
    assert half.dtype == np.float32
    assert 0 < np.abs(first - half).max() < 0.1 * np.abs(first).max()


def test_settings_of_pytorch_are_restored(checkpoint: LoadedCheckpoint) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    before = torch.backends.mkldnn.conv.fp32_precision

    with open_eager(checkpoint, threads=1) as runner:
        run_image(runner, image())

    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.mkldnn.conv.fp32_precision == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "place", "name", "value"),
    [
        (IEEE_FP32, torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        (_CUDNN_BENCHMARK, torch.backends.cudnn, "benchmark", True),
    ],
    ids=["fp32", "benchmark"],
)
def test_overlapping_blocks_of_threads_restore_what_was_set_before_the_first(
    change: Any, place: Any, name: str, value: object
) -> None:
    before = getattr(place, name)

    change.__enter__()
    change.__enter__()
    change.__exit__()
    inside = getattr(place, name)
    change.__exit__()

    assert inside == value, "the block that is still open computes with it"
    assert getattr(place, name) == before != value


def test_channels_last_changes_the_layout_only(checkpoint: LoadedCheckpoint) -> None:
    with open_eager(checkpoint, threads=1) as plain, open_eager(checkpoint, NHWC, threads=1) as other:
        # 1e-3 of 255-scale features: another summation order
        np.testing.assert_allclose(run_image(plain, image()), run_image(other, image()), atol=1e-5)

    assert "channels last" in other.info.numeric_mode


def test_compute_is_timed_apart(checkpoint: LoadedCheckpoint) -> None:
    with open_eager(checkpoint, threads=1) as runner:
        assert isinstance(runner, TimedRunner)
        assert 0 < runner.prepare({INPUT: image()})() < 10_000


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 9, 7), "float32"), ((1, 1, 9, 7), "float32"), ((1, 3, 9, 7), "uint8")], ids=str
)
def test_wrong_inputs_are_refused(checkpoint: LoadedCheckpoint, shape: tuple[int, ...], dtype: str) -> None:
    with open_eager(checkpoint, threads=1) as runner, pytest.raises(UsageError, match=INPUT):
        runner.run({INPUT: np.zeros(shape, dtype)})


def test_missing_gpu_and_unknown_type_are_refused(checkpoint: LoadedCheckpoint) -> None:
    with pytest.raises(UsageError, match="eager dtype"):
        open_eager(checkpoint, EagerForm("eager fp64", torch.float64))
    if not torch.cuda.is_available():
        with pytest.raises(CapabilityError, match="sees no NVIDIA GPU"):
            open_eager(checkpoint, device="cuda")
