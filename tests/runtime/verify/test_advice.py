"""The next step after a failure fits what went wrong."""

import numpy as np
import pytest

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.runtime.verify.advice import advice
from srdeploy.runtime.verify.difference import difference
from srdeploy.runtime.verify.parity import Case, Gates, VerifyResult


def _result(precision: Precision, problem: str | None, fidelity: float, grid_fidelity: float) -> VerifyResult:
    contract = ModelContract("rcan", {}, 2, "rgb", precision, None, 1.0, 1, "0" * 64)
    info = RunnerInfo("engine", "openvino", "cpu", contract, "FP32")

    def case(value: float, words: str | None) -> Case:
        plain = difference(np.zeros((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), 10 ** (-value / 20), np.float32))
        return Case("a", (1, 1, 1, 1), type(plain)(**{**plain.to_json(), "problem": words}), 40.0)

    return VerifyResult(info, info, Gates.of(precision), (case(fidelity, problem),), (case(grid_fidelity, None),))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (_result(Precision.FP16, "4 NaN and 0 infinite values of 9", 50, 50), "leave FP16's range"),
        (_result(Precision.FP32, "4 NaN and 0 infinite values of 9", 50, 50), "--bisect"),
        (_result(Precision.FP32, "output shape (1,) instead of (2,)", 50, 50), "export it again"),
        (_result(Precision.FP32, None, 50, 20), "a size was baked into the graph"),
        (_result(Precision.INT8, None, 9, 9), "compute this graph wrongly"),
        (_result(Precision.INT8, None, 38, 38), "--max-psnr-drop"),
        (_result(Precision.BF16, None, 38, 38), "--precision fp16"),
    ],
    ids=["fp16-nan", "nan", "shape", "baked-size", "engine-wrong", "int8", "bf16"],
)
def test_advice_fits_what_went_wrong(result: VerifyResult, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: False)

    assert words in advice(result)


@pytest.mark.parametrize(("saturate", "advised"), [(True, True), (False, False)], ids=["without-vnni", "with-vnni"])
def test_overflowing_sums_are_named_only_where_they_overflow(
    saturate: bool, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: saturate)

    words = advice(_result(Precision.INT8, None, 9, 9))

    assert ("--weight-bits 7" in words) is advised
