"""Order of work on a GPU: copies, computations, graphs, threads and memory that is given back at the wrong moment.

A missing wait seldom shows on an idle GPU. So everything here keeps streams busy, changes the data at every turn, and
compares with what the CPU computes from the same graph. On simulated GPUs the work runs as late as its order allows.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gpu.cases import assert_same, image
from gpu_simulator.cuda import Simulator

from srdeploy.core.runner import run_image
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.engines.sidecar import read_engine
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.open import open_plan
from srdeploy.runtime.engines.tensorrt.rtx import RTX
from srdeploy.runtime.engines.tensorrt.runner import CAPTURE_AFTER, MAX_PLANS, TensorRtRunner, _Plan

Expected = Callable[[np.ndarray], np.ndarray]
TURNS = CAPTURE_AFTER + 3
"""So many runs of a shape are plain, captured and replayed ones."""


def test_plans_alternate_before_and_after_their_capture(runner: TensorRtRunner, expected: Expected) -> None:
    for turn in range(TURNS):
        for index in range(MAX_PLANS - 1):
            picture = image(1, 3, 16 + 8 * index, 16, seed=10 * turn + index)
            assert_same(run_image(runner, picture), expected(picture))


def test_shapes_alternate_without_graphs(built: object, expected: Expected) -> None:
    engine = read_engine(built)  # type: ignore[arg-type]
    product = FULL if engine.family == "tensorrt" else RTX
    with open_plan(product, engine, "cuda:0", None, graphs=False) as runner:
        for turn in range(TURNS):
            for index in range(MAX_PLANS - 1):
                picture = image(1, 3, 16 + 8 * index, 16, seed=10 * turn + index)
                assert_same(run_image(runner, picture), expected(picture))


def test_tensors_at_other_addresses_every_time(runner: TensorRtRunner, expected: Expected) -> None:
    held, results = [], []
    for seed in range(TURNS):
        held.append(torch.from_numpy(image(1, 3, 40, 40, seed=seed)).cuda())
        results.append(runner.run_tensors({"input": held[-1]})["output"])

    # Results belong to the caller: later runs of the same shape leave them alone.
    for seed, result in enumerate(results):
        assert_same(result.cpu().numpy(), expected(image(1, 3, 40, 40, seed=seed)))


def test_tensors_and_arrays_take_turns(runner: TensorRtRunner, expected: Expected) -> None:
    for turn in range(TURNS):
        first, second = image(1, 3, 40, 40, seed=2 * turn), image(1, 3, 40, 40, seed=2 * turn + 1)
        result = runner.run_tensors({"input": torch.from_numpy(first).cuda()})["output"]
        assert_same(run_image(runner, second), expected(second))
        assert_same(result.cpu().numpy(), expected(first))


@pytest.mark.parametrize("runs_before", [0, 1, TURNS], ids=["first-run", "plain", "graph"])
def test_work_is_ordered_after_the_callers_stream(runner: TensorRtRunner, expected: Expected, runs_before: int) -> None:
    picture, other = image(1, 3, 40, 40, seed=1), image(1, 3, 40, 40, seed=2)
    for _ in range(runs_before):
        run_image(runner, other)
    source = torch.from_numpy(picture).cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()

    with torch.cuda.stream(stream):
        late = torch.zeros(1, 3, 40, 40, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(source, non_blocking=True)
        result = runner.run_tensors({"input": late})["output"].clone()
    stream.synchronize()

    assert_same(result.cpu().numpy(), expected(picture))


def test_memory_of_a_freed_input_is_not_reused_too_soon(runner: TensorRtRunner, expected: Expected) -> None:
    picture = image(1, 3, 40, 40, seed=1)
    run_image(runner, image(1, 3, 40, 40, seed=2))
    other = torch.from_numpy(image(1, 3, 40, 40, seed=4)).cuda()
    tensor = torch.from_numpy(picture).cuda()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()

    with torch.cuda.stream(side):
        result = runner.run_tensors({"input": tensor})["output"]
    del tensor
    again = torch.empty(1, 3, 40, 40, device="cuda")  # PyTorch may hand the same memory out
    again.copy_(other, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    side.synchronize()

    assert_same(result.cpu().numpy(), expected(picture))


def test_a_new_plan_in_memory_that_the_callers_stream_still_writes_to(
    runner: TensorRtRunner, expected: Expected
) -> None:
    for index in range(6):
        picture = image(1, 3, 16 + 8 * index, 24, seed=index)
        stale = torch.empty(picture.shape, device="cuda")
        torch.cuda._sleep(20_000_000)
        for _ in range(8):
            stale.fill_(0.5)
        del stale  # the plan's input may be in this memory now
        assert_same(run_image(runner, picture), expected(picture))


def test_a_stream_of_images_of_one_shape(runner: TensorRtRunner, expected: Expected) -> None:
    pictures = [image(1, 3, 48, 64, seed=seed) for seed in range(4 * CAPTURE_AFTER)]

    answers = list(runner.run_many(pictures))

    assert len(answers) == len(pictures)
    for picture, answer in zip(pictures, answers, strict=True):
        assert_same(answer, expected(picture))


def test_a_stream_of_images_of_many_shapes(runner: TensorRtRunner, expected: Expected) -> None:
    pictures = [image(1, 3, 16 + 8 * (seed % 5), 24, seed=seed) for seed in range(11)]

    for picture, answer in zip(pictures, runner.run_many(pictures), strict=True):
        assert_same(answer, expected(picture))


def test_a_stream_of_images_that_is_abandoned_disturbs_no_later_one(runner: TensorRtRunner, expected: Expected) -> None:
    pictures = [image(1, 3, 48, 64, seed=seed) for seed in range(3)]
    abandoned = runner.run_many(image(1, 3, 48, 64, seed=9) for _ in range(4))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]  # a generator

    for picture, answer in zip(pictures, runner.run_many(pictures), strict=True):
        assert_same(answer, expected(picture))


def test_plans_are_evicted_while_their_work_is_queued(runner: TensorRtRunner, expected: Expected) -> None:
    pictures = [image(1, 3, 16 + 8 * index, 24, seed=index) for index in range(2 * MAX_PLANS)]
    on_gpu = [torch.from_numpy(picture).cuda() for picture in pictures]  # before: these copies wait for the stream

    results = [runner.run_tensors({"input": tensor})["output"] for tensor in on_gpu]

    for picture, result in zip(pictures, results, strict=True):
        assert_same(result.cpu().numpy(), expected(picture))


def test_work_that_is_queued_when_the_runner_closes_is_finished(built: object, expected: Expected) -> None:
    picture = image(1, 3, 40, 40)
    with open_engine(built) as runner:  # type: ignore[arg-type]
        assert isinstance(runner, TensorRtRunner)
        result = runner.run_tensors({"input": torch.from_numpy(picture).cuda()})["output"]

    assert_same(result.cpu().numpy(), expected(picture))


def test_a_larger_shape_does_not_disturb_a_smaller_one(runner: TensorRtRunner, expected: Expected) -> None:
    """Plans share one buffer of activations: a larger one replaces it while work may be using the smaller one."""
    small, large = image(1, 3, 16, 16, seed=1), image(4, 3, 96, 128, seed=2)
    first = runner.run_tensors({"input": torch.from_numpy(small).cuda()})["output"]
    second = runner.run_tensors({"input": torch.from_numpy(large).cuda()})["output"]
    third = runner.run_tensors({"input": torch.from_numpy(small).cuda()})["output"]

    assert_same(second.cpu().numpy(), expected(large))
    for result in (first, third):
        assert_same(result.cpu().numpy(), expected(small))


def test_threads_compute_at_the_same_time(
    runner: TensorRtRunner, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have begun the copy of a picture of the same shape before one goes on: a plan in common has the last one."""
    together = threading.Barrier(3, timeout=120)
    load = _Plan.load

    def load_together(self: _Plan, picture: np.ndarray) -> None:
        load(self, picture)
        together.wait()

    def work(index: int) -> list[np.ndarray]:
        try:
            return [run_image(runner, image(1, 3, 24, 32, seed=10 * index + turn)) for turn in range(TURNS)]
        except Exception:
            together.abort()  # nobody waits for this thread any more
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(together.parties) as threads:
        patch.setattr(_Plan, "load", load_together)
        answers = list(threads.map(work, range(together.parties)))

    for index, results in enumerate(answers):
        for turn, result in enumerate(results):
            assert_same(result, expected(image(1, 3, 24, 32, seed=10 * index + turn)))


def test_rtx_records_its_graph_once_per_shape(
    machine: Simulator | None, runner: TensorRtRunner, expected: Expected
) -> None:
    if machine is None or runner.info.engine != "tensorrt-rtx":
        return  # a real GPU does not count them; full TensorRT is captured by us
    before = machine.recordings
    for turn in range(TURNS):
        for index in range(2):
            picture = image(1, 3, 16 + 8 * index, 16, seed=turn)
            runner.run_tensors({"input": torch.from_numpy(picture).cuda()})

    assert machine.recordings == before + 2


def test_the_caller_may_have_another_device_current(built: object, expected: Expected) -> None:
    last = torch.cuda.device_count() - 1
    picture = image(1, 3, 40, 40)
    with open_engine(built, device=f"cuda:{last}") as runner:  # type: ignore[arg-type]
        assert isinstance(runner, TensorRtRunner)
        for _ in range(TURNS):
            assert_same(run_image(runner, picture), expected(picture))
        result = runner.run_tensors({"input": torch.from_numpy(picture).to(f"cuda:{last}")})["output"]
        assert 0 < runner.prepare({"input": picture})() < 1000

    assert result.device.index == last
    assert torch.cuda.current_device() == 0
    assert_same(result.cpu().numpy(), expected(picture))
