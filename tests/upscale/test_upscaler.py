"""Pictures of every kind and size through networks on RGB and on Y."""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srdeploy.core.errors import GateError, InputError, UsageError
from srdeploy.core.imaging.colour import y_from_rgb, ycbcr_from_rgb
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.manifest import Source
from srdeploy.core.precision import Precision
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.shapes import ShapeProfile
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.spec import NetworkConfig, network_of, spec_of
from srdeploy.models.networks.srdensenet import SrDenseNetConfig, srdensenet_all, srdensenet_h, srdensenet_hl
from srdeploy.runtime.bundle import BundleEngine, write_bundle_manifest
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.upscale.budget import TileSettings, decide
from srdeploy.upscale.image_report import ImageReport
from srdeploy.upscale.upscaler import Upscaler

Draw = Callable[..., NDArray[np.uint8]]
RunnerFactory = Callable[..., Runner]
SHAPES = [(1, 1, 3), (1, 90, 3), (70, 1, 1), (41, 53, 3), (40, 61, 4), (37, 40, 2)]


@pytest.mark.parametrize(
    "network",
    ["srdensenet all", "srdensenet h", "srdensenet hl", "srdensenet batchnorm", "srdensenet rgb", "srdensenet trimmed"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_tiles_by_the_receptive_radius_equal_the_whole_image(
    network: str, shape: tuple[int, int, int], make_runner: RunnerFactory, picture: Draw
) -> None:
    image = picture(*shape)
    with Upscaler(make_runner(network)) as whole, Upscaler(make_runner(network), TileSettings(side=31)) as tiled:
        expected, _ = whole.upscale(image, dtype=np.float32)
        actual, report = tiled.upscale(image, dtype=np.float32)

    assert report.decision.exact
    assert max(shape[:2]) <= 31 or report.decision.plan.tiles > 1
    # 1e-5: FP32 sums in another order where kernels differ between shapes
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("make_config", [srdensenet_all, srdensenet_hl, srdensenet_h], ids=["all", "hl", "h"])
def test_tiles_of_the_papers_sizes_equal_the_whole_image_and_thinner_overlaps_would_not(
    make_config: Callable[[], SrDenseNetConfig],
) -> None:
    checkpoint = _lively_checkpoint(make_config())
    image = np.random.default_rng(0).integers(0, 256, (10, 160, 1), dtype=np.uint8)

    def upscaled(settings: TileSettings) -> tuple[NDArray[Any], ImageReport]:
        with Upscaler(open_eager(checkpoint, threads=1), settings) as up:
            return up.upscale(image, dtype=np.float32)

    expected, _ = upscaled(TileSettings())
    exact, report = upscaled(TileSettings(side=148))
    thin, _ = upscaled(TileSettings(mode="overlapped", side=148, overlap=16))

    assert report.decision.exact
    assert (report.decision.plan.tiles, report.decision.plan.halo) == (2, 66)
    assert report.fidelity_db is None
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    assert np.abs(thin - expected).max() > 1e-5


def _lively_checkpoint(config: NetworkConfig) -> LoadedCheckpoint:
    """Return weights that keep activations at one level, so that even the farthest pixel of the radius counts."""
    torch.manual_seed(0)
    network = network_of(config).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            torch.nn.init.zeros_(module.bias)
    evidence = Evidence("test", "test network", "seeded weights", "none", (), {}, ())
    return LoadedCheckpoint(Path("seeded.pth"), "0" * 64, "test", config, spec_of(config), network, evidence)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_tiles_are_exact_on_cpu_engines(engine: str, small_onnx: Callable[..., Path], picture: Draw) -> None:
    path = small_onnx(upsampler="deconvolution")
    image = picture(50, 64)
    with (
        Upscaler(open_engine(path, engine=engine, threads=1, parity=True)) as whole,
        Upscaler(open_engine(path, engine=engine, threads=1, parity=True), TileSettings(side=24)) as tiled,
    ):
        expected, _ = whole.upscale(image, dtype=np.float32)
        actual, report = tiled.upscale(image, dtype=np.float32)

    assert report.decision.plan.tiles == 12
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_too_thin_an_overlap_is_not_called_exact(make_runner: RunnerFactory, picture: Draw) -> None:
    image = picture(60, 60)
    with (
        Upscaler(make_runner("srdensenet all")) as whole,
        Upscaler(make_runner("srdensenet all"), TileSettings(mode="overlapped", side=24, overlap=2)) as tiled,
    ):
        expected, _ = whole.upscale(image, dtype=np.float32)
        actual, report = tiled.upscale(image, dtype=np.float32)

    assert not report.decision.exact
    assert report.seam_score is not None
    assert 1e-5 < np.abs(actual - expected).max() < 0.2


@pytest.mark.parametrize("network", ["rcan", "rcan x3", "rcan unshuffled", "rcan on 255 with mean shift"])
def test_overlapped_tiles_of_channel_attention_are_close_and_said_to_differ(
    network: str, make_runner: RunnerFactory, picture: Draw
) -> None:
    image = picture(61, 75)
    with (
        Upscaler(make_runner(network)) as whole,
        Upscaler(make_runner(network), TileSettings(side=48, overlap=14)) as tiled,
    ):
        expected, _ = whole.upscale(image, dtype=np.float32)
        actual, report = tiled.upscale(image, dtype=np.float32)

    assert not report.decision.exact
    assert "overlapped" in report.decision.reason
    # 40 dB: pooled means differ from tile to tile, and nothing else does
    fidelity_db = -10 * np.log10(np.mean((actual - expected) ** 2))
    assert fidelity_db > 40
    if network != "rcan unshuffled":  # its last tiles reach beyond an image of odd size, and nothing is measured
        assert report.fidelity_db == pytest.approx(fidelity_db, abs=10)  # one window tells the order of magnitude


@pytest.mark.parametrize("shape", [(40, 41, 4), (1, 90, 1), (90, 23, 3)], ids=str)
@pytest.mark.parametrize("network", ["srdensenet trimmed", "srdensenet rgb"])
def test_fidelity_of_thin_overlaps_is_measured_for_every_kind_of_picture(
    network: str, shape: tuple[int, ...], make_runner: RunnerFactory, picture: Draw
) -> None:
    image = picture(*shape)
    image[..., -1] += np.arange(shape[1], dtype=np.uint8)  # alpha that differs
    settings = TileSettings(mode="overlapped", side=24, overlap=2)
    with Upscaler(make_runner(network)) as whole, Upscaler(make_runner(network), settings) as tiled:
        expected, _ = whole.upscale(image, dtype=np.float32)
        actual, report = tiled.upscale(image, dtype=np.float32)

    assert report.fidelity_db is not None
    if shape[2] != 4:  # planes of gray alpha are measured three times, the picture once
        assert report.fidelity_db == pytest.approx(-10 * np.log10(np.mean((actual - expected) ** 2)), abs=12)
    json.dumps(report.to_json(), allow_nan=False)


def test_rgb_network_sees_unit_floats_and_output_is_clamped_and_rounded_half_to_even(
    make_runner: RunnerFactory, picture: Draw
) -> None:
    image = picture(12, 14)
    with make_runner("rcan") as runner, Upscaler(make_runner("rcan")) as up:
        planes = run_image(runner, (image.astype(np.float32) / 255).transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)

        np.testing.assert_array_equal(up(image), np.rint(np.clip(planes, 0, 1) * np.float32(255)).astype(np.uint8))
        np.testing.assert_array_equal(up(image.astype(np.float32) / 255), planes)  # floats are not clamped


def test_y_network_on_colour_takes_chroma_bicubically(make_runner: RunnerFactory, picture: Draw) -> None:
    image = picture(20, 30)
    unit = image / 255.0
    with make_runner("srdensenet all") as runner, Upscaler(make_runner("srdensenet all"), TileSettings(side=18)) as up:
        luma = run_image(runner, y_from_rgb(unit).astype(np.float32)[None, None])[0, 0]
        result = up(image.astype(np.float32) / 255)

    actual = ycbcr_from_rgb(result.astype(np.float64))
    np.testing.assert_allclose(actual[..., 0], luma, atol=1e-5)
    np.testing.assert_allclose(actual[..., 1:], imresize(ycbcr_from_rgb(unit)[..., 1:], scale=4), atol=1e-5)


def test_gray_through_a_y_network_keeps_full_swing(nearest_onnx: Callable[..., Path]) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Upscaler.open(nearest_onnx(channels=1), threads=1) as up:
        np.testing.assert_array_equal(up(image), image.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_every_kind_of_pixel_comes_back_as_it_went_in(
    channels: int, dtype: type, nearest_onnx: Callable[..., Path]
) -> None:
    random = np.random.default_rng(0)
    shape = (6, 5, channels) if channels else (6, 5)
    image = random.random(shape).astype(np.float32) if dtype == np.float32 else (
        random.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)
    )  # fmt: skip
    if channels in (2, 4):
        image[..., -1] = image[0, 0, -1]  # the same alpha everywhere does not touch the colours
    with Upscaler.open(nearest_onnx(), threads=1) as up:
        result = up(image)

    assert result.dtype == dtype
    np.testing.assert_allclose(
        result, image.repeat(2, axis=0).repeat(2, axis=1), atol=1e-6 if dtype == np.float32 else 0
    )


def test_colour_under_transparent_pixels_makes_no_fringe(make_runner: RunnerFactory) -> None:
    """A dark disc on transparent white: without spreading its color, white bleeds into the disc's edge."""
    rows, columns = np.mgrid[0:40, 0:40]
    inside = (rows - 20) ** 2 + (columns - 20) ** 2 < 140
    image = np.where(inside[..., None], np.uint8([40, 20, 30, 255]), np.uint8([255, 255, 255, 0])).astype(np.uint8)
    hidden_black = np.where(inside[..., None], image, np.uint8([0, 0, 0, 0]))
    with Upscaler(_bilinear_runner(make_runner)) as up:
        result = up(image)
        same = up(hidden_black)

    visible = result[..., 3] > 0
    np.testing.assert_array_equal(result[visible], same[visible])
    assert result[visible][:, 0].max() <= 41  # never lighter than the disc, rounding aside


def _bilinear_runner(make_runner: RunnerFactory) -> Runner:
    """A runner that doubles by bilinear interpolation: a smooth, known answer in place of a network's."""

    class Bilinear:
        info = make_runner("rcan").info

        def run(self, feeds: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
            image = torch.from_numpy(feeds["input"])
            return {"output": torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear").numpy()}

        def __enter__(self) -> "Bilinear":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    return Bilinear()  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(3, 9, 8), (2, 3, 9, 8), (1, 9, 8), (4, 9, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_torch_tensors_keep_layout_and_type(
    shape: tuple[int, ...], dtype: torch.dtype, nearest_onnx: Callable[..., Path]
) -> None:
    torch.manual_seed(0)
    image = torch.rand(shape) if dtype == torch.float32 else torch.randint(0, 256, shape, dtype=torch.uint8)
    if shape[-3] == 4:
        image[3] = image[3, 0, 0]
    with Upscaler.open(nearest_onnx(), threads=1) as up:
        result = up(image)

    assert result.dtype == dtype
    torch.testing.assert_close(result, image.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_float_planes_of_a_tensor_reach_the_engine_in_their_own_memory(make_runner: RunnerFactory) -> None:
    runner = _bilinear_runner(make_runner)
    image = torch.rand(3, 9, 8)
    seen: list[NDArray[np.float32]] = []
    made: list[NDArray[np.float32]] = []
    run = runner.run

    def watched(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = run(feeds)
        seen.append(feeds["input"])
        made.append(outputs["output"])
        return outputs

    runner.run = watched  # type: ignore[method-assign]
    with Upscaler(runner) as up:
        result = up(image)

    assert np.shares_memory(seen[0], image.numpy())
    assert np.shares_memory(made[0], result.numpy())


def test_bad_tensors_meet_the_guard_too(nearest_onnx: Callable[..., Path]) -> None:
    image = torch.rand(3, 9, 8)
    image[:, 4, 4] = 0.5
    with Upscaler.open(nearest_onnx(poison=0.5), threads=1) as up, pytest.raises(GateError, match="NaN"):
        up(image)
    with Upscaler.open(nearest_onnx(poison=0.5), fallback=nearest_onnx(), threads=1) as up:
        torch.testing.assert_close(up(image)[:, ::2, ::2], image)
    with Upscaler.open(nearest_onnx(), threads=1) as up, pytest.raises(InputError, match="NaN or infinite"):
        up(torch.full((3, 4, 4), torch.nan))


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4)], ids=["numpy", "torch"])
def test_closed_upscaler_says_so(image: Any, nearest_onnx: Callable[..., Path]) -> None:
    with Upscaler.open(nearest_onnx(), threads=1) as up:
        pass

    with pytest.raises(UsageError, match="is closed"):
        up(image)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(0, 3, 4, 4), "shape"),
        (np.zeros((4, 4, 5), np.uint8), "shape"),
        (np.zeros((4,), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros((4, 4, 3), np.float64), "float64"),
        (torch.zeros(4, 4), "shape"),
        (torch.zeros(3, 4, 4, dtype=torch.float16), "float16"),
        ([[1, 2]], "list"),
    ],
    ids=["no tensors", "channels", "axes", "empty", "double", "tensor axes", "half tensor", "list"],
)
def test_what_is_no_picture_is_refused(image: object, words: str, nearest_onnx: Callable[..., Path]) -> None:
    with Upscaler.open(nearest_onnx(), threads=1) as up, pytest.raises(UsageError, match=words):
        up(image)  # type: ignore[call-overload]


def test_nan_in_the_input_is_refused_as_such(nearest_onnx: Callable[..., Path]) -> None:
    image = np.zeros((4, 4, 3), np.float32)
    image[1, 2, 0] = np.nan
    with Upscaler.open(nearest_onnx(), threads=1) as up, pytest.raises(InputError, match="NaN"):
        up(image)


def test_bad_tile_is_run_again_on_the_fallback_and_counted(nearest_onnx: Callable[..., Path], picture: Draw) -> None:
    image = picture(40, 40)
    image[image == 200] = 201
    image[35, 35, 0] = 200
    broken = nearest_onnx(poison=float(np.float32(200) / np.float32(255)))
    with Upscaler.open(broken, TileSettings(side=20, overlap=0), threads=1, fallback=nearest_onnx()) as up:
        result, report = up.upscale(image)

    np.testing.assert_array_equal(result, image.repeat(2, axis=0).repeat(2, axis=1))
    assert report.tally.repaired == {"NaN": 1}
    assert report.tally.tiles == 4


def test_bad_tile_without_fallback_is_an_error(nearest_onnx: Callable[..., Path], picture: Draw) -> None:
    image = picture(20, 20)
    image[3, 3, 0] = 200
    broken = nearest_onnx(poison=float(np.float32(200) / np.float32(255)))
    with Upscaler.open(broken, threads=1) as up, pytest.raises(GateError, match="returned NaN for a tile.*verify"):
        up(image)


def test_calls_from_several_threads_take_turns(make_runner: RunnerFactory, picture: Draw) -> None:
    images = [picture(20, 20, seed=seed) for seed in range(4)]
    with Upscaler(make_runner("rcan")) as up:
        expected = [up(image) for image in images]
        results: list[NDArray[np.uint8] | None] = [None] * 4

        def work(index: int) -> None:
            results[index] = up(images[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_bundle_opens_its_best_engine_with_the_fp32_graph_as_fallback(
    nearest_onnx: Callable[..., Path], picture: Draw, tmp_path: Path
) -> None:
    image = picture(20, 20)
    image[3, 3, 0] = 200
    folder = tmp_path / "network.srd"
    (folder / "engines").mkdir(parents=True)
    shutil.copy(nearest_onnx(), folder / "model.fp32.onnx")
    shutil.copy(nearest_onnx(poison=float(np.float32(200) / np.float32(255))), folder / "engines" / "fast.onnx")
    with open_engine(nearest_onnx(), threads=1) as runner:
        contract = runner.info.contract
    engines = [
        BundleEngine("engines/fast.onnx", "openvino", Precision.INT8, verified=True),
        BundleEngine("model.fp32.onnx", "onnxruntime", Precision.FP32, verified=True),
    ]
    write_bundle_manifest(
        folder, contract=contract, checkpoint=Source("checkpoint", "x.pth", "0" * 64), engines=engines
    )

    with Upscaler.open(folder, threads=1) as best, Upscaler.open(folder, precision=Precision.FP32, threads=1) as plain:
        result, report = best.upscale(image)

        assert (best.info.engine, plain.info.engine) == ("openvino", "onnxruntime")
        assert report.tally.repaired == {"NaN": 1}
        np.testing.assert_array_equal(result, plain(image))


def test_checkpoint_is_told_to_be_exported_first(tmp_path: Path) -> None:
    (tmp_path / "rcan.pt").write_bytes(b"weights")

    with pytest.raises(InputError, match="not an ONNX file.*no readable manifest.*srdeploy export"):
        Upscaler.open(tmp_path / "rcan.pt")


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.onnx does not exist"):
        Upscaler.open(tmp_path / "no.onnx")


class TestDecisions:
    """Whole image or tiles, by memory, profile and index limits."""

    @pytest.fixture
    def contract(self, make_runner: RunnerFactory) -> object:
        return make_runner("srdensenet all").info.contract

    def test_whole_image_when_it_fits(self, contract: object) -> None:
        decision = decide(100, 200, contract, None, TileSettings(memory_bytes=1 << 30))  # type: ignore[arg-type]

        assert decision.plan.whole
        assert decision.exact

    def test_tiles_when_memory_is_short_and_they_stay_within_it(self, contract: object) -> None:
        decision = decide(1000, 2000, contract, None, TileSettings(memory_bytes=64 << 20))  # type: ignore[arg-type]

        window = decision.plan.rows.window * decision.plan.columns.window
        assert decision.plan.tiles > 1
        assert window * 256 * 4 * 5 <= 64 << 20  # 256 values per pixel in the largest tensor, five of them alive
        assert decision.exact

    def test_index_limit_makes_tiles_even_with_endless_memory(self, contract: object) -> None:
        decision = decide(4000, 4000, contract, None, TileSettings(memory_bytes=1 << 60))  # type: ignore[arg-type]

        assert decision.plan.rows.window * decision.plan.columns.window * 256 < 2**31
        assert decision.plan.tiles > 1

    def test_profile_makes_tiles_of_the_tuned_shape(self, contract: object) -> None:
        profile = ShapeProfile((1, 1, 16, 16), (2, 1, 48, 64), (4, 1, 96, 96))

        decision = decide(90, 200, contract, profile, TileSettings(memory_bytes=1 << 30))  # type: ignore[arg-type]

        assert (decision.plan.rows.window, decision.plan.columns.window) == (48, 64)
        assert decision.batch == 4
        assert "does not fit" in decision.reason

    def test_image_below_the_profile_is_padded(self, contract: object) -> None:
        profile = ShapeProfile((1, 1, 16, 16), (1, 1, 48, 64), (1, 1, 96, 96))

        decision = decide(5, 90, contract, profile, TileSettings(memory_bytes=1 << 30))  # type: ignore[arg-type]

        assert decision.plan.whole
        assert (decision.plan.rows.window, decision.plan.rows.padding) == (16, 11)
        assert not decision.exact
        assert "padded" in decision.reason

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (TileSettings(mode="whole"), "200x90 pixels as a whole.*96x96"),
            (TileSettings(side=97), "tiles of 97 pixels"),
            (TileSettings(side=40, overlap=20), "overlap of 20"),
            (TileSettings(batch=2), "batches of 2"),
        ],
        ids=["whole", "side", "overlap", "batch"],
    )
    def test_wishes_that_do_not_fit_are_refused(self, settings: TileSettings, words: str, contract: object) -> None:
        profile = ShapeProfile((1, 1, 16, 16), (1, 1, 48, 64), (1, 1, 96, 96))

        with pytest.raises(UsageError, match=words):
            decide(90, 200, contract, profile, settings)  # type: ignore[arg-type]
