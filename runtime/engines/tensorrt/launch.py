"""Starts the build worker so that the same build gives the same bytes as far as that can be had.

TensorRT-RTX 1.7.1 orders some of its work by the addresses of its objects, and hands tasks to a helper thread. Where an
object lies follows from every allocation and release before it, and which thread releases a task's result last follows
from who is on the processor. Recordings of all 16 million allocations of a build showed, one behind the other, what
moves them; each is taken away here:

- addresses of program and stack, and Python's hashes, are random: fixed;
- Python's start reads the environment and lists the current folder: a short environment, and `-P`;
- a thread that starts takes a place in the heap at a random moment: threads keep to heaps of their own, and large
  pieces stay in the main heap instead of lying between those;
- a helper that wakes the builder may be interrupted by it between two releases: one processor, and batch scheduling,
  in which whoever wakes up waits for the other one to finish.

It costs nothing: of 26 s that a build of RCAN computes, the helper threads take 0.1 s. Where a container forbids fixed
addresses, or other programs push in on a busy machine, the number in a generated name may still differ.
"""

import contextlib
import ctypes
import os
import signal
import sys

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
_PR_SET_PDEATHSIG = 1
_KEPT = ("HOME", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "TMPDIR")
"""What finds packages and libraries. Everything else could steer the builder, and no cache key would tell."""
_ADDED = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    # Compiling a module moves addresses; the parent has compiled them all, or is told not to and so finds none again.
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main() -> None:
    """Become the worker; for TensorRT-RTX always in the same surroundings where the system allows it."""
    library = ctypes.CDLL(None)
    environment = dict(os.environ)
    if sys.platform == "linux":
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the worker ends with its parent, however that went
    if sys.platform == "linux" and sys.argv[1] == "tensorrt-rtx":
        here = library.sched_getcpu()  # the processor that the system has just found free for this process
        if here in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {here})
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        library.personality(ctypes.c_ulong(library.personality(ctypes.c_ulong(_ASK)) | _ADDR_NO_RANDOMIZE))
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _ADDED
    worker = "srdeploy.runtime.engines.tensorrt.worker"
    os.execve(sys.executable, [sys.executable, "-P", "-m", worker, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
