"""Compressed graphs: the receptive field, exact tiles and lock-step hold as for the graphs that they were made from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from srdeploy.calibration.compress.layers import Change, Form, candidates, readers
from srdeploy.calibration.compress.moments import collect_moments
from srdeploy.calibration.compress.rebuild import apply_changes
from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.ort import cpu_session
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.upscale import Upscaler
from srdeploy.upscale.budget import TileSettings
from srdeploy.upscale.lock_step import lock_step_of

Draw = Callable[..., NDArray[np.uint8]]

FORMS: tuple[Form, ...] = ("inputs", "outputs", "channels")
RANK = 4


@pytest.fixture(scope="module")
def dense_onnx(make_checkpoint: Callable[..., LoadedCheckpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a small SRDenseNet, a network without channel attention."""
    return export_onnx(make_checkpoint("srdensenet all"), tmp_path_factory.mktemp("dense") / "dense.onnx").path


def compressed(onnx_path: Path, form: Form, folder: Path) -> Path:
    """Write a graph with one kind of change wherever it can be made."""
    graph = Graph(read_graph(onnx_path).model)
    channels = read_graph(onnx_path).contract.channels
    images = [np.random.default_rng(seed).random((1, channels, 24, 24), dtype=np.float32) for seed in range(4)]
    changes = []
    if form == "channels":
        changes = [
            Change(layer.name, form, RANK, 0.0, tuple(range(RANK)), reader.name)
            for layer, reader in readers(graph)
            if layer.channels_out > RANK
        ]
    else:
        for layer in candidates(graph):
            between = layer.channels_in if form == "inputs" else layer.channels_out
            if between > RANK and (form == "inputs" or layer.op == "Conv"):
                changes.append(Change(layer.name, form, RANK, 0.0))
    assert len(changes) >= 2
    model = apply_changes(graph, changes, collect_moments(graph, None, candidates(graph), images))
    onnx.checker.check_model(model, full_check=True)  # also that no shape of the original graph is left
    path = folder / f"{form}.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_pixel_changes_nothing_outside_the_receptive_field(form: Form, dense_onnx: Path, tmp_path: Path) -> None:
    path = compressed(dense_onnx, form, tmp_path)
    contract = read_graph(path).contract
    radius, scale, place = contract.receptive_radius, contract.scale, 20
    assert radius is not None
    image = np.random.default_rng(0).random((1, 1, 41, 41), dtype=np.float32)
    other = image.copy()
    other[0, 0, place, place] += 0.5

    session = cpu_session(onnx.load(path))
    before, after = (session.run([OUTPUT], {INPUT: each})[0] for each in (image, other))

    changed = np.argwhere(before[0, 0] != after[0, 0]) // scale
    assert np.abs(changed - place).max() <= radius
    assert np.abs(changed - place).max() >= radius - 1  # the field is the original's: 1x1 factors add no pixel


@pytest.mark.parametrize("form", FORMS)
def test_exact_tiles_are_the_bytes_of_the_whole_picture(
    form: Form, dense_onnx: Path, picture: Draw, tmp_path: Path
) -> None:
    image = picture(61, 70)
    path = compressed(dense_onnx, form, tmp_path)
    made = {}
    for name, file in (("original", dense_onnx), ("compressed", path)):
        with Upscaler.open(file, TileSettings(mode="whole"), threads=1) as up:
            whole = up(image)
        with Upscaler.open(file, TileSettings(mode="exact", side=32), threads=1) as up:
            tiled, report = up.upscale(image)
        assert report.decision.plan.tiles > 4
        assert report.decision.exact
        np.testing.assert_array_equal(tiled, whole)
        made[name] = whole

    assert (made["original"] != made["compressed"]).any()


@pytest.mark.parametrize("form", FORMS)
def test_lock_step_equals_the_whole_image(form: Form, rcan_onnx: Path, tmp_path: Path) -> None:
    path = compressed(rcan_onnx, form, tmp_path)
    image = np.random.default_rng(0).random((1, 3, 43, 59), dtype=np.float32)
    whole, original = (cpu_session(onnx.load(file)).run([OUTPUT], {INPUT: image})[0] for file in (path, rcan_onnx))
    lock = lock_step_of(open_engine(path, engine="onnxruntime", threads=1), path, threads=1, memory_bytes=1 << 30)
    decision = lock.decide(43, 59, TileSettings(mode="exact", side=24))
    assert decision is not None

    bands = list(lock.bands(lambda begin, end: image[:, :, begin:end], decision, scale=2))

    np.testing.assert_allclose(np.concatenate(bands, axis=2), whole, atol=1e-5)
    assert np.abs(whole - original).max() > 1e-3
