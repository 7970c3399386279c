"""Runners under the names of a table, and runners that can be opened again while they are measured."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from srdeploy.core.runner import Runner, RunnerInfo, TimedRunner


def named(runner: Runner, name: str) -> Runner:
    """Return the same runner under another name, for tables in which two runners would share one."""
    if isinstance(runner, ReopenedRunner):
        return runner.rename(name)
    return _NamedTimed(runner, name) if isinstance(runner, TimedRunner) else _Named(runner, name)


class _Named:
    """A runner under another name."""

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner = runner
        self._info = replace(runner.info, name=name)

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._runner.run(feeds)

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)


class _NamedTimed(_Named):
    """A timed runner under another name."""

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        assert isinstance(self._runner, TimedRunner)
        return self._runner.prepare(feeds)


def measured_runner(opener: Callable[[], Runner], name: str | None = None) -> Runner:
    """Open an engine to measure it: a `TimedRunner` on a CPU as `ReopenedRunner`, which may be opened several times.

    Engines on a GPU are opened once: their buffers come from an allocator of their own, and opening takes long.
    """
    runner = ReopenedRunner(opener, name)
    return runner if runner.reopens else runner.settled()


class ReopenedRunner:
    """A runner that `bench` may close and open again between visits.

    Where an engine's buffers happen to lie in memory changes its latency by several percent from one opening to the
    next (OpenVINO most of all), so one opening is one draw.

    Args:
        opener: opens the engine; called at once, and at every opening after that.
        name: for tables; None keeps the engine's own.
    """

    def __init__(self, opener: Callable[[], Runner], name: str | None = None) -> None:
        self._opener = opener
        self._name = name
        self.openings = 0
        self.opening_seconds = 0.0
        self._runner = self._opened()

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        info = self._runner.info
        return info if self._name is None else replace(info, name=self._name)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs; see `srdeploy.core.runner.Runner`."""
        return self._runner.run(feeds)

    def reopen(self) -> None:
        """Close the engine and open it again; functions that `prepare` returned before are no longer valid."""
        self._runner.__exit__(None, None, None)
        self._runner = self._opened()

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Place the inputs and return a function that computes once; see `srdeploy.core.runner.TimedRunner`."""
        assert isinstance(self._runner, TimedRunner), "see `reopens`"
        return self._runner.prepare(feeds)

    @property
    def reopens(self) -> bool:
        """Whether opening again is worthwhile: the engine computes on a CPU, and can be timed in both ways."""
        return self.info.device == "cpu" and isinstance(self._runner, TimedRunner)

    def settled(self) -> Runner:
        """Return the open engine under this name, to be opened no more."""
        return named(self._runner, self.info.name)

    def rename(self, name: str) -> Self:
        """Set the name for tables."""
        self._name = name
        return self

    def _opened(self) -> Runner:
        started = time.perf_counter()
        runner = self._opener()
        self.opening_seconds = time.perf_counter() - started
        self.openings += 1
        return runner

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)
