"""Options of the verbs: typed once, and written back as the command line that gives the same."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from srdeploy.cli.bench import BenchOptions
from srdeploy.cli.build import BuildVerbOptions
from srdeploy.cli.cache import CleanOptions, ExplainOptions, ListOptions
from srdeploy.cli.checkpoint_options import CheckpointOptions
from srdeploy.cli.demo import DemoOptions
from srdeploy.cli.doctor import DoctorOptions
from srdeploy.cli.export import ExportOptions
from srdeploy.cli.inspect import InspectOptions
from srdeploy.cli.options import command_line, from_values, parameters
from srdeploy.cli.pipeline.reproduce import stage_commands
from srdeploy.cli.pipeline.types import Candidate, DeployOptions
from srdeploy.cli.quantize import QuantizeVerbOptions
from srdeploy.cli.report import ReportOptions
from srdeploy.cli.upscale import UpscaleOptions
from srdeploy.cli.verify import VerifyOptions
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision, Target

OPTIONS: dict[str, Any] = {
    "inspect": InspectOptions,
    "export": ExportOptions,
    "quantize": QuantizeVerbOptions,
    "build": BuildVerbOptions,
    "verify": VerifyOptions,
    "bench": BenchOptions,
    "upscale": UpscaleOptions,
    "deploy": DeployOptions,
    "report": ReportOptions,
    "cache ls": ListOptions,
    "cache explain": ExplainOptions,
    "cache gc": CleanOptions,
    "demo": DemoOptions,
    "doctor": DoctorOptions,
}
FILE = Path("network file.pt")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that has the files that options name."""
    monkeypatch.chdir(tmp_path)
    for name in (FILE, Path("-leading dash.onnx")):
        name.write_text("content")


def parsed(options: Any, words: list[str]) -> Any:
    """Return what a verb is given when its command line is these words."""
    command = click.Command("try", params=parameters(options), callback=lambda **values: from_values(options, values))
    return command.main(words, standalone_mode=False)


def other_value(parameter: click.Parameter, default: Any) -> Any:
    """Return a value that a parameter may have and that is not its default."""
    kind: Any = parameter.type
    by_name: dict[str, Any] = {
        "boolean": not default,
        "text": "a word",
        "path": FILE,
        "PATH": Path("out put"),
        "SIZE": 3 << 30,
        "integer": 21,
        "integer range": 21,
        "float": 0.0625,
        "float range": 0.0625,
        "NxCxHxW": (1, 3, 24, 32),
        "HxW": (24, 32),
        "N,N,...": (1, 4),
        "NAME|R,G,B": (0.5, 0.1, 1.0),
    }
    value = kind.choices[-1] if isinstance(kind, click.Choice) else by_name[kind.name]
    return (value, value) if parameter.multiple or parameter.nargs == -1 else value


def every_option(options: Any) -> Any:
    """Return an options object in which no field has its default."""
    found = {parameter.name: parameter for parameter in parameters(options)}
    values = {}
    for entry in fields(options):
        if entry.name in found:
            values[entry.name] = other_value(found[entry.name], entry.default)
        else:
            values[entry.name] = every_option(entry.default_factory)
    if options is BuildVerbOptions:
        values["optimization_level"] = 3
    if options is ExportOptions:
        values["opset"] = 22
    return options(**values)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_line_gives_the_options_that_it_was_written_from(name: str) -> None:
    options = every_option(OPTIONS[name])

    words = command_line(name, options)

    assert words[: 1 + len(name.split())] == ["srdeploy", *name.split()]
    assert parsed(OPTIONS[name], words[1 + len(name.split()) :]) == options


def test_options_at_their_defaults_are_not_written() -> None:
    options = ExportOptions(checkpoint=FILE, output=Path("a.onnx"))

    assert command_line("export", options) == ["srdeploy", "export", "network file.pt", "-o", "a.onnx"]


def test_a_file_that_looks_like_an_option_stays_a_file() -> None:
    options = BuildVerbOptions(onnx=Path("-leading dash.onnx"), engine="openvino", output=Path("a.blob"))

    assert parsed(BuildVerbOptions, command_line("build", options)[2:]).onnx.samefile(options.onnx)


