"""Export random configurations of every dialect, with weights from 100 times too small to 100 times too large.

Nothing valid may be refused: each checkpoint is written under its family's own keys, loaded, its convolutions scaled by
a random factor, exported, and checked against the network in float64. Printed is how large the graphs' errors are
beside the eager FP32 networks' own, which is what `srdeploy.export.checks.MULTIPLE` bounds. Each graph is
also put into a static form, whose largest difference from the plain graph is printed.

    python benchmarks/export_sweep.py --count 300 -o benchmarks/results/export_sweep.json

Weights that drive the FP32 network itself beyond its range are not valid; they are counted apart.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))
from checkpoint_fuzzing.references import CASES, random_sizes, write_checkpoint

from srdeploy.core.contract import GraphForm
from srdeploy.core.errors import ExportError
from srdeploy.export import checks
from srdeploy.export.exporter import export_form, export_onnx
from srdeploy.models.checkpoint.load import Choices, LoadedCheckpoint, load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration; it is its seed")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.first, options.first + options.count):
        rows.append(one(seed))
        print(json.dumps(rows[-1]), flush=True)
    document = summary(rows)
    print(json.dumps(document, indent=2))
    if options.output:
        options.output.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")


def one(seed: int) -> dict[str, Any]:
    """Export one random configuration and return how it went."""
    choose = random.Random(seed)
    case = CASES[seed % len(CASES)]
    factor = 10.0 ** choose.uniform(-2, 2)
    row: dict[str, Any] = {"seed": seed, "dialect": case.dialect, "factor": round(factor, 4)}
    with tempfile.TemporaryDirectory() as name:
        path = write_checkpoint(case, random_sizes(case, choose), seed, Path(name))
        checkpoint = load_checkpoint(path, Choices(**case.choices))
        scale_weights(checkpoint, factor)
        try:
            check = export_onnx(checkpoint, Path(name) / "model.onnx").check
        except ExportError as error:
            finite = "the network gives values that are not finite" not in error.found
            return {**row, "outcome": "refused" if finite else "not finite in FP32", "error": str(error)}
        row["form_difference"] = form_difference(Path(name), checkpoint)
    row |= {"outcome": "exported", "network_error": check.network_error, "ratio": ratio(check)}
    return row if check.merged is None else row | {"merged_end_ratio": ratio(check.merged)}


def ratio(check: checks.GridCheck) -> float:
    """Return the largest error of a graph over the FP32 network's own."""
    used = max(entry.max_abs / entry.tolerance if entry.tolerance else 0.0 for entry in check.deviations)
    return checks.MULTIPLE * used


def form_difference(folder: Path, checkpoint: LoadedCheckpoint) -> float | str:
    """Return the largest absolute difference of a static graph from the plain one, or the refusal."""
    contract = checkpoint.contract()
    side = max(12, contract.min_size)
    form = GraphForm((1, contract.channels, side, side + 3))
    try:
        result = export_form(folder / "model.onnx", folder / "static.onnx", form=form)
    except ExportError as error:
        return str(error)
    assert result.form_check is not None
    return max(result.form_check.max_abs.values())


def scale_weights(checkpoint: LoadedCheckpoint, factor: float) -> None:
    """Multiply the weights and biases of all convolutions, in place."""
    with torch.no_grad():
        for module in checkpoint.network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.weight *= factor
                if module.bias is not None:
                    module.bias *= factor


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts by outcome, and the distribution of the ratios."""
    return {
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "dialects": len({row["dialect"] for row in rows}),
        "ratio": percentiles([row["ratio"] for row in rows if "ratio" in row]),
        "merged_end_ratio": percentiles([row["merged_end_ratio"] for row in rows if "merged_end_ratio" in row]),
        "multiple": checks.MULTIPLE,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the number of values and some percentiles of them."""
    found = {name: round(float(np.percentile(values, at)), 3) for name, at in PERCENTILES.items()} if values else {}
    return {"count": len(values), **found}


PERCENTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}

if __name__ == "__main__":
    main()
