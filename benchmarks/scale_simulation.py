"""How the work of a cluster scales: a discrete simulation of 1, 8, 100 and 1000 nodes with failures and stragglers.

    python benchmarks/scale_simulation.py [--pictures 100000] [-o benchmarks/results/scale_simulation.json]

Nothing here is a measurement of a cluster. The rule that is simulated is the real one: `ChunkPlanner` and `dispatch` of
srdeploy.upscale.scale.chunks hand out the pictures, and simulated nodes take the place of Ray's actors. The constants
are stated below: what is handed out, recorded and encoded was measured by benchmarks/scale_overheads.py on two cores;
the speed of the network, the storage and the failures are assumptions, which the table names.

Per picture, a node decodes, computes and encodes at the same time, so the slowest of network, encoding (on the node's
cores) and storage counts. The storage is shared: at full load everybody gets an equal part of its bandwidth. The
driver is one process; while it reads headers and hands out chunks nobody else gets any.

How to read it: "efficiency" is the speed-up over one node, divided by the number of nodes. "Limit" is the stage with
the most time. "Again" is pictures that ran more than once. Two pictures kill each worker that they run on: both must be
listed, and everything else be done, in each row.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srdeploy.cli.console import markdown_table
from srdeploy.upscale.scale.chunks import Chunk, ChunkPlanner, Lost, Work, dispatch
from srdeploy.upscale.scale.targets import Target

NODES = (1, 8, 100, 1000)


@dataclass(frozen=True)
class Format:
    """A format of the outputs: one core's seconds and bytes per output megapixel, measured (scale_overheads.json)."""

    name: str
    encode_seconds: float
    output_bytes: float


