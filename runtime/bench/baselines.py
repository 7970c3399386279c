"""The eager network in the forms that an engine has to beat, each on the device where the engines run.

All of them compute the same network and are measured by the same rules as the engines. They are for latency only:
verification always uses the plain eager FP32 network.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from srdeploy.core.errors import CapabilityError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.shapes import Shape
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.engines.eager import REFERENCE, EagerForm, open_eager

PLAIN = "eager"
"""The baseline that speed-ups refer to; it is always measured, and first."""

ON_CPU: Mapping[str, EagerForm] = {
    PLAIN: REFERENCE,
    "channels-last": EagerForm("eager fp32 channels-last", channels_last=True),
    "half": EagerForm("eager bf16 channels-last", torch.bfloat16, channels_last=True),
    "autocast": EagerForm("eager bf16 autocast", torch.bfloat16, channels_last=True, autocast=True),
    "compile": EagerForm("torch.compile fp32", channels_last=True, compiler="torch.compile"),
    "aot": EagerForm("AOTInductor fp32", channels_last=True, compiler="AOTInductor"),
}

ON_GPU: Mapping[str, EagerForm] = {
    PLAIN: REFERENCE,
    "channels-last": EagerForm("eager fp32 channels-last", channels_last=True),
    "half": EagerForm("eager fp16 channels-last", torch.float16, channels_last=True, cudnn_benchmark=True),
    "autocast": EagerForm("eager fp16 autocast", torch.float16, channels_last=True, autocast=True),
    "compile": EagerForm("torch.compile fp16", torch.float16, channels_last=True, compiler="torch.compile"),
    "aot": EagerForm("AOTInductor fp16", torch.float16, channels_last=True, compiler="AOTInductor"),
}

DEFAULT_ON_CPU = (PLAIN, "channels-last", "autocast", "compile")
DEFAULT_ON_GPU = (PLAIN, "half", "autocast", "compile", "aot")


@dataclass(frozen=True)
class Baselines:
    """The baselines of one measurement.

    Attributes:
        runners: opened and run once at the shape, the plain eager network first.
        skipped: reason by name, for those that cannot run here.
    """

    runners: tuple[Runner, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def default_baselines(device: str) -> tuple[str, ...]:
    """Return the baselines measured on a device ("cpu" or "cuda:N") unless others are named."""
    return DEFAULT_ON_CPU if device == "cpu" else DEFAULT_ON_GPU


def baseline_form(name: str, device: str) -> EagerForm:
    """Return the form behind a baseline's name, such as "autocast", on a device ("cpu" or "cuda:N")."""
    return (ON_CPU if device == "cpu" else ON_GPU)[name]


def open_baselines(
    checkpoint: LoadedCheckpoint,
    names: Sequence[str],
    stack: ExitStack,
    *,
    shape: Shape,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Baselines:
    """Open baselines and compile them for a shape. One that fails is skipped with its reason, except the plain one.

    Args:
        checkpoint: the loaded checkpoint.
        names: keys of `ON_CPU`; the plain eager network is added when it is missing.
        stack: closes the runners.
        shape: (N, C, H, W) that will be measured.
        device: "cpu" or "cuda:N".
        threads: CPU threads, a setting of the whole process; None uses all processors.
        progress: receives a note for each baseline that is skipped.
    """
    runners: list[Runner] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys((PLAIN, *names)):
        form = baseline_form(name, device)
        try:
            with ExitStack() as opening:
                _require_compiler(form)
                runner = opening.enter_context(open_eager(checkpoint, form, device=device, threads=threads))
                if form.compiler is not None:
                    progress.note(f"compiling {form.name}")
                    run_image(runner, bench_image(shape))
                stack.push(opening.pop_all())
        except CapabilityError as error:
            if name == PLAIN:
                raise
            skipped[form.name] = str(error)
            progress.note(f"baseline {form.name} is skipped: {error}")
        else:
            runners.append(runner)
    return Baselines(tuple(runners), skipped)


def _require_compiler(form: EagerForm) -> None:
    if form.compiler is not None and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise CapabilityError(f"{form.compiler} needs a C++ compiler")
