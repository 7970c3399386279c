"""What the search for a bound pays for exact layers, and which change it makes first."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.builder import Decisions
from srdeploy.calibration.options import Cost, QuantizeOptions
from srdeploy.calibration.quantize import QuantizeResult, artifacts_folder, quantize
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.choose import Forecast, remove_superfluous
from srdeploy.calibration.search.evaluate import GraphQuality
from srdeploy.calibration.search.sensitivity import Change
from srdeploy.core.imaging.psnr import drop_for_fidelity
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines.registry import open_engine

GROUP = ("up", "tail")


def opener(path: Path) -> Runner:
    return open_engine(path, engine="openvino", threads=1, parity=True)


@pytest.mark.parametrize(
    ("split_cost", "float_cost", "first"),
    [
        pytest.param(0.1, 0.3, "split", id="two 8-bit convolutions are quicker than a float one, as with VNNI"),
        pytest.param(0.2, 0.1, "float", id="a float one is quicker, as without"),
    ],
)
def test_the_change_that_removes_most_error_per_cost_comes_first(
    split_cost: float, float_cost: float, first: str
) -> None:
    split, full = Change(GROUP, True, 1e-5, split_cost), Change(GROUP, False, 1e-5, float_cost)

    best = max(split, full, key=lambda change: change.worth({GROUP: 1e-5}))

    assert best is (split if first == "split" else full)


def test_once_split_there_is_little_left_to_win() -> None:
    full = Change(GROUP, False, 1e-5, 0.3)

    assert full.worth({GROUP: 1e-6}) == pytest.approx(full.worth({GROUP: 1e-5}) / 10)


def test_a_layer_is_either_split_or_float() -> None:
    plain = Decisions(keep={"head": "asked for"}, splits=("end",))

    split = Change(GROUP, True, 1e-5, 0.1).applied(plain, "")
    full = Change(GROUP, False, 1e-5, 0.3).applied(split, "too much error")

    assert split.splits == ("end", *GROUP)
    assert dict(split.keep) == {"head": "asked for"}
    assert full.splits == ("end",)
    assert dict(full.keep) == {"head": "asked for", "up": "too much error", "tail": "too much error"}


@pytest.fixture
def bounded(
    network_paths: dict[str, Path], calibrations: dict[str, CalibrationSet], tmp_path: Path
) -> Callable[[str, Cost], QuantizeResult]:
    """Quantizes the tiny residual network so exactly that some layers have to change, judged by OpenVINO."""

    def run(name: str, cost: Cost, bound: float | None = None) -> QuantizeResult:
        return quantize(
            network_paths["residual"],
            tmp_path / name,
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["residual"],
            options=QuantizeOptions(strength=0.5, method="minmax", min_fidelity=bound, cost=cost),
            open_engine=opener,
        )

    plain = run("plain.onnx", "macs")
    assert plain.quality is not None
    return partial(run, bound=plain.quality.fidelity_db + 3)


def test_costs_are_measured_on_the_engine_and_kept_with_the_decision(
    bounded: Callable[[str, Cost], QuantizeResult],
) -> None:
    result = bounded("int8.onnx", "latency")

    groups = json.loads((artifacts_folder(result.output) / "sensitivity.json").read_text())["groups"]
    worst = max(groups, key=lambda group: group["image_mse"])
    changed = [group for group in groups if group["decision"] != "int8"]
    kept = {layer for group in groups if group["decision"] == "fp32" for layer in group["layers"]}
    assert result.quality is not None
    assert result.choice is not None
    assert result.quality.fidelity_db > result.choice.points[0].quality.fidelity_db + 2.9
    assert worst["latency_share_float"] >= 0.001
    assert changed
    assert kept <= set(result.floats)


def test_paying_in_multiply_adds_gives_the_same_graph_every_time(
    bounded: Callable[[str, Cost], QuantizeResult],
) -> None:
    first, second = bounded("one.onnx", "macs"), bounded("two.onnx", "macs")

    groups = json.loads((artifacts_folder(first.output) / "sensitivity.json").read_text())["groups"]
    assert first.output.read_bytes() == second.output.read_bytes()
    assert any(group["decision"] != "int8" for group in groups)
    assert all(group["latency_share_float"] is None for group in groups)


def test_changes_that_a_later_one_made_superfluous_are_taken_back() -> None:
    # 50 dB at first; the three bring 10 %, 30 % and 60 % of the error that was removed to reach 60 dB.
    small, middle, large = (
        Change((name,), False, error, cost)
        for name, error, cost in [("a", 1e-6, 0.02), ("b", 3e-6, 0.05), ("c", 6e-6, 0.2)]
    )
    first, reached = GraphQuality(50.0, 49.0, 0.1, 30.0, "hr", 4), GraphQuality(60.0, 59.0, 0.01, 30.0, "hr", 4)

    def needed(**bound: float) -> list[Change]:
        return remove_superfluous([small, middle, large], first, reached, QuantizeOptions(**bound))  # type: ignore[arg-type]

    assert needed(min_fidelity=60.0) == [small, middle, large]
    assert needed(min_fidelity=56.5) == [middle, large]  # 57.2 dB without the first
    assert needed(min_fidelity=54.0) == [small, large]  # 54.3 dB without the second, the dearer one
    assert needed(min_fidelity=53.0) == [large]  # 53.4 dB without both
    assert needed(max_psnr_drop=0.04) == [small, large]


def test_a_split_is_not_taken_back_from_under_a_float_layer() -> None:
    split, full = Change(GROUP, True, 1e-5, 0.1), Change(GROUP, False, 1e-5, 0.2)
    first, reached = GraphQuality(50.0, 49.0, 0.1, 30.0, "hr", 4), GraphQuality(65.0, 59.0, 0.01, 30.0, "hr", 4)

    assert remove_superfluous([split, full], first, reached, QuantizeOptions(min_fidelity=55.0)) == [split]


def test_a_bound_on_the_worst_image_counts_where_the_drop_was_measured() -> None:
    bound = QuantizeOptions(max_psnr_drop=0.02, max_worst_drop=0.03).bound
    fine, uneven = (GraphQuality(60.0, 59.0, 0.01, 30.0, "shrunk", 4, worst_drop_db=worst) for worst in (0.02, 0.05))
    estimated = GraphQuality(60.0, 59.0, 0.01, 30.0, None, 4)

    assert bound.is_satisfied_by(fine)
    assert not bound.is_satisfied_by(uneven)
    assert bound.is_satisfied_by(estimated)
    assert not bound.may_be_satisfied_by(uneven, 0.9)
    assert bound.may_be_satisfied_by(uneven, 0.5)
    assert "by any image" in str(bound)


def test_images_of_another_kind_are_expected_to_lose_more() -> None:
    quality = GraphQuality(60.0, 57.0, 0.001, 28.0, "hr", 4)
    assumed = GraphQuality(60.0, 57.0, 0.001, 34.0, None, 4)
    expected = 2 * drop_for_fidelity(28.0 + 6.0, 57.0)

    assert quality.other_kinds_drop_db == assumed.other_kinds_drop_db == pytest.approx(expected)
    assert Bound(0.01).is_satisfied_by(quality)
    assert not Bound(0.01, other_kinds=True).is_satisfied_by(quality)
    assert Bound(1.01 * expected, other_kinds=True).is_satisfied_by(quality)
    assert Bound(0.01, other_kinds=True).used_by(quality) == pytest.approx(expected / 0.01)


def test_a_forecast_learns_what_part_of_the_promised_error_goes_away() -> None:
    forecast = Forecast(50.0)
    before = forecast(0.1)

    forecast.learn(0.1, 55.0)  # 10 dB were promised
    after = forecast(0.01)

    assert before == pytest.approx(0.1)
    assert after == pytest.approx(0.1)  # 20 dB promised, 10 dB expected
    forecast.learn(0.01, 75.0)
    assert forecast(0.01) == pytest.approx(0.01)  # never more than promised
    forecast.learn(0.01, 49.0)
    assert 0.01 < forecast(0.01) < 1.0  # nor nothing at all: the search has to go on
