"""The journal of a search: two processes that measure the same share its folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.calibration.journal import Journal
from srdeploy.calibration.observe import Observation


def observation() -> Observation:
    values = np.arange(3, dtype=np.float64)
    return Observation(low=values, high=values, total=values, counts=values, images=2, limit=values, zeros=0)


def other(folder: Path) -> Journal:
    """Another process that has begun."""
    journal = Journal("graph", folder=folder)
    journal.number("first", lambda: 1.0)
    return journal


def once(action: Callable[[], object]) -> Callable[[], None]:
    """Return a function that does something at its first call alone."""
    pending = [action]

    def act() -> None:
        if pending:
            pending.pop()()

    return act


def test_a_process_that_is_done_does_not_disturb_another_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Journal("graph", folder=tmp_path), other(tmp_path)
    first.number("first", lambda: pytest.fail("it was measured before"))
    chmod = Path.chmod

    def close_late(self: Path, mode: int) -> None:
        if self.suffix == ".npz":
            first.close()
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", close_late)  # after the file was written, and before it gets its name
    found = second.observations("key", lambda: {"map": observation()})

    assert list(found) == ["map"]
    assert second.number("second", lambda: 2.0) == 2.0


def test_a_file_that_appears_while_a_journal_is_closed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Journal("graph", folder=tmp_path), other(tmp_path)
    assert first.resumed
    measure = once(lambda: second.observations("key", lambda: {"map": observation()}))
    unlink = Path.unlink

    def unlink_late(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        if self.suffix == ".jsonl":
            measure()

    monkeypatch.setattr(Path, "unlink", unlink_late)
    first.close()

    (left,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left.name == "seen-key.npz"


def test_two_processes_close_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Journal("graph", folder=tmp_path), other(tmp_path)
    assert first.resumed
    close = once(second.close)
    rmdir = Path.rmdir

    def rmdir_late(self: Path) -> None:
        close()
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", rmdir_late)
    first.close()

    assert list(tmp_path.iterdir()) == []


def test_observations_that_were_cut_short_are_made_again(tmp_path: Path) -> None:
    Journal("graph", folder=tmp_path).observations("key", lambda: {"map": observation()})
    (path,) = tmp_path.rglob("seen-key.npz")
    path.write_bytes(path.read_bytes()[:-10])

    found = Journal("graph", folder=tmp_path).observations("key", lambda: {"again": observation()})

    assert list(found) == ["again"]
