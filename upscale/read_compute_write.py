"""Read, compute and write at the same time, in two helper threads and the caller's own.

Decoders, engines and encoders release Python's lock, so the slowest of the three determines the speed. The queues
between them are short, so memory does not grow with the length of the work.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Read = TypeVar("Read")
Made = TypeVar("Made")
Item = TypeVar("Item")

_POLL_SECONDS = 0.1


def no_seconds() -> dict[str, float]:
    """Return the time that each of the three stages took, before they begin."""
    return {"decode": 0.0, "compute": 0.0, "encode": 0.0}


@dataclass
class _End:
    """End of a queue; `error` is set if reading failed."""

    error: BaseException | None = None


@dataclass
class Pipeline(Generic[Read, Made]):
    """Runs `read` in one thread, `compute` in the caller's and `write` in another, in order.

    Attributes:
        read: yields the items.
        compute: turns an item into a result.
        write: receives the results, in order.
        depth: maximum number of items in each queue.
    """

    read: Iterable[Read]
    compute: Callable[[Read], Made]
    write: Callable[[Made], None]
    depth: int = 3
    _stop: threading.Event = field(default_factory=threading.Event)
    _write_error: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        """Run until `read` is exhausted and everything is written.

        Raises:
            The first error of any stage, after the others have stopped. Ctrl-C stops all three.
        """
        incoming: queue.Queue[Read | _End] = queue.Queue(self.depth)
        outgoing: queue.Queue[Made | _End] = queue.Queue(self.depth)
        reader = threading.Thread(target=self._read, args=(incoming,), name="srdeploy-read", daemon=True)
        writer = threading.Thread(target=self._write, args=(outgoing,), name="srdeploy-write", daemon=True)
        reader.start()
        writer.start()
        try:
            while not isinstance(item := self._get(incoming), _End):
                self._put(outgoing, self.compute(item))
            if item.error is not None:
                raise item.error
            self._put(outgoing, _End())
            writer.join()
        finally:
            self._stop.set()
            reader.join()
            writer.join()
        if self._write_error:
            raise self._write_error[0]

    def stop(self) -> None:
        """Make `run` return in another thread as soon as its present items are done, without reading more."""
        self._stop.set()

    def _read(self, incoming: "queue.Queue[Read | _End]") -> None:
        try:
            for item in self.read:
                self._put(incoming, item)
                if self._stop.is_set():
                    return
            self._put(incoming, _End())
        except BaseException as error:
            self._put(incoming, _End(error))

    def _write(self, outgoing: "queue.Queue[Made | _End]") -> None:
        try:
            while not isinstance(item := self._get(outgoing), _End):
                self.write(item)
        except BaseException as error:
            self._write_error.append(error)
            self._stop.set()

    def _put(self, target: "queue.Queue[Item | _End]", item: "Item | _End") -> None:
        while not self._stop.is_set():
            try:
                target.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _get(self, origin: "queue.Queue[Item | _End]") -> "Item | _End":
        while not self._stop.is_set():
            try:
                return origin.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return _End()
