"""The bytes of an untrusted file: every read is checked against the file's real size, and nothing is mapped.

Reading by position (instead of mapping the file) gives each tensor its own aligned memory, costs memory only for what
is read, and cannot crash the process when another program shortens the file meanwhile.
"""

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srdeploy.core.errors import InputError
from srdeploy.core.sizes import format_bytes

MAX_FILE_BYTES = 2 * 1024**3
"""A default-size RCAN with its EMA copy and Adam state takes 0.3 GB; more than this is something else."""

_CHUNK_BYTES = 1 << 20


class RefusedError(Exception):
    """Part of a file is not what it should be. The reader turns this into an `InputError` that names the file.

    Args:
        found: what was found, as the rest of a sentence whose subject is the file ("is truncated: ...").
        expected: what would have been right.
        next_step: what the user can do now.
    """

    def __init__(self, found: str, *, expected: str | None = None, next_step: str | None = None) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.next_step = next_step


def shown(text: object, limit: int = 80) -> str:
    """Return text from an untrusted file fit for one terminal line: no control characters, at most `limit` long."""
    if isinstance(text, str) and len(text) <= limit and text.isprintable():
        return text
    printable = "".join(character if character.isprintable() else "�" for character in str(text)[: limit + 1])
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


class FileBytes:
    """A regular file, or a section of one, that is read by position."""

    def __init__(self, descriptor: int, size: int, start: int = 0) -> None:
        self._descriptor = descriptor
        self._start = start
        self.size = size

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            RefusedError: they are not all inside the file; `what` names them in the message.
        """
        self._check(offset, length, what)
        data = os.pread(self._descriptor, length, self._start + offset)
        return data if len(data) == length else bytes(self.buffer(offset, length, what))

    def buffer(self, offset: int, length: int, what: str) -> bytearray:
        """Return exactly `length` bytes from `offset` in fresh writable memory.

        Raises:
            RefusedError: they are not all inside the file.
        """
        self._check(offset, length, what)
        target = bytearray(length)
        view = memoryview(target)
        done = 0
        while done < length:
            count = os.preadv(self._descriptor, [view[done:]], self._start + offset + done)
            if count == 0:
                raise RefusedError(
                    f"became shorter while its {what} was read", next_step="wait until it is fully written"
                )
            done += count
        return target

    def section(self, offset: int, length: int, what: str) -> "FileBytes":
        """Return a part of the file as a file of its own.

        Raises:
            RefusedError: it is not inside the file.
        """
        self._check(offset, length, what)
        return FileBytes(self._descriptor, length, self._start + offset)

    def stream(self, limit: int, what: str) -> "BoundedStream":
        """Return the file as a stream for a library; one read of more than `limit` bytes is refused."""
        return BoundedStream(self, limit, what)

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, _CHUNK_BYTES):
            digest.update(self.read(offset, min(_CHUNK_BYTES, self.size - offset), "content"))
        return digest.hexdigest()

    def _check(self, offset: int, length: int, what: str) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RefusedError(
                f"is truncated or damaged: its {what} is expected at bytes {shown(offset)} to {shown(offset + length)} "
                f"of {self.size}",
                next_step="copy or download the file again",
            )


def step_into(folder: Path) -> str:
    """Return what to pass instead of a folder."""
    names = sorted(entry.name for entry in folder.iterdir())
    if "zero_to_fp32.py" in names:  # DeepSpeed puts it beside its shards
        return "run the zero_to_fp32.py inside and pass its result"
    if any(name.endswith(".distcp") for name in names):
        return "copy the whole folder again: its .metadata is missing"
    if any(name.endswith(".safetensors.index.json") for name in names):  # Hugging Face's libraries write it
        return (
            "join the shards first: python -c 'import pathlib, sys; from safetensors.torch import load_file, "
            'save_file; save_file({name: value for part in pathlib.Path(sys.argv[1]).glob("*.safetensors") '
            "for name, value in load_file(part).items()}, sys.argv[2])' FOLDER weights.safetensors"
        )
    inside = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".tar", ".safetensors", ".npz"))]
    return f"pass the file {shown(folder / inside[0], 200)}" if inside else "pass the checkpoint file itself"


class BoundedStream(io.RawIOBase):
    """A stream over a file whose every read is bounded, so that a library cannot be made to read what a file claims."""

    def __init__(self, file: FileBytes, limit: int, what: str) -> None:
        super().__init__()
        self._file = file
        self._limit = limit
        self._what = what
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, fewer at the end of the file.

        Raises:
            RefusedError: more than the limit would be read.
        """
        left = max(self._file.size - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._limit:
            raise RefusedError(f"has a {self._what} of {size} bytes", expected=f"at most {self._limit}")
        data = self._file.read(self._position, size, self._what) if size else b""
        self._position += size
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position; one before the start is an io.UnsupportedOperation."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise io.UnsupportedOperation("a position before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position


@contextmanager
def open_file_bytes(path: Path) -> Iterator[FileBytes]:
    """Open a regular file of reasonable size.

    Raises:
        InputError: it does not exist, cannot be read, is a folder or a device, is empty, or is too large.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer; it changes nothing for regular files.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"cannot read {path}: {reason.lower()}", expected="a checkpoint file") from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a folder", expected="a checkpoint file", next_step=step_into(path))
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file", expected="a checkpoint file")
        if status.st_size == 0:
            raise InputError(f"{path} is empty", expected="a checkpoint file", next_step="copy or download it again")
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path} has {format_bytes(status.st_size)}",
                expected=f"at most {format_bytes(MAX_FILE_BYTES)} (the largest known checkpoint has 0.3 GB)",
            )
        yield FileBytes(descriptor, status.st_size)
    finally:
        os.close(descriptor)
