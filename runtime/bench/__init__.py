"""Latency, memory and throughput of runners, measured side by side under one set of rules."""

from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.latency import BenchResult, bench
from srdeploy.runtime.bench.memory import process_memory
from srdeploy.runtime.bench.turns import Effort

__all__ = ["BenchResult", "Effort", "bench", "bench_image", "conditions", "process_memory"]
