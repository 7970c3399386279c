"""Starts the build worker so that the same build gives the same bytes as far as that can be had.

TensorRT-RTX 1.7.1 orders some of what it writes by the addresses of its objects, and by what its threads do first.
Linux places a program at random addresses, Python seeds its hashes at random, which moves them too, and threads get
heaps of their own: in 40 builds of one small graph three different files came out. With fixed addresses, a fixed seed,
one heap and one processor small graphs and SRDenseNet_All came out the same every time; two builds of full RCAN on a
busy machine still differed in 16 bytes of 35.6 MB, the number in a symbol name. It costs nothing: of 26 s that a build
of RCAN computes, the helper threads take 0.1 s. Where a container forbids fixed addresses the bytes may differ more.
"""

import ctypes
import os
import signal
import sys

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the worker; for TensorRT-RTX at fixed addresses and on one processor where the system allows it."""
    library = ctypes.CDLL(None)
    if sys.platform == "linux":
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the worker ends with its parent, however that went
    if sys.platform == "linux" and sys.argv[1] == "tensorrt-rtx":
        here = library.sched_getcpu()  # the processor that the system has just found free for this process
        if here in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {here})
        library.personality(ctypes.c_ulong(library.personality(ctypes.c_ulong(_ASK)) | _ADDR_NO_RANDOMIZE))
    # One heap for all threads: a heap of its own would lie wherever a thread happened to be when it first needed it.
    environment = {**os.environ, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    worker = "srdeploy.runtime.engines.tensorrt_worker"
    os.execve(sys.executable, [sys.executable, "-m", worker, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
