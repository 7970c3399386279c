"""Files that cross stages: written whole or not at all.

Every output is written under a temporary name in the folder it belongs to and renamed at the end, so that a crash,
a full disk or Ctrl-C leaves the previous artifact untouched and no half-written file behind.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from srdeploy.core import interrupts
from srdeploy.core.errors import OutputError, UsageError

_OUTPUT_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EFBIG,
    errno.ENAMETOOLONG,
}
_FOLDER_EXISTS = {errno.ENOTEMPTY, errno.EEXIST}
_PROCESS_STATUS = Path("/proc/self/status")
_UMASK_LOCK = threading.Lock()


@contextlib.contextmanager
def atomic_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block succeeds.

    Raises:
        UsageError: `path` exists, or does at the end of the block, and `force` is false.
        OutputError: the disk is full, or the folder cannot be written.
    """
    with atomic_files(path, force=force) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_files(*paths: Path, force: bool = False) -> Iterator[tuple[Path, ...]]:
    """Yield one temporary path per output; rename them all when the block succeeds.

    The renames happen in the given order with SIGINT deferred, so a set (an engine and its sidecar) changes as one.
    A temporary that was not written by the block is not renamed. Missing parent folders are created.

    Raises:
        UsageError: one of the outputs exists, or does at the end of the block, and `force` is false.
        OutputError: the disk is full, or a folder cannot be written.
    """
    for path in paths:
        refuse_existing(path, force)
        if path.is_dir():
            raise UsageError(f"{path} is a folder", expected="a file", next_step="choose another output name")
    temporaries: list[Path] = []
    made: list[Path] = []
    try:
        with _write_errors(paths[0]):
            for path in paths:
                made += _make_folder(path.parent)
                temporaries.append(_temporary_name(path))
            yield tuple(temporaries)
            for temporary in temporaries:
                if temporary.exists():
                    _fsync(temporary)
            with interrupts.held():
                for path in paths:
                    refuse_existing(path, force)  # another process may have made it meanwhile
                for temporary, path in zip(temporaries, paths, strict=True):
                    if temporary.exists():
                        _default_mode(temporary)
                        temporary.replace(path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        _remove_empty(made)


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False, known_by: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; it replaces `path` when the block succeeds.

    Args:
        path: the folder to make.
        force: replace an existing folder, with everything in it.
        known_by: an entry that folders of this kind have. A folder with content but without this entry is never
            replaced, with or without `force`.

    Raises:
        UsageError: `path` exists and `force` is false, or is not a folder, or is a folder of another kind; at the
            begin, or at the end because another process made it meanwhile.
        OutputError: the disk is full, or the parent folder cannot be written.
    """
    _refuse_folder(path, force, known_by)
    temporary: Path | None = None
    old: Path | None = None
    made: list[Path] = []
    try:
        with _write_errors(path):
            made = _make_folder(path.parent)
            with output_errors(path):
                temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:60]}.", dir=path.parent))
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            with interrupts.held():
                _refuse_folder(path, force, known_by)  # another process may have made it meanwhile
                old = _moved_away(path)
                try:
                    temporary.replace(path)
                except OSError as error:
                    if error.errno in _FOLDER_EXISTS:  # made after that look; what was moved away is not needed again
                        raise UsageError(f"{path} was written by another process meanwhile") from error
                    if old is not None:
                        (old / "previous").rename(path)
                    raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)


def refuse_input_as_output(output: Path, source: Path) -> None:
    """Refuse to overwrite the input file, even when `force` is set.

    Raises:
        UsageError: both are the same file.
    """
    same = False
    with contextlib.suppress(OSError):  # one of them does not exist
        same = output.samefile(source)
    if same:
        raise UsageError(f"{output} is the input itself", next_step="choose another output name")


def check_output_folder(path: Path, *, force: bool = False, known_by: str | None = None) -> None:
    """Check before long work that `atomic_folder` with the same arguments could start.

    Raises:
        UsageError: as `atomic_folder`.
        OutputError: the parent folder cannot be written.
    """
    _refuse_folder(path, force, known_by)
    made = _make_folder(path.parent)
    try:
        _temporary_name(path)
    finally:
        _remove_empty(made)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """Return the SHA-256 of some bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise every system error of a block that touches nothing but an output as that output's error.

    Raises:
        OutputError: the disk is full, or the output cannot be read, written or removed.
    """
    try:
        yield
    except OSError as error:
        raise _output_error(path, error) from error


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse an output that exists already, unless it may be replaced; called early, before long work.

    Raises:
        UsageError: `path` exists and `force` is false.
        OutputError: the path cannot be accessed.
    """
    try:
        exists = path.exists() or path.is_symlink()
    except OSError as error:
        raise OutputError(f"cannot access {path}: {error.strerror}") from error
    if exists and not force:
        raise UsageError(f"{path} exists already", next_step="choose another name, or pass --force to replace it")


def _remove_empty(made: list[Path]) -> None:
    """Remove folders that were created for an output that was not written."""
    for folder in reversed(made):
        with contextlib.suppress(OSError):  # not empty: the output, or what others put there
            folder.rmdir()


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _OUTPUT_ERRNOS:
            raise
        raise _output_error(path, error) from error


def _refuse_folder(path: Path, force: bool, known_by: str | None) -> None:
    refuse_existing(path, force)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file", expected="a folder", next_step="choose another output name")
    if known_by is not None and path.is_dir() and any(path.iterdir()) and not (path / known_by).exists():
        raise UsageError(
            f"{path} is a folder of other files (it has no {known_by})",
            expected="a new name, or an earlier output of this command",
            next_step="choose another name; --force does not remove other people's files",
        )


def _moved_away(path: Path) -> Path | None:
    """Move a folder into a new one next to it, as `previous`, and return that; None if there is no such folder."""
    if not path.exists():
        return None
    old = Path(tempfile.mkdtemp(prefix=f".{path.name[:60]}.old.", dir=path.parent))
    try:
        path.rename(old / "previous")
    except FileNotFoundError:  # another process has just moved it away
        old.rmdir()
        return None
    return old


def _make_folder(path: Path) -> list[Path]:
    """Make a folder with its parents, and return those that were missing, outermost first."""
    with output_errors(path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise OutputError(f"cannot write into {path}: it is a file", next_step="choose another folder") from error
    return missing[::-1]


def _temporary_name(path: Path) -> Path:
    """Return an unused name in the folder of `path`, after checking that the folder takes new files."""
    with output_errors(path):
        # The suffix stays: libraries choose formats by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:60]}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        Path(name).unlink()
    return Path(name)


def _output_error(path: Path, error: OSError) -> OutputError:
    reason = (error.strerror or str(error)).lower()
    step = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a folder you can write to"
    return OutputError(f"cannot write {path}: {reason}", next_step=step)


def _fsync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _default_mode(path: Path) -> None:
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Return the process's umask, which other threads need unchanged while they make files."""
    with contextlib.suppress(OSError):
        for line in _PROCESS_STATUS.read_bytes().splitlines():
            name, _, value = line.partition(b":")
            if name == b"Umask":
                return int(value, 8)
    with _UMASK_LOCK:  # without /proc it can be read by setting it only
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
