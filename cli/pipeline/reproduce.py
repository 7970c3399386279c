"""The commands, stage by stage, that make a bundle's files again: reproduce.sh, and the report's last section.

Each command is written from the options class of its verb, so that it says what the verb reads.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srdeploy.cli.bench import BenchOptions
from srdeploy.cli.build import BuildVerbOptions
from srdeploy.cli.compress import CompressVerbOptions
from srdeploy.cli.export import ExportOptions
from srdeploy.cli.options import command_line
from srdeploy.cli.pipeline.engines import compressed_for, graphs_to_quantize, target_of, threads_for
from srdeploy.cli.pipeline.types import COMPRESSION_SHARE, FP32_ONNX, ORIGINAL_ONNX, Candidate, DeployOptions
from srdeploy.cli.quantize import QuantizeVerbOptions
from srdeploy.cli.verify import VerifyOptions
from srdeploy.core.contract import ModelContract
from srdeploy.core.manifest import Source
from srdeploy.core.precision import Precision, Target

OUT, CHECKPOINT, IMAGES, EVALUATE = (Path(f"${name}") for name in ("OUT", "CHECKPOINT", "IMAGES", "EVALUATE"))
"""Shell variables of the script."""


def reproducing_lines(
    checkpoint: Source,
    options: DeployOptions,
    kept: Sequence[Candidate],
    contract: ModelContract,
    *,
    ran: Sequence[Candidate],
    fp16: bool,
    compression: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return lines of a shell script that makes the files of a bundle again.

    Args:
        checkpoint: the file it starts from; the script checks its SHA-256.
        options: of the `deploy` that made the bundle.
        kept: the engines in the bundle.
        contract: of the FP32 graph.
        ran: those of them that were verified and measured.
        fp16: whether the bundle holds the FP16 graph.
        compression: what was compressed of the FP32 graph; None where it is as exported.
    """
    inputs = {CHECKPOINT: options.checkpoint, IMAGES: options.images}
    if options.evaluate is not None:
        inputs[EVALUATE] = options.evaluate
    commands = stage_commands(options, kept, contract, ran=ran, fp16=fp16, compression=compression)
    return [
        "# In one command:",
        f"#   {shlex.join(command_line('deploy', options))}",
        "# Stage by stage; the variables may be set from outside:",
        'OUT="${1:-reproduced}"',
        *(f'{name}="${{{name}:-{_quoted_inside(value)}}}"' for name, value in _names(inputs).items()),
        f'echo "{checkpoint.sha256}  $CHECKPOINT" | sha256sum --check --quiet',
        *(_command(words) for words in commands),
    ]


