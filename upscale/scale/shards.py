"""Which pictures of a folder are whose: a rule that every process evaluates alike without talking to another."""

import hashlib
import os
import re
from dataclasses import dataclass

from srdeploy.core.errors import UsageError

_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Shard:
    """One of `count` disjoint parts of a folder; `index` counts from 0, as Slurm's and Kubernetes' indices do."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, name: str) -> bool:
        """Return True if a picture belongs to this shard.

        Args:
            name: path relative to the folder, with forward slashes.
        """
        return shard_index(name, self.count) == self.index


def shard_index(name: str, count: int) -> int:
    """Return the index of the shard that a picture belongs to: the first 8 hexadecimal digits of the SHA-256 of its
    relative path, modulo the number of shards.
    """
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) % count


def parse_shard(text: str) -> Shard:
    """Read "I/N".

    Raises:
        UsageError: not two whole numbers with 0 <= I < N.
    """
    match = _SHARD.fullmatch(text.strip())
    shard = Shard(int(match[1]), int(match[2])) if match else None
    if shard is None or shard.index >= shard.count:
        raise UsageError(f"--shard {text}", expected="I/N with I from 0 to N - 1, such as 0/4 to 3/4")
    return shard
