"""The eager network on a GPU: the forms that engines are measured against, on the device that was requested."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import CapabilityError
from srdeploy.core.imaging.psnr import psnr_db
from srdeploy.core.runner import run_image
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.bench.baselines import ON_GPU, open_baselines
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.engines.eager import REFERENCE, open_eager
from srdeploy.runtime.engines.timer import timed

SHAPE = (1, 3, 24, 40)


@pytest.mark.parametrize(("name", "floor_db"), [("eager", 90.0), ("half", 45.0), ("autocast", 45.0)], ids=str)
def test_forms_compute_the_network_on_the_gpu(checkpoint: LoadedCheckpoint, name: str, floor_db: float) -> None:
    image = bench_image(SHAPE)

    with open_eager(checkpoint, threads=1) as reference, open_eager(checkpoint, ON_GPU[name], device="cuda") as runner:
        assert psnr_db(run_image(runner, image), run_image(reference, image)) > floor_db
        assert runner.info.device == f"cuda:{torch.cuda.current_device()}"
        assert runner.info.threads is None
        assert runner.run_tensors({INPUT: torch.from_numpy(image)})["output"].device.type == "cuda"


def test_baselines_open_on_the_gpu_with_the_plain_network_first(checkpoint: LoadedCheckpoint) -> None:
    with ExitStack() as stack:
        found = open_baselines(checkpoint, ["half", "autocast"], stack, shape=SHAPE, device="cuda:0")

        assert [runner.info.name for runner in found.runners] == [
            "eager fp32", "eager fp16 channels-last", "eager fp16 autocast",
        ]  # fmt: skip
        assert {runner.info.device for runner in found.runners} == {"cuda:0"}
    assert torch.backends.cudnn.benchmark is False


def test_a_gpu_that_is_not_there_is_named(checkpoint: LoadedCheckpoint) -> None:
    with pytest.raises(CapabilityError, match=f"'cuda:7' was requested, and PyTorch sees {torch.cuda.device_count()}"):
        open_eager(checkpoint, device="cuda:7")


def test_time_is_taken_on_the_device_of_the_runner(checkpoint: LoadedCheckpoint) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    before = torch.cuda.current_device()

    with open_eager(checkpoint, REFERENCE, device="cuda:1") as runner:
        assert runner.prepare({INPUT: bench_image(SHAPE)})() > 0
        assert runner.info.device == "cuda:1"

    assert torch.cuda.current_device() == before == 0


def test_work_on_a_stream_of_its_own_is_timed_there() -> None:
    device = f"cuda:{torch.cuda.device_count() - 1}"
    stream = torch.cuda.Stream(device)
    source = torch.ones(1000, device=device)
    target = torch.zeros_like(source)
    torch.cuda.synchronize(device)

    def work() -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)

    assert timed(work, device, stream=stream)() >= 0.0
    np.testing.assert_array_equal(target.cpu().numpy(), 1.0)
