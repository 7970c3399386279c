"""Putting the simulated GPU in place of the real one, in this process and in the processes that it starts.

    with simulated(version="10.16.1.11", schedule="late") as simulator:
        ...

`torch.cuda`, `tensorrt`, `tensorrt_rtx` and `onnxruntime`'s GPU providers are then simulated. Processes started
meanwhile find a `sitecustomize` on PYTHONPATH that does the same there.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_simulator.bindings import VERSIONS, describe, description, generate
from gpu_simulator.cuda import Gpu, Simulator

ADA = Gpu("Simulated GPU Ada", (8, 9), 8 * 2**30)
BLACKWELL = Gpu("Simulated GPU Blackwell", (12, 0), 8 * 2**30)
_HERE = Path(__file__).parents[1]
_CUDA = (13, 0)
"""What PyTorch and the TensorRTs were built with."""
_MODULES = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx")


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        version: release of TensorRT, None for none installed.
        gpus: the devices; none for a machine without a GPU.
        schedule: see `gpu_simulator.cuda`.
        seed: of the schedule "random".
        tolerated: names of rules that may be broken, which is then only noted.
        build_step_seconds: how long each step of a build takes.
        onnxruntime_gpu: whether the installed onnxruntime has the GPU providers.
        driver: newest CUDA version that the NVIDIA driver supports; one older than PyTorch's makes no GPU usable.
    """

    version: str | None = VERSIONS[0]
    gpus: tuple[Gpu, ...] = (ADA, ADA)
    schedule: str = "at-once"
    seed: int = 0
    tolerated: tuple[str, ...] = ()
    build_step_seconds: float = 0.0
    onnxruntime_gpu: bool = True
    driver: tuple[int, int] = (13, 0)

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """The devices that the driver lets PyTorch and TensorRT use."""
        return self.gpus if self.driver >= _CUDA else ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def setting_from_json(text: str) -> Setting:
    """Read `Setting.to_json` back."""
    values = json.loads(text)
    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in values["gpus"])
    return Setting(
        **{**values, "gpus": gpus, "tolerated": tuple(values["tolerated"]), "driver": tuple(values["driver"])}
    )


@contextlib.contextmanager
def simulated(folder: Path, setting: Setting) -> Iterator[Simulator]:
    """Simulate GPUs while the block runs.

    Args:
        folder: an empty folder, for what other processes need.
        setting: what is simulated.
    """
    from gpu_simulator import driver, onnxruntime_gpu, torch_cuda

    _forget_loggers()
    write_environment(folder, setting)
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PATH")}
    kept = _forget_modules()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), str(_HERE), before["PYTHONPATH"])))
    os.environ["PATH"] = os.pathsep.join((str(folder), os.environ["PATH"]))  # nvidia-smi
    simulator = Simulator(setting.usable_gpus, setting.schedule, setting.seed)
    simulator.tolerated = set(setting.tolerated)
    finder = Finder(simulator, setting)
    after_polygraphy = Afterwards("polygraphy.cuda.cuda", lambda: _install("cuda_runtime", simulator))
    sys.meta_path[:0] = [finder, after_polygraphy]
    torch_cuda.install(simulator)
    driver.install(setting.driver)
    if setting.onnxruntime_gpu:
        onnxruntime_gpu.install(simulator, setting.version)
    try:
        yield simulator
    finally:
        onnxruntime_gpu.uninstall()
        torch_cuda.uninstall()
        driver.uninstall()
        sys.meta_path[:] = [entry for entry in sys.meta_path if entry not in (finder, after_polygraphy)]
        _forget_modules()
        sys.modules.update(kept)
        _forget_loggers()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def write_environment(folder: Path, setting: Setting) -> None:
    """Write what another process needs: PYTHONPATH must name the folder, and PATH for nvidia-smi."""
    from gpu_simulator import driver

    (folder / "simulated_gpu.json").write_text(setting.to_json(), encoding="utf-8")
    driver.write_nvidia_smi(folder, setting.gpus, setting.driver)
    (folder / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(1, {str(_HERE)!r})\n"
        "from gpu_simulator.install import begin\n"
        f"begin({str(folder / 'simulated_gpu.json')!r})\n",
        encoding="utf-8",
    )


def begin(path: str) -> None:
    """Simulate from now on: what `sitecustomize` calls at the start of another process."""
    from gpu_simulator import driver

    setting = setting_from_json(Path(path).read_text(encoding="utf-8"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver.install(setting.driver)
    gpus = setting.usable_gpus
    if visible is not None:
        gpus = tuple(gpus[int(number)] for number in visible.split(",") if number.isdigit())
    simulator = Simulator(gpus, setting.schedule, setting.seed)
    simulator.tolerated = set(setting.tolerated)
    sys.meta_path.insert(0, Finder(simulator, setting))
    sys.meta_path.insert(0, Afterwards("torch", lambda: _install("torch_cuda", simulator)))
    sys.meta_path.insert(0, Afterwards("polygraphy.cuda.cuda", lambda: _install("cuda_runtime", simulator)))
    if setting.onnxruntime_gpu:
        install = functools.partial(_install, "onnxruntime_gpu", simulator, setting.version)
        sys.meta_path.insert(0, Afterwards("onnxruntime", install))


def _install(module: str, *arguments: Any) -> None:
    importlib.import_module(f"gpu_simulator.{module}").install(*arguments)


class Afterwards(importlib.abc.MetaPathFinder):
    """Calls a function behind the import of a module."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self._name, self._call = name, call
        self._busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name or self._busy:
            return None
        self._busy = True
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self._busy = False
            return None
        run = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            run(module)
            self._busy = False
            self._call()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the simulated TensorRTs under their real names."""

    def __init__(self, simulator: Simulator, setting: Setting) -> None:
        self._simulator, self._setting = simulator, setting

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name in ("tensorrt", "tensorrt_bindings") and self._setting.version:
            return importlib.machinery.ModuleSpec(name, self)
        if name == "tensorrt_rtx" and importlib.util.find_spec("tensorrt_rtx_bindings"):
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        if spec.name == "tensorrt_rtx":
            return self._rtx()
        from gpu_simulator.tensorrt import FULL_FUNCTIONS, FULL_STATES

        assert self._setting.version is not None
        module = generate(description(self._setting.version), FULL_STATES, FULL_FUNCTIONS, title="tensorrt")
        return self._completed(module)

    def _rtx(self) -> types.ModuleType:
        import tensorrt_rtx_bindings as real

        from gpu_simulator.rtx import keep_graphs
        from gpu_simulator.tensorrt import RTX_STATES

        module = generate(describe(real), RTX_STATES, {}, title="tensorrt_rtx", real=real)
        keep_graphs(module, real)
        return self._completed(module)

    def _completed(self, module: Any) -> types.ModuleType:
        module.simulator = self._simulator
        module.build_step_seconds = self._setting.build_step_seconds
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def forget_polygraphy() -> dict[str, types.ModuleType]:
    """Forget that Polygraphy was imported, as a new process does: it keeps the TensorRT that it has seen."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "polygraphy"}


def _forget_modules() -> dict[str, types.ModuleType]:
    """Forget imported TensorRTs, and Polygraphy; return the modules."""
    return {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules} | forget_polygraphy()


def _forget_loggers() -> None:
    """Forget what this project keeps per process: loggers belong to the module whose classes they use."""
    from srdeploy.runtime.engines import onnxruntime_gpu
    from srdeploy.runtime.engines.tensorrt import log

    log._LOGGERS.clear()
    onnxruntime_gpu._probe.cache_clear()
