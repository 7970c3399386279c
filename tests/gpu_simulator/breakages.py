"""Deliberate breakages of the TensorRT runner, for the test that each of them makes a test of the runner fail.

A breakage is another text of one place in the source. `broken` compiles the changed source and puts the code of its
functions in place of the present one: in memory, in this process, and only inside the block.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNER = "srdeploy.runtime.engines.tensorrt.runner"
TIMER = "srdeploy.runtime.engines.timer"


@dataclass(frozen=True)
class Breakage:
    """A breakage of one source file.

    Attributes:
        name: what goes wrong.
        test: a test of `test_gpu_ordering` or `test_gpu_engines` that notices it.
        old: text in the source.
        new: what it becomes.
        module: whose source it is.
    """

    name: str
    test: str
    old: str
    new: str
    module: str = RUNNER


BREAKAGES = (
    Breakage(
        "computation does not wait for the upload",
        "test_plans_alternate_before_and_after_their_capture",
        "self.stream.wait_event(plan.loaded)",
        "pass",
    ),
    Breakage(
        "pinned buffers overwritten while they are copied",
        "test_a_stream_of_images_that_is_abandoned_disturbs_no_later_one",
        "self.copies.synchronize()  # the pinned",
        "pass  # ",
    ),
    Breakage(
        "input overwritten while it is computed on",
        "test_tensors_and_arrays_take_turns",
        "self.copies.wait_event(self.computed)",
        "pass",
    ),
    Breakage(
        "run_tensors does not wait for the caller",
        "test_work_is_ordered_after_the_callers_stream",
        "            self.stream.wait_stream(caller)\n",
        "",
    ),
    Breakage(
        "caller does not wait for run_tensors",
        "test_tensors_at_other_addresses_every_time",
        "            caller.wait_stream(self.stream)\n",
        "",
    ),
    Breakage(
        "download does not wait for the computation",
        "test_plans_alternate_before_and_after_their_capture",
        "        self.copies.wait_stream(stream)\n",
        "",
    ),
    Breakage(
        "run returns the pinned buffer itself",
        "test_the_ways_to_run_do_not_write_over_each_other",
        "host_output.numpy().copy()}",
        "host_output.numpy()}",
    ),
    Breakage(
        "run_many yields the pinned buffer itself",
        "test_a_stream_of_images_of_one_shape",
        "                yield waiting[0].host_output.numpy().copy()",
        "                yield waiting[0].host_output.numpy()",
    ),
    Breakage("one slot for run_many", "test_a_stream_of_images_of_one_shape", "slot=1 + turn % 2", "slot=1"),
    Breakage(
        "no device memory set",
        "test_plans_alternate_before_and_after_their_capture",
        "context.set_device_memory(memory.data_ptr(), memory.numel())",
        "pass",
    ),
    Breakage(
        "device memory arguments swapped",
        "test_plans_alternate_before_and_after_their_capture",
        "set_device_memory(memory.data_ptr(), memory.numel())",
        "set_device_memory(memory.numel(), memory.data_ptr())",
    ),
    Breakage(
        "half of the device memory",
        "test_plans_alternate_before_and_after_their_capture",
        "torch.empty(max(needed, 1)",
        "torch.empty(max(needed // 2, 1)",
    ),
    Breakage(
        "captured before the first run",
        "test_plans_alternate_before_and_after_their_capture",
        "        plan.uses += 1\n",
        "        plan.uses += 1\n"
        "        if self.capturing and plan.uses == 1:\n"
        "            self._capture(plan)\n"
        "            return self._compute(plan)\n",
    ),
    Breakage(
        "graph of the caller's buffer",
        "test_tensors_at_other_addresses_every_time",
        "plan.input.copy_(image, non_blocking=True)",
        "plan.context.set_tensor_address(self._engine.inputs[0].name, image.data_ptr())",
    ),
    Breakage(
        "plan of another shape",
        "test_plans_alternate_before_and_after_their_capture",
        "key = (slot, *shape)",
        "key = (slot, *shape[:2], shape[3])",
    ),
    Breakage(
        "contexts shared by threads",
        "test_threads_compute_at_the_same_time",
        'lane = getattr(self._local, "lane", None)',
        "lane = self._lanes[0][1] if self._lanes else None",
    ),
    Breakage(
        "inference mode reaches the buffers",
        "test_the_callers_inference_mode_and_gradients_stay_outside",
        "with torch.cuda.device(self._device), torch.inference_mode(False):",
        "with torch.cuda.device(self._device):",
    ),
    Breakage("time read before the end", "test_compute_time_is_the_gpus", "            end.synchronize()\n", "", TIMER),
    Breakage(
        "evicted plans not waited for",
        "test_plans_are_evicted_while_their_work_is_queued",
        "        self.stream.synchronize()\n        _, oldest",
        "        _, oldest",
    ),
    Breakage(
        "no record_stream",
        "test_memory_of_a_freed_input_is_not_reused_too_soon",
        "            image.record_stream(self.stream)\n",
        "",
    ),
    Breakage(
        "lanes of ended threads kept",
        "test_threads_that_have_ended_give_their_memory_back",
        "ended[1].close()  # a program",
        "continue  # a program",
    ),
    Breakage(
        "engine freed before contexts",
        "test_work_that_is_queued_when_the_runner_closes_is_finished",
        "            for _, lane in self._lanes:\n                lane.close()\n",
        "",
    ),
    Breakage(
        "run_tensors returns the plan's buffer",
        "test_tensors_at_other_addresses_every_time",
        "        return result\n",
        "        return plan.output\n",
    ),
    Breakage(
        "one context for all plans of a lane",
        "test_plans_alternate_before_and_after_their_capture",
        "context = self._cuda_engine.create_execution_context(runtime_config)",
        'context = getattr(self, "_one", None) or self._cuda_engine.create_execution_context(runtime_config)\n'
        "        self._one = context",
    ),
    Breakage(
        "a plan uses memory that the caller's stream still uses",
        "test_a_new_plan_in_memory_that_the_callers_stream_still_writes_to",
        "                self.stream.wait_stream(torch.cuda.current_stream(self._device))\n",
        "",
    ),
    Breakage(
        "memory size asked for before the shape",
        "test_plans_alternate_before_and_after_their_capture",
        "if not context.set_input_shape(self._engine.inputs[0].name, shape):",
        "context.update_device_memory_size_for_shapes()\n"
        "        if not context.set_input_shape(self._engine.inputs[0].name, shape):",
    ),
    Breakage(
        "engine runs while another device is current",
        "test_the_caller_may_have_another_device_current",
        '        """Enqueue one inference from the plan\'s input to its output on the private stream."""\n'
        "        with torch.cuda.device(self._device):",
        '        """Enqueue one inference from the plan\'s input to its output on the private stream."""\n'
        "        if True:",
    ),
)


@contextlib.contextmanager
def broken(breakage: Breakage) -> Iterator[None]:
    """Run the block with the code of the changed source."""
    module = importlib.import_module(breakage.module)
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    if breakage.old not in text:
        raise LookupError(f"the breakage {breakage.name!r} does not fit the source any more")
    changed = types.ModuleType(breakage.module)
    source = text.replace(breakage.old, breakage.new)
    exec(compile(source, str(module.__file__), "exec"), vars(changed))  # noqa: S102
    found = _functions(changed)
    before = {name: function.__code__ for name, function in _functions(module).items()}
    try:
        for name, function in _functions(module).items():
            function.__code__ = found[name].__code__
        yield
    finally:
        for name, function in _functions(module).items():
            function.__code__ = before[name]


def _functions(module: types.ModuleType) -> dict[str, Any]:
    """Return the functions, methods and properties that a module defines, by qualified name."""
    found = {}
    for place in (module, *(kind for kind in vars(module).values() if isinstance(kind, type))):
        for value in vars(place).values():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                found[function.__qualname__] = function
    return found
