"""The options by which a user states what a checkpoint's tensors cannot say, shared by all verbs that open one.

@click.command()
@click.argument("checkpoint", type=EXISTING)
@checkpoint_options
def command(checkpoint: Path, stated: CheckpointOptions) -> None:
    loaded = load_from_options(checkpoint, stated, progress)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.console import table, warning_line
from srdeploy.cli.options import EXISTING
from srdeploy.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import Choices, LoadedCheckpoint

_ACTIVATIONS = ("relu", "leaky_relu", "elu", "silu", "gelu", "prelu", "identity")
"""The names of `srdeploy.models.networks.activations`; importing them would import torch (a test compares)."""

_MEANS = {"div2k": (0.4488, 0.4371, 0.4040), "df2k": (0.4690, 0.4490, 0.4036), "none": (0.0, 0.0, 0.0)}
"""The means of `srdeploy.models.dialects.rcan_common`, for the same reason."""


@dataclass(frozen=True)
class CheckpointOptions:
    """What the user states about a checkpoint; None means not stated (`models.checkpoint.resolve.Choices`)."""

    value_range: float | None = None
    res_scale: float | None = None
    activation: str | None = None
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    colours: str | None = None
    group_skip: bool | None = None
    layer_scale: float | None = None
    probe: tuple[Path, ...] = ()

    def choices(self) -> "Choices":
        """Return the choices for `load_checkpoint`."""
        from srdeploy.models.checkpoint.load import Choices

        return Choices(**{entry.name: getattr(self, entry.name) for entry in fields(Choices)})

    def probe_images(self) -> list[Path]:
        """Return the images to probe with; folders are searched.

        Raises:
            InputError: a folder holds no image.
        """
        if not self.probe:
            return []
        from srdeploy.core.imaging.read import find_images

        return [image for source in self.probe for image in find_images(source)]

    def flags(self) -> list[str]:
        """Return the words that state the same on a command line."""
        words: list[str] = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            flag = "--" + entry.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            elif entry.name == "probe":
                words += [word for path in self.probe for word in (flag, str(path))]
            elif value is not None:
                words += [flag, ",".join(map(_word, value)) if entry.name == "mean" else _word(value)]
        return words


class _Mean(click.ParamType[tuple[float, ...]]):
    """A mean colour: a known name, or values on 0..1 joined by commas."""

    name = "div2k|df2k|none|R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            return value
        if value in _MEANS:
            return _MEANS[value]
        try:
            mean = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            mean = ()
        if len(mean) not in (1, 3) or not all(0 <= part <= 1 for part in mean):
            self.fail(f"{value!r} is neither {', '.join(_MEANS)} nor one or three numbers in 0..1", param, ctx)
        return mean


_OPTIONS = (
    click.option(
        "--value-range",
        type=click.Choice(["1", "255"]),
        help="Largest value of the network's own input, where the file does not say.",
    ),
    click.option("--res-scale", type=float, help="Factor on every block's branch (RCAN-it: 0.1; others: 1)."),
    click.option("--activation", type=click.Choice(_ACTIVATIONS), help="Activation, where the file does not say."),
    click.option("--weights", type=click.Choice(["raw", "ema"]), help="Plain weights or their moving average."),
    click.option(
        "--mean",
        type=_Mean(),
        metavar="NAME|R,G,B",
        help="Mean colour around the network on 0..1: div2k, df2k, none or numbers (BasicSR).",
    ),
    click.option("--colours", type=click.Choice(["rgb", "bgr"]), help="Channel order the network was trained on."),
    click.option("--group-skip/--no-group-skip", default=None, help="A group adds its input (RCAN-it)."),
    click.option("--layer-scale", type=float, help="Factor on every dense layer's maps (RDST)."),
    click.option(
        "--probe",
        type=EXISTING,
        multiple=True,
        help="Image or folder: try what is still open on real images. Repeatable.",
    ),
)


def checkpoint_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a verb; its function gets them as one keyword argument `stated` (CheckpointOptions)."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        values = {entry.name: options.pop(entry.name) for entry in fields(CheckpointOptions)}
        if values["value_range"] is not None:
            values["value_range"] = float(values["value_range"])
        return function(*arguments, stated=CheckpointOptions(**values), **options)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper


def load_from_options(
    path: Path, stated: CheckpointOptions, progress: Progress = SILENT, *, quiet: bool = False
) -> "LoadedCheckpoint":
    """Load a checkpoint as the options say, and say aloud on stderr what had to be assumed.

    Args:
        path: the checkpoint.
        stated: from `checkpoint_options`.
        progress: where the work is reported.
        quiet: say nothing about assumptions (the caller shows them itself).

    Raises:
        InputError, UsageError: as `srdeploy.models.checkpoint.load.load_checkpoint`.
    """
    from srdeploy.models.checkpoint.load import load_checkpoint
    from srdeploy.models.checkpoint.resolve import flag_of, shown

    loaded = load_checkpoint(path, stated.choices(), probe_images=stated.probe_images(), progress=progress)
    if quiet:
        return loaded
    if loaded.evidence.ranking:
        show_ranking([(entry.values, entry.psnr_db) for entry in loaded.evidence.ranking])
    for decision in loaded.evidence.decisions:
        stands = f"{flag_of(decision.choice)} {shown(decision.value)}"
        if decision.by == "probe":
            progress.note(f"{stands}: {decision.reason}")
        elif decision in loaded.evidence.assumptions:
            candidates = ", ".join(map(shown, decision.candidates))
            warning_line(f"assumed {stands}: {decision.reason} (candidates: {candidates})")
    return loaded


def show_ranking(ranking: Sequence[tuple[Mapping[str, Any], float]]) -> None:
    """Print what candidates reached on real images, best first, with each one's distance to the best."""
    from srdeploy.models.checkpoint.resolve import flag_of, shown

    rows = [
        (
            " ".join(f"{flag_of(choice)} {shown(value)}" for choice, value in values.items()),
            f"{psnr_db:.2f}",
            f"{psnr_db - ranking[0][1]:.2f}",
        )
        for values, psnr_db in ranking
    ]
    table("Candidates on real images", ("", "reduced output vs input, dB", "to the best, dB"), rows)


def _word(value: Any) -> str:
    """Write a value so that reading it gives the very same one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
