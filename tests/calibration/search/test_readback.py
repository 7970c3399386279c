"""What engines say they run, compared with what was asked for."""

from collections.abc import Callable
from typing import Any

import onnx
import pytest

from srdeploy.calibration.int8.placement import RECIPES, Placement, place
from srdeploy.calibration.search.readback import read_back
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import BuildError
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Target
from srdeploy.core.runner import RunnerInfo


@pytest.fixture
def asked(networks: dict[str, Callable[..., onnx.ModelProto]]) -> tuple[Graph, Placement]:
    graph = Graph(networks["dense"]())
    return graph, place(graph, RECIPES[Target.OPENVINO])


def info(contracts: dict[str, ModelContract], built: dict[str, Any]) -> RunnerInfo:
    return RunnerInfo(
        "openvino int8", "openvino", "cpu", contracts["dense"], "INT8", versions={"openvino": "1"}, built=built
    )


def test_the_line_names_layers_and_multiply_adds(
    asked: tuple[Graph, Placement], contracts: dict[str, ModelContract]
) -> None:
    built = {"convolutions": {"int8": 8, "fp32": 2}, "macs_share": {"int8": 1.0}}

    found = read_back(info(contracts, built), *asked)

    assert found is not None
    assert found.line() == "8 of 10 convolutions, 100.0 % of multiply-adds in INT8"


@pytest.mark.parametrize(
    "built",
    [
        pytest.param({"convolutions": {"int8": 7, "fp32": 1}, "macs_share": {"int8": 0.9}}, id="one layer fell back"),
        pytest.param({"convolutions": {"int8": 8}, "macs_share": {"int8": 0.5, "fp32": 0.5}}, id="the heavy one did"),
        pytest.param({"convolutions": {"fp32": 8}}, id="all did"),
    ],
)
def test_less_than_asked_is_an_error(
    built: dict[str, Any], asked: tuple[Graph, Placement], contracts: dict[str, ModelContract]
) -> None:
    with pytest.raises(BuildError, match="as the graph says"):
        read_back(info(contracts, built), *asked)


def test_an_engine_that_counts_no_multiply_adds_is_judged_by_its_layers(
    asked: tuple[Graph, Placement], contracts: dict[str, ModelContract]
) -> None:
    found = read_back(info(contracts, {"convolutions": {"int8": 8}, "macs_share": {"int8": 0.0}}), *asked)

    assert found is not None
    assert found.macs == pytest.approx(1.0)
    assert read_back(info(contracts, {}), *asked) is None
