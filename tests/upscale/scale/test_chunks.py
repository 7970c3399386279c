"""Chunks: about equal in time, smaller at the end, retried picture by picture."""

from collections.abc import Iterator

from srdeploy.upscale.scale.chunks import ATTEMPTS, CHUNK_SECONDS, Chunk, ChunkPlanner, Lost, Work, dispatch
from srdeploy.upscale.scale.targets import Target


def targets(count: int) -> list[Target]:
    return [Target(f"{index}.png", f"{index}.png") for index in range(count)]


def test_chunks_grow_from_one_picture_to_their_time_and_shrink_at_the_end() -> None:
    planner = ChunkPlanner(targets(3000), lambda target: 1_000_000)
    seconds: list[float] = []
    sizes: list[int] = []
    while not planner.finished:
        chunk = planner.next(0)
        assert chunk is not None
        seconds.append(len(chunk.targets) * 0.5)
        sizes.append(len(chunk.targets))
        planner.done(0, chunk, seconds[-1])

    assert sum(sizes) == 3000
    assert sizes[0] == 1
    assert seconds[1] == CHUNK_SECONDS
    assert seconds == [seconds[0], *sorted(seconds[1:], reverse=True)]
    assert seconds[-1] == 0.5


def test_each_worker_gets_what_it_does_in_the_time() -> None:
    planner = ChunkPlanner(targets(100_000), lambda target: 1_000_000)
    chunks = [chunk for worker in (0, 1) if (chunk := planner.next(worker))]
    for worker, seconds in ((0, 1.0), (1, 0.1)):
        planner.done(worker, chunks[worker], seconds)

    sizes = [len(chunk.targets) for worker in (0, 1) if (chunk := planner.next(worker))]

    assert sizes == [40, 400]


def test_a_huge_picture_is_a_chunk_of_its_own() -> None:
    pixels = {"0.png": 1, "1.png": 10**10, "2.png": 1}
    planner = ChunkPlanner(targets(3), lambda target: pixels[target.source])
    first = planner.next(0)
    assert first is not None
    planner.done(0, first, 1.0)

    assert [chunk.targets for _ in range(2) if (chunk := planner.next(0))] == [(each,) for each in targets(3)[1:]]


def test_pictures_of_a_lost_chunk_run_one_by_one_and_at_most_three_times() -> None:
    planner = ChunkPlanner(targets(40), lambda target: 1_000_000)
    first = planner.next(0)
    assert first is not None
    planner.done(0, first, 0.1)
    lost = planner.next(0)
    assert lost is not None
    assert len(lost.targets) > 1
    assert planner.lost(0, lost) == []

    retries: list[Chunk] = []
    while (chunk := planner.next(0)) is not None and chunk.attempt > 1:
        retries.append(chunk)
    given_up = [target for chunk in retries for target in planner.lost(0, chunk)]
    again = planner.next(0)

    assert [chunk.targets for chunk in retries] == [(target,) for target in lost.targets]
    assert given_up == []
    assert again is not None
    assert again.attempt == ATTEMPTS
    assert planner.lost(0, again) == list(again.targets)


class OneByOne:
    """A pool of two workers, of which the second one loses its first task."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.most = 0
        self.lost = False

    def idle(self) -> list[int]:
        return [worker for worker in (0, 1) if worker not in self.running]

    def submit(self, worker: int, task: int) -> None:
        assert worker not in self.running
        self.running[worker] = task
        self.most = max(self.most, len(self.running))

    def wait(self) -> Iterator[tuple[int, int, str | Lost]]:
        worker, task = self.running.popitem()
        if worker == 1 and not self.lost:
            self.lost = True
            yield worker, task, Lost("killed")
        else:
            yield worker, task, "done"


def test_dispatch_keeps_every_worker_busy_with_one_task_until_all_is_done() -> None:
    pool, waiting, done = OneByOne(), list(range(5)), []

    def take(worker: int, task: int, outcome: str | Lost) -> None:
        (waiting if isinstance(outcome, Lost) else done).append(task)

    work: Work[int, str] = Work(lambda worker: waiting.pop(0) if waiting else None, take, lambda: len(done) == 5)
    dispatch(pool, work)

    assert sorted(done) == [0, 1, 2, 3, 4]
    assert pool.most == 2