def test_options_do_not_change() -> None:
    options = DoctorOptions()

    with pytest.raises(AttributeError):
        options.as_json = True  # type: ignore[misc]


CONTRACT = ModelContract("rcan", {"scale": 2}, 2, "rgb", Precision.FP32, None, 1e6, 256, "0" * 64)


def test_the_fp16_graph_is_made_again_when_no_engine_here_needs_it() -> None:
    deploy = DeployOptions(checkpoint=FILE, images=Path("photos"), output=Path("a.srd"))

    commands = stage_commands(deploy, [], CONTRACT, ran=[], fp16=True)

    assert [words[-1] for words in commands] == ["$OUT/model.fp32.onnx", "$OUT/model.fp16.onnx"]


def test_every_command_of_reproduce_sh_is_read_as_it_was_meant(tmp_path: Path) -> None:
    deploy = DeployOptions(
        checkpoint=FILE,
        images=Path("photos"),
        output=Path("a.srd"),
        hr=True,
        evaluate=FILE,
        max_psnr_drop=0.05,
        size=(24, 32),
        threads=2,
        compute_capabilities=("8.6", "8.9"),
        checkpoint_options=CheckpointOptions(value_range=255.0, mean=(0.5, 0.25, 0.125), group_skip=False),
    )
    kept = [
        Candidate("onnxruntime", Precision.INT8, "model.int8.onnxruntime.onnx", file="engines/a.ort.onnx"),
        Candidate("tensorrt-rtx", Precision.FP16, "model.fp16.onnx", "cuda:0", file="engines/a.rtx"),
        Candidate("onnxruntime-cuda", Precision.FP16, "model.fp16.onnx", "cuda:1", file="model.fp16.onnx"),
    ]

    commands = stage_commands(deploy, kept, CONTRACT, ran=[kept[0], kept[2]], fp16=True)

    given: dict[str, list[Any]] = {}
    for words in commands:
        name, rest = words[1], [word.replace("$", "") for word in words[2:]]
        for word in rest:
            if "/" in word or word.isupper():
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).touch()
        given.setdefault(name, []).append(parsed(OPTIONS[name], rest))
    (export,) = given["export"]
    assert export.checkpoint_options == deploy.checkpoint_options
    assert [(entry.precision, entry.target) for entry in given["quantize"]] == [
        (Precision.INT8, Target.ONNXRUNTIME),
        (Precision.FP16, Target.TENSORRT_RTX),
    ]
    assert [entry.max_psnr_drop for entry in given["quantize"]] == [0.05, None]
    assert all(entry.hr and entry.threads == 2 for entry in given["quantize"])
    assert [entry.compute_capability for entry in given["build"]] == [(), ("8.6", "8.9")]
    assert given["build"][1].opt_shape == ((1, 3, 24, 32),)
    # An ONNX file opens in any family: the one that was verified must be named. Threads are for engines on the CPU.
    assert [(entry.engine, entry.threads) for entry in given["verify"]] == [(None, 2), ("onnxruntime-cuda", None)]
    assert [(entry.engine, entry.threads) for entry in given["bench"]] == [(None, 2), ("onnxruntime-cuda", None)]
    assert [entry.device for entry in given["bench"]] == ["auto", "cuda:1"]
    assert all(entry.hr == Path("EVALUATE") and entry.images is None for entry in given["verify"])


@pytest.mark.parametrize("verb", ["build", "upscale", "cache gc"])
def test_sizes_are_read_alike_by_every_verb(verb: str) -> None:
    (found,) = [each for each in parameters(OPTIONS[verb]) if each.name in ("memory", "max_size")]

    assert [found.type.convert(text, found, None) for text in ("8G", "8GB", "8GiB")] == [8 << 30] * 3
    with pytest.raises(click.BadParameter, match="expected a size"):
        found.type.convert("3 apples", found, None)


def test_the_whole_command_is_quoted_for_a_shell() -> None:
    words = command_line("export", ExportOptions(checkpoint=FILE, output=Path("a.onnx")))

    assert shlex.join(words) == "srdeploy export 'network file.pt' -o a.onnx"
