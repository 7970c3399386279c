"""Workers on a Ray cluster that somebody else started: one Ray Core actor per GPU, or per share of the CPUs.

An actor opens the engine once and has one task in flight: a task queued behind another would fail with it if the
actor died. Ray starts an actor again that died (`max_restarts=-1`) and runs no task again (`max_task_retries=0`): which
pictures run again, and how often, is decided by `srdeploy.upscale.scale.chunks`.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from srdeploy.core.errors import CapabilityError
from srdeploy.core.extras import import_extra
from srdeploy.upscale.scale.chunks import Lost
from srdeploy.upscale.scale.model_package import pack_model
from srdeploy.upscale.scale.worker import Opened, RemoteError, Worker, WorkerOptions, compared_versions

_CONNECT_SECONDS = 5.0
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""Client's preface and empty settings (RFC 9113, section 3.4). A cluster's head speaks gRPC; Ray itself would wait for
minutes before it gives up on a server that does not."""
_HTTP2_SETTINGS = b"\4"
_POLL_SECONDS = 2.0
_PATIENCE_SECONDS = 300.0
"""How long a run goes on without a single worker, for machines that are being started."""
_MAX_CPUS_PER_GPU = 8.0
_STEP = "start one with `ray start --head` and `ray start --address HEAD:PORT`, and pass --ray HEAD:PORT"


@dataclass(frozen=True)
class Share:
    """What each worker takes of its machine, and how many workers there are."""

    count: int
    cpus: float
    gpus: int

    @property
    def device(self) -> str:
        """Name of the device as a worker sees it: Ray shows each its own GPU only."""
        return "cuda:0" if self.gpus else "cpu"


@contextlib.contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a running cluster and yield the module `ray`; no cluster is ever started.

    Args:
        address: "HOST:PORT" of its head, or "auto" for the cluster of this machine.

    Raises:
        MissingExtraError: Ray is not installed.
        CapabilityError: no cluster answers at the address, or it runs another version of Ray or Python.
    """
    ray = import_extra("ray", "ray")
    if address != "auto":
        _check_reachable(address)
    # Read when Ray connects; its own default is to wait for minutes, and then to end the process.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    # Ray prints about dead workers on standard output, which belongs to programs; the driver reports them itself.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=False)
        except (Exception, SystemExit) as error:
            raise CapabilityError(_why_not_connected(address, error), next_step=_next_step(error)) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536) or "/" in host:
        raise CapabilityError(f"no cluster at {address!r}", expected="HOST:PORT or auto", next_step=_STEP)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        reason = (error.strerror or str(error) or "no answer").lower()
        raise CapabilityError(f"no Ray cluster answers at {address} ({reason})", next_step=_STEP) from error
    if answer[3:4] != _HTTP2_SETTINGS:
        raise CapabilityError(f"no Ray cluster answers at {address} (another server does)", next_step=_STEP)


def _why_not_connected(address: str, error: BaseException) -> str:
    if _is_version_mismatch(error):
        lines = [line.strip() for line in str(error).splitlines() if line.strip().startswith(("Ray: ", "Python: "))]
        theirs, ours = lines[:2], lines[2:4]
        return f"the cluster at {address} runs {', '.join(theirs)} and this command {', '.join(ours)}"
    if address == "auto" and isinstance(error, ConnectionError):
        return "no Ray cluster runs on this machine"
    reason = "it is no Ray cluster" if isinstance(error, SystemExit) else str(error).strip().partition("\n")[0]
    return f"no Ray cluster answers at {address} ({reason})"


def _next_step(error: BaseException) -> str:
    return "install the same versions on all machines" if _is_version_mismatch(error) else _STEP


def _is_version_mismatch(error: BaseException) -> bool:
    return "was started with" in str(error) and "Python" in str(error)


def choose_share(ray: ModuleType, device: str, threads: int | None) -> Share:
    """Choose how workers are laid over the machines of a cluster.

    Args:
        ray: the connected module.
        device: "cpu", "cuda", or "auto" for GPUs if the cluster has any.
        threads: CPU threads per worker; None for all CPUs of the smallest machine, divided by its GPUs.

    Raises:
        CapabilityError: the cluster has no such resources.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_of([(each.get("CPU", 0.0), int(each.get("GPU", 0))) for each in machines], device, threads)


