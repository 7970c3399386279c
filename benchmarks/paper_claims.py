"""Two claims of the SRDenseNet paper, checked: computing at low resolution, and what the three variants cost.

    python benchmarks/paper_claims.py [--side 24] [--seconds 2] [--engine eager|openvino] [-o benchmarks/results]

What is measured: SRDenseNet_All in front of its deconvolutions ("body": first convolution, dense blocks, bottleneck)
runs on the low-resolution image and is followed by deconvolutions; networks of the generation before (SRCNN, VDSR,
DRCN) enlarge the image bicubically first and run their whole body at high resolution. Here the same body does both,
for x2, x3 and x4: values, multiply-adds, and latency of the two, which take turns. Then SRDenseNet_H, _HL and _All at
x4 on the same image. Weights are random: they cost the same time as trained ones.

What limits it: the body's multiply-adds fall by exactly scale squared, the network's by less, because the
deconvolutions come on top (66 % of SRDenseNet_All x4 is in them). Latency follows the multiply-adds only as far as
both forms run at the same rate; small images run at a lower one.

How to read it: the ratio of one row. For x3 one deconvolution of stride 3 replaces the paper's pair, which only
doubles. Needs no network and no data.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srdeploy.cli.console import markdown_table
from srdeploy.core.environment import cpu_count
from srdeploy.core.imaging.resize import imresize
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.spec import network_of, spec_of
from srdeploy.models.networks.srdensenet import (
    Deconvolution,
    SrDenseNetConfig,
    srdensenet_all,
    srdensenet_h,
    srdensenet_hl,
)
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.turns import Effort, measure, statistics_of, why_unstable
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.engines.timer import timed


def all_at(scale: int) -> SrDenseNetConfig:
    """SRDenseNet_All for a scale; x3 with one deconvolution of stride 3."""
    if scale == 3:
        return replace(srdensenet_all(4), deconvolutions=(Deconvolution(kernel=3, stride=3),))
    return srdensenet_all(scale)


def body_at_high_resolution() -> SrDenseNetConfig:
    """The same body without deconvolutions, for an image that is enlarged beforehand."""
    return replace(srdensenet_all(4), deconvolutions=())


def loaded(config: SrDenseNetConfig) -> LoadedCheckpoint:
    """A checkpoint that no file holds: random weights of a fixed seed."""
    torch.manual_seed(0)
    evidence = Evidence("none", "random weights", "", "", (), {}, ())
    network = network_of(config).eval()
    return LoadedCheckpoint(Path("random.pt"), "0" * 64, "none", config, spec_of(config), network, evidence)


def values_of(config: SrDenseNetConfig) -> int:
    return sum(parameter.numel() for parameter in network_of(config).parameters())


class Workshop:
    """Opens networks in one engine and keeps them open until the end."""

    def __init__(self, engine: str, stack: ExitStack) -> None:
        self._engine = engine
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="srdeploy-claims-")))

    def opened(self, config: SrDenseNetConfig, name: str) -> Any:
        """Return a runner of a new network; `name` is for its ONNX file."""
        checkpoint = loaded(config)
        if self._engine == "eager":
            return self._stack.enter_context(open_eager(checkpoint))
        path = self._folder / f"{name}.onnx"
        export_onnx(checkpoint, path)
        return self._stack.enter_context(open_engine(path, engine=self._engine, parity=True))


def spaces(workshop: Workshop, side: int, effort: Effort) -> list[dict[str, Any]]:
    """Low-resolution computation against bicubic first, for x2, x3 and x4."""
    image = bench_image((1, 1, side, side))
    high = workshop.opened(body_at_high_resolution(), "high")
    rows = []
    for scale in (2, 3, 4):
        low = workshop.opened(all_at(scale), f"low{scale}")

        def at_low(low: Any = low) -> NDArray[np.float32]:
            result: NDArray[np.float32] = low.run({"input": image})["output"]
            return result

        def at_high(scale: int = scale) -> NDArray[np.float32]:
            enlarged = imresize(image[0, 0], scale=scale)[None, None]
            result: NDArray[np.float32] = high.run({"input": enlarged})["output"]
            return result

        assert at_low().shape == at_high().shape == (1, 1, side * scale, side * scale)
        times = durations([at_low, at_high], effort)
        print(f"x{scale}: " + " and ".join(f"{entry['median_ms']:.3g} ms" for entry in times), file=sys.stderr)
        body = spec_of(body_at_high_resolution()).macs_per_pixel
        macs_low, macs_high = spec_of(all_at(scale)).macs_per_pixel, body * scale**2
        rows.append(
            {
                "scale": scale,
                "macs_low": macs_low,
                "macs_high": macs_high,
                "body_ratio": float(scale**2),
                "macs_ratio": macs_high / macs_low,
                "low": times[0],
                "high": times[1],
                "latency_ratio": times[1]["median_ms"] / times[0]["median_ms"],
            }
        )
    return rows


def variants(workshop: Workshop, side: int, effort: Effort) -> list[dict[str, Any]]:
    """H, HL and All side by side at x4."""
    configurations = {"H": srdensenet_h(4), "HL": srdensenet_hl(4), "All": srdensenet_all(4)}
    image = bench_image((1, 1, side, side))
    runners = {name: workshop.opened(config, f"variant{name}") for name, config in configurations.items()}
    functions = [lambda runner=runner: runner.run({"input": image}) for runner in runners.values()]
    times = durations(functions, effort)
    return [
        {
            "variant": name,
            "values": values_of(config),
            "macs": spec_of(config).macs_per_pixel,
            **entry,
        }
        for (name, config), entry in zip(configurations.items(), times, strict=True)
    ]


def durations(functions: Sequence[Callable[[], object]], effort: Effort) -> list[dict[str, Any]]:
    measured = measure([timed(function) for function in functions], effort)
    statistics = [statistics_of(times) for times in measured]
    return [
        {
            "median_ms": entry.median_ms,
            "p90_ms": entry.p90_ms,
            "n": entry.n,
            "cov": entry.cov,
            "unstable": why_unstable(entry, effort),
        }
        for entry in statistics
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=24, help="low-resolution pixels per axis")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per row")
    parser.add_argument("--engine", default="eager", choices=["eager", "onnxruntime", "openvino"])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    effort = Effort(warmup_runs=2, warmup_seconds=0.3, min_runs=9, max_runs=200, seconds=options.seconds)
    with ExitStack() as stack:
        workshop = Workshop(options.engine, stack)
        by_scale = spaces(workshop, options.side, effort)
        by_variant = variants(workshop, options.side, effort)
    document = {
        "engine": options.engine,
        "side": options.side,
        "threads": cpu_count(),
        "spaces": by_scale,
        "variants": by_variant,
        "environment": conditions(),
    }
    print(f"\nBicubic first against low resolution, {options.engine} FP32, LR {options.side}x{options.side}\n")
    headers = ("scale", "M multiply-adds per LR pixel: low", "bicubic first", "ratio", "ratio of the bodies",
               "ms: low", "bicubic first", "ratio", "runs")  # fmt: skip
    rows = []
    for row in by_scale:
        macs = [f"{row[key] / 1e6:.3f}" for key in ("macs_low", "macs_high")]
        times = [f"{row[key]['median_ms']:.3g}" for key in ("low", "high")]
        ratios = f"{row['macs_ratio']:.2f}", f"{row['body_ratio']:.0f}"
        rows.append((f"x{row['scale']}", *macs, *ratios, *times, f"{row['latency_ratio']:.2f}", row["low"]["n"]))
    print(markdown_table(headers, rows))
    print("\nVariants at x4\n")
    lines = [
        (row["variant"], f"{row['values']:,}", f"{row['macs'] / 1e6:.3f}", f"{row['median_ms']:.3g}", row["n"])
        for row in by_variant
    ]
    print(markdown_table(("variant", "values", "M multiply-adds per LR pixel", "ms", "runs"), lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"paper_claims_{options.engine}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
