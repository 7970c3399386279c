"""deploy, verify, bench and quantize call the same functions: engines are opened, compared and timed in one way."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.cli.console import RichProgress
from srdeploy.cli.deploy import show
from srdeploy.cli.main import run
from srdeploy.cli.pipeline import engines as engines_module
from srdeploy.cli.pipeline import make, measure, opening, verify
from srdeploy.cli.pipeline.engines import checked_placements
from srdeploy.cli.pipeline.measure import measure_groups, with_baselines
from srdeploy.cli.pipeline.opening import by_device, engine_opener
from srdeploy.cli.pipeline.types import Candidate, DeployOptions, Outcome, Work
from srdeploy.cli.pipeline.verify import compare_with_eager, side_within
from srdeploy.core.errors import CapabilityError, SrdeployError, UsageError
from srdeploy.core.memory import bytes_per_pixel
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner, RunnerInfo
from srdeploy.core.samples import Sample
from srdeploy.models.checkpoint.load import LoadedCheckpoint, load_checkpoint
from srdeploy.runtime.bench import baselines
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines import recommend
from srdeploy.runtime.engines.eager import EagerRunner, open_eager
from srdeploy.runtime.engines.gpu import Gpu
from srdeploy.runtime.engines.registry import EngineStatus, open_engine
from srdeploy.runtime.verify.parity import Gates

BRIEF = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.01)


class Placed:
    """A runner that reports another device than the one it runs on: a GPU, as far as its callers can see."""

    def __init__(self, runner: Runner, device: str) -> None:
        self._runner = runner
        self._device = device

    @property
    def info(self) -> RunnerInfo:
        return replace(self._runner.info, device=self._device, name=f"{self._runner.info.name} {self._device}")

    def run(self, feeds: Any) -> Any:
        return self._runner.run(feeds)

    def __enter__(self) -> "Placed":
        return self

    def __exit__(self, *reason: object) -> None: ...


@pytest.fixture
def loaded(workshop: Path) -> LoadedCheckpoint:
    return load_checkpoint(workshop / "good.pt")


@pytest.fixture
def engine(workshop: Path) -> Iterator[Runner]:
    with open_engine(workshop / "good.onnx", threads=1) as runner:
        yield runner


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the devices that the eager network is opened on; it runs on the CPU."""
    asked: list[str] = []

    def opened(checkpoint: LoadedCheckpoint, *arguments: Any, device: str = "cpu", **more: Any) -> Any:
        asked.append(device)
        return Placed(open_eager(checkpoint, threads=1), device)

    monkeypatch.setattr(verify, "open_eager", opened)
    monkeypatch.setattr(baselines, "open_eager", opened)
    monkeypatch.setattr(measure, "default_baselines", lambda device: ())
    return asked


def sample() -> Sample:
    return Sample("a", np.random.default_rng(0).random((1, 3, 24, 24), np.float32))


def test_the_reference_runs_on_the_device_of_each_engine(
    loaded: LoadedCheckpoint, engine: Runner, devices: list[str]
) -> None:
    runners = [engine, Placed(engine, "cuda:1"), Placed(engine, "cpu")]

    results = compare_with_eager(runners, loaded, [sample()], gates=[Gates.of(Precision.FP32)] * 3)

    assert devices == ["cpu", "cuda:1"]
    assert [result.reference.device for result in results] == ["cpu", "cuda:1", "cpu"]
    assert [result.candidate.name for result in results] == [runner.info.name for runner in runners]
    assert all(result.passed for result in results)


def test_no_gpu_in_place_of_the_reference_is_a_refusal(loaded: LoadedCheckpoint, engine: Runner) -> None:
    with pytest.raises(CapabilityError, match="cuda:7"):
        compare_with_eager([Placed(engine, "cuda:7")], loaded, [sample()], gates=[Gates.of(Precision.FP32)])


def test_ratios_refer_to_the_eager_network_on_the_same_device(loaded: LoadedCheckpoint, engine: Runner) -> None:
    eager: dict[str, EagerRunner] = {}

    def opened(device: str) -> list[Runner]:
        eager[device] = open_eager(loaded, threads=1)
        return [Placed(eager[device], device)]

    groups = with_baselines([Placed(engine, "cuda:0"), engine], opened)
    results = measure_groups(groups, (1, 3, 8, 8), effort=BRIEF)

    assert list(eager) == ["cuda:0", "cpu"]
    assert [{row.runner.device for row in result.rows} for result in results] == [{"cuda:0"}, {"cpu"}]
    assert all(result.rows[0].runner.engine == "eager" for result in results)


def test_a_baseline_that_is_measured_already_is_omitted(engine: Runner) -> None:
    ((only,),) = with_baselines([engine], lambda device: [engine])

    assert only is engine


