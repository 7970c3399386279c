"""`verify --bisect` of a TensorRT engine: Polygraphy's loaders and runner, on real or simulated GPUs.

Simulated GPUs compute a layer wrongly on request; a real one is only asked to blame nobody.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu.cases import image, needs
from gpu_simulator.cuda import Simulator
from gpu_simulator.install import forget_polygraphy

from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision
from srdeploy.runtime.verify.bisect import AGREEMENT_DB, MODULE_KEY, bisect_path
from srdeploy.runtime.verify.layerwise import tensorrt_snr

pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'srdeploy[gpu]'")


@pytest.fixture(autouse=True)
def as_in_a_new_process(machine: Simulator | None) -> None:
    """Polygraphy serves one of the TensorRTs per process."""
    if machine is not None:
        forget_polygraphy()


@pytest.fixture
def beside_its_graph(built: Path, onnx_fp16: Path) -> Iterator[Path]:
    """The engine, with the graph that it was built from in its folder."""
    copy = built.parent / onnx_fp16.name
    for suffix in ("", ".json"):
        (copy.parent / (copy.name + suffix)).write_bytes((onnx_fp16.parent / (onnx_fp16.name + suffix)).read_bytes())
    yield built
    copy.unlink()


def test_an_engine_that_computes_its_graph_is_not_blamed(beside_its_graph: Path, onnx_fp32: Path) -> None:
    found = bisect_path(beside_its_graph, image(1, 3, 24, 32), fp32=lambda: onnx_fp32)

    assert found.blame != "engine"
    assert found.output_snr_db > 35
    assert found.probes > 10


@pytest.mark.parametrize(("operator", "index"), [("Conv", 0), ("Add", -1), ("DepthToSpace", 0)], ids=str)
def test_a_layer_that_is_computed_wrongly_is_found(
    operator: str, index: int, beside_its_graph: Path, onnx_fp16: Path, machine: Simulator | None
) -> None:
    if machine is None:
        pytest.skip("a real GPU computes no layer wrongly on request")
    nodes = [node for node in read_graph(onnx_fp16).model.graph.node if node.op_type == operator]
    node = nodes[index]
    module = next(entry.value for entry in node.metadata_props if entry.key == MODULE_KEY)
    machine.faulty = {node.name}
    try:
        found = bisect_path(beside_its_graph, image(1, 3, 24, 32))
    finally:
        machine.faulty = set()

    assert found.blame == "engine"
    assert found.first is not None
    assert (found.first.node, found.first.module) == (node.name, module)
    assert found.first.inputs_snr_db > 35 > found.first.snr_db


@pytest.mark.once
def test_inner_tensors_of_an_int8_graph_are_compared(onnx_int8: Path) -> None:
    needs("tensorrt")
    graph = read_graph(onnx_int8)
    names = [name for node in graph.model.graph.node if node.op_type in ("Conv", "Relu") for name in node.output]

    found = tensorrt_snr(graph, image(1, 3, 16, 24), names, engine="tensorrt")

    assert set(found) == set(names)
    assert min(found.values()) > AGREEMENT_DB[Precision.INT8]
