"""Open engines and ONNX files next to the eager network, the one way for `verify`, `bench` and `deploy`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from srdeploy.cli.console import warning_line
from srdeploy.core.errors import InputError
from srdeploy.core.precision import Target
from srdeploy.core.runner import Runner
from srdeploy.runtime.bench.naming import measured_runner, named
from srdeploy.runtime.engines.registry import open_engine

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import LoadedCheckpoint

Opened = TypeVar("Opened", bound=Runner)


def open_candidates(
    candidates: Sequence[Path],
    loaded: "LoadedCheckpoint",
    stack: ExitStack,
    *,
    engine: str | None,
    device: str,
    threads: int | None,
    parity: bool,
) -> list[Runner]:
    """Open ONNX files and engines for comparison with a checkpoint, each under a name of its own.

    Raises:
        InputError: one has another scale or other colors than the checkpoint, or is not understood.
        CapabilityError: one cannot run on this machine.
    """
    contract = loaded.contract()
    runners: list[Runner] = []
    for path in candidates:
        opener = partial(open_engine, path, engine=engine, device=device, threads=threads, parity=parity)
        # A comparison opens an engine once; a measurement may open it several times.
        runner = stack.enter_context(opener() if parity else measured_runner(opener))
        found = runner.info.contract
        if found.form.io == "uint8" or found.form.color_wrapper:
            raise InputError(
                f"{path} is in a form for a consumer ({found.form})",
                expected="a graph that takes and returns what PyTorch's network does",
                next_step="name the plain graph that it was made from: export compared the two",
            )
        if (found.scale, found.colours, found.trim) != (contract.scale, contract.colours, contract.trim):
            raise InputError(
                f"{path} is x{found.scale} {found.colours}",
                expected=f"x{contract.scale} {contract.colours} as {loaded.path}",
                next_step="name the checkpoint that it was made from",
            )
        if found.checkpoint_sha256 != contract.checkpoint_sha256:
            warning_line(f"{path} was made from another checkpoint than {loaded.path} (SHA-256 differs)")
        name, taken = runner.info.name, {runner.info.name for runner in runners}
        if name in taken:
            name = f"{name} ({path.name})"
        runners.append(runner if name == runner.info.name else named(runner, name))
    return runners


def engine_opener(target: Target, threads: int | None) -> Callable[[Path], Runner] | None:
    """Return a function that opens an ONNX file with the target's engine to evaluate it.

    The engine is opened in its parity mode, so that a graph is evaluated in the arithmetic that it states: a processor
    with BF16 units would otherwise compute float layers in BF16. None when no engine of the target opens ONNX files.
    """
    if target not in (Target.OPENVINO, Target.ONNXRUNTIME):
        return None
    return partial(open_engine, engine=target.value, threads=threads, parity=True)


def by_device(runners: Sequence[Opened]) -> dict[str, list[Opened]]:
    """Group runners by the device that they run on, in the order of their first appearance."""
    groups: dict[str, list[Opened]] = {}
    for runner in runners:
        groups.setdefault(runner.info.device, []).append(runner)
    return groups
