"""Lines of a report about files that were verified or measured, and the command that made it."""

import shlex
import sys
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.runner import RunnerInfo
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.report.document import EngineEntry
from srdeploy.runtime.verify.parity import VerifyResult


def verified_entry(path: Path, result: VerifyResult) -> EngineEntry:
    """Return the report's line of a verified file."""
    return _entry(path, result.candidate, verify=result)


def measured_entry(path: Path, info: RunnerInfo) -> EngineEntry:
    """Return the report's line of a file that was measured and not verified."""
    return _entry(path, info, reason="measured only; verify it with: srdeploy verify", measured=True)


def checkpoint_entry(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Return the report's description of a checkpoint."""
    return {
        "name": loaded.path.name,
        "sha256": loaded.sha256,
        "dialect": loaded.dialect,
        "evidence": loaded.evidence.to_json(),
    }


def this_command() -> str:
    """Return the command line of this process as it would be typed."""
    return shlex.join(["srdeploy", *sys.argv[1:]])


def _entry(
    path: Path,
    info: RunnerInfo,
    *,
    verify: VerifyResult | None = None,
    reason: str | None = None,
    measured: bool = False,
) -> EngineEntry:
    return EngineEntry(
        name=info.name,
        engine=info.engine,
        precision=info.contract.precision,
        file=path.name,
        size_bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        precision_built=_convolutions(info.built),
        verify=verify,
        reason=reason,
        measured=measured,
    )


def _convolutions(built: object) -> str | None:
    """Write the convolutions that were read back from an engine: "29 int8, 3 fp32"."""
    convolutions = built.get("convolutions") if hasattr(built, "get") else None
    if not convolutions:
        return None
    return ", ".join(f"{count} {label}" for label, count in convolutions.items()) + " convolutions"
