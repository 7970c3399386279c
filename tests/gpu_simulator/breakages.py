"""Deliberate breakages of the TensorRT runner: a good suite fails for each. Not part of the tests.

    python tests/gpu_simulator/breakages.py [NAME ...]

For every breakage the GPU tests run on the simulated GPU with a changed text of one source file, in memory: no file is
changed. Prints which test catches it, and under which schedule; the exit status is 1 when one passes all tests.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNNER = "srdeploy.runtime.engines.tensorrt.runner"
TIMER = "srdeploy.runtime.engines.timer"
TESTS = ("tests/gpu/test_gpu_ordering.py", "tests/gpu/test_gpu_engines.py")

BREAKAGES: dict[str, tuple[str, str, str]] = {
    # name -> (module, text, what it becomes)
    "computation does not wait for the upload": (RUNNER, "self.stream.wait_event(plan.loaded)", "pass"),
    "computation does not wait for the download": (RUNNER, "self.stream.wait_event(plan.fetched)", "pass"),
    "pinned buffer overwritten while it is read": (RUNNER, "self.copies.synchronize()  # the pinned", "pass  # "),
    "input overwritten while it is computed on": (RUNNER, "self.copies.wait_event(self.computed)", "pass"),
    "run_tensors does not wait for the caller": (RUNNER, "            self.stream.wait_stream(caller)\n", ""),
    "caller does not wait for run_tensors": (RUNNER, "            caller.wait_stream(self.stream)\n", ""),
    "download does not wait for the computation": (RUNNER, "        self.copies.wait_stream(stream)\n", ""),
    "run returns the pinned buffer itself": (RUNNER, "host_output.numpy().copy()}", "host_output.numpy()}"),
    "run_many yields the pinned buffer itself": (
        RUNNER,
        "                yield waiting[0].host_output.numpy().copy()",
        "                yield waiting[0].host_output.numpy()",
    ),
    "one slot for run_many": (RUNNER, "slot=1 + turn % 2", "slot=1"),
    "no device memory set": (RUNNER, "context.set_device_memory(memory.data_ptr(), memory.numel())", "pass"),
    "device memory arguments swapped": (
        RUNNER,
        "set_device_memory(memory.data_ptr(), memory.numel())",
        "set_device_memory(memory.numel(), memory.data_ptr())",
    ),
    "half of the device memory": (RUNNER, "torch.empty(max(needed, 1)", "torch.empty(max(needed // 2, 1)"),
    "captured before the first run": (
        RUNNER,
        "        plan.uses += 1\n",
        "        plan.uses += 1\n"
        "        if self.capturing and plan.uses == 1:\n"
        "            self._capture(plan)\n"
        "            return self._compute(plan)\n",
    ),
    "graph of the caller's buffer": (
        RUNNER,
        "plan.input.copy_(image, non_blocking=True)",
        "plan.context.set_tensor_address(self._engine.inputs[0].name, image.data_ptr())",
    ),
    "plan of another shape": (RUNNER, "key = (slot, *shape)", "key = (slot, *shape[:2], shape[3])"),
    "contexts shared by threads": (
        RUNNER,
        'lane = getattr(self._local, "lane", None)',
        "lane = self._lanes[0][1] if self._lanes else None",
    ),
    "inference mode reaches the buffers": (
        RUNNER,
        "with torch.cuda.device(self._device), torch.inference_mode(False):",
        "with torch.cuda.device(self._device):",
    ),
    "time read before the end": (TIMER, "            end.synchronize()\n", ""),
    "evicted plans not waited for": (
        RUNNER,
        "        self.stream.synchronize()\n        _, oldest",
        "        _, oldest",
    ),
    "no record_stream": (RUNNER, "            image.record_stream(self.stream)\n", ""),
    "lanes of ended threads kept": (RUNNER, "ended[1].close()  # a program", "continue  # a program"),
    "engine freed before contexts": (
        RUNNER,
        "            for _, lane in self._lanes:\n                lane.close()\n",
        "",
    ),
    # Those above are the ones that the suite was made for; those below came with later forms of the runner.
    "run_tensors returns the plan's buffer": (RUNNER, "        return result\n", "        return plan.output\n"),
    "one context for all plans of a lane": (
        RUNNER,
        "context = self._cuda_engine.create_execution_context(runtime_config)",
        'context = getattr(self, "_one", None) or self._cuda_engine.create_execution_context(runtime_config)\n'
        "        self._one = context",
    ),
    "a plan reads memory that the caller's stream still uses": (
        RUNNER,
        "                self.stream.wait_stream(torch.cuda.current_stream(self._device))\n",
        "",
    ),
    "memory size asked for before the shape": (
        RUNNER,
        "if not context.set_input_shape(self._engine.inputs[0].name, shape):",
        "context.update_device_memory_size_for_shapes()\n"
        "        if not context.set_input_shape(self._engine.inputs[0].name, shape):",
    ),
    "engine runs while another device is current": (
        RUNNER,
        '        """Enqueue one inference from the plan\'s input to its output on the private stream."""\n'
        "        with torch.cuda.device(self._device):",
        "        if True:",
    ),
}

_HOOK = """
import importlib.machinery, sys
MODULE, OLD, NEW = {module!r}, {old!r}, {new!r}

class Broken(importlib.machinery.SourceFileLoader):
    def get_data(self, path):
        data = super().get_data(path)
        if path.endswith(".py"):
            text = data.decode()
            assert OLD in text, "the breakage does not fit the source any more"
            data = text.replace(OLD, NEW).encode()
        return data
    def path_stats(self, path):
        raise OSError  # no cached bytecode

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        for finder in sys.meta_path:
            if finder is not self and (found := finder.find_spec(name, path, target)):
                found.loader = Broken(found.loader.name, found.loader.path)
                return found

sys.meta_path.insert(0, Finder())
"""


def main() -> int:
    names = sys.argv[1:] or list(BREAKAGES)
    missed, started = [], time.monotonic()
    for name in names:
        found = caught_by(*BREAKAGES[name])
        print(f"{'caught' if found else 'MISSED'}  {name}{': ' + found if found else ''}", flush=True)
        if not found:
            missed.append(name)
    print(f"{len(names) - len(missed)} of {len(names)} caught in {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


def caught_by(module: str, old: str, new: str) -> str | None:
    """Return the first test that fails, None when all pass."""
    with tempfile.TemporaryDirectory() as folder:
        hook = _HOOK.format(module=module, old=old, new=new)
        (Path(folder) / "sitecustomize.py").write_text(hook, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", *TESTS]
        done = subprocess.run(
            [*command, "-k", "not rtx and not onnxruntime and not process and not baseline"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
    return failed[1].rpartition("::")[2] if failed else f"no test ran: {done.stdout[-300:]} {done.stderr[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