def share_of(machines: list[tuple[float, int]], device: str, threads: int | None) -> Share:
    """As `choose_share`, for the CPUs and GPUs of each machine."""
    with_gpus = [(cpus, gpus) for cpus, gpus in machines if gpus]
    if device != "cpu" and with_gpus:
        per_gpu = min(cpus / gpus for cpus, gpus in with_gpus)
        return Share(sum(gpus for _, gpus in with_gpus), threads or max(0.0, min(per_gpu, _MAX_CPUS_PER_GPU)) // 1, 1)
    if device.startswith("cuda"):
        raise CapabilityError("the cluster has no GPU", next_step="pass --device cpu, or add machines with a GPU")
    usable = [cpus for cpus, _ in machines if cpus >= (threads or 1)]
    if not usable:
        raise CapabilityError(
            f"no machine of the cluster has {threads or 1} CPUs",
            next_step="add machines with CPUs" if threads in (None, 1) else "add machines, or pass fewer --threads",
        )
    cpus = float(threads or min(usable) // 1)
    return Share(int(sum(each // cpus for each in usable)), cpus, 0)


class RayPool:
    """Actors of one run as a `srdeploy.upscale.scale.chunks.Pool`.

    Attributes:
        workers: what is open now, by worker.
        opened: what the first worker opened; the others must have opened the same.
        losses: how many tasks were lost with their worker.
    """

    def __init__(
        self,
        ray: ModuleType,
        share: Share,
        options: WorkerOptions,
        call: Callable[[Any, Any], Any],
        *,
        mixed_engines: bool = False,
    ) -> None:
        """Start the actors and wait for the first one.

        Args:
            ray: the connected module.
            share: resources of each.
            options: how a worker opens the network.
            call: starts a task on an actor and returns its reference.
            mixed_engines: workers may open different engines or precisions.

        Raises:
            CapabilityError: no worker can be placed, or one lacks something.
            SrdeployError: what the first worker failed with.
        """
        self.workers: dict[int, Opened] = {}
        self.opened: Opened | None = None
        self.losses = 0
        self._ray = ray
        self._options = replace(options, device=share.device, threads=int(share.cpus) or None)
        self._call = call
        self._mixed = mixed_engines
        self._package: Any = None
        self._running: dict[Any, tuple[int, Any]] = {}
        self._opening: dict[Any, int] = {}
        self._lost_since = time.monotonic()
        actor = ray.remote(Worker).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=-1, max_task_retries=0
        )
        self._actors = [actor.remote(self._options) for _ in range(share.count)]
        for worker in range(share.count):
            self._open(worker)

    def first(self) -> Opened:
        """Wait for the first worker, and return what it opened.

        Raises:
            CapabilityError: none can be placed.
        """
        while self.opened is None:
            for _ in self.wait():
                pass
        return self.opened

    def idle(self) -> list[int]:
        """Return the workers that can take a task now."""
        busy = {worker for worker, _ in self._running.values()}
        return [worker for worker in self.workers if worker not in busy]

    def submit(self, worker: int, task: Any) -> None:
        """Start a task on an idle worker."""
        self._running[self._call(self._actors[worker], task)] = (worker, task)

    def wait(self) -> Iterator[tuple[int, Any, Any]]:
        """Wait until something happens or some seconds have passed, and return the tasks that ended.

        Raises:
            CapabilityError: there has been no worker for minutes.
        """
        pending = [*self._running, *self._opening]
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=_POLL_SECONDS) if pending else ([], [])
        for reference in ready:
            if reference in self._opening:
                self._take_opened(self._opening.pop(reference), reference)
            else:
                worker, task = self._running.pop(reference)
                outcome = self._result(reference)
                if isinstance(outcome, Lost):
                    self.losses += 1
                    self.workers.pop(worker, None)
                    self._open(worker)
                yield worker, task, outcome
        if self.workers or self._running:
            self._lost_since = time.monotonic()
        elif time.monotonic() - self._lost_since > _PATIENCE_SECONDS:
            raise CapabilityError(
                f"no worker of the cluster has been ready for {_PATIENCE_SECONDS:.0f} s",
                next_step=f"look at `ray status --address {self._ray.get_runtime_context().gcs_address}`; the same"
                " command resumes",
            )

    def close(self) -> None:
        """End the actors, so that nothing writes any more."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _open(self, worker: int, package: Any = None) -> None:
        self._opening[self._actors[worker].open.remote(package)] = worker

    def _take_opened(self, worker: int, reference: Any) -> None:
        opened = self._result(reference)
        if isinstance(opened, Lost):
            time.sleep(0.1)  # one that dies at once must not keep this process busy
            self._open(worker)
        elif opened is None:
            if self._package is None:
                self._package = self._ray.put(pack_model(self._options.model))
            self._open(worker, self._package)
        elif isinstance(opened, RemoteError):
            raise opened.error("a worker of the cluster")
        else:
            check_versions(opened)
            if self.opened is not None and not self._mixed:
                check_same_engine(self.opened, opened)
            self.opened = self.opened or opened
            self.workers[worker] = opened

    def _result(self, reference: Any) -> Any:
        failures = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except failures.RayTaskError:
            raise  # a bug, with the traceback of the worker
        except failures.RayError as error:
            return Lost(str(error).partition("\n")[0])


def check_versions(opened: Opened) -> None:
    """Check that a worker runs what this process runs; packages that one side lacks are not compared.

    Raises:
        CapabilityError: versions differ.
    """
    ours = compared_versions()
    for name, version in opened.versions.items():
        if ours.get(name, version) != version:
            raise CapabilityError(
                f"{opened.host} runs {name} {version}, and this machine {ours[name]}",
                expected="the same versions on all machines, or results depend on the machine",
                next_step="install the same versions everywhere, as with pip install -c constraints.txt",
            )


def check_same_engine(first: Opened, other: Opened) -> None:
    """Check that two workers compute the same.

    Raises:
        CapabilityError: engine, precision or the library behind them differ.
    """
    for mine, theirs in (
        (f"{first.name} ({first.numeric_mode})", f"{other.name} ({other.numeric_mode})"),
        (str(first.engine_versions), str(other.engine_versions)),
        (first.identity, other.identity),
    ):
        if mine != theirs:
            raise CapabilityError(
                f"{first.host} runs {mine}, and {other.host} {theirs}",
                expected="one engine and precision everywhere, so that results do not depend on the machine",
                next_step="choose with --engine and --precision, or pass --mixed-engines",
            )
