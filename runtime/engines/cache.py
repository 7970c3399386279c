"""The engine cache: an engine is found by what decides its bytes, never by a file name.

The key is a JSON document: the family with its exact library versions, the SHA-256 of the graph with all its weights,
every option that changes the bytes, the target and the machine. Its hash names a folder that holds the engine and its
sidecar (which holds the key again, readable). Whatever does not match is a miss with a reason, never a crash.

One lock file per key lets two processes that ask for the same engine build it once.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_folder
from srdeploy.core.environment import cache_folder
from srdeploy.core.errors import InputError, SrdeployError
from srdeploy.core.manifest import Manifest, manifest_path
from srdeploy.runtime.engines.sidecar import Engine, key_sha256, read_engine

KEY_SCHEMA = 6
"""Raise it whenever a change of this program builds the same inputs into other bytes."""
_NAME = "engine"


def default_root() -> Path:
    """Return the folder of the engine cache, below srdeploy's cache folder."""
    return cache_folder() / "engines"


@dataclass(frozen=True)
class Lookup:
    """The result of a lookup: the engine, or None with the reason."""

    engine: Engine | None
    reason: str


@dataclass(frozen=True)
class Entry:
    """One cached engine. `problem` is the reason why it cannot be used; None if it is intact."""

    folder: Path
    key_sha256: str
    bytes: int
    used: float
    manifest: Manifest | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        details = self.manifest.details if self.manifest else {}
        return {
            "key": self.key_sha256,
            "engine": details.get("engine"),
            "onnx": self.manifest.sources[0].name if self.manifest and self.manifest.sources else None,
            "precision": details.get("precision", {}).get("built"),
            "profiles": details.get("profiles", []),
            "target": details.get("target", {}),
            "versions": dict(self.manifest.versions) if self.manifest else {},
            "created": self.manifest.created if self.manifest else None,
            "bytes": self.bytes,
            "last_used": self.used,
            "problem": self.problem,
            "folder": str(self.folder),
        }


class EngineCache:
    """A folder of engines by content. Only its owner may read it, as engines are native code."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    @contextlib.contextmanager
    def locked(self, key: Mapping[str, Any]) -> Iterator[None]:
        """Hold the key's lock: another process that wants the same engine waits here until it is built.

        Raises:
            OSError: the cache folder cannot be made or written.
        """
        import filelock

        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)
        with filelock.FileLock(self.root / f"{key_sha256(key)}.lock", mode=0o600):
            yield

    def lookup(self, key: Mapping[str, Any]) -> Lookup:
        """Find an engine and check its bytes, sidecar and key."""
        folder = self.root / key_sha256(key)
        if not folder.is_dir():
            near = nearest(self, key)
            differing = f"; the nearest engine in it differs in {', '.join(near[1])}" if near else ""
            return Lookup(None, f"not in the cache{differing}")
        try:
            engine = read_engine(folder / _NAME)
        except InputError as error:
            return Lookup(None, f"the cached engine is damaged: {error}")
        if engine.manifest.details.get("key") != key:
            return Lookup(None, "the cached engine's sidecar states another key")
        with contextlib.suppress(OSError):
            os.utime(folder)
        return Lookup(engine, f"in the cache since {engine.manifest.created}")

    def store(self, key: Mapping[str, Any], data: bytes, manifest: Manifest) -> None:
        """Store an engine and its sidecar under a key; an older entry is replaced as a whole.

        Raises:
            OutputError: disk full, or the cache folder cannot be written. An older entry stays.
        """
        with atomic_folder(self.root / key_sha256(key), force=True) as folder:
            for path, content in ((folder / _NAME, data), (manifest_path(folder / _NAME), manifest.to_json().encode())):
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
        (self.root / key_sha256(key)).chmod(0o700)

    def entries(self, *, check: bool = False) -> list[Entry]:
        """List the cached engines, the most recently used first.

        Args:
            check: read every engine and compare its SHA-256 (slow for many); else only the sidecars are read.
        """
        if not self.root.is_dir():
            return []
        found = []
        for folder in self.root.iterdir():
            if folder.is_dir() and len(folder.name) == 64:
                with contextlib.suppress(FileNotFoundError):  # another process removes or replaces it just now
                    found.append(_entry(folder, check=check))
        return sorted(found, key=lambda entry: -entry.used)

    def gc(
        self, *, max_bytes: int | None = None, older_than_days: float | None = None, dry_run: bool = False
    ) -> list[Entry]:
        """Remove damaged engines, old engines, then the least recently used ones above a size.

        Returns:
            The entries that were removed (or would be).
        """
        now, kept, removed = time.time(), 0, []
        for entry in self.entries(check=True):
            old = older_than_days is not None and now - entry.used > older_than_days * 86400
            large = max_bytes is not None and kept + entry.bytes > max_bytes
            if entry.problem or old or large:
                removed.append(entry)
            else:
                kept += entry.bytes
        return removed if dry_run else [entry for entry in removed if self._remove(entry)]

    def _remove(self, entry: Entry) -> bool:
        """Remove an entry, unless another process has used or replaced it since it was listed."""
        import filelock

        lock_path = self.root / f"{entry.key_sha256}.lock"
        with filelock.FileLock(lock_path, mode=0o600):
            if entry.folder.is_dir() and entry.folder.stat().st_mtime != entry.used:
                return False
            shutil.rmtree(entry.folder, ignore_errors=True)
            # While it is held: whoever waits for it finds it removed and makes another.
            lock_path.unlink(missing_ok=True)
        return True


def key_differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two keys differ, by dotted name: (wanted, found)."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name in sorted(set(wanted) | set(found)):
        left, right = wanted.get(name), found.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differences |= key_differences(left, right, f"{prefix}{name}.")
        elif left != right:
            differences[prefix + name] = (left, right)
    return differences


def nearest(cache: EngineCache, key: Mapping[str, Any]) -> tuple[Entry, dict[str, tuple[Any, Any]]] | None:
    """Return the cached engine whose key has the fewest differences, with them; None if the cache is empty."""
    candidates = [
        (entry, key_differences(key, entry.manifest.details.get("key", {})))
        for entry in cache.entries()
        if entry.manifest is not None
    ]
    return min(candidates, key=lambda pair: len(pair[1])) if candidates else None


def _entry(folder: Path, *, check: bool) -> Entry:
    used = folder.stat().st_mtime
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    manifest, problem = None, None
    try:
        manifest = Manifest.from_json(
            manifest_path(folder / _NAME).read_text(encoding="utf-8"), name=str(manifest_path(folder / _NAME))
        )
        if key_sha256(manifest.details.get("key", {})) != folder.name:
            problem = "the sidecar states another key"
        if check:
            read_engine(folder / _NAME)
    except (OSError, UnicodeDecodeError, SrdeployError) as error:
        problem = str(error)
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    return Entry(folder, folder.name, size, used, manifest, problem)
