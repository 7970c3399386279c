"""Artifacts are written whole or not at all: whatever happens in the block, the previous one stays intact."""

import errno
import hashlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from srdeploy.core.artifact import (
    _umask,
    atomic_file,
    atomic_files,
    atomic_folder,
    sha256_of_bytes,
    sha256_of_file,
)
from srdeploy.core.errors import OutputError, UsageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_block_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.onnx"

    with atomic_file(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".onnx"
        temporary.write_bytes(b"whole")
        assert not target.exists()

    assert target.read_bytes() == b"whole"
    assert names(target.parent) == ["model.onnx"]


def test_a_new_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")

    with atomic_file(tmp_path / "atomic") as temporary:
        temporary.write_bytes(b"")

    assert (tmp_path / "atomic").stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_failed_block_keeps_the_previous_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"previous")

    with pytest.raises(type(error)), atomic_file(target, force=True) as temporary:
        temporary.write_bytes(b"half")
        raise error

    assert target.read_bytes() == b"previous"
    assert names(tmp_path) == ["model.onnx"]


def test_an_existing_file_is_refused_without_force_before_the_block_runs(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"previous")

    with pytest.raises(UsageError, match="exists already.*--force"), atomic_file(target):
        pytest.fail("the block must not run")

    assert target.read_bytes() == b"previous"


def test_a_set_changes_as_one(tmp_path: Path) -> None:
    engine, sidecar = tmp_path / "e.plan", tmp_path / "e.plan.json"
    engine.write_text("old")
    sidecar.write_text("old")

    with pytest.raises(RuntimeError), atomic_files(engine, sidecar, force=True) as (first, _):
        first.write_text("new")
        raise RuntimeError

    assert (engine.read_text(), sidecar.read_text()) == ("old", "old")

    with atomic_files(engine, sidecar, force=True) as (first, second):
        first.write_text("new")
        second.write_text("new")

    assert (engine.read_text(), sidecar.read_text()) == ("new", "new")
    assert names(tmp_path) == ["e.plan", "e.plan.json"]


