"""Starts the build worker so that the same build gives the same bytes.

TensorRT-RTX 1.7.1 orders some of what it writes by the addresses of its objects. Linux places a program at random
addresses, and Python seeds its hashes at random, which moves them too: in 40 builds of one small graph three different
files came out. With both switched off for the worker, which reads a graph that this program wrote and nothing else,
all come out the same. Where a container forbids it the build goes on, and its bytes may differ from the next one's.
"""

import ctypes
import os
import sys

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF


def main() -> None:
    """Become the worker, at fixed addresses where the system allows it."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.personality(ctypes.c_ulong(library.personality(ctypes.c_ulong(_ASK)) | _ADDR_NO_RANDOMIZE))
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    worker = "srdeploy.runtime.engines.tensorrt_worker"
    os.execve(sys.executable, [sys.executable, "-m", worker, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
