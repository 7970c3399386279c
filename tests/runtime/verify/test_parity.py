"""What verification must catch, each beside the engine that must pass: a compact RCAN compared with broken copies."""

import copy
import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.errors import UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import Runner, RunnerInfo
from srdeploy.core.samples import Sample
from srdeploy.core.shapes import ShapeProfile
from srdeploy.models.networks.rcan import Rcan, RcanConfig
from srdeploy.runtime.verify.crops import WORST_SIDE
from srdeploy.runtime.verify.parity import GRID, Gates, VerifyResult, grid_batches, verify_all

SCALE = 2
CONFIG = RcanConfig(
    scale=SCALE, groups=2, blocks=2, features=8, attention_width=2, value_range=1.0, upsampler=(2,), mean_shift="none"
)
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class TorchRunner:
    """A network as a runner, with an optional change of its output: a stand-in for an engine that computes wrongly."""

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        precision: Precision = Precision.FP32,
        change: Change | None = None,
        profile: ShapeProfile | None = None,
    ) -> None:
        self.network = network
        self.change = change
        contract = ModelContract("rcan", {}, SCALE, "rgb", precision, None, 1.0, 1, "0" * 64)
        self._info = RunnerInfo(
            "candidate", "eager", "cpu", contract, "FP32", threads=1, profiles=() if profile is None else (profile,)
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            output = self.network(torch.from_numpy(feeds[INPUT])).numpy()
        return {OUTPUT: output if self.change is None else self.change(output.copy())}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A compact RCAN whose output is a picture: bicubic-like gain, with overshoots beyond 0..1."""
    torch.manual_seed(0)
    rcan = Rcan(CONFIG).eval()
    return _WithSkip(rcan)


class _WithSkip(torch.nn.Module):
    def __init__(self, rcan: Rcan) -> None:
        super().__init__()
        self.rcan = rcan

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        enlarged = torch.nn.functional.interpolate(image, scale_factor=SCALE, mode="bicubic")
        result: torch.Tensor = enlarged + 0.2 * self.rcan(image)
        return result


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Two pictures with colour, edges and both extremes, with ground truth."""
    generator = np.random.default_rng(0)
    result = []
    for name, (height, width) in {"wide": (24, 40), "odd": (31, 23)}.items():
        picture = generator.random((1, 3, height, width), dtype=np.float32) * 0.2 + 0.2
        picture[:, 0, :, width // 2 :] = 1.0
        picture[:, 2, : height // 2] = 0.0
        truth = np.repeat(np.repeat(picture[0].transpose(1, 2, 0), SCALE, 0), SCALE, 1)
        result.append(Sample(name, picture, np.rint(truth * 255).astype(np.uint8)))
    return result


def verify(
    candidate: Runner, reference: Runner, samples: list[Sample], *, gates: Gates | None = None, **options: Any
) -> VerifyResult:
    """Evaluate one engine."""
    return verify_all([candidate], reference, samples, gates=[gates], **options)[0]


def evaluated(
    network: torch.nn.Module, samples: list[Sample], change: Change | None = None, **options: Any
) -> VerifyResult:
    return verify(TorchRunner(network, change=change), TorchRunner(network), samples, **options)


def test_identical_engines_are_infinitely_faithful(network: torch.nn.Module, samples: list[Sample]) -> None:
    result = evaluated(network, samples)

    assert result.passed
    assert result.min_fidelity_db == math.inf
    assert result.psnr_drop_db == 0.0
    assert result.ssim_drop == 0.0
    assert {case.difference.max_abs for case in (*result.images, *result.grid)} == {0.0}
    assert len(result.grid) == len(GRID)
    assert result.to_json()["passed"] is True


def test_rounding_noise_passes(network: torch.nn.Module, samples: list[Sample]) -> None:
    noise = np.random.default_rng(1)

    result = evaluated(network, samples, lambda output: output + noise.normal(0, 1e-6, output.shape).astype(np.float32))

    assert result.passed
    assert 110 < result.min_fidelity_db < 130


def test_one_perturbed_weight_fails(network: torch.nn.Module, samples: list[Sample]) -> None:
    perturbed = copy.deepcopy(network)
    with torch.no_grad():
        next(perturbed.parameters()).view(-1)[7] += 0.01

    result = verify(TorchRunner(perturbed), TorchRunner(network), samples)

    assert not result.passed
    assert "fidelity" in result.failures[0]


def _nan_in_a_tile(output: NDArray[np.float32]) -> NDArray[np.float32]:
    if output.shape[2] > 20:
        output[:, :, 8:16, 4:12] = np.nan
    return output


def _clamped(output: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(output, 0, 1)


def _wrapped(output: NDArray[np.float32]) -> NDArray[np.float32]:
    """8 bits without a clamp: whatever leaves 0..255 comes in again from the other side."""
    wrapped: NDArray[np.float32] = (np.rint(output * 255).astype(np.int32) & 255).astype(np.float32) / np.float32(255)
    return wrapped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output: output[:, ::-1].copy(), "fidelity"),
        (lambda output: output[:, [1, 0, 2]], "fidelity"),
        (lambda output: np.roll(output, 1, axis=3), "fidelity"),
        (lambda output: np.roll(output, 1, axis=2), "fidelity"),
        (_clamped, "fidelity"),
        (_wrapped, "fidelity"),
        (lambda output: output[::-1].copy(), "shape 2x"),
        (_nan_in_a_tile, "rows 8..15 and columns 4..11"),
        (lambda output: np.full_like(output, np.inf), "infinite"),
        (np.zeros_like, "constant output (0 everywhere)"),
        (lambda output: output[:, :, :-1], "instead of"),
        (lambda output: np.where(output.shape[0] > 1, output * 1.1, output).astype(np.float32), "shape"),
    ],
    ids=[
        "rgb-bgr",
        "shuffled-channel",
        "shift-right",
        "shift-down",
        "added-clamp",
        "dropped-clamp",
        "shuffled-batch",
        "nan-in-a-tile",
        "infinite",
        "black",
        "row-missing",
        "wrong-in-batches-only",
    ],
)
def test_wrong_engines_are_caught(network: torch.nn.Module, samples: list[Sample], change: Change, reason: str) -> None:
    result = evaluated(network, samples, change)

    assert not result.passed
    assert any(reason in failure for failure in result.failures), result.failures


def test_swapped_colours_are_caught_even_by_the_quantized_gate(network: torch.nn.Module, samples: list[Sample]) -> None:
    engine = TorchRunner(network, precision=Precision.INT8, change=lambda output: output[:, ::-1].copy())

    assert not verify(engine, TorchRunner(network), samples).passed


@pytest.mark.parametrize(("allowed", "passes"), [(5.0, True), (0.001, False)], ids=["generous", "strict"])
def test_the_drop_against_ground_truth_decides(
    network: torch.nn.Module, samples: list[Sample], allowed: float, passes: bool
) -> None:
    gates = Gates(20.0, 10.0, max_psnr_drop_db=allowed)
    noise = np.random.default_rng(2)

    result = evaluated(
        network, samples, lambda output: output + noise.normal(0, 0.02, output.shape).astype(np.float32), gates=gates
    )

    assert result.passed is passes
    assert result.psnr_drop_db is not None
    assert result.psnr_drop_db > 0.001


def test_a_set_is_the_mean_of_its_images(network: torch.nn.Module, samples: list[Sample]) -> None:
    result = evaluated(network, samples)

    values = [case.reference_quality.psnr_y_db for case in result.images if case.reference_quality]
    assert len(values) == 2
    assert result.reference_quality is not None
    assert result.reference_quality.psnr_y_db == pytest.approx(sum(values) / 2)


def test_the_worst_crop_holds_the_defect(network: torch.nn.Module) -> None:
    picture = np.random.default_rng(3).random((1, 3, 120, 150), dtype=np.float32)

    def spoiled(output: NDArray[np.float32]) -> NDArray[np.float32]:
        output[:, :, 200:203, 40:43] += 0.5
        return output

    result = evaluated(network, [Sample("large", picture)], spoiled, grid=(), keep_crops=1)

    assert result.worst is not None
    assert result.worst.error.shape == (WORST_SIDE, WORST_SIDE)
    assert result.worst.top <= 200 < result.worst.top + WORST_SIDE
    assert result.worst.left <= 40 < result.worst.left + WORST_SIDE
    assert len(result.crops) == 1
    assert result.crops[0].truth is None


def test_nan_is_magenta_in_the_pictures(network: torch.nn.Module, samples: list[Sample]) -> None:
    result = evaluated(network, samples[:1], _nan_in_a_tile)

    assert result.worst is not None
    assert np.any(np.all(result.worst.candidate == (255, 0, 255), axis=2))
    assert math.isnan(result.min_fidelity_db)
    assert result.psnr_drop_db is not None
    assert math.isnan(result.psnr_drop_db)


def test_images_are_cropped_to_each_engines_profile(network: torch.nn.Module) -> None:
    image = np.random.default_rng(0).random((1, 3, 30, 44), dtype=np.float32)
    truth = np.zeros((60, 88, 3), np.uint8)
    narrow = ShapeProfile((1, 3, 8, 8), (1, 3, 16, 16), (1, 3, 24, 32))
    shapes: list[tuple[int, ...]] = []
    reference = TorchRunner(network, change=lambda output: shapes.append(output.shape) or output)  # type: ignore[func-returns-value]
    engines = [TorchRunner(network), TorchRunner(network, profile=narrow), TorchRunner(network, profile=narrow)]

    whole, first, second = verify_all(engines, reference, [Sample("a", image, truth)], grid=(), keep_crops=1)

    assert [result.images[0].shape for result in (whole, first, second)] == [
        (1, 3, 30, 44), (1, 3, 24, 32), (1, 3, 24, 32)
    ]  # fmt: skip
    assert all(result.passed and result.images[0].candidate_quality is not None for result in (whole, first, second))
    assert shapes[:2] == [(1, 3, 60, 88), (1, 3, 48, 64)], "the reference computes each crop once"
    assert first.crops[0].truth is not None
    assert first.crops[0].truth.shape == (48, 64, 3)


def test_images_and_shapes_that_cannot_fit_the_profile_are_skipped_and_named(
    network: torch.nn.Module, samples: list[Sample]
) -> None:
    profile = ShapeProfile((1, 3, 16, 16), (1, 3, 24, 40), (2, 3, 24, 64))
    small = Sample("small", samples[0].image[:, :, :8, :8])

    result = verify(TorchRunner(network, profile=profile), TorchRunner(network), [*samples, small])

    assert "small" not in [case.name for case in result.images]
    assert "outside the engine's profile" in result.skipped["small"]
    assert all(profile.contains(case.shape) for case in result.images)
    assert "1x3x16x16" in [case.name for case in result.grid]
    assert "2x3x17x17" in [case.name for case in result.grid]
    assert "1x3x1x1" in result.skipped


def test_no_image_that_fits_the_profile_is_an_error(network: torch.nn.Module, samples: list[Sample]) -> None:
    profile = ShapeProfile((1, 3, 200, 200), (1, 3, 200, 200), (1, 3, 200, 200))

    with pytest.raises(UsageError, match="outside the engine's profile"):
        verify(TorchRunner(network, profile=profile), TorchRunner(network), samples)


def test_several_engines_share_one_run_of_the_reference(network: torch.nn.Module, samples: list[Sample]) -> None:
    calls = []
    reference = TorchRunner(network, change=lambda output: calls.append(output.shape) or output)  # type: ignore[func-returns-value]
    engines = [TorchRunner(network), TorchRunner(network, change=np.zeros_like)]

    good, bad = verify_all(engines, reference, samples)

    assert good.passed
    assert not bad.passed
    assert len(calls) == len(samples) + len(GRID)


def test_grid_batches_are_real_and_different() -> None:
    picture = np.random.default_rng(4).random((1, 3, 9, 9), dtype=np.float32)

    batches = list(grid_batches([picture], [(2, 3, 4), (1, 12, 5)]))

    assert [batch.shape for batch in batches] == [(2, 3, 3, 4), (1, 3, 12, 5)]
    assert not np.array_equal(batches[0][0], batches[0][1])


@pytest.mark.parametrize(
    ("precision", "images", "grid"),
    [(Precision.FP32, 90, 90), (Precision.FP16, 60, 60), (Precision.BF16, 45, 45), (Precision.INT8, 40, 30)],
    ids=str,
)
def test_default_gates(precision: Precision, images: float, grid: float) -> None:
    assert Gates.of(precision) == Gates(images, grid)
    assert Gates.of(precision, min_fidelity_db=50.0).min_fidelity_db == 50.0
