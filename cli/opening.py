"""What `verify` and `bench` share: opening the candidates under names that tell them apart, and recording the call."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from srdeploy.cli.console import warning_line
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.errors import InputError
from srdeploy.core.runner import Runner, RunnerInfo

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import LoadedCheckpoint
    from srdeploy.runtime.report.document import EngineEntry
    from srdeploy.runtime.verify.parity import VerifyResult


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
    """Open ONNX files and engines for comparison with a checkpoint, each under another name.

    Raises:
        InputError: one has another scale or other colours than the checkpoint, or is not understood.
        CapabilityError: one cannot run on this machine.
    """
    from srdeploy.runtime.bench.latency import named
    from srdeploy.runtime.engines.registry import open_engine

    contract = loaded.contract()
    runners: list[Runner] = []
    for path in candidates:
        runner = stack.enter_context(open_engine(path, engine=engine, device=device, threads=threads, parity=parity))
        found = runner.info.contract
        if (found.scale, found.colours, found.trim) != (contract.scale, contract.colours, contract.trim):
            raise InputError(
                f"{path} is x{found.scale} {found.colours}",
                expected=f"x{contract.scale} {contract.colours} as {loaded.path}",
                next_step="name the checkpoint that it came from",
            )
        if found.checkpoint_sha256 != contract.checkpoint_sha256:
            warning_line(f"{path} was made from another checkpoint than {loaded.path} (SHA-256 differs)")
        name, taken = runner.info.name, {runner.info.name for runner in runners}
        if name in taken:
            name = f"{name} ({path.name})"
        runners.append(runner if name == runner.info.name else named(runner, name))
    return runners


def engine_entry(path: Path, result: "VerifyResult") -> "EngineEntry":
    """Return a judged file as a line of the report."""
    from srdeploy.runtime.report.document import EngineEntry

    return EngineEntry(
        name=result.candidate.name,
        engine=result.candidate.engine,
        precision=result.candidate.contract.precision,
        file=path.name,
        size_bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        precision_built=built_words(result.candidate.built),
        verify=result,
    )


def built_words(built: object) -> str | None:
    """Write the convolutions that were read back from an engine: "29 int8, 3 fp32"."""
    convolutions = built.get("convolutions") if hasattr(built, "get") else None
    if not convolutions:
        return None
    return ", ".join(f"{count} {label}" for label, count in convolutions.items()) + " convolutions"


def spoken_command() -> str:
    """Return the command line of this process as one would type it."""
    return shlex.join(["srdeploy", *sys.argv[1:]])


def benched_entry(path: Path, info: RunnerInfo) -> "EngineEntry":
    """Return a measured file that was not judged as a line of the report."""
    from srdeploy.runtime.report.document import EngineEntry

    return EngineEntry(
        name=info.name,
        engine=info.engine,
        precision=info.contract.precision,
        file=path.name,
        size_bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        precision_built=built_words(info.built),
        reason="measured only; judge it with: srdeploy verify",
        measured=True,
    )
