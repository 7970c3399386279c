"""The tests of the TensorRT runner are sharp: each deliberate breakage of it makes the test fail that is named for it.

One simulated GPU is enough: every breakage is tried under the three schedules in turn, and one of them must catch it.
"""

import contextlib
import gc
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import test_gpu_engines, test_gpu_ordering
from gpu.cases import PROFILE, REAL
from gpu_simulator.breakages import BREAKAGES, Breakage, broken
from gpu_simulator.cuda import Simulator
from gpu_simulator.install import Setting, simulated

from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine

SCHEDULES = ("late", "random", "at-once")
KNOWN_TO_PASS: set[str] = set()
"""Names of tests; some notice several breakages."""
pytestmark = pytest.mark.skipif(REAL, reason="a real GPU is not driven into undefined behavior")


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with simulated(tmp_path_factory.mktemp("simulated"), Setting("11.4.0.106")) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def built(machine: Simulator, onnx_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(profiles=(PROFILE,), use_cache=False)
    path = tmp_path_factory.mktemp("engine") / "model.plan"
    return build_engine(onnx_fp16, path, engine="tensorrt", options=options).path


Expected = Callable[[np.ndarray], np.ndarray]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name.replace(" ", "-"))
def test_a_breakage_is_caught(breakage: Breakage, machine: Simulator, built: Path, expected: Expected) -> None:
    test = getattr(test_gpu_ordering, breakage.test, None) or getattr(test_gpu_engines, breakage.test)
    if breakage.test not in KNOWN_TO_PASS:
        assert passes(test, machine, "late", built, expected), "the test fails without the breakage"
        KNOWN_TO_PASS.add(breakage.test)

    with broken(breakage):
        assert not all(passes(test, machine, schedule, built, expected) for schedule in SCHEDULES)


def passes(test: Callable[..., None], machine: Simulator, schedule: str, built: Path, expected: Expected) -> bool:
    """Run a test with every value of its parameters and return True if it passes without breaking a rule."""
    machine.schedule = schedule
    machine.violations.clear()
    (mark,) = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"] or [None]
    cases: list[dict[str, Any]] = [{mark.args[0]: value} for value in mark.args[1]] if mark else [{}]
    try:
        for case in cases:
            run(test, {"built": built, "expected": expected, **case})
        return machine.violations == []
    except Exception:
        return False
    finally:
        forget(machine)


def run(test: Callable[..., None], values: dict[str, Any]) -> None:
    """Call a test with the fixtures that it asks for."""
    wanted = inspect.signature(test).parameters
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("error")
        if "monkeypatch" in wanted:
            values["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
        if "runner" in wanted:
            values["runner"] = stack.enter_context(open_engine(values["built"]))
        test(**{name: values[name] for name in wanted})
    del values["built"]
    values.clear()
    gc.collect()


def forget(machine: Simulator) -> None:
    """Run or drop what a failed test left behind."""
    gc.collect()
    for stream in machine.all_streams():
        stream.capture = None
        stream.queue.clear()
    machine.violations.clear()
