"""Engines on a real NVIDIA GPU: parity with eager FP32, shapes, threads, streams, graphs, and opening safely.

Families that are not installed, or that do not support the GPU (TensorRT-RTX and Hopper), are skipped with a reason.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.dlpack
from gpu.cases import BUILT, OPENED, PROFILE, assert_same, image, needs, psnr_db

from srdeploy.core.errors import CapabilityError, InputError, UsageError
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.runner import TimedRunner, run_image
from srdeploy.core.shapes import ShapeProfile
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.bench.memory import process_memory
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine
from srdeploy.runtime.engines.tensorrt.runner import CAPTURE_AFTER, MAX_PLANS, TensorRtRunner

FIDELITY_DB = {"fp32": 90.0, "fp16": 55.0}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("engine", [*BUILT, *OPENED])
def test_parity_with_eager_fp32(
    engine: str, precision: str, checkpoint: LoadedCheckpoint, onnx_fp32: Path, onnx_fp16: Path, tmp_path: Path
) -> None:
    needs(engine)
    source = onnx_fp32 if precision == "fp32" else onnx_fp16
    if engine in BUILT:
        options = BuildOptions(profiles=(PROFILE,), use_cache=False)
        built = build_engine(source, tmp_path / "e", engine=engine, options=options)
        assert built.manifest.details["precision"]["built"] == precision
        source = built.path

    with open_engine(source, engine=engine) as runner, open_eager(checkpoint, device="cuda") as eager:
        for shape in [(1, 3, 8, 8), (1, 3, 48, 64), (3, 3, 33, 57), (4, 3, 96, 128)]:
            picture = image(*shape)
            assert psnr_db(run_image(runner, picture), run_image(eager, picture)) > FIDELITY_DB[precision]


@pytest.mark.parametrize("engine", OPENED)
def test_an_array_that_may_not_be_written(engine: str, onnx_fp16: Path, expected: Callable[..., np.ndarray]) -> None:
    needs(engine)
    picture = image(1, 3, 24, 32)
    picture.flags.writeable = False
    with open_engine(onnx_fp16, engine=engine) as runner:
        assert isinstance(runner, TimedRunner)
        assert_same(run_image(runner, picture), expected(picture))
        assert 0 < runner.prepare({"input": picture})() < 1000


def test_shapes_may_alternate(runner: TensorRtRunner) -> None:
    pictures = [image(1, 3, 16 + 8 * index, 16, seed=index) for index in range(MAX_PLANS + 3)]
    alone = [run_image(runner, picture) for picture in pictures]

    for _ in range(3):  # plans are made, captured, replayed and given back
        for picture, answer in zip(pictures, alone, strict=True):
            assert_same(run_image(runner, picture), answer)


def test_a_shape_outside_the_profile_names_the_profile(runner: TensorRtRunner) -> None:
    with pytest.raises(UsageError, match="1x3x8x8 to 4x3x96x128.*--max-shape 4x3x96x256"):
        run_image(runner, image(1, 3, 96, 256))


def test_tensors_go_in_and_out_without_the_host(runner: TensorRtRunner) -> None:
    picture = image(1, 3, 40, 40)
    expected = run_image(runner, picture)
    on_gpu = torch.from_numpy(picture).cuda()

    for value in (on_gpu, torch.utils.dlpack.to_dlpack(on_gpu)):
        result = runner.run_tensors({"input": value})["output"]
        assert result.device.type == "cuda"
        assert_same(result.cpu().numpy(), expected)
    with pytest.raises(UsageError, match="on cpu"):
        runner.run_tensors({"input": torch.from_numpy(picture)})


def test_work_is_ordered_behind_the_callers_stream(runner: TensorRtRunner) -> None:
    picture = image(1, 3, 40, 40)
    expected = run_image(runner, picture)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(1, 3, 40, 40, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(torch.from_numpy(picture))
        result = runner.run_tensors({"input": late})["output"].clone()
    stream.synchronize()

    assert_same(result.cpu().numpy(), expected)


def test_a_copy_into_another_layout_is_waited_for(runner: TensorRtRunner) -> None:
    picture = image(1, 3, 40, 40)
    expected = run_image(runner, picture)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(1, 3, 40, 40, device="cuda").to(memory_format=torch.channels_last)
        torch.cuda._sleep(50_000_000)
        late.copy_(torch.from_numpy(picture))
        result = runner.run_tensors({"input": late})["output"].clone()
    stream.synchronize()

    assert_same(result.cpu().numpy(), expected)


def test_the_callers_inference_mode_and_gradients_stay_outside(runner: TensorRtRunner) -> None:
    on_gpu = torch.from_numpy(image(1, 3, 40, 40)).cuda()
    with torch.inference_mode():
        first = runner.run_tensors({"input": on_gpu})["output"].clone()
    second = runner.run_tensors({"input": on_gpu.clone().requires_grad_()})["output"]

    assert not second.requires_grad
    assert_same(second.cpu().numpy(), first.cpu().numpy())


def test_the_ways_to_run_do_not_write_over_each_other(runner: TensorRtRunner) -> None:
    pictures = [image(1, 3, 48, 64, seed=index) for index in range(6)]
    alone = [run_image(runner, picture) for picture in pictures]
    on_gpu = torch.from_numpy(pictures[0]).cuda()

    for index, answer in enumerate(runner.run_many(pictures)):
        assert_same(answer, alone[index])
        kept = runner.run_tensors({"input": on_gpu})["output"].clone()
        assert_same(run_image(runner, pictures[-1]), alone[-1])
        assert_same(kept.cpu().numpy(), alone[0])


def test_every_profile_of_an_engine_is_used(
    onnx_fp16: Path, tmp_path: Path, expected: Callable[..., np.ndarray]
) -> None:
    needs("tensorrt")
    small = ShapeProfile((1, 3, 8, 8), (1, 3, 16, 16), (1, 3, 24, 24))
    wide = replace(PROFILE, min=(1, 3, 40, 40))
    options = BuildOptions(profiles=(wide, small), use_cache=False)
    path = build_engine(onnx_fp16, tmp_path / "e.plan", engine="tensorrt", options=options).path

    with open_engine(path) as runner:
        assert runner.info.profiles == (wide, small)
        assert runner.info.profile == wide
        for turn in range(2 * CAPTURE_AFTER):
            for shape in [(1, 3, 16, 16), (1, 3, 48, 64), (1, 3, 24, 24)]:
                picture = image(*shape, seed=turn)
                assert_same(run_image(runner, picture), expected(picture))
        with pytest.raises(UsageError, match="1x3x40x40 to 4x3x96x128 or 1x3x8x8 to 1x3x24x24"):
            run_image(runner, image(1, 3, 32, 32))


def test_a_closed_runner_says_so(built: Path) -> None:
    with open_engine(built) as runner:
        run_image(runner, image(1, 3, 8, 8))
    with pytest.raises(UsageError, match="is closed"):
        run_image(runner, image(1, 3, 8, 8))


def test_a_gpu_that_is_not_there_is_refused(built: Path) -> None:
    with pytest.raises(CapabilityError, match="device 'cuda:99' does not exist"):
        open_engine(built, device="cuda:99")


def test_threads_have_contexts_of_their_own(runner: TensorRtRunner) -> None:
    pictures = [image(1, 3, 24 + 8 * index, 32, seed=index) for index in range(4)]
    alone = [run_image(runner, picture) for picture in pictures]
    failures: list[str] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not np.allclose(run_image(runner, pictures[index]), alone[index], atol=2e-3):
                failures.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []


def test_threads_that_have_ended_give_their_memory_back(runner: TensorRtRunner) -> None:
    picture = image(1, 3, 48, 64)
    held = []
    for _ in range(4):
        thread = threading.Thread(target=run_image, args=(runner, picture))
        thread.start()
        thread.join()
        held.append(runner.peak_activation_bytes)

    assert len(set(held)) == 1


def test_a_stream_of_images_overlaps_and_keeps_its_order(runner: TensorRtRunner) -> None:
    pictures = [image(1, 3, 48, 64, seed=index) for index in range(7)]

    answers = list(runner.run_many(pictures))

    assert len(answers) == 7
    for picture, answer in zip(pictures, answers, strict=True):
        assert_same(answer, run_image(runner, picture))


def test_compute_time_is_the_gpus(runner: TensorRtRunner) -> None:
    assert isinstance(runner, TimedRunner)
    compute = runner.prepare({"input": image(1, 3, 48, 64)})

    assert all(0 < compute() < 1000 for _ in range(5))


def test_activation_memory_follows_the_real_shape(runner: TensorRtRunner) -> None:
    run_image(runner, image(1, 3, 8, 8))
    small = runner.peak_activation_bytes
    run_image(runner, image(4, 3, 96, 128))

    assert small < runner.peak_activation_bytes / 4


@pytest.mark.once
def test_gpu_memory_of_an_engine_is_seen_from_its_own_process(built: Path) -> None:
    shape = (4, 3, 96, 128)
    with open_engine(built) as runner:
        assert isinstance(runner, TensorRtRunner)
        run_image(runner, image(*shape))
        activations = runner.peak_activation_bytes

    found = process_memory(built, shape, device="cuda:0")

    assert found.device_bytes is not None, found.device_note
    assert found.device_bytes >= activations
    assert found.device_bytes < activations + 4 * 2**30


def test_gpu_memory_of_a_baseline_holds_weights_and_output(checkpoint: LoadedCheckpoint) -> None:
    shape = (1, 3, 96, 128)
    weights = sum(value.nbytes for value in checkpoint.reference.parameters())
    output = 4 * 3 * (2 * shape[2]) * (2 * shape[3])

    with open_eager(checkpoint, device="cuda:0") as runner:
        taken = runner.run_metered({"input": image(*shape)})

    assert weights + output <= taken < torch.cuda.get_device_properties(0).total_memory


def test_another_gpu_is_refused_before_deserializing(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.engine"
    copy.write_bytes(built.read_bytes())
    manifest = read_manifest(built)
    target = {"compute_capabilities": ["7.5"], "compute_capability": "7.5", "words": "another GPU"}
    manifest_path(copy).write_text(replace(manifest, details={**manifest.details, "target": target}).to_json())

    with pytest.raises(CapabilityError, match="this GPU is"):
        open_engine(copy)


def test_a_sidecar_that_states_other_profiles_is_refused(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.engine"
    copy.write_bytes(built.read_bytes())
    manifest = read_manifest(built)
    wider = [{**manifest.details["profiles"][0], "max": [9, 3, 96, 128]}]
    manifest_path(copy).write_text(replace(manifest, details={**manifest.details, "profiles": wider}).to_json())

    with pytest.raises(InputError, match="as its sidecar says"):
        open_engine(copy)


@pytest.mark.parametrize("engine", OPENED)
def test_onnxruntime_runs_nothing_on_the_cpu(engine: str, onnx_fp16: Path) -> None:
    needs(engine)
    with open_engine(onnx_fp16, engine=engine) as runner:
        on_gpu = torch.from_numpy(image(1, 3, 40, 40)).cuda()
        first = runner.run_tensors({"input": on_gpu})["output"]  # type: ignore[attr-defined]  # GPU runners have it

        assert first.device.type == "cuda"
        assert_same(first.cpu().numpy(), run_image(runner, on_gpu.cpu().numpy()))
