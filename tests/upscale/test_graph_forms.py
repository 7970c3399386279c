"""Pictures through graphs of other forms: what `Upscaler` returns is what it returns with the plain graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.contract import GraphForm
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.export.exporter import export_form, export_onnx
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine
from srdeploy.upscale import Upscaler
from srdeploy.upscale.budget import TileSettings

Draw = Callable[..., NDArray[np.uint8]]

ENGINES = ("onnxruntime", "openvino")
COLOR_TOLERANCE = 2e-6
"""Of the color wrapper in float32, against the same conversions in float64."""


@pytest.fixture(scope="module")
def luma_onnx(make_checkpoint: Callable[..., LoadedCheckpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a Y network whose output is three pixels short."""
    return export_onnx(make_checkpoint("srdensenet trimmed"), tmp_path_factory.mktemp("luma") / "luma.onnx").path


@pytest.mark.parametrize("engine", ENGINES)
def test_a_uint8_graph_returns_the_bytes_of_the_float_path(engine: str, rcan_onnx: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8)
    graph = export_form(rcan_onnx, tmp_path / "uint8.onnx", form=GraphForm(io="uint8")).path

    with Upscaler.open(rcan_onnx, engine=engine) as plain, Upscaler.open(graph, engine=engine) as formed:
        assert (formed(image) == plain(image)).all()
        # What an engine changes in the network's end, it changes behind a form too.
        assert formed.info.built["merged_layers"] == plain.info.built["merged_layers"] != []
        # Gray is the mean of the three channels, which are rounded before here and after it there.
        assert np.abs(formed(image[..., 0]).astype(int) - plain(image[..., 0])).max() <= 1
        tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
        assert torch.equal(formed(tensor), plain(tensor))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_color_wrapper_returns_the_picture_of_the_upscaler(
    engine: str, luma_onnx: Path, picture: Draw, tmp_path: Path
) -> None:
    image = picture(40, 33)
    values = image.astype(np.float32) / np.float32(255)
    graph = export_form(luma_onnx, tmp_path / "rgb.onnx", form=GraphForm(color_wrapper=True)).path
    levels = export_form(luma_onnx, tmp_path / "rgb8.onnx", form=GraphForm(io="uint8", color_wrapper=True)).path

    with Upscaler.open(luma_onnx, engine=engine) as plain, Upscaler.open(graph, engine=engine) as formed:
        assert np.abs(formed(values) - plain(values)).max() <= COLOR_TOLERANCE
        expected = plain(image).astype(int)
    with Upscaler.open(levels, engine=engine) as formed:
        difference = np.abs(formed(image) - expected)
    # A value at the border between two levels may be rounded to the other.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_static_graph_runs_pictures_of_any_size_in_its_tiles(
    engine: str, luma_onnx: Path, picture: Draw, tmp_path: Path
) -> None:
    image = picture(70, 90)
    graph = export_form(luma_onnx, tmp_path / "static.onnx", form=GraphForm((2, 1, 48, 56))).path

    with Upscaler.open(luma_onnx, engine=engine) as plain, Upscaler.open(graph, engine=engine) as formed:
        assert str(formed.info.profile) == "2x1x48x56..2x1x48x56..2x1x48x56"
        large, report = formed.upscale(image)
        assert not report.decision.plan.whole
        assert np.abs(large.astype(int) - plain(image)).max() <= 1
        with pytest.raises(UsageError, match="expected 'input' float32 2x1x48x56"):
            formed.runner.run({"input": np.zeros((1, 1, 48, 56), np.float32)})


def test_pictures_that_a_uint8_graph_cannot_take_are_refused(
    rcan_onnx: Path, luma_onnx: Path, picture: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = GraphForm(io="uint8")
    color = export_form(rcan_onnx, tmp_path / "color.onnx", form=form).path
    luma = export_form(luma_onnx, tmp_path / "luma.onnx", form=form).path

    with Upscaler.open(color) as up:
        for image in (np.zeros((8, 8, 3), np.uint16), np.zeros((8, 8, 3), np.float32), torch.zeros(3, 8, 8)):
            with pytest.raises(UsageError, match="for a graph that takes uint8; expected 8-bit pictures"):
                up(image)  # type: ignore[call-overload]
    with Upscaler.open(luma) as up, pytest.raises(UsageError, match="luma, which has fractions"):
        up(picture(8, 8))
    with (
        Upscaler.open(color, TileSettings(mode="exact", side=16)) as up,
        pytest.raises(UsageError, match="another form"),
    ):
        up(picture(40, 40))


def test_a_16_bit_file_is_refused_and_nothing_is_written(
    rcan_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = export_form(rcan_onnx, tmp_path / "uint8.onnx", form=GraphForm(io="uint8")).path
    Image.fromarray(np.zeros((8, 9), np.uint16)).save(tmp_path / "deep.png")
    before = sorted(tmp_path.iterdir())

    code = run(["upscale", str(graph), str(tmp_path / "deep.png"), "-o", str(tmp_path / "large.png")])

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert (code, len(lines)) == (2, 1)
    assert "pixels of uint16, for a graph that takes uint8" in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_verify_names_the_graph_to_compare(rcan_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = export_form(rcan_onnx, tmp_path / "uint8.onnx", form=GraphForm(io="uint8")).path
    checkpoint, photos = "examples/rcan_x2_demo.pt", "examples/photos/evaluation"

    code = run(["verify", str(graph), "--against", checkpoint, "--images", photos])

    assert code == 3
    assert "name the plain graph that it was made from" in capsys.readouterr().err


def test_tensorrt_for_rtx_builds_a_static_uint8_graph(luma_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    form = GraphForm((1, 3, 24, 32), "uint8", color_wrapper=True)
    graph = export_form(luma_onnx, tmp_path / "formed.onnx", form=form).path
    options = BuildOptions(use_cache=False)

    try:
        built = build_engine(graph, tmp_path / "engine.rtx", engine="tensorrt-rtx", options=options)
    except CapabilityError as error:
        pytest.skip(str(error))

    assert built.manifest.details["profiles"] == [{end: [1, 3, 24, 32] for end in ("min", "opt", "max")}]
    assert [entry["dtype"] for entry in built.manifest.details["inputs"]] == ["uint8"]
