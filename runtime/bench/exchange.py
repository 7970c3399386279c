"""How fast two processors exchange data, which decides what an engine gains from its second thread.

Two processors of a virtual machine exchange data fast at some times and slowly at others, probably because its host
moves them between cores that share a cache and cores that do not. Engines of many small layers pass their maps between
threads all the time: ONNX Runtime's INT8 graph of a compact RCAN takes 18 ms in one state and 36 ms in the other, while
PyTorch changes by a fifth. No interval of a run in one state can cover the other, so a measurement records the state.

What is measured: the time in which a processor reads what another one has just written, over the time in which it reads
what it wrote itself. 1.0 to 1.3 is the fast state; 2 and more the slow one.
"""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Semaphore, Thread
from typing import Any

import numpy as np

_VALUES = 1 << 14
"""Of 8 bytes each: 128 KiB are within the second cache of every present processor, and beyond the first."""
_ROUNDS = 5
_APART = 1.5
"""Two states differ when their costs differ by this factor; undisturbed ones repeat within 1.2."""


@dataclass(frozen=True)
class Exchange:
    """The cost of reading another processor's data during a measurement, as a multiple of reading one's own.

    Attributes:
        lowest, median, highest: over the looks that were taken.
    """

    lowest: float
    median: float
    highest: float

    @classmethod
    def of_costs(cls, costs: Sequence[float]) -> "Exchange | None":
        """Summarize what `exchange_cost` returned; None without any."""
        if not costs:
            return None
        return cls(*(round(value, 2) for value in (min(costs), float(np.median(costs)), max(costs))))

    @classmethod
    def of_environment(cls, environment: Mapping[str, Any]) -> "Exchange | None":
        """Return what a measurement recorded; None when it recorded none."""
        values = environment.get("processor_exchange")
        return cls(values["lowest"], values["median"], values["highest"]) if values else None

    @property
    def changed(self) -> bool:
        """Whether the processors were in both states during the measurement."""
        return self.highest > _APART * self.lowest

    @property
    def label(self) -> str:
        """The costs for people: "1.1x", or "1.1x to 2.2x" where they changed."""
        return f"{self.lowest:.1f}x to {self.highest:.1f}x" if self.changed else f"{self.median:.1f}x"

    @property
    def sentence(self) -> str:
        """What a reader of speed-ups should know of a change."""
        return (
            f"the processors exchanged data faster and slower while measuring (reading another's data costs "
            f"{self.label} reading one's own): engines of many small layers change their speed with it"
        )

    def differs_from(self, other: "Exchange") -> bool:
        """Return True if two measurements were mostly made in different states."""
        return max(self.median, other.median) > _APART * min(self.median, other.median)

    def to_json(self) -> dict[str, float]:
        """Return the costs as JSON values."""
        return {"lowest": self.lowest, "median": self.median, "highest": self.highest}


def exchange_cost() -> float | None:
    """Measure for a millisecond what reading another processor's data costs, as a multiple of reading one's own.

    Of a process's processors the first and the last are taken. None with a single processor, and on systems where a
    thread cannot choose its processor.
    """
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(processors) < 2:
        return None
    values = np.zeros(_VALUES)
    turn, written = Semaphore(0), Semaphore(0)
    own: list[float] = []
    others: list[float] = []

    def write() -> None:
        _move_to(processors[-1])
        for _ in range(_ROUNDS):
            turn.acquire()
            values.fill(1.0)
            written.release()

    def read() -> None:
        _move_to(processors[0])
        for _ in range(_ROUNDS):
            turn.release()
            written.acquire()
            others.append(_reading_time(values))
            values.fill(0.0)
            own.append(_reading_time(values))

    threads = [Thread(target=write), Thread(target=read)]  # of their own, so that no other thread is moved
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(others) / min(own)  # what else runs on the machine only ever adds


def _move_to(processor: int) -> None:
    with contextlib.suppress(OSError):  # some containers forbid it
        os.sched_setaffinity(0, {processor})


def _reading_time(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    started = time.perf_counter()
    values.sum()
    return time.perf_counter() - started
