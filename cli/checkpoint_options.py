"""The options that state what a checkpoint's tensors cannot say, shared by all verbs that open a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.console import table, warning_line
from srdeploy.cli.options import EXISTING, MeanType, arguments, option, option_words
from srdeploy.core.progress import SILENT, Progress
from srdeploy.models.choices import ACTIVATIONS, COLOUR_ORDERS, MEANS, VALUE_RANGES, Choices, flag_of, flag_value

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import LoadedCheckpoint


@arguments
class CheckpointOptions:
    """What the user states about a checkpoint; None means not stated (`models.checkpoint.resolve.Choices`)."""

    value_range: float | None = option(
        "--value-range",
        type=click.Choice([int(value) for value in VALUE_RANGES]),
        default=None,
        help="Largest value of the network's own input, where the file does not say.",
    )
    res_scale: float | None = option(
        "--res-scale",
        type=float,
        default=None,
        help="Factor on every block's branch (RCAN-it: 0.1; others: 1).",
    )
    activation: str | None = option(
        "--activation",
        type=click.Choice(ACTIVATIONS),
        default=None,
        help="Activation, where the file does not say.",
    )
    weights: str | None = option(
        "--weights",
        type=str,
        default=None,
        metavar="raw|ema|KEYS",
        help="Which network of a file with several: plain weights, their average, or the keys that lead to it.",
    )
    mean: tuple[float, ...] | None = option(
        "--mean",
        type=MeanType(MEANS),
        default=None,
        help="Mean color around the network on 0..1: div2k, df2k, none or numbers (BasicSR).",
    )
    colours: str | None = option(
        "--colours",
        type=click.Choice(COLOUR_ORDERS),
        default=None,
        help="Channel order that the network was trained on.",
    )
    group_skip: bool | None = option(
        "--group-skip/--no-group-skip", default=None, help="A group adds its input to its output (RCAN-it)."
    )
    layer_scale: float | None = option(
        "--layer-scale", type=float, default=None, help="Factor on every dense layer's maps (RDST)."
    )
    probe: tuple[Path, ...] = option(
        "--probe",
        type=EXISTING,
        default=(),
        help="Image or folder: try what is still open on real images. Repeatable.",
    )

    def choices(self) -> Choices:
        """Return the choices for `load_checkpoint`."""
        return Choices(**{entry.name: getattr(self, entry.name) for entry in fields(Choices)})

    def probe_images(self) -> list[Path]:
        """Return the images to probe with; folders are searched.

        Raises:
            InputError: a folder holds no image.
        """
        if not self.probe:
            return []
        from srdeploy.core.imaging.files import find_images

        return [image for source in self.probe for image in find_images(source)]

    def flags(self) -> list[str]:
        """Return the words of a command line that state the same."""
        return option_words(self)


def load_from_options(
    path: Path, options: CheckpointOptions, progress: Progress = SILENT, *, quiet: bool = False
) -> "LoadedCheckpoint":
    """Load a checkpoint as the options say, and print what had to be assumed.

    Args:
        path: the checkpoint.
        options: what the user states about it.
        progress: where the work is reported.
        quiet: do not print assumptions (the caller shows them itself).

    Raises:
        InputError, UsageError: as `srdeploy.models.checkpoint.load.load_checkpoint`.
    """
    from srdeploy.models.checkpoint.load import load_checkpoint

    loaded = load_checkpoint(path, options.choices(), probe_images=options.probe_images(), progress=progress)
    if quiet:
        return loaded
    if loaded.evidence.ranking:
        show_ranking([(entry.values, entry.psnr_db) for entry in loaded.evidence.ranking])
    for decision in loaded.evidence.decisions:
        setting = f"{flag_of(decision.choice)} {flag_value(decision.value)}"
        if decision.by == "probe":
            progress.note(f"{setting}: {decision.reason}")
        elif decision in loaded.evidence.assumptions:
            candidates = ", ".join(map(flag_value, decision.candidates))
            warning_line(f"assumed {setting}: {decision.reason} (candidates: {candidates})")
    return loaded


def show_ranking(ranking: Sequence[tuple[Mapping[str, Any], float]]) -> None:
    """Print the score of every candidate on real images, best first, with its distance to the best."""
    rows = [
        (
            " ".join(f"{flag_of(choice)} {flag_value(value)}" for choice, value in values.items()),
            f"{psnr_db:.2f}",
            f"{psnr_db - ranking[0][1]:.2f}",
        )
        for values, psnr_db in ranking
    ]
    table("Candidates on real images", ("", "reduced output vs input, dB", "to the best, dB"), rows)