def stage_commands(
    options: DeployOptions,
    kept: Sequence[Candidate],
    contract: ModelContract,
    *,
    ran: Sequence[Candidate],
    fp16: bool,
    compression: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """Return the commands of a `deploy`, verb by verb, with shell variables for inputs and outputs."""
    compressed = compression is not None
    commands = [command_line("export", _export(options, compressed))]
    if compression is not None:
        commands.append(command_line("compress", _compress(options, Target(compression["target"]))))
    graphs = graphs_to_quantize(kept, fp16=fp16)
    commands += [command_line("quantize", _quantize(options, entry, compressed)) for entry in graphs.values()]
    commands += [command_line("build", _build(options, entry, contract)) for entry in kept if entry.file != entry.onnx]
    commands += [command_line("verify", _verify(options, entry)) for entry in ran]
    commands += [command_line("bench", each) for each in _benches(options, ran, contract)]
    return commands


def write_reproduce_script(path: Path, lines: Sequence[str], *, versions: Mapping[str, str]) -> None:
    """Write an executable script.

    Args:
        path: the file.
        lines: of `reproducing_lines`.
        versions: of the packages that were used.
    """
    whole = [
        "#!/usr/bin/env bash",
        "# Makes the files of this bundle again. Usage: reproduce.sh [FOLDER]",
        "# Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "set -euo pipefail",
        "",
        *lines,
    ]
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    path.chmod(0o755)


def _export(options: DeployOptions, compressed: bool) -> ExportOptions:
    output = OUT / (ORIGINAL_ONNX if compressed else FP32_ONNX)
    return ExportOptions(checkpoint=CHECKPOINT, checkpoint_options=options.checkpoint_options, output=output)


def _compress(options: DeployOptions, target: Target) -> CompressVerbOptions:
    assert options.max_psnr_drop is not None, "checked with the options"
    return CompressVerbOptions(
        onnx=OUT / ORIGINAL_ONNX,
        images=IMAGES,
        max_psnr_drop=COMPRESSION_SHARE * options.max_psnr_drop,
        target=target,
        precision=compressed_for(target),
        hr=options.hr,
        threads=options.threads,
        output=OUT / FP32_ONNX,
    )


def _quantize(options: DeployOptions, entry: Candidate, compressed: bool) -> QuantizeVerbOptions:
    return QuantizeVerbOptions(
        onnx=OUT / FP32_ONNX,
        precision=entry.precision,
        target=target_of(entry.engine),
        images=IMAGES,
        hr=options.hr,
        max_psnr_drop=options.max_psnr_drop if entry.precision is Precision.INT8 else None,
        reference=OUT / ORIGINAL_ONNX if compressed else None,
        threads=options.threads,
        output=OUT / entry.onnx,
    )


def _build(options: DeployOptions, entry: Candidate, contract: ModelContract) -> BuildVerbOptions:
    build = BuildVerbOptions(onnx=OUT / entry.onnx, engine=entry.engine, output=OUT / entry.file)
    if not entry.engine.startswith("tensorrt"):
        return build
    profile = options.profile(contract)
    return replace(
        build,
        device=_device_option(entry) if entry.engine == "tensorrt" else "auto",
        min_shape=(profile.min,),
        opt_shape=(profile.opt,),
        max_shape=(profile.max,),
        compute_capability=options.compute_capabilities if entry.engine == "tensorrt-rtx" else (),
    )


def _verify(options: DeployOptions, entry: Candidate) -> VerifyOptions:
    source = IMAGES if options.evaluate is None else EVALUATE
    return VerifyOptions(
        candidates=(OUT / entry.file,),
        checkpoint=CHECKPOINT,
        checkpoint_options=options.checkpoint_options,
        images=None if options.hr else source,
        hr=source if options.hr else None,
        engine=_engine_option(entry),
        device=_device_option(entry),
        threads=threads_for(entry.engine, options.threads),
    )


def _benches(options: DeployOptions, ran: Sequence[Candidate], contract: ModelContract) -> list[BenchOptions]:
    """Return one command for each pair of --engine and --device: within a command they hold for all files."""
    groups: dict[tuple[str | None, str], list[Candidate]] = {}
    for entry in ran:
        groups.setdefault((_engine_option(entry), _device_option(entry)), []).append(entry)
    return [
        BenchOptions(
            candidates=tuple(OUT / entry.file for entry in entries),
            checkpoint=CHECKPOINT,
            checkpoint_options=options.checkpoint_options,
            shape=options.bench_shape(contract, [entry.device for entry in ran]),
            engine=engine,
            device=device,
            threads=options.threads if any(threads_for(entry.engine, 1) for entry in entries) else None,
            no_baselines=True,
            allow_unstable=True,  # noise is no reason to stop the script
        )
        for (engine, device), entries in groups.items()
    ]


def _device_option(entry: Candidate) -> str:
    """Return the --device of an engine; the CPU and the first GPU are what "auto" selects."""
    return "auto" if entry.device in ("cpu", "cuda:0") else entry.device


def _engine_option(entry: Candidate) -> str | None:
    """Return the --engine that opens a file: a built engine knows its own, an ONNX file opens in any family."""
    return entry.engine if entry.file == entry.onnx else None


def _names(inputs: Mapping[Path, Path]) -> dict[str, Path]:
    return {str(variable).removeprefix("$"): path for variable, path in inputs.items()}


def _command(words: Sequence[str]) -> str:
    """Quote every word, but let the shell expand "$NAME" and "$OUT/..."."""
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)


def _quoted_inside(path: Path) -> str:
    """Escape a path for the inside of "${NAME:-...}"."""
    return "".join("\\" + letter if letter in '"$`\\}' else letter for letter in str(path.resolve()))
