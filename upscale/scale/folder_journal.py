"""The journal of an output folder, in OUT/.srdeploy/journal/: one file per writer, read by all.

A writer is a process that upscales pictures into the folder. Its file begins with an entry about the run and goes on
with events about outputs:

    {"run": WRITER, "key": ..., "host": ..., "pid": ..., "shard": "0/4", "source": ..., "suffix": ..., "total": ...,
     "pictures": ..., "device": ..., "time": ...}
    {"output": "a.png", "source": "a.png", "state": "started" | "done" | "failed", "host": ..., "attempt": 1, ...}

`started` comes just before an output is renamed to its final name, `done` just after. An output is done if one writer
recorded it with the same input, network and settings, and the file still has the bytes that it recorded: no order
between writers, and no clock, is needed for that. For the rest, the latest event counts: a writer's times are later
than all that it has read, whatever its clock says, so what follows from an event comes after it.

A writer holds a lock on its file while it runs, which the system releases when the process ends in any way: a locked
file is a running writer.
"""

import os
import platform
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from srdeploy.core import file_lock
from srdeploy.core.artifact import output_errors, sha256_of_file
from srdeploy.core.errors import UsageError
from srdeploy.core.journal import Journal

JOURNALS = Path(".srdeploy", "journal")
OLD_JOURNAL = ".srdeploy-upscale.jsonl"
"""The only file of earlier versions; it is read, and not written any more."""
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[a-z0-9_]{8}(?P<suffix>\.[A-Za-z]+)")
"""Names that `srdeploy.core.artifact.atomic_file` gives to unfinished files."""
_TICK_SECONDS = 0.001


@dataclass(frozen=True)
class RunFacts:
    """What a writer records about its run.

    Attributes:
        key: hash of network and settings; empty when the writer runs no network itself.
        source: absolute path of the input folder.
        suffix: of all outputs, None for each input's.
        total: pictures in the whole folder.
        pictures: of these, pictures of this writer; None when others assign them.
        shard: "I/N", None without shards.
        device: where the network runs.
        others: keys of other engines whose results count as done too.
    """

    key: str
    source: str
    suffix: str | None
    total: int
    pictures: int | None = None
    shard: str | None = None
    device: str = ""
    others: frozenset[str] = field(default_factory=frozenset)


class _Done(NamedTuple):
    key: str
    sha256: str
    result: str


def journal_files(folder: Path) -> list[Path]:
    """Return the journal files of an output folder, oldest layout first."""
    old = folder / OLD_JOURNAL
    return ([old] if old.exists() else []) + sorted((folder / JOURNALS).glob("*.jsonl"))


def is_locked(path: Path) -> bool:
    """Return True if a running process writes to a journal file."""
    try:
        with path.open("rb") as stream:
            return file_lock.is_held(stream)
    except OSError:  # gone
        return False


