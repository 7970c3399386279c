"""What a search has measured so far, kept in the user's cache so that an interrupted one resumes where it stopped.

The journal is named by everything that decides its numbers: graph, images, target. It is removed when its graph is
written.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from srdeploy.calibration.observe import Observation
from srdeploy.core import journal
from srdeploy.core.artifact import atomic_file, sha256_of_bytes
from srdeploy.core.environment import cache_folder
from srdeploy.core.errors import OutputError


class Journal:
    """Remembers measured numbers, and observations, by key.

    Args:
        parts: what decides the numbers; any change starts a new journal.
        folder: where journals lie; None takes the user's cache folder.
    """

    def __init__(self, *parts: str, folder: Path | None = None) -> None:
        name = sha256_of_bytes(json.dumps(parts).encode())[:32]
        self._folder = (folder or cache_folder() / "quantize") / name
        self._file: journal.Journal | None = None
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
            with contextlib.suppress(OutputError):  # a cache that cannot be written costs the resumption, not the work
                if self._file is not None:
                    self._file.append({"key": key, "number": numbers[key]})
        return numbers[key]

    def observations(self, key: str, collect: Callable[[], dict[str, Observation]]) -> dict[str, Observation]:
        """Return observations made before, or make and remember them."""
        path = self._folder / f"seen-{key}.npz"
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                names = json.loads(str(arrays["names"]))
                return {
                    name: Observation(
                        low=arrays[f"{index}.low"],
                        high=arrays[f"{index}.high"],
                        total=arrays[f"{index}.total"],
                        counts=arrays[f"{index}.counts"],
                        images=int(arrays[f"{index}.images"]),
                        limit=arrays[f"{index}.limit"],
                        zeros=int(arrays[f"{index}.zeros"]),
                    )
                    for index, name in enumerate(names)
                }
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            seen = collect()
        content: dict[str, Any] = {"names": np.array(json.dumps(list(seen)))}
        for index, entry in enumerate(seen.values()):
            for field in ("low", "high", "total", "counts", "images", "limit", "zeros"):
                content[f"{index}.{field}"] = np.asarray(getattr(entry, field))
        # OSError: another process that is done with the same has removed the folder.
        with contextlib.suppress(OutputError, OSError), atomic_file(path, force=True) as temporary:
            np.savez(temporary, **content)  # compressing takes longer than a pass over a small network
        return seen

    def close(self) -> None:
        """Forget everything: the work is done."""
        with contextlib.suppress(OSError):  # another process that measures the same may write, or remove, them now
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _load(self) -> dict[str, float]:
        if self._numbers is None:
            self._numbers = {}
            with contextlib.suppress(OutputError, KeyError, TypeError):
                self._file = journal.Journal(self._folder / "numbers.jsonl")
                self._numbers |= {entry["key"]: float(entry["number"]) for entry in self._file.entries}
        return self._numbers
