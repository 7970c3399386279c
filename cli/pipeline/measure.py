"""Latency next to the eager FP32 network on the engine's own device: for `bench`, and a stage of `deploy`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from srdeploy.cli.pipeline.engines import threads_for
from srdeploy.cli.pipeline.opening import by_device
from srdeploy.cli.pipeline.types import Candidate, Work
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.bench.baselines import default_baselines, open_baselines
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.floor import Cost
from srdeploy.runtime.bench.latency import BenchResult, bench, with_floors, with_process_memory
from srdeploy.runtime.bench.naming import measured_runner
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines.registry import open_engine

Baselines = Callable[[str], Sequence[Runner]]
"""Opens the baselines of a device ("cpu", "cuda:0"), the eager FP32 network first."""


def with_baselines(runners: Sequence[Runner], baselines: Baselines) -> list[list[Runner]]:
    """Group runners by device, each group after the baselines of its device.

    A baseline that has the name of a runner is omitted: it is measured already.
    """
    groups = []
    for device, group in by_device(runners).items():
        names = {runner.info.name for runner in group}
        others = [runner for runner in baselines(device) if runner.info.name not in names]
        groups.append([*others, *group])
    return groups


def measure_groups(
    groups: Sequence[Sequence[Runner]],
    shape: Shape,
    *,
    cost: Cost | None = None,
    effort: Effort | None = None,
    progress: Progress = SILENT,
) -> list[BenchResult]:
    """Measure each group of `with_baselines` in turns; ratios refer to its first runner, eager FP32 on that device.

    With the `cost` of the network, rows state their distance to the device's floor.
    """
    results = [
        bench(group, shape=shape, effort=effort, environment=conditions(), progress=progress) for group in groups
    ]
    return results if cost is None else [with_floors(result, cost) for result in results]


def with_process_memories(
    results: Sequence[BenchResult], files: Mapping[str, tuple[Path, str | None]], threads: int | None
) -> list[BenchResult]:
    """Return the results with the memory that each file needs in a process of its own.

    Args:
        results: of `measure_groups`; call this when the measured runners are closed.
        files: by runner name, the file and the engine family that opens it (None for the file's own).
        threads: CPU threads.
    """
    completed = []
    for result in results:
        measured = {row.runner.name for row in result.rows}
        own = {name: entry for name, entry in files.items() if name in measured}
        completed.append(with_process_memory(result, own, threads=threads))
    return completed


def measure_engines(
    work: Work,
    candidates: Sequence[Candidate],
    checkpoint: LoadedCheckpoint,
    effort: Effort | None,
    report: list[str],
) -> tuple[BenchResult, ...]:
    """Measure engines in turns with the eager network; empty when there is none to measure."""
    if not candidates:
        report.append("no engine runs here")
        return ()
    threads = work.options.threads
    shape = work.options.bench_shape(checkpoint.contract(), [candidate.device for candidate in candidates])
    with ExitStack() as stack:
        runners: list[Runner] = []
        for candidate in candidates:
            opener = partial(
                open_engine,
                work.folder / candidate.file,
                engine=candidate.engine,
                device=candidate.device,
                threads=threads_for(candidate.engine, threads),
            )
            runners.append(stack.enter_context(measured_runner(opener, candidate.name)))

        def baselines(device: str) -> Sequence[Runner]:
            # On the CPU the other forms cost minutes and are not faster than the engines; `bench` measures them.
            names = () if device == "cpu" else default_baselines(device)
            return open_baselines(
                checkpoint, names, stack, shape=shape, device=device, threads=threads, progress=work.progress
            ).runners

        groups = with_baselines(runners, baselines)
        results = measure_groups(groups, shape, cost=checkpoint.spec, effort=effort, progress=work.progress)
    files: dict[str, tuple[Path, str | None]] = {
        entry.name: (work.folder / entry.file, entry.engine) for entry in candidates
    }
    results = with_process_memories(results, files, threads)
    report.append(f"{sum(map(len, groups))} networks in turns at {format_shape(shape)}")
    names = [candidate.name for candidate in candidates]
    report += [fastest.sentence for result in results if (fastest := result.fastest(names)) is not None]
    return tuple(results)
