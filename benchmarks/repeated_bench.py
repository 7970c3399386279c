"""Do the speed-ups of two runs agree within their intervals, also on a busy machine? The same bench, many times.

Each run is a process of its own: `srdeploy bench` on the CPU engines of a bundle, next to the eager network. For every
pair of runs and every engine the script counts whether the two 95 % intervals overlap, and how often a run names the
same fastest engine (or the engines that it cannot tell apart). Pairs of runs whose processors exchanged data at
different speeds are not compared, as `report --compare` does not.

    srdeploy demo -o demo-output
    python benchmarks/repeated_bench.py demo-output/rcan_x2.srd --against examples/rcan_x2_demo.pt --busy 1

Reads: how far a single run can be trusted. `--busy N` starts N processes that keep one core busy each.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.exchange import Exchange
from srdeploy.runtime.bench.ratios import listed, ratio_label, ratio_of_rounds
from srdeploy.runtime.bundle import read_bundle

RESULTS = Path(__file__).parent / "results"
KIND = "end-to-end"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--shape", default="1x3x96x128")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", default="3")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep one core busy each")
    parser.add_argument("--output", type=Path, default=RESULTS / "repeated_bench.json")
    arguments = parser.parse_args()
    files = [
        str(arguments.bundle / engine.file)
        for engine in read_bundle(arguments.bundle).engines
        if engine.engine in ("openvino", "onnxruntime")
    ]
    command = [
        sys.executable, "-m", "srdeploy.cli.main", "bench", *files, "--against", str(arguments.against), "--shape",
        arguments.shape, "--no-baselines", "--seconds", arguments.seconds, "--allow-unstable", "--json",
    ]  # fmt: skip
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        runs = [one_run(command, number) for number in range(arguments.runs)]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    document = {
        "bundle": arguments.bundle.name,
        "shape": arguments.shape,
        "seconds": float(arguments.seconds),
        "busy_processes": arguments.busy,
        "agreement": agreement(runs),
        "fastest": Counter(run["fastest"] for run in runs),
        "runs": runs,
        "conditions": conditions(),
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: document[key] for key in ("agreement", "fastest")}, indent=1))
    return 0


def one_run(command: list[str], number: int) -> dict[str, Any]:
    """Run the bench once and return the speed-ups, medians and the fastest engine."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    rows = {row["runner"]["name"]: row for row in document["rows"] if row["kind"] == KIND}
    base = document["rows"][0]["runner"]["name"]
    engines = {name: row for name, row in rows.items() if name != base}
    leader = max(engines, key=lambda name: float(engines[name]["ratio"]))
    rivals = [
        name
        for name, row in engines.items()
        if name != leader
        and not ratio_of_rounds(
            row["times_ms"], engines[leader]["times_ms"], visit=document["effort"]["visit"]
        ).decided
    ]  # fmt: skip
    found = {
        "fastest": listed(sorted([leader, *rivals])),
        "load_average": document["environment"]["load_average"],
        "processor_exchange": document["environment"].get("processor_exchange"),
        "unstable_medians": sum(not row["stable"] for row in rows.values()),
        "engines": {
            name: {
                key: row[key]
                for key in (
                    "ratio",
                    "ratio_low",
                    "ratio_high",
                    "median_ms",
                    "ci_share",
                    "openings",
                    "floor_distance",
                    "n",
                )
            }
            for name, row in engines.items()
        },
    }
    labels = [
        f"{name} {ratio_label(row['ratio'], row['ratio_low'], row['ratio_high'])}" for name, row in engines.items()
    ]
    print(f"run {number + 1}: {'; '.join(labels)}; fastest: {found['fastest']}", file=sys.stderr)
    return found


def agreement(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return per engine: the share of pairs of runs whose intervals overlap, and the spread of the speed-ups."""
    found = {}
    comparable = [pair for pair in itertools.combinations(runs, 2) if in_one_state(*pair)]
    for name in runs[0]["engines"]:
        entries = [run["engines"][name] for run in runs]
        pairs = [(first["engines"][name], second["engines"][name]) for first, second in comparable]
        overlap = [
            first["ratio_low"] <= second["ratio_high"] and second["ratio_low"] <= first["ratio_high"]
            for first, second in pairs
        ]
        ratios = sorted(entry["ratio"] for entry in entries)
        found[name] = {
            "pairs": len(pairs),
            "pairs_that_agree": round(sum(overlap) / len(pairs), 3) if pairs else 1.0,
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
        }
    return found


def in_one_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return True unless two runs say that the processors exchanged data at different speeds."""
    states = [Exchange.of_environment(run) for run in (first, second)]
    return not (states[0] and states[1] and states[0].differs_from(states[1]))


if __name__ == "__main__":
    raise SystemExit(main())
