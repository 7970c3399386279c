"""The model card prints what the report holds, and no figure that it does not."""

import re
from typing import Any

from srdeploy.cli.pipeline.card import model_card
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.runtime.report.document import EngineEntry, report_document

PLAN = EngineEntry("tensorrt fp16", "tensorrt", Precision.FP16, file="engines/a.plan", size_bytes=2**20,
                   reason="/home/me/a.plan: no NVIDIA GPU")  # fmt: skip


def document(colors: str = "rgb", **changes: Any) -> dict[str, Any]:
    contract = ModelContract("rcan", {}, 2, colors, Precision.FP32, None, 1e6, 256, "0" * 64)  # type: ignore[arg-type]
    return report_document(title="my net.srd", contract=contract, engines=[PLAN], **changes)


def test_nothing_measured_prints_no_figure() -> None:
    card = model_card(document())

    assert "dB" not in card.split("## Figures")[1]
    assert " ms" not in card
    assert "Measured on" not in card
    assert "| tensorrt fp16 | `engines/a.plan` | 1 MiB | built, not run here |" in card


def test_equal_reports_give_equal_cards() -> None:
    first, second = document(), {**document(), "created": "2001-01-01T00:00:00+00:00"}

    assert model_card(first) == model_card(second)


def test_no_place_of_the_machine_is_published() -> None:
    assert "/home/me" not in model_card(document())


def test_commands_survive_a_name_with_a_space() -> None:
    assert "srdeploy inspect 'my net.srd'\n" in model_card(document())


def test_channels_follow_the_network() -> None:
    assert re.search(r"\(N, 3, H, W\)", model_card(document()))
    assert re.search(r"Y channel.*\(N, 1, H, W\)", model_card(document("y")), re.DOTALL)
