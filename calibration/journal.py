"""What a search has measured so far, kept in the user's cache so that an interrupted one goes on where it stopped.

The journal is named by everything that decides its numbers: graph, images, target. It is removed when its graph is
written.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from srdeploy.calibration.observe import Observation
from srdeploy.core.artifact import sha256_of_bytes


class Journal:
    """Remembers measured numbers, and observations, by key.

    Args:
        parts: what decides the numbers; any change starts a new journal.
        folder: where journals lie; None takes the user's cache folder.
    """

    def __init__(self, *parts: str, folder: Path | None = None) -> None:
        name = sha256_of_bytes(json.dumps(parts).encode())[:32]
        self._folder = (folder or _cache_folder() / "quantize") / name
        self._numbers: dict[str, float] | None = None

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left something."""
        return bool(self._load())

    def number(self, key: str, measure: Callable[[], float]) -> float:
        """Return a number measured before, or measure and remember it."""
        numbers = self._load()
        if key not in numbers:
            numbers[key] = measure()
            self._write("numbers.json", json.dumps(numbers).encode())
        return numbers[key]

    def observations(self, key: str, collect: Callable[[], dict[str, Observation]]) -> dict[str, Observation]:
        """Return observations made before, or make and remember them."""
        path = self._folder / f"seen-{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = json.loads(str(arrays["names"]))
                return {
                    name: Observation(
                        low=arrays[f"{index}.low"],
                        high=arrays[f"{index}.high"],
                        total=arrays[f"{index}.total"],
                        counts=arrays[f"{index}.counts"],
                        images=int(arrays[f"{index}.images"]),
                        limit=float(arrays[f"{index}.limit"]),
                    )
                    for index, name in enumerate(names)
                }
        except (OSError, ValueError, KeyError, EOFError):
            seen = collect()
        content: dict[str, Any] = {"names": np.array(json.dumps(list(seen)))}
        for index, entry in enumerate(seen.values()):
            for field in ("low", "high", "total", "counts", "images", "limit"):
                content[f"{index}.{field}"] = np.asarray(getattr(entry, field))
        with tempfile.TemporaryFile() as stream:
            np.savez_compressed(stream, **content)
            stream.seek(0)
            self._write(path.name, stream.read())
        return seen

    def close(self) -> None:
        """Forget everything: the work is done."""
        for path in self._folder.glob("*"):
            path.unlink(missing_ok=True)
        if self._folder.is_dir():
            self._folder.rmdir()

    def _load(self) -> dict[str, float]:
        if self._numbers is None:
            try:
                self._numbers = dict(json.loads((self._folder / "numbers.json").read_text(encoding="utf-8")))
            except (OSError, ValueError):
                self._numbers = {}
        return self._numbers

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            Path(temporary).replace(self._folder / name)
        except OSError:
            return  # a cache that cannot be written costs the resumption, not the work


def _cache_folder() -> Path:
    named = os.environ.get("SRDEPLOY_CACHE_DIR")
    return Path(named) if named else platformdirs.user_cache_path("srdeploy")
