"""How pictures are handed to workers: chunks of about equal time, retries one by one.

The rule is independent of what runs it: `srdeploy.upscale.scale.cluster` applies it to a Ray cluster, and
benchmarks/scale_simulation.py to simulated ones.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Generic, Protocol, TypeVar

from srdeploy.upscale.scale.targets import Target

CHUNK_SECONDS = 40.0
"""Time that a chunk should take: a thousand times what handing it over costs, and little to lose with its worker."""
MAX_CHUNK_SECONDS = 60.0
ATTEMPTS = 3
"""How often a picture is tried whose worker dies: the first time in its chunk, then by itself."""
_MAX_PICTURES = 2000
_SMOOTHING = 0.5


@dataclass(frozen=True)
class Chunk:
    """Pictures for one worker.

    Attributes:
        targets: the pictures.
        pixels: input pixels of all, as their headers state.
        attempt: 1, or how often they were tried with this one.
    """

    targets: tuple[Target, ...]
    pixels: int
    attempt: int = 1


class ChunkPlanner:
    """Cuts the pictures of a folder into chunks, while they run."""

    def __init__(self, targets: Iterable[Target], pixels_of: Callable[[Target], int]) -> None:
        """Plan nothing yet: headers are read as chunks are requested.

        Args:
            targets: the pictures.
            pixels_of: returns the pixels of a picture; an estimate when its header cannot be read.
        """
        self._waiting = deque(targets)
        self._pixels_of = pixels_of
        self._retries: deque[Chunk] = deque()
        self._rates: dict[int, float] = {}
        self._in_flight: set[tuple[Target, ...]] = set()
        self._seen_pixels = 0
        self._seen = 0

    @property
    def finished(self) -> bool:
        """Return True if nothing waits and nothing runs."""
        return not (self._waiting or self._retries or self._in_flight)

    def next(self, worker: int) -> Chunk | None:
        """Return what a worker should do next, None if nothing waits."""
        chunk = self._retries.popleft() if self._retries else self._cut(worker)
        if chunk is not None:
            self._in_flight.add(chunk.targets)
        return chunk

    def done(self, worker: int, chunk: Chunk, seconds: float) -> None:
        """Note that a worker finished a chunk, and how long it took."""
        self._in_flight.discard(chunk.targets)
        if seconds > 0 and chunk.pixels > 0:
            rate = chunk.pixels / seconds
            known = self._rates.get(worker, rate)
            self._rates[worker] = known + _SMOOTHING * (rate - known)

    def lost(self, worker: int, chunk: Chunk) -> list[Target]:
        """Note that a worker died with a chunk: its pictures run again one by one.

        Returns:
            Pictures that were tried too often.
        """
        self._in_flight.discard(chunk.targets)
        self._rates.pop(worker, None)  # it restarts, perhaps elsewhere
        if chunk.attempt >= ATTEMPTS:
            return list(chunk.targets)
        share = chunk.pixels // len(chunk.targets)
        self._retries += (Chunk((target,), share, chunk.attempt + 1) for target in chunk.targets)
        return []

    def _cut(self, worker: int) -> Chunk | None:
        if not self._waiting:
            return None
        targets: list[Target] = []
        pixels, limit = 0, self._limit(worker)
        while self._waiting and len(targets) < _MAX_PICTURES:
            more = self._pixels_of(self._waiting[0])
            if targets and pixels + more > limit:
                break
            targets.append(self._waiting.popleft())
            pixels += more
            self._seen += 1
            self._seen_pixels += more
        return Chunk(tuple(targets), pixels)

    def _limit(self, worker: int) -> float:
        """Return the pixels of the next chunk; 0 (one picture) until a rate is known."""
        if not self._rates:
            return 0.0
        usual = median(self._rates.values())
        rate = self._rates.get(worker, usual)
        remaining = len(self._waiting) * self._seen_pixels / max(1, self._seen)
        # Half of what is left for each worker: chunks become smaller towards the end, and all workers end together.
        fair = remaining / (2 * usual * len(self._rates))
        return rate * min(CHUNK_SECONDS, fair, MAX_CHUNK_SECONDS)


Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
OutcomeOut = TypeVar("OutcomeOut", covariant=True)


@dataclass(frozen=True)
class Lost:
    """A task whose worker died."""

    reason: str


class Pool(Protocol[Task, OutcomeOut]):
    """Workers that run one task at a time."""

    def idle(self) -> Iterable[int]:
        """Return the workers that can take a task now."""

    def submit(self, worker: int, task: Task) -> None:
        """Start a task on an idle worker."""

    def wait(self) -> Iterator[tuple[int, Task, OutcomeOut | Lost]]:
        """Wait until something happens and return the tasks that ended."""


@dataclass(frozen=True)
class Work(Generic[Task, Outcome]):
    """What `dispatch` needs to know about the work.

    Attributes:
        next: returns a worker's next task, None if nothing waits.
        take: receives what became of a task.
        finished: returns True if nothing waits and nothing runs.
    """

    next: Callable[[int], Task | None]
    take: Callable[[int, Task, Outcome | Lost], None]
    finished: Callable[[], bool]


def dispatch(pool: Pool[Task, Outcome], work: Work[Task, Outcome]) -> None:
    """Keep every worker of a pool busy with one task at a time until the work is finished."""
    while not work.finished():
        for worker in pool.idle():
            task = work.next(worker)
            if task is None:
                break
            pool.submit(worker, task)
        for worker, ended, outcome in pool.wait():
            work.take(worker, ended, outcome)
