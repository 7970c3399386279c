"""Nothing valid is refused: random checkpoints of public families, with weights of any size, export.

benchmarks/export_sweep.py does the same with hundreds of them.
"""

import random
from pathlib import Path

import pytest
import torch
from checkpoint_fuzzing.references import CASES, random_sizes, write_checkpoint

from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import Choices, load_checkpoint

FACTORS = {0: 0.01, 11: 10.0, 20: 0.03, 31: 100.0}
"""Number of the case in the references, and the factor that its weights are multiplied by."""


@pytest.mark.parametrize(
    ("number", "factor"), FACTORS.items(), ids=[f"{CASES[key].dialect} x {factor}" for key, factor in FACTORS.items()]
)
def test_weights_of_any_size_export(number: int, factor: float, tmp_path: Path) -> None:
    case = CASES[number]
    path = write_checkpoint(case, random_sizes(case, random.Random(number)), number, tmp_path)
    checkpoint = load_checkpoint(path, Choices(**case.choices))
    with torch.no_grad():
        for module in checkpoint.network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                for values in module.parameters():
                    values *= factor

    result = export_onnx(checkpoint, tmp_path / "model.onnx")

    assert all(entry.max_abs <= entry.tolerance for entry in result.check.deviations)
