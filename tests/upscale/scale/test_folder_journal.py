"""The journal of an output folder with several writers."""

import errno
import fcntl
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from srdeploy.core.errors import UsageError
from srdeploy.upscale.scale import folder_journal
from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts, is_locked, journal_files


def run(key: str = "key", **changes: object) -> RunFacts:
    return RunFacts(key=key, source="/in", suffix=None, total=2, **changes)  # type: ignore[arg-type]


def make(journal: FolderJournal, output: str, content: bytes, sha256: str = "input") -> None:
    journal.started(output, sha256=sha256)
    (journal.folder / output).write_bytes(content)
    journal.done(output, sha256=sha256)


def test_what_one_writer_made_is_done_for_the_others(tmp_path: Path) -> None:
    with FolderJournal(tmp_path, run()) as one, FolderJournal(tmp_path, run()) as two:
        make(one, "a.png", b"pixels")
        before = two.is_done("a.png", "input")
        two.refresh()

        assert not before
        assert two.is_done("a.png", "input")
        assert not two.is_done("a.png", "another input")
        (tmp_path / "a.png").write_bytes(b"edited")
        assert not two.is_done("a.png", "input")
    with FolderJournal(tmp_path, run("other")) as other:
        assert not other.is_done("a.png", "input")
    with FolderJournal(tmp_path, run("other", others=frozenset({"key"}))) as mixed:
        (tmp_path / "a.png").write_bytes(b"pixels")
        assert mixed.is_done("a.png", "input")


def test_attempts_are_counted_over_all_writers(tmp_path: Path) -> None:
    attempts = []
    for state in ("started", "failed", "started", "done"):
        with FolderJournal(tmp_path, run()) as journal:
            (tmp_path / "a.png").write_bytes(b"pixels")
            getattr(journal, state)("a.png", sha256="input")
            attempts.append(journal._journal.entries[-1]["attempt"])

    assert attempts == [1, 1, 3, 3]  # a start without an end counts as an attempt once another one starts


def test_a_writer_is_locked_while_it_runs(tmp_path: Path) -> None:
    with FolderJournal(tmp_path, run()) as journal:
        (path,) = journal_files(tmp_path)
        locked = is_locked(path)
        seen = journal.running_writers()

    assert locked
    assert seen == []  # of others
    assert not is_locked(path)


def test_two_runs_with_other_settings_at_once_are_refused_and_one_after_the_other_are_not(tmp_path: Path) -> None:
    with FolderJournal(tmp_path, run("one")):
        with pytest.raises(UsageError, match=r"other settings writes into .* \(process [0-9]+ on "):
            FolderJournal(tmp_path, run("two"))
        assert len(journal_files(tmp_path)) == 1
    with FolderJournal(tmp_path, run("two")):
        pass


@pytest.mark.parametrize("seconds", [0.0, -3600.0])
def test_the_second_run_is_refused_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock = itertools.count(1e9, seconds)
    monkeypatch.setattr(folder_journal.time, "time", lambda: next(clock))
    for repeat in range(10):  # the writers' names are random
        folder = tmp_path / str(repeat)
        with FolderJournal(folder, run("one")), pytest.raises(UsageError):
            FolderJournal(folder, run("two"))


def test_of_runs_with_different_settings_that_begin_at_once_one_goes_on(tmp_path: Path) -> None:
    begin = threading.Barrier(8)

    def attempt(key: int) -> FolderJournal | None:
        begin.wait()
        try:
            return FolderJournal(tmp_path, run(str(key)))
        except UsageError:
            return None

    with ThreadPoolExecutor(8) as threads:
        begun = [journal for journal in threads.map(attempt, range(8)) if journal]

    assert len(begun) == 1
    assert begun[0].running_writers() == []
    with begun[0]:
        (path,) = journal_files(tmp_path)
        assert is_locked(path)


def test_leftovers_of_killed_writers_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    leftovers = [".a.k3j_x9ab.png", ".b.c.abcdefgh.tif"]
    kept = [".a.k3j_x9ab.jpg", ".z.abcdefgh.png", ".a.short.png", "a.abcdefgh.png", ".hidden"]
    for name in leftovers + kept:
        (tmp_path / name).touch()

    with FolderJournal(tmp_path, run()) as journal:
        with FolderJournal(tmp_path, run()):
            journal.remove_leftovers(["a.png", "b.c.tif"])
            while_another_runs = {path.name for path in tmp_path.iterdir() if path.is_file()}
        journal.remove_leftovers(["a.png", "b.c.tif", "nowhere/x.png"])

    assert while_another_runs == {*leftovers, *kept}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(kept)


def test_what_follows_from_an_event_comes_after_it_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is an hour ahead fails at a picture; one with the right clock makes it afterwards."""
    (tmp_path / "a.png").write_bytes(b"made")
    for repeat, seconds in enumerate([2e9, 1e9, 1e9]):
        monkeypatch.setattr(folder_journal.time, "time", lambda now=seconds: now)
        with FolderJournal(tmp_path, run()) as journal:
            assert journal.has_failed("a.png") is (repeat == 1)
            if repeat == 0:
                journal.failed("a.png", sha256="in", source="a.png", error="no memory", exit_code=8)
            elif repeat == 1:
                journal.started("a.png", sha256="in", source="a.png")
                journal.done("a.png", sha256="in", source="a.png")
            else:
                assert not journal.was_started("a.png")


def test_a_writer_that_begins_while_leftovers_are_removed_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, threads = FolderJournal.running_writers, []

    def write() -> None:
        with FolderJournal(tmp_path, run("second")):
            (tmp_path / ".a.abcdefgh.png").touch()

    def looked(self: FolderJournal) -> list[Path]:
        found = real(self)
        if self.writer == first.writer and not threads:
            threads.append(threading.Thread(target=write))
            threads[0].start()
            threads[0].join(0.3)  # it would be done by then, if it did not have to wait
        return found

    first = FolderJournal(tmp_path, run(""))
    monkeypatch.setattr(FolderJournal, "running_writers", looked)
    with first:
        first.remove_leftovers(["a.png"])
    threads[0].join()

    assert (tmp_path / ".a.abcdefgh.png").exists()


def test_nothing_is_removed_where_running_writers_are_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".a.abcdefgh.png").touch()
    with FolderJournal(tmp_path, run("")) as journal:
        journal.remove_leftovers(["a.png"])

    assert (tmp_path / ".a.abcdefgh.png").exists()
