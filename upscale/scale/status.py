"""How far the work on an output folder is, from its journal alone: no process and no cluster is asked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import output_errors
from srdeploy.core.errors import InputError
from srdeploy.core.journal import read_entries
from srdeploy.upscale.scale.folder_journal import is_locked, journal_files, runs_of
from srdeploy.upscale.scale.shards import shard_index
from srdeploy.upscale.scale.targets import Target, find_targets


@dataclass(frozen=True)
class Failure:
    """The last failure of a picture that has no output since."""

    error: str
    exit_code: int
    host: str
    attempt: int


@dataclass(frozen=True)
class FolderStatus:
    """The state of an output folder.

    Attributes:
        source: the input folder of the latest run.
        total: pictures in it.
        done: of these, pictures with an output.
        failed: pictures whose last attempt failed.
        left: pictures that are neither; None if the input folder cannot be read here.
        left_count: how many they are.
        left_by_shard: the same by shard "I/N", if the latest run was a shard and they are known.
        running: writers at work now: host, pid, shard, device.
        done_by_host: outputs made, by host.
    """

    source: str
    total: int
    done: int
    failed: dict[str, Failure]
    left: list[str] | None
    left_count: int
    left_by_shard: dict[str, int]
    running: list[dict[str, Any]]
    done_by_host: dict[str, int] = field(default_factory=dict)

    @property
    def failed_by_host(self) -> dict[str, int]:
        """Number of failed pictures by host."""
        return dict(sorted(Counter(failure.host for failure in self.failed.values()).items()))

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return {**asdict(self), "failed_by_host": self.failed_by_host}


def folder_status(output: Path) -> FolderStatus:
    """Read the state of an output folder from its journal.

    Raises:
        InputError: there is no journal of this version in it.
        OutputError: the journal cannot be read.
    """
    with output_errors(output):
        files = journal_files(output)
        entries = read_entries(files)
    runs = runs_of(entries)
    if not runs:
        raise InputError(
            f"{output} has no journal of an upscaled folder",
            expected="the output folder of srdeploy upscale FOLDER -o OUT",
        )
    latest = runs[-1]
    targets = _targets(latest, output)
    events = _latest_events(entries)
    failed = {
        str(event.get("source") or name): _failure(event)
        for name, event in events.items()
        if event.get("state") == "failed"
    }
    done = {name: event for name, event in events.items() if event.get("state") == "done" and (output / name).is_file()}
    total = int(latest.get("total", 0)) if targets is None else len(targets)
    left = None
    if targets is not None:
        left = [each.source for each in targets if each.output not in done and each.source not in failed]
        done = {each.output: done[each.output] for each in targets if each.output in done}
    return FolderStatus(
        source=str(latest.get("source")),
        total=total,
        done=len(done),
        failed=dict(sorted(failed.items())),
        left=left,
        left_count=total - len(done) - len(failed) if left is None else len(left),
        left_by_shard=_by_shard(left, latest.get("shard")),
        running=[
            {name: run.get(name) for name in ("host", "pid", "shard", "device")}
            for run in runs
            if is_locked(next((file for file in files if file.stem == run["run"]), output))
        ],
        done_by_host=dict(sorted(Counter(str(event.get("host", "")) for event in done.values()).items())),
    )


def _targets(run: Mapping[str, Any], output: Path) -> list[Target] | None:
    """Return the pictures of a run and their outputs; None if its input folder cannot be read here."""
    try:
        found = find_targets(Path(str(run["source"])), output, run.get("suffix"))
    except InputError:
        return None
    return [*found.items, *(Target(name, "") for name in found.collisions)]


def _latest_events(entries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the event that counts for each output: `done` before all others, else the latest."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: float(entry.get("time", 0.0))):
        if "output" in entry and entry.get("state") in ("started", "done", "failed"):
            # Pictures without an output of their own are known by their source.
            found[str(entry["output"] or f"/{entry.get('source')}")] = entry
    return found


def _failure(event: Mapping[str, Any]) -> Failure:
    return Failure(
        str(event.get("error")), int(event.get("exit_code", 1)), str(event.get("host")), int(event.get("attempt", 1))
    )


def _by_shard(left: list[str] | None, shard: Any) -> dict[str, int]:
    if left is None or not isinstance(shard, str):
        return {}
    count = int(shard.partition("/")[2])
    found = Counter(shard_index(name, count) for name in left)
    return {f"{index}/{count}": found[index] for index in sorted(found)}