def test_runners_are_grouped_in_their_order(engine: Runner) -> None:
    runners = [Placed(engine, "cuda:0"), engine, Placed(engine, "cuda:0")]

    assert by_device(runners) == {"cuda:0": [runners[0], runners[2]], "cpu": [engine]}


def test_deploy_says_which_device_was_measured(
    loaded: LoadedCheckpoint, engine: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        eager = stack.enter_context(open_eager(loaded, threads=1))
        groups = with_baselines([Placed(engine, "cuda:0")], lambda device: [Placed(eager, device)])
        results = measure_groups(groups, (1, 3, 8, 8), effort=BRIEF)

    show(Outcome(Path("a.srd"), loaded.contract(), (), (), {}, tuple(results), {}, 0))

    printed = capsys.readouterr().err
    assert "a.srd, 1x3x8x8 on cuda:0" in printed
    assert "on the CPU" not in printed


@pytest.mark.parametrize("target", [Target.ONNXRUNTIME, Target.OPENVINO], ids=str)
def test_graphs_are_evaluated_in_the_parity_mode_with_the_given_threads(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(opening, "open_engine", lambda path, **options: opened.append(options))

    opener = engine_opener(target, 3)

    assert opener is not None
    opener(workshop / "good.onnx")
    assert opened == [{"engine": target.value, "threads": 3, "parity": True}]
    assert engine_opener(Target.TENSORRT, 3) is None


def test_deploy_quantizes_as_the_verb_does(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hand the same opener to the same function."""
    given: list[Any] = []

    def quantize(*arguments: Any, **options: Any) -> Any:
        opener = options["open_engine"]
        given.append((opener.func, opener.keywords, options["precision"], options["target"]))
        raise SrdeployError("far enough")

    monkeypatch.setattr("srdeploy.calibration.quantize.quantize", quantize)
    monkeypatch.setattr(make, "quantize", quantize)
    shared = ["--images", str(workshop / "photos"), "--threads", "2"]
    run(["quantize", str(workshop / "good.onnx"), "--precision", "int8", *shared, "-o", str(tmp_path / "a.onnx")])
    run(["deploy", str(workshop / "good.pt"), "--engine", "openvino", *shared, "-o", str(tmp_path / "a.srd")])

    by_verb, by_deploy = given
    assert by_verb == by_deploy


CPU = {"onnxruntime", "openvino"}
NOTHING: set[str] = set()


@pytest.mark.parametrize(
    ("runs", "builds", "engines", "devices", "expected"),
    [
        (CPU, {*CPU, "tensorrt-rtx"}, (), (), "onnxruntime cpu, openvino cpu, tensorrt-rtx cuda:0"),
        ({"openvino"}, {"openvino"}, (), (), "openvino cpu"),
        ({*CPU, "tensorrt", "onnxruntime-cuda"}, CPU, (), (), "tensorrt cuda:0, onnxruntime-cuda cuda:0"),
        ({*CPU, "tensorrt", "tensorrt-rtx"}, CPU, (), (), "tensorrt cuda:0"),
        ({*CPU, "tensorrt-rtx"}, CPU, (), (), "tensorrt-rtx cuda:0"),
        ({*CPU, "tensorrt"}, CPU, (), ("cpu",), "onnxruntime cpu, openvino cpu"),
        ({*CPU, "tensorrt"}, CPU, (), ("cuda:1", "cpu"), "tensorrt cuda:1, onnxruntime cpu, openvino cpu"),
        ({*CPU, "tensorrt"}, CPU, (), ("cuda", "cuda:1"), "tensorrt cuda:0, tensorrt cuda:1"),
        (CPU, {*CPU, "tensorrt"}, ("tensorrt", "openvino"), (), "tensorrt cuda:0, openvino cpu"),
        (CPU, {*CPU, "tensorrt"}, ("tensorrt",), ("cuda:0", "cuda:1"), "tensorrt cuda:0, tensorrt cuda:1"),
    ],
    ids=[
        "no GPU",
        "one engine installed",
        "GPU",
        "GPU with both TensorRTs",
        "RTX GPU",
        "CPU of a GPU machine",
        "GPU and CPU",
        "two GPUs",
        "requested",
        "requested on two GPUs",
    ],
)
def test_engines_are_those_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    runs: set[str],
    builds: set[str],
    engines: tuple[str, ...],
    devices: tuple[str, ...],
    expected: str,
) -> None:
    assume(monkeypatch, runs, builds)
    options = replace(OPTIONS, engines=engines, devices=devices)

    assert ", ".join(f"{entry.engine} {entry.device}" for entry in checked_placements(options)) == expected


@pytest.mark.parametrize(
    ("runs", "engines", "devices", "words"),
    [
        (NOTHING, (), (), r"pip install 'srdeploy\[cpu\]'"),
        (CPU, (), ("cuda",), "no engine runs on cuda:0 here .tensorrt-rtx: lacks it; tensorrt: lacks it"),
        (CPU, ("onnxruntime-cuda",), (), "onnxruntime-cuda cannot be made here: lacks it"),
    ],
    ids=["nothing installed", "no GPU", "requested engine"],
)
def test_an_engine_that_cannot_be_made_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, runs: set[str], engines: tuple[str, ...], devices: tuple[str, ...], words: str
) -> None:
    assume(monkeypatch, runs, NOTHING)

    with pytest.raises(CapabilityError, match=words):
        checked_placements(replace(OPTIONS, engines=engines, devices=devices))


def assume(monkeypatch: pytest.MonkeyPatch, runs: set[str], builds: set[str]) -> None:
    """Pretend a machine on which these engines run and build; what runs builds too."""
    gpu = Gpu("cuda:0", "GPU", (8, 6), 8 << 30) if runs & {"tensorrt", "tensorrt-rtx", "onnxruntime-cuda"} else None

    def status(name: str, device: str = "auto") -> EngineStatus:
        why_not_run = None if name in runs else "lacks it"
        return EngineStatus(name, "", None if name in builds | runs else "lacks it", why_not_run, {})

    monkeypatch.setattr(engines_module, "engine_status", status)
    monkeypatch.setattr(recommend, "engine_status", status)
    monkeypatch.setattr(recommend, "find_gpu", lambda device: gpu)


OPTIONS = DeployOptions(checkpoint=Path("none.pt"), images=Path("none"), output=Path("a.srd"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output": Path("a")}, "ends in .srd"),
        ({"max_psnr_drop": -1.0}, "positive"),
        ({"engines": ("tensort",)}, "one of onnxruntime"),
        ({"engines": ("openvino",), "compute_capabilities": ("8.9",)}, "tensorrt-rtx"),
        ({"engines": ("tensorrt-rtx",), "compute_capabilities": ("Ada",)}, "such as 8.9"),
        ({"devices": ("gpu",)}, "expected auto, cpu, cuda or cuda:N"),
        ({"devices": ("auto", "cpu")}, "remove --device auto"),
        ({"engines": ("openvino",), "devices": ("cuda",)}, "add --device cpu"),
    ],
    ids=["name", "bound", "engine", "capability without its engine", "capability", "device", "devices", "both"],
)
def test_options_are_checked_before_any_work(changes: dict[str, Any], words: str) -> None:
    if "tensorrt-rtx" in changes.get("engines", ()):
        pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UsageError, match=words):
        checked_placements(replace(OPTIONS, **changes))


def test_images_are_cropped_to_what_the_memory_pays_for(loaded: LoadedCheckpoint) -> None:
    contract = loaded.contract()
    budget = int(100 * 100 * bytes_per_pixel(contract))

    assert side_within(budget, contract, None) in (99, 100)
    assert side_within(budget, contract, 64) == 64
    assert side_within(budget // 4, contract, 64) in (49, 50)
    with pytest.raises(CapabilityError, match="allow more with --memory"):
        side_within(1000, contract, None)


def test_an_engine_on_a_gpu_gets_no_cpu_threads(
    loaded: LoadedCheckpoint, engine: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str]
) -> None:
    opened: list[tuple[str, int | None]] = []

    def open_(path: Path, *, engine: str, device: str, threads: int | None) -> Runner:
        opened.append((engine, threads))
        return Placed(runner, device)

    runner = engine
    monkeypatch.setattr(measure, "open_engine", open_)
    monkeypatch.setattr(measure, "with_process_memories", lambda results, files, threads: results)
    options = DeployOptions(checkpoint=Path("a.pt"), images=Path("b"), output=Path("a.srd"), size=(8, 8), threads=2)
    candidates = [
        Candidate(name, Precision.FP32, "model.fp32.onnx", device, file="model.fp32.onnx")
        for name, device in (("onnxruntime", "cpu"), ("onnxruntime-cuda", "cuda:0"))
    ]

    measure.measure_engines(Work(options, tmp_path, RichProgress()), candidates, loaded, BRIEF, [])

    assert opened == [("onnxruntime", 2), ("onnxruntime-cuda", None)]
    assert devices == ["cpu", "cuda:0"]


def test_only_an_optional_precision_may_be_excluded_without_an_exit_code(tmp_path: Path) -> None:
    work = Work(DeployOptions(checkpoint=tmp_path, images=tmp_path, output=tmp_path), tmp_path, RichProgress())

    work.exclude(Candidate("tensorrt", Precision.FP8, "model.fp8.tensorrt.onnx"), "build", "no kernel", 5)
    assert work.exit_code == 0

    work.exclude(Candidate("tensorrt", Precision.INT8, "model.int8.tensorrt.onnx"), "quantize", "the gate", 6)
    assert work.exit_code == 6