def test_an_output_the_block_did_not_write_keeps_its_previous_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    second.write_text("old")

    with atomic_files(first, second, force=True) as (temporary, _):
        temporary.write_text("new")

    assert (first.read_text(), second.read_text()) == ("new", "old")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left.*free some space"),
        (errno.EDQUOT, "quota exceeded.*free some space"),
        (errno.EROFS, "read-only.*choose a folder"),
        (errno.EACCES, "permission denied.*choose a folder"),
    ],
    ids=["disk full", "quota", "read-only", "permission"],
)
def test_a_refusal_of_the_system_becomes_one_line(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(OutputError, match=words) as caught, atomic_file(tmp_path / "out") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    assert caught.value.exit_code == 8
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_an_os_error_that_is_not_about_the_output_stays_a_bug(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught, atomic_file(tmp_path / "out"):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    assert not isinstance(caught.value, OutputError)


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with (
        pytest.raises(OutputError, match="cannot write into .*file: it is a file"),
        atomic_file(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.tmpfs
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a tmpfs needs root on Linux")
def test_a_really_full_disk_keeps_the_previous_file(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        target = tmp_path / "model.onnx"
        target.write_bytes(b"previous")

        with pytest.raises(OutputError, match="free some space"), atomic_file(target, force=True) as temporary:
            temporary.write_bytes(bytes(1 << 20))

        assert target.read_bytes() == b"previous"
        assert names(tmp_path) == ["model.onnx"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_takes_its_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "rcan.srd"

    with atomic_folder(target) as temporary:
        (temporary / "report").mkdir()
        (temporary / "report" / "report.json").write_text("{}")
        assert not target.exists()

    assert (target / "report" / "report.json").read_text() == "{}"
    assert names(tmp_path) == ["rcan.srd"]


def test_a_failed_folder_keeps_the_previous_one(tmp_path: Path) -> None:
    target = tmp_path / "rcan.srd"
    target.mkdir()
    (target / "manifest.json").write_text("previous")

    with pytest.raises(KeyboardInterrupt), atomic_folder(target, force=True) as temporary:
        (temporary / "manifest.json").write_text("half")
        raise KeyboardInterrupt

    assert (target / "manifest.json").read_text() == "previous"
    assert names(tmp_path) == ["rcan.srd"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "rcan.srd"
    target.mkdir()
    (target / "stale").write_text("")

    with atomic_folder(target, force=True) as temporary:
        (temporary / "fresh").write_text("")

    assert names(target) == ["fresh"]
    assert names(tmp_path) == ["rcan.srd"]


def test_a_folder_refuses_an_existing_one_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")

    with pytest.raises(UsageError, match="exists already"), atomic_folder(tmp_path / "folder"):
        pytest.fail("the block must not run")
    with pytest.raises(UsageError, match="is a file"), atomic_folder(tmp_path / "file", force=True):
        pytest.fail("the block must not run")

    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_the_renames_arrives_after_them(tmp_path: Path, name: str) -> None:
    # In a process of its own: the signal is raised from inside the first rename of a pair.
    script = textwrap.dedent(f"""
        import pathlib, signal
        from srdeploy.core import interrupts
        from srdeploy.core.artifact import atomic_files
        interrupts.install()
        folder = pathlib.Path({str(tmp_path)!r})
        real = pathlib.Path.replace
        def replace(self, target):
            signal.raise_signal(signal.{name})
            return real(self, target)
        pathlib.Path.replace = replace
        try:
            with atomic_files(folder / "a", folder / "b") as (a, b):
                a.write_text("new"); b.write_text("new")
        except (KeyboardInterrupt, SystemExit):
            print("interrupted afterwards")
    """)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)

    assert done.stdout == "interrupted afterwards\n", done.stderr
    assert names(tmp_path) == ["a", "b"]


def test_sigint_still_works_after_a_write(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("x")

    assert signal.getsignal(signal.SIGINT) is before


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    data = b"0123456789" * 100_000
    (tmp_path / "data").write_bytes(data)

    assert sha256_of_file(tmp_path / "data") == sha256_of_bytes(data) == hashlib.sha256(data).hexdigest()


def test_what_another_process_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    for path in (tmp_path / "engine", tmp_path / "sidecar"):
        with (
            pytest.raises(UsageError, match="exists already"),
            atomic_files(tmp_path / "engine", tmp_path / "sidecar") as temporaries,
        ):
            for temporary in temporaries:
                temporary.write_text("ours")
            path.write_text("theirs")

        assert path.read_text() == "theirs"
        assert names(tmp_path) == [path.name], "both or none"
        path.unlink()


def test_a_folder_that_another_process_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "rcan.srd"
    for force, words in ((False, "exists already"), (True, "folder of other files")):
        with pytest.raises(UsageError, match=words), atomic_folder(target, force=force, known_by="manifest.json"):
            target.mkdir(exist_ok=True)
            (target / "theirs").touch()

    assert names(tmp_path) == ["rcan.srd"]
    assert names(target) == ["theirs"]


def test_a_folder_made_between_the_last_look_and_the_rename_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "rcan.srd"
    target.mkdir()
    real = Path.replace

    def replace(self: Path, new: Path) -> Path:
        new.mkdir()
        (new / "theirs").touch()
        return real(self, new)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UsageError, match="written by another process meanwhile"), atomic_folder(target, force=True):
        pass

    assert names(tmp_path) == ["rcan.srd"]
    assert names(target) == ["theirs"]


def test_a_folder_that_another_process_moves_away_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "rcan.srd"
    target.mkdir()
    real = Path.rename

    def rename(self: Path, new: Path) -> Path:
        self.rmdir()
        return real(self, new)

    monkeypatch.setattr(Path, "rename", rename)
    with atomic_folder(target, force=True) as temporary:
        (temporary / "ours").touch()

    assert names(tmp_path) == ["rcan.srd"]
    assert names(target) == ["ours"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the umask can only be read by setting it")
def test_the_umask_is_read_without_setting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the process: files that other threads make meanwhile would get another mode."""
    set_umask = os.umask
    before = set_umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    try:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("x")
    finally:
        set_umask(before)

    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_threads_that_read_the_umask_at_once_leave_it_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is read by setting it: a second thread would take what the first one has set for the umask."""
    real, calls, second = os.umask, itertools.count(), threading.Event()

    def umask(mask: int) -> int:
        call = next(calls)
        found = real(mask)
        if call == 0:
            second.wait(0.3)
        elif call == 1:
            second.set()
        return found

    monkeypatch.setattr("srdeploy.core.artifact._PROCESS_STATUS", tmp_path / "none")
    before = real(0o022)
    monkeypatch.setattr(os, "umask", umask)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = [each.result() for each in [threads.submit(_umask) for _ in range(2)]]
    finally:
        after = real(before)

    assert (found, after) == ([0o022, 0o022], 0o022)