class FolderJournal:
    """The events of all writers about the outputs of a folder, and the writer of this process.

    Use it as a context manager. Calls from several threads are safe.
    """

    def __init__(self, folder: Path, run: RunFacts) -> None:
        """Read what was recorded, and record that this run begins.

        Raises:
            UsageError: another run with other settings writes into this folder now.
            OutputError: the folder cannot be read and written.
        """
        self.folder = folder
        self.writer = uuid.uuid4().hex
        self._run = run
        self._lock = threading.RLock()
        self._latest: dict[str, str] = {}
        self._failed: set[str] = set()
        self._done: dict[str, set[_Done]] = {}
        self._tried: Counter[str] = Counter()
        path = folder / JOURNALS / f"{self.writer}.jsonl"
        self._journal = Journal(path, others=lambda: journal_files(folder))
        with _one_writer_begins(path.parent):
            self._journal.refresh()
            self._time = max(map(_time_of, self._journal.entries), default=0.0)
            self._refuse_other_settings()
            with output_errors(path):
                self._stream = path.open("ab")
            self._seen_by_others = file_lock.hold(self._stream)  # waits: `is_locked` takes it for a moment too
            try:
                facts = {name: value for name, value in vars(run).items() if name != "others"}
                self._append({"run": self.writer, "pid": os.getpid(), **facts})
            except BaseException:
                self._stream.close()
                path.unlink(missing_ok=True)
                raise
        for entry in sorted(self._journal.entries, key=_time_of):
            self._take(entry)
        self._journal.entries.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def started(self, output: str, **facts: Any) -> None:
        """Record that an output is about to get its final name."""
        self._event(output, "started", facts)

    def done(self, output: str, **facts: Any) -> None:
        """Record a finished output."""
        self._event(output, "done", {**facts, "result": sha256_of_file(self.folder / output)})

    def failed(self, output: str, **facts: Any) -> None:
        """Record a failure."""
        self._event(output, "failed", facts)

    def is_done(self, output: str, sha256: str) -> bool:
        """Return True if an output was made from an input of this hash, with these settings, and is unchanged."""
        accepted = {self._run.key, *self._run.others}
        with self._lock:
            found = self._done.get(output, set())
            results = {each.result for each in found if each.key in accepted and each.sha256 == sha256}
        path = self.folder / output
        return bool(results) and path.is_file() and sha256_of_file(path) in results

    def was_started(self, output: str) -> bool:
        """Return True if a run of ours was killed, or is, where it gives this output its final name."""
        with self._lock:
            return self._latest.get(output) == "started"

    def has_failed(self, output: str) -> bool:
        """Return True if the latest event about an output is a failure."""
        with self._lock:
            return output in self._failed

    def refresh(self) -> None:
        """Read what other writers have recorded since."""
        with self._lock:
            for entry in self._journal.refresh():
                self._time = max(self._time, _time_of(entry))
                self._take(entry)

    def running_writers(self) -> list[Path]:
        """Return the journal files of other writers that run now."""
        return [path for path in journal_files(self.folder) if path != self._journal.path and is_locked(path)]

    def wait_for_others(self, seconds: float) -> None:
        """Wait until no other writer runs, but not longer than some seconds."""
        deadline = time.monotonic() + seconds
        while self.running_writers() and time.monotonic() < deadline:
            time.sleep(0.1)

    def remove_leftovers(self, outputs: Iterable[str]) -> None:
        """Remove unfinished files of killed writers, next to these outputs; nothing while another writer runs."""
        with _one_writer_begins(self.folder / JOURNALS):  # one that began now would lose the file that it writes
            if self._seen_by_others and not self.running_writers():  # where no lock is held, none is seen either
                self._remove_leftovers(outputs)

    def _remove_leftovers(self, outputs: Iterable[str]) -> None:
        folders: dict[Path, set[tuple[str, str]]] = {}
        for output in outputs:
            path = self.folder / output
            folders.setdefault(path.parent, set()).add((path.stem[:60], path.suffix))
        for folder, names in folders.items():
            if not folder.is_dir():
                continue
            with output_errors(folder):
                for path in folder.iterdir():
                    match = _TEMPORARY.fullmatch(path.name)
                    if match and (match["stem"], match["suffix"]) in names:
                        path.unlink(missing_ok=True)

    def _event(self, output: str, state: str, facts: Mapping[str, Any]) -> None:
        entry = {"output": output, "state": state, "key": self._run.key, **facts}
        with self._lock:
            self._take(entry)
            attempt = self._tried[output] + (state != "failed")
            self._append({"attempt": attempt, **entry})

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self._time = max(round(time.time(), 3), round(self._time + _TICK_SECONDS, 3))
            self._journal.append({"host": platform.node(), "time": self._time, **entry})

    def _take(self, entry: Mapping[str, Any]) -> None:
        output, state = entry.get("output"), entry.get("state")
        if not isinstance(output, str):
            return
        if state == "failed":
            self._tried[output] += 1
            self._failed.add(output)
        elif state in ("started", "done"):
            if state == "started" and self._latest.get(output) == "started":
                self._tried[output] += 1  # the earlier one was killed
            self._failed.discard(output)
            self._latest[output] = state
            if state == "done":
                values = (str(entry.get(name)) for name in ("key", "sha256", "result"))
                self._done.setdefault(output, set()).add(_Done(*values))

    def _refuse_other_settings(self) -> None:
        running = {path.stem for path in self.running_writers()}
        for entry in runs_of(self._journal.entries):
            accepted = entry.get("key") in (self._run.key, "", *self._run.others)
            if entry["run"] in running and not accepted and self._run.key:
                raise UsageError(
                    f"another run with another network or other settings writes into {self.folder} "
                    f"(process {entry.get('pid')} on {entry.get('host')})",
                    next_step="wait for it, or choose another output folder",
                )


def runs_of(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries about runs, in order of their time."""
    return sorted((entry for entry in entries if "run" in entry), key=_time_of)


def _time_of(entry: Mapping[str, Any]) -> float:
    value = entry.get("time", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


@contextmanager
def _one_writer_begins(journals: Path) -> Iterator[None]:
    """Let one writer at a time look at the running ones and record itself.

    Two that begin at once would otherwise both find nobody; clocks cannot tell which was first.
    """
    path = journals / "begin.lock"
    with output_errors(path):
        stream = path.open("ab")
    with stream:
        file_lock.hold(stream)
        yield
