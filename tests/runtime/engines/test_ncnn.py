"""ncnn on the CPU: what it builds from, what it computes, and what it refuses."""

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.core.errors import BuildError, MissingExtraError, UsageError
from srdeploy.core.runner import TimedRunner, run_image
from srdeploy.core.shapes import ShapeProfile
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import load_checkpoint
from srdeploy.runtime.bundle import BundleEngine
from srdeploy.runtime.engines import ncnn
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.recommend import recommended
from srdeploy.runtime.engines.registry import build_engine, engine_status, open_engine

GraphFactory = Callable[..., Path]


@pytest.fixture
def installed() -> None:
    pytest.importorskip("ncnn")
    if importlib.util.find_spec("pnnx") is None:
        pytest.skip("pnnx is not installed")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("upsampler", ["shuffle", "deconvolution"])
def test_an_engine_computes_what_the_graph_does_at_any_shape(
    small_onnx: GraphFactory, upsampler: str, tmp_path: Path
) -> None:
    path = small_onnx(upsampler=upsampler)
    result = build_engine(path, tmp_path / "net.ncnn", engine="ncnn")

    with (
        open_engine(path, engine="onnxruntime", threads=1) as reference,
        open_engine(result.path, threads=1) as engine,
    ):
        for shape in ((1, 3, 1, 1), (2, 3, 17, 22), (1, 3, 40, 9)):
            image = np.random.default_rng(1).random(shape, np.float32)
            np.testing.assert_allclose(run_image(engine, image), run_image(reference, image), rtol=0, atol=2e-5)
        assert engine.info.numeric_mode == "FP32"
        assert engine.info.built["convolutions"] == {"fp32": 3}
        assert isinstance(engine, TimedRunner)
        assert engine.prepare({"input": image})() > 0
        with pytest.raises(UsageError, match="has type float64"):
            engine.run({"input": image.astype(np.float64)})


@pytest.mark.usefixtures("installed")
def test_equal_graphs_give_equal_engines_of_ncnns_own_two_files(small_onnx: GraphFactory, tmp_path: Path) -> None:
    options = BuildOptions(use_cache=False)
    first, second = (
        build_engine(small_onnx(), tmp_path / f"{turn}.ncnn", engine="ncnn", options=options) for turn in range(2)
    )

    assert first.path.read_bytes() == second.path.read_bytes()
    with zipfile.ZipFile(first.path) as archive:
        assert archive.namelist() == ["model.ncnn.param", "model.ncnn.bin"]
        assert archive.read("model.ncnn.param").startswith(b"7767517\n"), "ncnn's magic number"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"quantized": "both"}], ids=["FP16", "INT8"])
def test_graphs_of_other_precisions_are_refused_and_nothing_is_written(
    small_onnx: GraphFactory, tmp_path: Path, changes: dict[str, str]
) -> None:
    with pytest.raises(BuildError, match="expected an FP32 graph with float32 images"):
        build_engine(small_onnx(**changes), tmp_path / "net.ncnn", engine="ncnn")

    assert not list(tmp_path.glob("*.ncnn*"))


@pytest.mark.usefixtures("installed")
def test_an_operator_that_ncnn_lacks_is_named_with_the_others(tmp_path: Path) -> None:
    """RCAN with a pixel unshuffle computes sizes: ncnn has no layer for that, and would crash on the network."""
    checkpoints = Path(__file__).parents[2] / "data" / "checkpoints"
    checkpoint = load_checkpoint(next((checkpoints / "trainner_rcan_x2_unshuffle").glob("*.safetensors")))
    export_onnx(checkpoint, tmp_path / "net.onnx")

    with pytest.raises(BuildError, match=r"ncnn lacks an operator of .*net\.onnx; its layers are BinaryOp, "):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.ncnn", engine="ncnn")

    assert not (tmp_path / "net.ncnn").exists()


@pytest.mark.usefixtures("installed")
def test_options_and_files_that_do_not_fit_are_refused(small_onnx: GraphFactory, tmp_path: Path) -> None:
    path = small_onnx()
    profile = ShapeProfile((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))

    with pytest.raises(UsageError, match="does not apply to ncnn"):
        build_engine(path, tmp_path / "net.ncnn", engine="ncnn", options=BuildOptions(profiles=(profile,)))
    with pytest.raises(UsageError, match="ncnn runs built engines"):
        open_engine(path, engine="ncnn")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srdeploy.core.extras.is_installed", lambda module: False)
    monkeypatch.setattr(ncnn, "is_installed", lambda module: False)

    with pytest.raises(MissingExtraError, match=r"pnnx is not installed.*srdeploy\[ncnn\]"):
        ncnn.why_not_build()
    with pytest.raises(MissingExtraError, match=r"ncnn is not installed.*srdeploy\[ncnn\]"):
        ncnn.why_not_run()
    assert "not installed" in str(engine_status("ncnn").why_not_build)


def test_it_is_a_cpu_engine_that_is_built_only_where_it_is_named() -> None:
    assert BundleEngine("engines/a.ncnn", "ncnn", ncnn.precisions(None)[0], False).on_cpu
    assert "ncnn" not in {entry.engine for entry in recommended("cpu")}
