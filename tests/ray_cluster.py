"""A Ray cluster of two machines for the tests: raylets on 127.0.0.2 and 127.0.0.3 (Ray rewrites 127.0.0.1)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

_START = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
_RESOURCES = ("--num-cpus=1", "--object-store-memory=100000000")
AFTER_RENAME = "out/after_rename.png"
KILLER = "in/killer.png"
_KILL = """
import json, os, signal, sys

_rules = json.loads(os.environ["SRDEPLOY_TEST_KILL"])


def _hook(event, arguments):
    if event != "open" or not isinstance(arguments[0], str):
        return
    for ending, once in _rules.items():
        if arguments[0].endswith(ending) and not (once and os.path.exists(once)):
            if once:
                os.close(os.open(once, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_hook)
"""


class Cluster:
    """Two machines of one CPU each; use `cluster` to make one.

    A process of it that opens a file whose path ends with AFTER_RENAME kills itself with SIGKILL, once; of a file that
    ends with KILLER each time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.2", 0))
            self.address = f"127.0.0.2:{free.getsockname()[1]}"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # Notice dead machines in seconds.
        self._environment |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        (folder / "sitecustomize.py").write_text(_KILL)
        rules = {AFTER_RENAME: str(folder / "was_killed"), KILLER: None}
        self._environment |= {"SRDEPLOY_TEST_KILL": json.dumps(rules), "PYTHONPATH": str(folder)}
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        head = ("--head", "--node-ip-address=127.0.0.2", f"--port={self.address.partition(':')[2]}")
        dashboard = ("--include-dashboard=false", f"--temp-dir={self.folder}")
        self._start(*head, *dashboard)
        self._wait(lambda: _answers(self.address))
        self._start(f"--address={self.address}", "--node-ip-address=127.0.0.3")
        self._wait(lambda: len(self.processes("raylet")) == 2)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes of the cluster whose name begins so."""
        found = []
        for node in self._nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(node.pid).children(recursive=True)
        return [process for process in found if _title(process).startswith(name)]

    def kill_machine(self) -> None:
        """Kill the raylet of 127.0.0.3, with SIGKILL."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._nodes[1].pid).children(recursive=True)
            next(child for child in children if _title(child).startswith("raylet")).send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill everything."""
        processes = []
        for node in self._nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(node.pid)
                processes += [*parent.children(recursive=True), parent]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=20)
        for node in self._nodes:
            node.wait(20)

    def _start(self, *words: str) -> None:
        command = [*_START, *_RESOURCES, *words]
        log = (self.folder / f"start{len(self._nodes)}.log").open("wb")
        self._nodes.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT))
        log.close()

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            if time.monotonic() > deadline or self._nodes[-1].poll() is not None:
                raise RuntimeError((self.folder / f"start{len(self._nodes) - 1}.log").read_text())
            time.sleep(0.1)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster and end it."""
    with tempfile.TemporaryDirectory(
        prefix="sr", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # socket names: short
        made = Cluster(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.close()


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _title(process: psutil.Process) -> str:
    try:
        line = process.cmdline()
        return Path(line[0]).name if line and "/" in line[0] else (line[0] if line else "")
    except psutil.Error:
        return ""