# Measured with an enlarged photograph of 16.8 megapixels; PNG of a sharper picture takes longer and is larger.
FORMATS = (Format("png", 2.09 / 16.8, 5.43e6 / 16.8), Format("webp", 1.10 / 16.8, 0.53e6 / 16.8),
           Format("jpg", 0.112 / 16.8, 1.93e6 / 16.8))  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is assumed, and what was measured.

    Attributes:
        megapixels: median of the inputs; they vary by a factor of two (one standard deviation).
        scale: of the network.
        network_seconds: per input megapixel, on a usual node.
        encoders: outputs that a node encodes at the same time; a worker has one encoding thread.
        storage_bytes_per_second: of the shared file system.
        input_bytes: per input megapixel.
        stragglers: share of the nodes that are three times slower.
        hours_between_failures: of one node, on average.
        notice_seconds: until the driver notices a dead node.
        restart_seconds: until a worker is ready again.
        header_seconds: reading a header, in the driver; on network storage, not the 0.03 ms of a local disk.
        chunk_seconds: handing out a chunk, measured.
    """

    megapixels: float = 1.0
    scale: int = 4
    network_seconds: float = 0.25
    encoders: int = 1
    storage_bytes_per_second: float = 10e9
    input_bytes: float = 1.5e6
    stragglers: float = 0.05
    hours_between_failures: float = 24.0
    notice_seconds: float = 15.0
    restart_seconds: float = 60.0
    header_seconds: float = 0.5e-3
    chunk_seconds: float = 1.6e-3


class SimulatedPool:
    """Nodes on a virtual clock, as a `srdeploy.upscale.scale.chunks.Pool`."""

    def __init__(self, nodes: int, setting: Setting, form: Format, megapixels: dict[Target, float], seed: int) -> None:
        self.now = 0.0
        self.headers = 0
        self.seconds: Counter[str] = Counter()
        self.driver_seconds = 0.0
        self.ran: Counter[Target] = Counter()
        self.failures = 0
        self._random = random.Random(seed)
        self._setting = setting
        self._form = form
        self._megapixels = megapixels
        self._nodes = nodes
        self._speed = [1 / 3 if self._random.random() < setting.stragglers else 1.0 for _ in range(nodes)]
        self._idle = list(range(nodes))
        self._events: list[tuple[float, int, int, Chunk | None, float | Lost]] = []
        self._counted = 0

    def idle(self) -> list[int]:
        """Return the nodes without a chunk."""
        return self._idle[:]

    def submit(self, worker: int, task: Chunk) -> None:
        """Start a chunk: the driver pays for its headers, the node for its pictures."""
        self._idle.remove(worker)
        self._spend(self._setting.chunk_seconds + self.headers * self._setting.header_seconds)
        self.headers = 0
        self.ran.update(task.targets)
        seconds = self._seconds(task, worker)
        dies = self._random.expovariate(1 / (3600 * self._setting.hours_between_failures))
        if any(target.source.startswith("killer") for target in task.targets):
            dies = min(dies, self._random.random() * seconds)
        if dies < seconds:
            self.failures += 1
            lost = self.now + dies + self._setting.notice_seconds
            self._push(lost, worker, task, Lost("killed"))
            self._push(lost + self._setting.restart_seconds, worker, None, 0.0)
        else:
            self._push(self.now + seconds, worker, task, seconds)

    def wait(self) -> Iterator[tuple[int, Chunk, float | Lost]]:
        """Go to the next event."""
        if not self._events:
            return
        time, _, worker, task, outcome = heapq.heappop(self._events)
        self.now = max(self.now, time)  # the driver may be late
        if task is None:
            self._idle.append(worker)
            return
        if not isinstance(outcome, Lost):
            self._idle.append(worker)
        yield worker, task, outcome

    def _seconds(self, task: Chunk, worker: int) -> float:
        setting, form = self._setting, self._form
        pixels = sum(self._megapixels[target] for target in task.targets)
        large = pixels * setting.scale**2
        stages = {
            "network": pixels * setting.network_seconds / self._speed[worker],
            "encoding": large * form.encode_seconds / min(setting.encoders, len(task.targets)),
            "storage": (pixels * setting.input_bytes + large * form.output_bytes)
            * self._nodes
            / setting.storage_bytes_per_second,
        }
        self.seconds.update(stages)
        return max(stages.values()) + sum(stages.values()) / len(task.targets)  # the first and last do not overlap

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.driver_seconds += seconds

    def _push(self, time: float, worker: int, task: Chunk | None, outcome: float | Lost) -> None:
        self._counted += 1
        heapq.heappush(self._events, (time, self._counted, worker, task, outcome))


def simulate(nodes: int, pictures: int, setting: Setting, form: Format, seed: int = 0) -> dict[str, Any]:
    """Return what happens to a folder of pictures, two of which kill their workers."""
    draw = random.Random(seed)
    names = [f"{index:07d}.png" for index in range(pictures)] + ["killer1.png", "killer2.png"]
    draw.shuffle(names)
    megapixels = {Target(name, name): setting.megapixels * math.exp(draw.gauss(0, math.log(2))) for name in names}
    pool = SimulatedPool(nodes, setting, form, megapixels, seed)

    def pixels(target: Target) -> int:
        pool.headers += 1
        return int(megapixels[target] * 1e6)

    planner = ChunkPlanner(megapixels, pixels)
    done: set[Target] = set()
    failed: list[str] = []
    lengths: list[float] = []

    def take(worker: int, chunk: Chunk, outcome: float | Lost) -> None:
        if isinstance(outcome, Lost):
            failed.extend(target.source for target in planner.lost(worker, chunk))
            return
        planner.done(worker, chunk, outcome)
        done.update(chunk.targets)
        lengths.append(outcome)

    work: Work[Chunk, float] = Work(planner.next, take, lambda: planner.finished)
    dispatch(pool, work)
    assert sorted(failed) == ["killer1.png", "killer2.png"]
    assert len(done) == pictures
    limit = max(pool.seconds, key=lambda name: pool.seconds[name])
    if pool.driver_seconds > 0.9 * pool.now:
        limit = "driver"
    return {
        "nodes": nodes,
        "format": form.name,
        "hours": pool.now / 3600,
        "pictures_per_second": pictures / pool.now,
        "limit": limit,
        "driver_busy": pool.driver_seconds / pool.now,
        "node_failures": pool.failures,
        "run_again": sum(count - 1 for count in pool.ran.values()),
        "chunk_seconds_median": statistics.median(lengths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/scale_simulation.json"))
    given = parser.parse_args()
    setting = Setting()
    results = []
    for form in FORMATS:
        single = 0.0
        for nodes in NODES:
            found = simulate(nodes, given.pictures, setting, form)
            single = single or found["pictures_per_second"]
            found["efficiency"] = found["pictures_per_second"] / single / nodes
            results.append(found)
    headers = (
        "format",
        "nodes",
        "hours",
        "pictures/s",
        "efficiency",
        "limit",
        "driver busy",
        "failures",
        "again",
        "chunk s",
    )
    rows = [
        (
            each["format"],
            each["nodes"],
            f"{each['hours']:.2f}",
            f"{each['pictures_per_second']:.2f}",
            f"{each['efficiency']:.0%}",
            each["limit"],
            f"{each['driver_busy']:.0%}",
            each["node_failures"],
            each["run_again"],
            f"{each['chunk_seconds_median']:.0f}",
        )
        for each in results
    ]
    print(markdown_table(headers, rows))
    document = {"setting": asdict(setting), "formats": [asdict(form) for form in FORMATS], "pictures": given.pictures}
    given.output.write_text(json.dumps({**document, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
